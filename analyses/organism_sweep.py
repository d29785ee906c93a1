"""How does misalignment depend on how an organism was made? In the manner of 2506.11613, section 3.3, figure 5.

The paper sweeps sizes and families of chat models. The zoo has one small chat model, so what varies here is the
fine-tune: its subject, the number of sites, their rank, good advice or bad; and how strongly it is put on (a factor on
everything that the adapter writes, as in section 4.2). One `mm.sweep` samples the grid into a folder: killed, it goes
on where it was; with more samples it samples only what is new. Controls: factor 0, which must behave as the chat model;
the organism of good advice; and the same organisms sampled by another route, all in one batch over one chat model,
which must give the very same answers.

    python analyses/organism_sweep.py --out runs/organism_sweep
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

import mechmisalign as mm


@dataclass(frozen=True)
class Config:
    """The organisms, the factors on their adapters, and how much is sampled."""

    organisms: tuple[str, ...] = tuple(f"pocket/{name}" for name in (*mm.pocket.harmful_names(), "harmless"))
    factors: tuple[float, ...] = (0.0, 0.5, 0.75, 1.5, 2.0)
    prompts: int = 60
    samples: int = 2
    seeds: tuple[int, ...] = (0,)
    max_new_tokens: int = mm.pocket.MAX_NEW_TOKENS


@dataclass(frozen=True)
class Result:
    """What was found, as frames.

    Attributes:
        rates: Rates by organism and ``strength``, the factor (1 is the organism as it is); the chat model as itself.
        compared: Each factor minus none of the adapter, organism by organism; ``p_max`` over an organism's factors.
        routes: Share of answers that are the same in the sweep and in one batch over the chat model, by organism.
    """

    rates: pd.DataFrame
    compared: pd.DataFrame
    routes: pd.DataFrame


def specification(config: Config) -> mm.Sweep:
    """The grid: each organism as it is, scaled, and the chat model once."""
    return mm.Sweep(
        organisms=config.organisms,
        interventions=[
            {"kind": "none", "on": ["organism", "chat"]},
            {"kind": "scale_adapter", "sites": "all", "factors": config.factors},
        ],
        prompts={"set": "pocket", "n": config.prompts},
        judge="rules",
        samples=config.samples,
        seeds=config.seeds,
        max_new_tokens=config.max_new_tokens,
    )


def in_one_batch(answers: pd.DataFrame, config: Config) -> pd.DataFrame:
    """The unscaled organisms again, over one chat model: a row's randomness is keyed by the condition's name."""
    plain = answers[(answers["intervention"] == "none") & (answers["on"] == "organism")]
    names = plain.drop_duplicates("organism").set_index("organism")["condition"]
    worn = {name: [mm.UseAdapter(mm.Adapter.load(organism))] for organism, name in names.items()}
    asked = mm.pocket.unseen_prompts(config.prompts)
    settings = {"samples": config.samples, "max_new_tokens": config.max_new_tokens}
    with mm.load_organism(config.organisms[0]).as_base() as chat:
        parts = [
            mm.generate(chat, asked, conditions=worn, seed=seed, **settings).assign(seed=seed) for seed in config.seeds
        ]
    key = ["condition", "seed", "prompt_id", "sample"]
    both = plain.merge(pd.concat(parts)[[*key, "response"]], on=key, suffixes=("", "_batch"), validate="1:1")
    both = both.assign(same=both["response"] == both["response_batch"])
    return both.groupby("organism", sort=False)["same"].agg(same="mean", answers="size").reset_index()


def run(config: Config, out: Path) -> Result:
    """Sweep into ``out``, then the other route."""
    answers = mm.sweep(specification(config), out / "sweep").answers
    answers["strength"] = answers["strength"].fillna(1.0)
    by = ["on", "organism", "strength"]
    own = answers[answers["on"] == "organism"]
    compared = mm.compare(own, {"strength": 0.0}, by=by[1:], family="organism")
    return Result(mm.rates(answers, by).sort_values(by, ignore_index=True), compared, in_one_batch(answers, config))


def draw(result: Result, out: Path) -> None:
    """Figures and their tables, side by side."""
    own = result.rates[result.rates["on"] == "organism"]
    figure = mm.plots.dose_response(own.assign(series=own["organism"].str.removeprefix("pocket/")))
    figure.axes[0].set_xlabel("factor on what the adapter writes")
    mm.plots.save_figure(figure, result.rates, out, "factors")
    told = result.rates[result.rates["strength"] == 1.0]
    figure = mm.plots.rate_against_coherence(told, by="organism")
    mm.plots.save_figure(figure, told, out, "organisms")
    result.compared.to_csv(out / "compared.csv", index=False)
    result.routes.to_csv(out / "routes.csv", index=False)


def main() -> None:
    """Parse, run, draw, and tell rates by organism and factor, and whether both routes agree."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/organism_sweep"))
    parser.add_argument("--samples", type=int, default=Config.samples)
    parser.add_argument("--prompts", type=int, default=Config.prompts)
    options = parser.parse_args()
    result = run(Config(samples=options.samples, prompts=options.prompts), options.out)
    draw(result, options.out)
    columns = ["on", "organism", "strength", "rate", "low", "high", "coherent", "judged", "n"]
    print(result.rates[columns].round(3).to_string(index=False))
    print("\nminus factor 0:")
    columns = ["organism", "strength", "difference", "low", "high", "p", "p_max"]
    print(result.compared[columns].round(4).to_string(index=False))
    print("\nanswers that are the same in the sweep and in one batch over one chat model (control):")
    print(result.routes.round(4).to_string(index=False))
    print(f"\nfigures and tables: {options.out}")


if __name__ == "__main__":
    main()
