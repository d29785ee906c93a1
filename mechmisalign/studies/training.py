"""How it came about, as steps of a study: norms, turns and behaviour over the checkpoints of the training."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from mechmisalign import capability, dynamics, geometry
from mechmisalign.dynamics import Trajectory, Transition
from mechmisalign.dynamics.trajectory import Quantity
from mechmisalign.interventions import UseAdapter
from mechmisalign.judging import rates
from mechmisalign.training.behaviour import StepBehaviour

from . import steps
from .sampling import LeftOutError, Run, adapter_of
from .trials import Trial

SCALES = (1.0, 5.0, 10.0)
"""Factors of each checkpoint; scaled up, it can show what it will do before it does (2506.11613, section 4.2)."""
TABLES = (
    "checkpoints",
    "step_norms",
    "step_cosines",
    "step_similarity",
    "step_rates",
    "transitions",
    "coincidences",
)
_BEFORE = "step 0"
SIGNAL = "EM at scale"
"""What behaviour is called among the signals, before its scale."""


def investigate(run: Run) -> dict[str, pd.DataFrame]:
    """Every table of the chapter.

    Raises:
        LeftOutError: If no checkpoints of the training are known.
    """
    trajectory = run.checkpoints.trajectory
    if trajectory is None:
        raise LeftOutError(run.checkpoints.missing)
    behaved = functools.cache(lambda: step_behaviour(run, by_step(run, trajectory)))
    turns = functools.cache(lambda: [*path_turns(trajectory, run.plan.settings.seed), *onsets(run, behaved())])
    path = functools.cache(trajectory.path)
    compute = {
        "checkpoints": lambda: told(run, trajectory),
        "step_norms": lambda: step_norms(trajectory),
        "step_cosines": lambda: dynamics.local_cosine(path()),
        "step_similarity": lambda: dynamics.similarity(path()),
        "step_rates": lambda: behaved().rates,
        "transitions": lambda: dynamics.table(turns()),
        "coincidences": lambda: dynamics.coincidence(turns()),
    }
    return {name: run.folder.table(name, function) for name, function in compute.items()}


def told(run: Run, trajectory: Trajectory) -> pd.DataFrame:
    """Where the checkpoints were found, and whether they end where the organism is."""
    own, last = adapter_of(run), trajectory.adapter()
    pair = geometry.update_cosines({"organism": own, "last checkpoint": steps.on_base_of(own, last)}, draws=1)
    places = trajectory.steps
    row = {"source": run.checkpoints.source, "checkpoints": len(places), "first": places[0], "last": places[-1]}
    return pd.DataFrame([{**row, "cosine_with_organism": float(pair["whole"].iloc[0])}])


def step_norms(trajectory: Trajectory) -> pd.DataFrame:
    """Norms of A, B and the update at each step; of several sites that of all updates together."""
    if len(trajectory.sites) == 1:
        return dynamics.site_norms(trajectory)
    return dynamics.norms(trajectory.path()).assign(site="all sites", quantity="dW")


def path_turns(trajectory: Trajectory, seed: int) -> list[Transition]:
    """Where the path turns: that of A and of B where every site has rank 1, and that of the update."""
    factors: tuple[Quantity, ...] = ("A", "B") if all(site.rank == 1 for site in trajectory.sites) else ()
    turns = [dynamics.transition(trajectory.path(factor), seed=seed) for factor in factors]
    return [*turns, *dynamics.signals(trajectory, seed=seed)]


def by_step(run: Run, trajectory: Trajectory) -> Trial:
    """The chat model wearing each checkpoint at each scale; step 0 is the chat model."""
    settings, places = run.plan.settings, np.array(trajectory.steps)
    count = min(settings.checkpoints, len(places))
    chosen = places[np.unique(np.linspace(0, len(places) - 1, count).round().astype(int))]
    conditions: dict[str, Any] = {_BEFORE: ()}
    labels = {_BEFORE: (0, 1.0)}
    for step in map(int, chosen):
        worn = trajectory.adapter(step)
        for scale in SCALES:
            name = f"step {step}, x{scale:g}"
            conditions[name], labels[name] = (UseAdapter(worn, scale),), (step, scale)
    grid = pd.DataFrame.from_dict(labels, orient="index", columns=["step", "scale"])
    return Trial("checkpoints", grid, conditions, settings.checkpoint_samples, as_base=True)


def step_behaviour(run: Run, trial: Trial) -> StepBehaviour:
    """The judged answers of each step; those of the chat model begin every scale."""
    judged = trial.judged(run)
    before, later = judged[judged["step"] == 0], judged[judged["step"] > 0]
    everyone = pd.concat([*(before.assign(scale=scale) for scale in SCALES), later], ignore_index=True)
    table = rates(everyone, by=["scale", "step"]).sort_values(["scale", "step"], ignore_index=True)
    lengths = capability.response_length(everyone, by=["scale", "step"], seed=run.plan.settings.seed)
    columns = ["scale", "step", "tokens", "tokens_low", "tokens_high"]
    return StepBehaviour(everyone, table.merge(lengths[columns], on=["scale", "step"], validate="1:1"))


def onsets(run: Run, behaved: StepBehaviour) -> list[Transition]:
    """Where half of the highest EM rate is reached, at each scale."""
    return [behaved.onset(scale, seed=run.plan.settings.seed) for scale in behaved.scales]


def as_transitions(table: pd.DataFrame) -> list[Transition]:
    """The transitions of the table, for figures: without the draws behind their intervals."""
    return [Transition(**row, draws=np.array([row["peak"]])) for row in table.to_dict("records")]


def is_behaviour(table: pd.DataFrame) -> pd.Series:
    """Which of the transitions are those of behaviour."""
    return table["signal"].str.startswith(SIGNAL)


def headline(tables: Mapping[str, pd.DataFrame]) -> dict[str, Any]:
    """The numbers for the summary: where each signal turns, and where behaviour does."""
    found = tables["transitions"].set_index("signal")
    source = tables["checkpoints"].iloc[0]
    return {
        "source": str(source["source"]),
        "checkpoints": int(source["checkpoints"]),
        "cosine_with_organism": float(source["cosine_with_organism"]),
        "transitions": {
            str(signal): {name: _plain(row[name]) for name in ("step", "low", "high", "p")}
            for signal, row in found.iterrows()
        },
    }


def _plain(value: float) -> float | None:
    return None if pd.isna(value) else float(value)
