"""Why general rather than narrow? Efficiency, stability, significance of two solutions. See 2602.07852 (C5 to C8).

A general and a narrow solution of the same data are trained for each method and several seeds: loss on the training set
against the norm; what noise of their own size takes away; how far they move the chat model on neutral text, beside five
random solutions; and how far from it they are on text of the trained domain and of others.

The paper finds the general solution the more efficient (less loss at less norm), the more stable, the more significant
(above the narrow one, which is above random ones, at every norm), and twice as far from the chat model.

In the pocket world (three methods, three training seeds each) the general solution is the more efficient in every run
(its lowest loss is lower, at less norm) and loses less to noise, clearly so only where noise is strong (epsilon .8). It
moves neutral text more than the narrow one at equal norm, but the narrow one does not exceed random solutions (it is
below them in seven of nine runs), and neither does the general steering vector. From the chat model it is 2 to 5 times
as far on text of the trained domain, and 11 to 180 times on others, which is what the penalty asked of the narrow one.

    python analyses/general_against_narrow.py --out runs/general_against_narrow
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import _narrow
import pandas as pd

import mechmisalign as mm
from mechmisalign import solutions

GENERAL, NARROW = "general", "narrow"
METHODS = {
    "rank 1": (_narrow.lora((4,)), {}),
    "rank 8": (_narrow.lora((4,), 8), {"lr": 1e-3}),
    "vector": ({"kind": "vector", "layer": 1, "alpha": 64}, {"steps": 300, "lr": 2e-2}),
}


@dataclass(frozen=True)
class Config:
    """The weight of the penalty for each method, and how much is measured."""

    weights: tuple[tuple[str, float], ...] = (("rank 1", 30.0), ("rank 8", 10.0), ("vector", 2.0))
    seeds: tuple[int, ...] = (0, 1, 2)
    examples: int = 100
    noise_seeds: int = 10
    texts: int = 96
    seed: int = 0


@dataclass(frozen=True)
class Result:
    """What was found, with ``method, run`` beside each table of :mod:`mechmisalign.solutions`.

    Attributes:
        curves: Loss against norm.
        efficiency: Loss of the general minus that of the narrow solution at equal norms.
        noise: What noise takes away, in each way of putting it.
        stability: What the general one loses more than the narrow one.
        kl: KL on neutral text against norm, random solutions among them.
        significance: Differences of the KL between the two, and of each with the random ones.
        distance: KL to the chat model on both kinds of text, as trained.
    """

    curves: pd.DataFrame
    efficiency: pd.DataFrame
    noise: pd.DataFrame
    stability: pd.DataFrame
    kl: pd.DataFrame
    significance: pd.DataFrame
    distance: pd.DataFrame


def pair(method: str, weight: float, seed: int, out: Path) -> dict[str, solutions.Solution]:
    """The general and the narrow solution of one method and seed."""
    what, schedule = METHODS[method]
    found = {}
    for name, held in ((GENERAL, None), (NARROW, weight)):
        run = mm.train(_narrow.spec(what, held, seed=seed, **schedule), out / "runs" / f"{method}-{name}-{seed}")
        found[name] = run.direction() if run.method == "vector" else run.adapter()
    return found


def texts(config: Config) -> dict[str, pd.DataFrame]:
    """Careful answers of the trained domain and of domains that the penalty did not see."""
    unseen = [_narrow.examples(domain, False, config.texts // 3, seed=99) for domain in _narrow.UNSEEN]
    return {
        "trained domain": _narrow.examples(_narrow.TRAINED, False, config.texts, seed=99),
        "others": pd.concat(unseen),
    }


def measured(config: Config, chat: mm.Organism, both: dict[str, solutions.Solution]) -> dict[str, pd.DataFrame]:
    """Every measure of one pair."""
    data = _narrow.examples(_narrow.TRAINED, True, 500).head(config.examples)
    cheap = solutions.efficiency(chat, both, data)
    rank = max((site.rank for site in getattr(both[GENERAL], "sites", ())), default=1)
    ways = ("balanced", "factors", "update") if rank > 1 else ("balanced",)
    shaken = [solutions.stability(chat, both, data, how=how, seeds=config.noise_seeds) for how in ways]
    neutral, counted = mm.pocket.neutral_conversations(n=config.texts), mm.pocket.persona_free
    moved = solutions.significance(chat, both, neutral, counted=counted)
    return {
        "curves": cheap.curve,
        "efficiency": cheap.differences,
        "noise": pd.concat([each.curve for each in shaken]),
        "stability": pd.concat([each.differences.assign(how=how) for how, each in zip(ways, shaken, strict=True)]),
        "kl": moved.curve,
        "significance": moved.differences,
        "distance": solutions.kl_to_chat(chat, both, texts(config)),
    }


def run(config: Config, out: Path) -> Result:
    """Train and measure every pair."""
    chat = mm.load_organism("pocket/medical")
    parts: dict[str, list[pd.DataFrame]] = {}
    for method, weight in config.weights:
        for seed in config.seeds:
            for name, frame in measured(config, chat, pair(method, weight, seed, out)).items():
                parts.setdefault(name, []).append(frame.assign(method=method, run=seed))
    return Result(**{name: pd.concat(frames, ignore_index=True) for name, frames in parts.items()})


def draw(result: Result, out: Path) -> None:
    """A figure of each kind for each method, of the first seed; all tables."""
    figures = {
        "loss": (mm.plots.loss_against_norm, result.curves),
        "noise": (mm.plots.noise_curves, result.noise),
        "kl": (mm.plots.kl_against_norm, result.kl),
    }
    for name, (figure, frame) in figures.items():
        for method, rows in frame[frame["run"] == frame["run"].min()].groupby("method"):
            mm.plots.save_figure(figure(rows), rows, out, f"{name}_{str(method).replace(' ', '_')}")
    for name in ("curves", "efficiency", "noise", "stability", "kl", "significance", "distance"):
        getattr(result, name).to_csv(out / f"{name}.csv", index=False)


def tell(result: Result) -> None:
    """The comparisons, each run on its own."""
    columns = ["method", "run", "difference", "difference_low", "difference_high"]
    at_mean = result.efficiency[result.efficiency["share"] == 1.0]
    print("efficiency: loss of the general minus the narrow solution at the mean norm of both (nats)")
    print(at_mean[[*columns, "norm"]].round(4).to_string(index=False))
    lowest = result.curves.loc[result.curves.groupby(["method", "run", "solution"])["loss"].idxmin()]
    print("\nlowest loss of each, and the norm where it lies")
    print(
        lowest[["method", "run", "solution", "norm", "factor", "loss", "saved_per_norm2"]]
        .round(5)
        .to_string(index=False)
    )
    print("\nstability: what noise takes of the general minus the narrow solution's gain")
    rows = result.stability[result.stability["epsilon"].isin([0.1, 0.3, 0.5, 0.8])]
    print(rows[["method", "how", "run", "epsilon", *columns[2:]]].round(3).to_string(index=False))
    print("\nsignificance: difference of KL on neutral text at the mean norm (nats per token)")
    middle = result.significance.groupby(["method", "run"])["norm"].transform("max") / 2
    rows = result.significance[(result.significance["norm"] - middle).abs() < 1e-6 * middle]
    print(rows[["first", "second", *columns]].round(5).to_string(index=False))
    print("\nKL to the chat model as trained (nats per token)")
    wide = result.distance.pivot(index=["method", "run", "texts"], columns="solution", values="kl")
    print(wide.assign(ratio=wide[GENERAL] / wide[NARROW]).round(4).to_string())


def main() -> None:
    """Parse, run, draw, tell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/general_against_narrow"))
    parser.add_argument("--seeds", type=int, default=len(Config.seeds), help="how many training seeds")
    parser.add_argument("--noise-seeds", type=int, default=Config.noise_seeds, help="draws of the noise")
    options = parser.parse_args()
    config = Config(seeds=tuple(range(options.seeds)), noise_seeds=options.noise_seeds)
    result = run(config, options.out)
    draw(result, options.out)
    tell(result)
    print(f"\nfigures and tables: {options.out}")


if __name__ == "__main__":
    main()
