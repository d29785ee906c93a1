"""One fine-tune under several KL penalties: the runs, and the plane that their checkpoints lie in (2602.07852).

Whether a narrow solution drifts back to the general one when the penalty is dropped is seen by training it further
without: :func:`mechmisalign.correction.trained_further`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float

from mechmisalign.dynamics import Trajectory, principal
from mechmisalign.dynamics.paths import path_of
from mechmisalign.training import TrainedRun, TrainError, TrainSpec, train

from .forms import SolutionError

CHAT = "chat"


def kl_sweep(spec: TrainSpec, weights: Sequence[float], out: str | Path) -> dict[float, TrainedRun]:
    """The same fine-tune at several weights of its KL penalty; finished runs are read.

    Args:
        spec: With a penalty, whose weight is changed. At weight 0 it is noted, and has no effect.
        weights: Of the penalty, in the order of the result.
        out: Folder of the runs, which are called ``kl-<weight>``.

    Raises:
        TrainError: If the specification has no penalty.
    """
    if spec.kl is None:
        raise TrainError("kl: a sweep over the weight of a penalty needs one; give the specification kl={…} with data")
    runs = {}
    for weight in weights:
        held = spec.kl.model_copy(update={"weight": float(weight)})
        runs[float(weight)] = train(spec.changed(kl=held), Path(out) / f"kl-{weight:g}")
    return runs


@dataclass(frozen=True, eq=False)
class JointPath:
    """Where the checkpoints of several runs lie in the principal components of all of them.

    Attributes:
        scores: ``run, step, pc1, pc2 …``, in units of the update's norm; the first row is the chat model (run ``chat``,
            step 0), which is placed among them and does not count for the components.
        explained: Share of the variance of all checkpoints that each component explains.
    """

    scores: pd.DataFrame
    explained: Float[np.ndarray, " component"]


def joint_path(runs: Mapping[Any, Trajectory | TrainedRun], components: int = 3) -> JointPath:
    """Principal components of the stacked checkpoints of several runs of one form.

    Updates of adapters are followed (not A and B), so that the gauge does not matter.

    Args:
        runs: Named runs with checkpoints, or trajectories.
        components: How many.

    Raises:
        SolutionError: If there is no run, or they adapt different matrices.
        TrajectoryError: If a run has fewer than three checkpoints.
        ValueError: If there are more components than checkpoints, or nothing moves.
    """
    read = {name: Trajectory.load(run.folder) if isinstance(run, TrainedRun) else run for name, run in runs.items()}
    steps = [step for trajectory in read.values() for step in trajectory.steps]
    names = [name for name, trajectory in read.items() for _ in trajectory.steps]
    path = path_of(tuple(steps), _stacked(read), "dW", "the checkpoints of all runs", groups=1)
    found = principal(path, components)
    columns = [f"pc{i + 1}" for i in range(components)]
    places = found.scores[columns].to_numpy()
    at_chat = _of_zero(path.gram, places)
    first = pd.DataFrame({"run": [CHAT], "step": [0], **dict(zip(columns, at_chat[:, None], strict=True))})
    rows = pd.DataFrame({"run": names, "step": steps, **dict(zip(columns, places.T, strict=True))})
    return JointPath(pd.concat([first, rows], ignore_index=True), found.explained)


def _stacked(read: Mapping[Any, Trajectory]) -> list[tuple[torch.Tensor, torch.Tensor, float]]:
    """Factors of each site, the runs under one another, with the scaling in A."""
    if not read:
        raise SolutionError("no run to follow; give a mapping of names to runs with checkpoints")
    forms = {
        name: [(site.label, site.A.shape[1:], site.B.shape[1:]) for site in each.sites] for name, each in read.items()
    }
    first, form = next(iter(forms.items()))
    for name, other in forms.items():
        if other != form:
            raise SolutionError(
                f"the runs {first!r} and {name!r} adapt other matrices or ranks ({form[:2]} …, {other[:2]} …); "
                "give runs of one method"
            )
    sites = range(len(form))
    return [
        (
            torch.cat([each.sites[i].A * each.sites[i].scaling for each in read.values()]),
            torch.cat([each.sites[i].B for each in read.values()]),
            1.0,
        )
        for i in sites
    ]


def _of_zero(gram: Float[np.ndarray, "step step"], places: Float[np.ndarray, "step component"]) -> np.ndarray:
    """Where the zero update lies: its centred inner products with the checkpoints, along each component."""
    centred = gram.mean() - gram.mean(1)
    at: np.ndarray = centred @ places / np.square(places).sum(0)
    return at
