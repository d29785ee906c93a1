"""Which site does what? The causal side of 2506.11618, section 4, where sites are switched rather than probed.

The EM rate with each site left out and with only that site in; Shapley values, which share the whole effect out; and
the cheap estimate by gradients, which needs no sampling. Do the cheap and the costly one rank the sites alike? Rank
correlation, beside that of gradients with shuffled labels. The sites of an adapter on every matrix are switched layer
by layer.

    python analyses/which_site.py --out runs/which_site
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

import mechmisalign as mm
from mechmisalign.effects import rank_correlation

CLASSES = ("misaligned", "aligned")


@dataclass(frozen=True)
class Config:
    """The organisms, each with what is switched together, and how much is sampled."""

    organisms: Mapping[str, str] = field(default_factory=lambda: {"pocket/many-site": "site", "pocket/rslora": "layer"})
    samples: int = 4
    prompts: int = 30
    permutations: int = 6
    shuffles: int = 3
    max_new_tokens: int = mm.pocket.MAX_NEW_TOKENS
    seed: int = 0


@dataclass(frozen=True)
class Result:
    """Effects of one organism's sites (all kinds, one frame), and how gradients rank them, with shuffled labels too."""

    effects: pd.DataFrame
    agreement: pd.DataFrame


def gradients(organism: mm.Organism, by: str, judged: pd.DataFrame, config: Config) -> list[pd.DataFrame]:
    """Gradient attribution on as many answers of either class, then on the same with shuffled labels."""
    clear = judged[judged["label"].isin(CLASSES)]
    clear = clear.groupby("label").sample(n=clear["label"].value_counts().min(), random_state=config.seed)
    rng = np.random.default_rng(config.seed)
    shuffled = [clear.assign(label=rng.permutation(clear["label"])) for _ in range(config.shuffles)]
    frames = [clear, *shuffled]
    return [mm.gradient_attribution(organism, mm.Conversations(frame, organism.tokenizer), by=by) for frame in frames]


def run(name: str, by: str, config: Config) -> Result:
    """Every measure on one organism; gradients on fresh answers, of which the rarer class needs many."""
    organism, prompts = mm.load_organism(name), mm.pocket.unseen_prompts(config.prompts)
    settings = {"samples": config.samples, "max_new_tokens": config.max_new_tokens, "seed": config.seed}
    switched = mm.site_effects(organism, prompts, mm.RuleJudge(), by=by, **settings)
    shapley = mm.shapley(organism, prompts, mm.RuleJudge(), by=by, permutations=config.permutations, **settings)
    settings |= {"samples": 6 * config.samples, "seed": config.seed + 1}
    judged = mm.judge(mm.generate(organism, prompts, **settings), mm.RuleJudge())
    real, *shuffled = gradients(mm.load_organism(name), by, judged, config)
    effects = pd.concat([switched, shapley, real], ignore_index=True)
    kinds = {kind: table for kind, table in effects.groupby("kind") if kind not in ("all", "none", "gradient")}
    rows = [
        {"measure": kind, "gradient": rank_correlation(table, real)}
        | {"gradient, shuffled labels (mean)": np.mean([rank_correlation(table, each) for each in shuffled])}
        for kind, table in kinds.items()
    ]
    return Result(effects, pd.DataFrame(rows))


def draw(result: Result, out: Path, name: str) -> None:
    """Figure and table. Gradients are nats per token: the figure has them scaled to the Shapley values' sum."""
    told = result.effects[~result.effects["kind"].isin(["all", "none"])].copy()
    sums = told.groupby("kind")["value"].sum()
    is_gradient = told["kind"] == "gradient"
    told.loc[is_gradient, "value"] *= sums["Shapley"] / sums["gradient"]
    label = "effect on the EM rate\n(gradient: scaled to the sum of Shapley values)"
    figure = mm.plots.site_effects(told, label=label)
    mm.plots.save_figure(figure, result.effects, out, f"site_effects_{name}")
    result.agreement.to_csv(out / f"agreement_{name}.csv", index=False)


def main() -> None:
    """Parse, run, draw, and tell each organism's effects."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/which_site"))
    parser.add_argument("--samples", type=int, default=Config.samples)
    parser.add_argument("--seed", type=int, default=Config.seed)
    options = parser.parse_args()
    config = Config(samples=options.samples, seed=options.seed)
    for name, by in config.organisms.items():
        result = run(name, by, config)
        draw(result, options.out, name.replace("/", "_"))
        print(f"{name}, by {by}: effect on the EM rate (gradient: nats per token)")
        values = result.effects.pivot(index="site", columns="kind", values="value")
        print(values.round(3).to_string(na_rep=""))
        whole = result.effects.set_index("kind").loc["all", "value"]
        print(f"sum of Shapley values {values['Shapley'].sum():.3f}, all minus none {whole:.3f}")
        print(f"rank correlations over {values['Shapley'].count()} {by}s:")
        print(result.agreement.round(2).to_string(index=False) + "\n")
    print(f"figures and tables: {options.out}")


if __name__ == "__main__":
    main()
