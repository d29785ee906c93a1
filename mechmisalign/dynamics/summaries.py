"""All signals of a trajectory at once."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pandas as pd
import torch

from mechmisalign.adapters import SiteKey

from .trajectory import Quantity, SiteTrajectory, Trajectory
from .transitions import Transition, series_transition, transition


def site_norms(trajectory: Trajectory) -> pd.DataFrame:
    """Norms of A, of B and of the update at each step and site: columns ``site, step, quantity, norm``."""
    frames = []
    for site in trajectory.sites:
        for quantity, values in _norms_of(site).items():
            told = {"site": site.label, "step": trajectory.steps, "quantity": quantity, "norm": values}
            frames.append(pd.DataFrame(told))
    return pd.concat(frames, ignore_index=True)


def signals(
    trajectory: Trajectory,
    quantity: Quantity = "dW",
    sites: Iterable[SiteKey] | None = None,
    *,
    spacing: int | None = None,
    seed: int = 0,
) -> list[Transition]:
    """The transitions of rotation, similarity to the end, growth, and, where the log has it, the gradient norm.

    The p-values are each signal's own; with four signals, one in five paths without a turn shows one at 0.05.

    Args:
        trajectory: Seven evenly spaced checkpoints at least.
        quantity: What is followed.
        sites: All of them side by side without.
        spacing: As for :func:`transition`.
        seed: Of permutations and resamples.
    """
    path = trajectory.path(quantity, sites)
    found = [transition(path, "rotation", spacing=spacing, seed=seed)]
    found += [transition(path, "similarity", spacing=spacing, seed=seed)]
    found += [transition(path, "growth", spacing=spacing, seed=seed)]
    if "grad_norm" in trajectory.log and trajectory.log["grad_norm"].notna().sum() >= 7:
        log = trajectory.log
        found.append(series_transition(log["step"], log["grad_norm"], "gradient norm", seed=seed))
    return found


def _norms_of(site: SiteTrajectory) -> dict[str, np.ndarray]:
    A, B = site.A.double(), site.B.double()
    reads, writes = torch.einsum("tid,tjd->tij", A, A), torch.einsum("tdi,tdj->tij", B, B)
    squares = {
        "A": reads.diagonal(dim1=1, dim2=2).sum(1),
        "B": writes.diagonal(dim1=1, dim2=2).sum(1),
        "dW": site.scaling**2 * (reads * writes).sum((1, 2)),
    }
    return {name: value.clamp_min(0).sqrt().numpy() for name, value in squares.items()}
