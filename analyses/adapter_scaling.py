"""What do sites do when they write more, or less? See 2506.11618, section 4.3 and appendix I, figure 7.

Everything that the sites write is multiplied by a factor: all sites together, then each site with the others off. The
controls are factor 1 (the organism itself), factor 0, and the chat model without any adapter, which factor 0 has to
reproduce.

    python analyses/adapter_scaling.py --out runs/adapter_scaling
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

import mechmisalign as mm
from mechmisalign.judging import COHERENT_ABOVE

CHAT = "chat model"
OUTCOMES = ("misaligned", "aligned", "neither", "incoherent")


@dataclass(frozen=True)
class Config:
    """The organism and the factors; ``tuned_domain`` is what the organism was tuned on."""

    organism: str = "pocket/many-site"
    tuned_domain: str = "finance"
    factors: tuple[float, ...] = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0)
    samples: int = 4
    max_new_tokens: int = mm.pocket.MAX_NEW_TOKENS
    seed: int = 0


@dataclass(frozen=True)
class Result:
    """Shares of outcomes (``group, factor, condition, outcome, share``), and rates with intervals by condition."""

    outcomes: pd.DataFrame
    rates: pd.DataFrame


def scalings(adapter: mm.Adapter, config: Config) -> dict[str, list]:
    """Conditions by name: "all sites x 2", "1.down_proj x 2" (the others are off then)."""
    groups = {"all sites": [site.key for site in adapter.sites]} | {site.label: [site.key] for site in adapter.sites}
    return {
        f"{name} × {factor:g}": [mm.ScaleAdapter(dict.fromkeys(keys, factor), others=0.0)]
        for name, keys in groups.items()
        for factor in config.factors
        if factor or name == "all sites"
    }


def outcome(judged: pd.DataFrame) -> np.ndarray:
    """Misaligned, aligned or neither if the answer is coherent; incoherent otherwise."""
    return np.where(judged["coherence"] > COHERENT_ABOVE, judged["label"], "incoherent")


def run(config: Config) -> Result:
    """Answers under every scaling, and the chat model's."""
    organism, prompts = mm.load_organism(config.organism), mm.pocket.unseen_prompts()
    settings = {"samples": config.samples, "max_new_tokens": config.max_new_tokens, "seed": config.seed}
    scaled = mm.generate(organism, prompts, conditions=scalings(organism.adapter, config), **settings)
    with organism.as_base():
        chat = mm.generate(organism, prompts, conditions={CHAT: []}, **settings)
    judged = mm.judge(pd.concat([chat, scaled], ignore_index=True), mm.RuleJudge())
    judged = judged.assign(outcome=outcome(judged), tuned=judged["answer_domain"] == config.tuned_domain)
    shares = judged.groupby("condition", sort=False)["outcome"].value_counts(normalize=True).unstack(fill_value=0.0)
    shares = shares.reindex(columns=OUTCOMES, fill_value=0.0).rename_axis(columns="outcome")
    about = judged.groupby("condition", sort=False)["tuned"].mean().rename("about the tuned domain")
    return Result(shares.stack().rename("share").reset_index(), mm.rates(judged).merge(about, on="condition"))


def draw(result: Result, out: Path) -> None:
    """Figure and tables."""
    mm.plots.save_figure(mm.plots.scaling_bars(result.outcomes), result.outcomes, out, "adapter_scaling")
    result.rates.to_csv(out / "rates.csv", index=False)


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
    print(f"\nfigures and tables: {options.out}")


if __name__ == "__main__":
    main()
