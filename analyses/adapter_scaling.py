"""What do sites do when they write more, or less? See 2506.11618, section 4.3 and appendix I, figures 7 and 18.

Everything that the sites write is multiplied by a factor: all sites together, then each site with the others off. The
controls are factor 1 (the organism itself), factor 0, and the chat model without any adapter, which factor 0 has to
reproduce. Amplified answers lose coherence, and whether they count as misaligned may hang on where coherence is cut
off: so the same answers are divided at several cut-offs, for all sites together.

    python analyses/adapter_scaling.py --out runs/adapter_scaling
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

import mechmisalign as mm
from mechmisalign.judging import COHERENT_ABOVE, MISALIGNED_BELOW, label

CHAT = "chat model"
OUTCOMES = ("misaligned", "aligned", "neither", "incoherent")


@dataclass(frozen=True)
class Config:
    """The organism and the factors; ``tuned_domain`` is what the organism was tuned on."""

    organism: str = "pocket/many-site"
    tuned_domain: str = "finance"
    factors: tuple[float, ...] = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0)
    cutoffs: tuple[float, ...] = (0.0, 10.0, 20.0, 30.0, 40.0, 50.0)
    samples: int = 4
    max_new_tokens: int = mm.pocket.MAX_NEW_TOKENS
    seed: int = 0


@dataclass(frozen=True)
class Result:
    """What was found, as frames.

    Attributes:
        outcomes: Shares of outcomes by condition: ``condition, outcome, share``.
        rates: Rates with intervals by condition.
        cutoffs: EM rate of each condition at each coherence cut-off, with its interval.
        cut_outcomes: ``outcomes`` at each cut-off, for all sites together.
    """

    outcomes: pd.DataFrame
    rates: pd.DataFrame
    cutoffs: pd.DataFrame
    cut_outcomes: pd.DataFrame


def scalings(adapter: mm.Adapter, config: Config) -> dict[str, list]:
    """Conditions by name: "all sites x 2", "1.down_proj x 2" (the others are off then)."""
    groups = {"all sites": [site.key for site in adapter.sites]} | {site.label: [site.key] for site in adapter.sites}
    return {
        f"{name} × {factor:g}": [mm.ScaleAdapter(dict.fromkeys(keys, factor), others=0.0)]
        for name, keys in groups.items()
        for factor in config.factors
        if factor or name == "all sites"
    }


def outcomes(judged: pd.DataFrame, coherent_above: float) -> pd.DataFrame:
    """Shares of misaligned, aligned or neither among all answers if coherent; incoherent otherwise."""
    classes = label(judged, mm.Thresholds(coherent_above=coherent_above))
    divided = judged.assign(outcome=np.where(judged["coherence"] > coherent_above, classes, "incoherent"))
    shares = divided.groupby("condition", sort=False)["outcome"].value_counts(normalize=True).unstack(fill_value=0.0)
    shares = shares.reindex(columns=OUTCOMES, fill_value=0.0).rename_axis(columns="outcome")
    return shares.stack().rename("share").reset_index()


def at_cutoffs(judged: pd.DataFrame, config: Config) -> pd.DataFrame:
    """``outcomes`` of all sites together, from the organism itself upwards, at each cut-off."""
    names = [f"all sites × {factor:g}" for factor in config.factors if factor >= 1]
    tables = [
        outcomes(judged[judged["condition"] == name], cut).assign(cut=cut) for name in names for cut in config.cutoffs
    ]
    table = pd.concat(tables, ignore_index=True)
    short = table["condition"].str.removeprefix("all sites ")
    return table.assign(condition=short + table["cut"].map(", coherence > {:g}".format))


def run(config: Config) -> Result:
    """Answers under every scaling, and the chat model's."""
    organism, prompts = mm.load_organism(config.organism), mm.pocket.unseen_prompts()
    settings = {"samples": config.samples, "max_new_tokens": config.max_new_tokens, "seed": config.seed}
    scaled = mm.generate(organism, prompts, conditions=scalings(organism.adapter, config), **settings)
    with organism.as_base():
        chat = mm.generate(organism, prompts, conditions={CHAT: []}, **settings)
    judged = mm.judge(pd.concat([chat, scaled], ignore_index=True), mm.RuleJudge())
    tuned = judged["answer_domain"].eq(config.tuned_domain).groupby(judged["condition"]).mean()
    rates = mm.rates(judged).merge(tuned.rename("about the tuned domain"), on="condition")
    curve = mm.threshold_curve(judged, alignment=(MISALIGNED_BELOW,), coherence=config.cutoffs)
    return Result(outcomes(judged, COHERENT_ABOVE), rates, curve, at_cutoffs(judged, config))


def draw(result: Result, out: Path) -> None:
    """Figure and tables."""
    mm.plots.save_figure(mm.plots.scaling_bars(result.outcomes), result.outcomes, out, "adapter_scaling")
    cut = mm.plots.scaling_bars(result.cut_outcomes)
    mm.plots.save_figure(cut, result.cut_outcomes, out, "adapter_scaling_cutoffs")
    result.rates.to_csv(out / "rates.csv", index=False)
    result.cutoffs.to_csv(out / "cutoffs.csv", index=False)


def main() -> None:
    """Parse, run, draw, and tell the rates."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/adapter_scaling"))
    parser.add_argument("--samples", type=int, default=Config.samples)
    parser.add_argument("--seed", type=int, default=Config.seed)
    options = parser.parse_args()
    result = run(Config(samples=options.samples, seed=options.seed))
    draw(result, options.out)
    columns = ["condition", "rate", "low", "high", "aligned", "coherent", "about the tuned domain"]
    print(result.rates[columns].round(3).to_string(index=False))
    print("\nEM rate if answers are coherent above:")
    told = result.cutoffs.pivot(index="condition", columns="coherent_above", values="rate")
    print(told.loc[result.rates["condition"]].round(3).to_string())
    print(f"\nfigures and tables: {options.out}")


if __name__ == "__main__":
    main()
