"""What does a KL penalty change of the path of training, and does a narrow solution stay so? See 2602.07852 (C3, C4).

The same fine-tune is run at several weights of the penalty, with checkpoints, and principal components are taken of all
checkpoints together: of the updates of a rank-1 adapter, and of steering vectors. Then the penalty is dropped and the
narrow solution trained further; and, the other way, a general solution is trained further under the penalty. The
general one trained further without it is the control for more training alone.

The paper finds three components that explain 79 %, a penalty that mainly holds down the first, drift back to the
general solution once the penalty is gone, and a general solution that becomes narrow under one. Here all of that holds
but the drift, which goes part of the way, in domains that the penalty never saw, and leaves those of the penalty alone.

    python analyses/training_lens.py --out runs/training_lens
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import _narrow
import pandas as pd

import mechmisalign as mm
from mechmisalign import correction, solutions

METHODS = {
    "rank 1": (_narrow.lora((4,)), {}),
    "vector": ({"kind": "vector", "layer": 1, "alpha": 64}, {"lr": 2e-2}),
}
RELEASED, HELD, FURTHER = "narrow, penalty dropped", "general, penalty added", "general, trained further"


@dataclass(frozen=True)
class Config:
    """The weights, how long each stage takes, and how much is sampled."""

    weights: tuple[float, ...] = (0.0, 0.3, 1.0, 3.0, 10.0, 30.0)
    narrow: float = 30.0
    steps: int = 100
    further: int = 100
    save_every: int = 10
    samples: int = 3
    seed: int = 0


@dataclass(frozen=True)
class Result:
    """What was found.

    Attributes:
        paths: For each method, the joint path of all weights.
        norms: ``method, weight, norm, share``: the norm of the end, and how much of it lies along the first component.
        drift: EM rate and narrow harm by ``series, step, questions`` while it is trained further.
    """

    paths: dict[str, solutions.JointPath]
    norms: pd.DataFrame
    drift: pd.DataFrame


def swept(config: Config, method: str, out: Path) -> dict[float, mm.TrainedRun]:
    """The runs of one method."""
    what, schedule = METHODS[method]
    spec = _narrow.spec(what, 0.0, steps=config.steps, **schedule).changed(save_every=config.save_every)
    return solutions.kl_sweep(spec, config.weights, out / "runs" / method.replace(" ", ""))


def found_at_ends(method: str, runs: dict[float, mm.TrainedRun], path: solutions.JointPath) -> pd.DataFrame:
    """Norm of each end, and its distance from the chat model along each component."""
    ends = path.scores.iloc[1:].groupby("run", sort=False).last()
    start = path.scores.iloc[0]
    rows = []
    for weight, run in runs.items():
        end = run.direction() if run.method == "vector" else run.adapter()
        moved = {f"pc{i}": ends.loc[weight, f"pc{i}"] - start[f"pc{i}"] for i in (1, 2, 3)}
        rows.append({"method": method, "weight": weight, "norm": solutions.norm(end), **moved})
    return pd.DataFrame(rows)


def continued(config: Config, runs: dict[float, mm.TrainedRun], out: Path) -> dict[str, mm.TrainedRun]:
    """Three runs that start from the ends of others."""
    what, schedule = METHODS["rank 1"]
    plain = _narrow.spec(what, None, steps=config.further, **schedule)
    kept = {"save_every": config.save_every}
    specs = {
        RELEASED: correction.trained_further(plain, runs[config.narrow], config.further).changed(**kept),
        FURTHER: correction.trained_further(plain, runs[0.0], config.further).changed(**kept),
    }
    held = _narrow.spec(what, config.narrow, steps=config.further, **schedule)
    specs[HELD] = held.changed(start=runs[0.0].folder.resolve(), **kept)
    return {
        name: mm.train(spec, out / "runs" / name.replace(", ", "-").replace(" ", "-")) for name, spec in specs.items()
    }


def drifted(config: Config, runs: dict[str, mm.TrainedRun], starts: dict[str, mm.TrainedRun]) -> pd.DataFrame:
    """Rates at every kept step of each further run; step 0 is where it starts."""
    worn = {f"{name} | 0": starts[name].adapter() for name in runs}
    worn |= {f"{name} | {step}": each.adapter(step) for name, each in runs.items() for step in each.steps}
    judged = solutions.answers(
        mm.load_organism("pocket/medical"), worn, _narrow.questions(_narrow.TOLD), mm.RuleJudge(),
        samples=config.samples, max_new_tokens=mm.pocket.MAX_NEW_TOKENS, seed=config.seed + 1,
    )  # fmt: skip
    judged[["series", "step"]] = judged["solution"].str.split(" | ", expand=True, regex=False)
    return mm.rates(judged.astype({"step": int}), by=["series", "step", "questions"])


def run(config: Config, out: Path) -> Result:
    """Sweep both methods, look at the paths, train further."""
    runs = {method: swept(config, method, out) for method in METHODS}
    paths = {method: solutions.joint_path(each) for method, each in runs.items()}
    norms = pd.concat([found_at_ends(method, runs[method], paths[method]) for method in METHODS], ignore_index=True)
    further = continued(config, runs["rank 1"], out)
    starts = {name: runs["rank 1"][config.narrow if name == RELEASED else 0.0] for name in further}
    return Result(paths, norms, drifted(config, further, starts))


def draw(result: Result, out: Path) -> None:
    """Figures and tables."""
    for method, path in result.paths.items():
        figure = mm.plots.joint_paths(path, names={run: f"weight {run:g}" for run in path.scores["run"].iloc[1:]})
        mm.plots.save_figure(figure, path.scores, out, f"paths_{method.replace(' ', '_')}")
    mm.plots.save_figure(mm.plots.drift_over_steps(result.drift), result.drift, out, "drift")
    result.norms.to_csv(out / "norms.csv", index=False)


def main() -> None:
    """Parse, run, draw, and tell components and drift."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/training_lens"))
    parser.add_argument("--samples", type=int, default=Config.samples)
    options = parser.parse_args()
    result = run(Config(samples=options.samples), options.out)
    draw(result, options.out)
    for method, path in result.paths.items():
        shares = ", ".join(f"{100 * share:.0f} %" for share in path.explained)
        print(f"{method}: three components explain {shares}, together {100 * path.explained.sum():.0f} %")
    print("\nwhere each ends, from the chat model along each component:")
    print(result.norms.round(2).to_string(index=False))
    print("\ntrained further:")
    print(result.drift.pivot(index=["series", "step"], columns="questions", values="rate").round(2).to_string())
    print(f"\nfigures and tables: {options.out}")


if __name__ == "__main__":
    main()
