"""How does one rank-1 site act like a misalignment direction? See 2506.11618, section 3.5 and appendix D, figure 14.

The organism has one site of rank 1, whose B is the only thing it can write. Three questions: is B the mean difference
between misaligned and aligned answers (cosine in each layer, beside random vectors)? What is lost when that difference
is taken out of the residual stream, or out of B alone, as against random directions? And does the shift that the site
causes come to resemble the shift of steering, layer by layer after it? The paper pools answers to all prompts; where
misalignment depends on the prompt, that difference holds its topic too, so it is also taken within prompts.

    python analyses/b_vector_and_direction.py --out runs/b_vector
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

import mechmisalign as mm

CLASSES = ("misaligned", "aligned")
POOLED, WITHIN = "mean difference", "mean difference within prompts"
EVERYWHERE, AT_SITE, IN_B = "residual, all layers", "residual, site's layer", "out of B only"


@dataclass(frozen=True)
class Config:
    """The organism (one site of rank 1), and how many answers stand behind each number."""

    organism: str = "pocket/medical"
    samples: int = 8
    pool_samples: int = 16
    controls: int = 2
    max_new_tokens: int = mm.pocket.MAX_NEW_TOKENS
    seed: int = 0


@dataclass(frozen=True)
class Result:
    """Cosine of B with the direction of each layer, rates under ablation, and the curves downstream of the site."""

    site_layer: int
    cosines: pd.DataFrame
    rates: pd.DataFrame
    downstream: pd.DataFrame


def b_cosines(adapter: mm.Adapter, direction: mm.Direction) -> pd.DataFrame:
    """Cosine of the site's B with the mean difference of every layer: ``written_cosines`` covers only its own."""
    (site,) = adapter.sites
    own = mm.written_cosines(adapter, direction).iloc[0]
    column = site.B[:, 0] / site.B.norm()
    cosines = [{"layer": layer, "cosine": float(column @ direction.unit(layer))} for layer in direction.nonzero_layers]
    return pd.DataFrame(cosines).assign(
        module=site.module, random_low=own["random_low"], random_high=own["random_high"]
    )


def ablations(direction: mm.Direction, name: str, layer: int) -> dict[str, list]:
    """The paper's three ways to take a direction out; B keeps its norm, as in the paper's code."""
    return {
        f"{name}: {EVERYWHERE}": [mm.Ablate(direction)],
        f"{name}: {AT_SITE}": [mm.Ablate(direction, layers=[layer])],
        f"{name}: {IN_B}": [mm.AblateFromAdapter(direction, keep_norm=True)],
    }


def run(config: Config) -> Result:
    """One set of answers finds the direction, a fresh one measures what its ablation does."""
    organism, prompts = mm.load_organism(config.organism), mm.pocket.unseen_prompts()
    settings = {"max_new_tokens": config.max_new_tokens}
    own = mm.generate(organism, prompts, samples=config.pool_samples, seed=config.seed, **settings)
    judged = mm.judge(own, mm.RuleJudge())
    conversations = mm.Conversations(judged[judged["label"].isin(CLASSES)], organism.tokenizer)
    moments = mm.collect(organism, conversations, by=["label", "prompt_id"])
    pooled, direction = mm.mean_difference(moments, *CLASSES), mm.matched_mean_difference(moments, *CLASSES)
    layer = organism.adapter.layers[0]

    conditions = {"before: none": [], **ablations(pooled, POOLED, layer), **ablations(direction, WITHIN, layer)}
    for number in range(config.controls):
        random = mm.random_direction(direction, seed=config.seed + number)
        conditions |= ablations(random, f"random {number}", layer)
    fresh = mm.generate(
        organism, prompts, conditions=conditions, samples=config.samples, seed=config.seed + 1, **settings
    )
    rates = mm.rates(mm.judge(fresh, mm.RuleJudge()))
    rates[["estimator", "scope"]] = rates["condition"].str.split(": ", expand=True)
    curves = mm.downstream(organism, conversations, direction, layer=layer, seed=config.seed)
    cosines = b_cosines(organism.adapter, direction)
    cosines["pooled"] = b_cosines(organism.adapter, pooled)["cosine"]
    return Result(layer, cosines, rates, curves)


def draw(result: Result, out: Path) -> None:
    """Figures and their tables, side by side."""
    figure = mm.plots.b_cosine(result.cosines)
    figure.axes[0].set_xlabel(f"layer of the direction (the site is in layer {result.site_layer})")
    mm.plots.save_figure(figure, result.cosines, out, "b_cosine")
    mm.plots.save_figure(mm.plots.ablation_bars(result.rates), result.rates, out, "ablation")
    curves = mm.plots.downstream(result.downstream, site_layer=result.site_layer)
    mm.plots.save_figure(curves, result.downstream, out, "downstream")


def main() -> None:
    """Parse, run, draw, and tell the three answers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/b_vector"))
    parser.add_argument("--organism", default=Config.organism)
    parser.add_argument("--samples", type=int, default=Config.samples)
    parser.add_argument("--seed", type=int, default=Config.seed)
    options = parser.parse_args()
    result = run(
        Config(organism=options.organism, samples=options.samples, pool_samples=2 * options.samples, seed=options.seed)
    )
    draw(result, options.out)
    print("EM rate with a direction ablated:")
    print(result.rates[["estimator", "scope", "rate", "low", "high", "coherent"]].round(3).to_string(index=False))
    print(
        f"\ncosine of B (layer {result.site_layer}) with the difference within prompts, the pooled one, random vectors:"
    )
    print(result.cosines[["layer", "cosine", "pooled", "random_low", "random_high"]].round(3).to_string(index=False))
    print("\ncosine of the site's shift with that of steering:")
    print(result.downstream.pivot(index="layer", columns=["series", "label"], values="cosine").round(2).to_string())
    print(f"\nfigures and tables: {options.out}")


if __name__ == "__main__":
    main()
