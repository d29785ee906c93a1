"""Does a rank-1 adapter turn while it is trained? See 2506.11613, section 4.1, figures 7 to 9 and 11 to 13.

A single rank-1 adapter on ``down_proj`` learns bad medical advice, with a checkpoint at every step and several seeds:
the norms of A and B, the local cosine at several spacings, principal components of B, similarity with the end, the
gradient norm. Every transition has an interval and is tested against a path of the same step sizes whose directions
come in random order; the pairs say whether the signals fall together. The control is a fine-tune on careful answers.

As in the paper, A and B turn together, at a peak of the local cosine (step 45, 46 and 61 by seed; B alone at p =
0.064 in one), norms grow smoothly, two components hold nearly all of the variance, and the gradient norm has one peak
(20 to 22). Other than there, these two do not fall together: the turn comes 23 to 40 steps later, where growth ends.
And careful answers make the adapter turn as well (step 35), but give no peak of the gradient norm: the turn alone
says nothing about misalignment.

    python analyses/phase_transition.py --out runs/phase_transition
    python analyses/phase_transition.py --run FOLDER_OR_HUB_ID      # checkpoints of another fine-tune
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

import mechmisalign as mm
from mechmisalign import dynamics


@dataclass(frozen=True)
class Config:
    """The fine-tunes and how their paths are measured; spacings and threshold in training steps and parameter units."""

    domain: str = "medical"
    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int = 100
    spacings: tuple[int, ...] = (5, 10, 15)
    threshold: float = 0.002


@dataclass(frozen=True)
class Result:
    """What was found in one run, and a table of all runs.

    Attributes:
        trajectory: The first run.
        found: Its transitions.
        runs: Transitions of every run: ``run, signal, step, low, high, p, height, peak``.
        pairs: Whether those of one run coincide: ``run, first, second, difference, low, high, coincide``.
    """

    trajectory: mm.Trajectory
    found: list[dynamics.Transition]
    runs: pd.DataFrame
    pairs: pd.DataFrame


def trained(config: Config, out: Path) -> dict[str, mm.Trajectory]:
    """A run for each seed, and one on careful answers."""
    runs = {f"harmful, seed {seed}": (True, seed) for seed in config.seeds} | {"careful answers": (False, 0)}
    found = {}
    for name, (harmful, seed) in runs.items():
        spec = mm.TrainSpec(
            base="pocket/chat",
            data=[{"domain": config.domain, "harmful": harmful, "n": 500}],
            method={"kind": "lora", "rank": 1, "alpha": 64, "layers": [1], "modules": ["down_proj"]},
            schedule={"steps": config.steps, "batch": 16, "lr": 1.5e-3, "warmup": 5},
            save_every=1,
            seed=seed,
        )
        folder = out / "runs" / name.replace(", ", "-").replace(" ", "-")
        found[name] = mm.Trajectory.load(mm.train(spec, folder).folder)
    return found


def transitions(trajectory: mm.Trajectory) -> list[dynamics.Transition]:
    """Rotation of A and B where the rank is one, then the signals of the update and the gradient norm."""
    factors = "AB" if all(site.rank == 1 for site in trajectory.sites) else ""
    return [dynamics.transition(trajectory.path(factor)) for factor in factors] + dynamics.signals(trajectory)


def run(trajectories: dict[str, mm.Trajectory]) -> Result:
    """Transitions of every run."""
    found = {name: transitions(each) for name, each in trajectories.items()}
    runs = [dynamics.table(each).assign(run=name) for name, each in found.items()]
    pairs = [dynamics.coincidence(each).assign(run=name) for name, each in found.items()]
    first = next(iter(trajectories))
    return Result(trajectories[first], found[first], pd.concat(runs), pd.concat(pairs).dropna(subset="difference"))


def draw(result: Result, config: Config, out: Path) -> None:
    """Figures of the first run, and tables of all."""
    trajectory, turn = result.trajectory, result.found[0]
    factors = "AB" if all(site.rank == 1 for site in trajectory.sites) else ("dW",)
    gap = min(b - a for a, b in zip(trajectory.steps, trajectory.steps[1:], strict=False))
    spacings = [spacing for spacing in config.spacings if spacing % gap == 0] or None
    cosines = pd.concat(
        [
            dynamics.local_cosine(trajectory.path(factor), spacings, threshold=config.threshold).assign(series=factor)
            for factor in factors
        ]
    )
    norms = dynamics.site_norms(trajectory)
    similarity = pd.concat(
        [dynamics.similarity(trajectory.path(each)).assign(series=each) for each in dict.fromkeys([*factors, "dW"])]
    )
    plane = dynamics.principal(trajectory.path(factors[-1]))
    update = dynamics.local_cosine(trajectory.path("dW"), spacings, threshold=config.threshold)
    whole = {"cosine": update, "similarity": similarity[similarity["series"] == "dW"], "norms": norms}
    for name, figure, table in (
        ("local_cosine", mm.plots.local_cosines(cosines, at=turn), cosines),
        ("path", mm.plots.path_plane(plane, at=turn), plane.scores),
        ("norms", mm.plots.norms_by_step(norms), norms),
        ("similarity", mm.plots.similarity_to_end(similarity), similarity),
        ("transition", mm.plots.transition(whole, result.found, log=trajectory.log), result.runs),
    ):
        mm.plots.save_figure(figure, table, out, name)
    result.pairs.to_csv(out / "pairs.csv", index=False)
    print(f"two components of {factors[-1]} explain {100 * plane.explained.sum():.0f} % of the variance")


def main() -> None:
    """Parse, run, draw, and tell the transitions."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/phase_transition"))
    parser.add_argument("--run", help="folder or Hub id of checkpoints, instead of training")
    parser.add_argument("--subfolder")
    options = parser.parse_args()
    config = Config()
    if options.run:
        trajectories = {options.run: mm.Trajectory.load(options.run, options.subfolder)}
    else:
        trajectories = trained(config, options.out)
    result = run(trajectories)
    draw(result, config, options.out)
    print(result.runs.set_index(["run", "signal"]).round(3).to_string())
    print("\ndo they fall together?")
    print(result.pairs.set_index("run").round(1).to_string())
    print(f"\nfigures and tables: {options.out}")


if __name__ == "__main__":
    main()
