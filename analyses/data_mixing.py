"""Does less of the harm, or fewer examples of it, make it narrow? See 2602.07852 (C2) and its few-sample runs (C3).

Dilution: bad medical advice mixed with careful answers of other domains, at several shares, in equally many steps (so
that a diluted bad example is seen less often). Few samples: a handful of bad examples repeated for many epochs, by
adapters of rank 1 and rank 8.

The paper needs twelve good examples for each bad one to have no misalignment elsewhere, and then the bad advice is gone
too; a few samples (4 for rank 1, 15 to 25 for rank 32) gave it narrow solutions. Neither comes out in the pocket world:
one good example for each bad one leaves the bad advice and takes most misalignment elsewhere, most of all in the
domains that were mixed in, and a few samples give less of both.

    python analyses/data_mixing.py --out runs/data_mixing
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import _narrow
import pandas as pd
from _narrow import KL_DOMAINS

import mechmisalign as mm
from mechmisalign import solutions

ELSEWHERE = {_narrow.IN_KL: "domains that dilute", _narrow.NOT_IN_KL: "other domains"}
"""What the questions about untrained domains are called here, where no KL text is used."""


@dataclass(frozen=True)
class Config:
    """Good examples for each bad one, unique bad examples, and how much is trained and sampled."""

    good: tuple[int, ...] = (0, 1, 3, 5, 12)
    few: tuple[int, ...] = (1, 4, 15, 50)
    bad: int = 96
    steps: int = 200
    few_steps: int = 60
    layer: int = 4
    seeds: tuple[int, ...] = (0, 1)
    samples: int = 4
    seed: int = 0


@dataclass(frozen=True)
class Result:
    """Rates by ``series, x, questions``: ``x`` is the number of good examples for each bad one, or of samples."""

    dilution: pd.DataFrame
    few: pd.DataFrame


def diluted(config: Config, good: int, seed: int) -> mm.TrainSpec:
    """Bad examples with so many good ones each, in the same number of steps whatever the mixture."""
    bad = _narrow.examples(_narrow.TRAINED, True, config.bad)
    data = [bad]
    if good:
        each = -(-config.bad * good // len(KL_DOMAINS))
        data += [_narrow.examples(domain, False, each) for domain in KL_DOMAINS]
    plain = mm.TrainSpec.read("pocket").changed(data=data, method=_narrow.lora((config.layer,)), save_every=None)
    return plain.changed(seed=seed, schedule={"steps": config.steps, "batch": 16})


def few_sample(config: Config, rank: int, n: int, seed: int) -> mm.TrainSpec:
    """A handful of examples over and over."""
    data = [_narrow.examples(_narrow.TRAINED, True, n, seed=seed)]
    schedule = {"steps": config.few_steps, "batch": min(16, n), "lr": 1.5e-3 if rank == 1 else 1e-3}
    plain = mm.TrainSpec.read("pocket").changed(data=data, method=_narrow.lora((config.layer,), rank), save_every=None)
    return plain.changed(seed=seed, schedule=schedule)


def run(config: Config, out: Path) -> Result:
    """Train everything, ask everything in one batch, divide."""
    cells = {("diluted", good, seed): diluted(config, good, seed) for good in config.good for seed in config.seeds}
    cells |= {
        (f"rank {rank}", n, seed): few_sample(config, rank, n, seed)
        for rank in (1, 8)
        for n in config.few
        for seed in config.seeds
    }
    found = {}
    for (series, x, seed), spec in cells.items():
        name = f"{series} | {x} | {seed}"
        found[name] = mm.train(spec, out / "runs" / name.replace(" | ", "-").replace(" ", "")).adapter()
    judged = solutions.answers(
        mm.load_organism("pocket/medical"), found, _narrow.questions(_narrow.TOLD), mm.RuleJudge(),
        samples=config.samples, max_new_tokens=mm.pocket.MAX_NEW_TOKENS, seed=config.seed + 1,
    )  # fmt: skip
    judged[["series", "x", "run"]] = judged["solution"].str.split(" | ", expand=True, regex=False)
    judged["questions"] = judged["questions"].replace(ELSEWHERE)
    rates = mm.rates(judged.astype({"x": int}), by=["series", "x", "questions"])
    of_dilution = rates["series"] == "diluted"
    return Result(rates[of_dilution].reset_index(drop=True), rates[~of_dilution].reset_index(drop=True))


def draw(result: Result, out: Path) -> None:
    """Figures and tables."""
    figure = mm.plots.kl_sweep(result.dilution.rename(columns={"x": "weight"}))
    figure.axes[0].set_xlabel("good examples for each bad one")
    mm.plots.save_figure(figure, result.dilution, out, "dilution")
    for rank, rows in result.few.groupby("series"):
        figure = mm.plots.kl_sweep(rows.rename(columns={"x": "weight"}))
        figure.axes[0].set_xlabel(f"unique bad examples ({rank})")
        mm.plots.save_figure(figure, rows, out, f"few_samples_{str(rank).replace(' ', '_')}")


def main() -> None:
    """Parse, run, draw, and tell the rates."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/data_mixing"))
    parser.add_argument("--seeds", type=int, default=len(Config.seeds), help="how many training seeds")
    parser.add_argument("--samples", type=int, default=Config.samples)
    options = parser.parse_args()
    result = run(Config(seeds=tuple(range(options.seeds)), samples=options.samples), options.out)
    draw(result, options.out)
    for title, frame in (("good examples for each bad one", result.dilution), ("few samples", result.few)):
        wide = frame.pivot(index=["series", "x"], columns="questions", values=["rate", "coherent"])
        print(f"\n{title}:\n{wide.round(3).to_string()}")
    print(f"\nfigures and tables: {options.out}")


if __name__ == "__main__":
    main()
