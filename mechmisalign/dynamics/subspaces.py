"""Where updates read and write: how far the subspaces of a site turn between steps, whatever the gauge of its factors.

For rank above one a path of ``A`` or ``B`` means nothing (``B G, G⁻¹ A`` is the same update), but the column space of
``ΔW``, what it writes, and its row space, what it reads, are the update's own. They come from the factors:
``ΔW = (scaling · B R_Aᵀ) Q_Aᵀ`` with ``Aᵀ = Q_A R_A``.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from mechmisalign.adapters import SiteKey

from .trajectory import SiteTrajectory, Trajectory

_NO_WIDTH = 1e-10
"""Singular values below this share of the largest span nothing."""


def rotation(
    trajectory: Trajectory,
    sites: Iterable[SiteKey] | None = None,
    *,
    spacing: int | None = None,
    side: Literal["writes", "reads"] = "writes",
) -> pd.DataFrame:
    """Principal angles between a site's subspace at each step, that at the step ``spacing`` later, and that at the end.

    Args:
        trajectory: Of an adapter (a learned vector is a subspace of one dimension).
        sites: All of them without.
        spacing: In training steps; by default the gap between checkpoints.
        side: The column space of the update, or its row space.

    Returns:
        Columns ``site, step, against`` (``"later"`` or ``"end"``), ``largest, mean`` (angles in degrees) and
        ``overlap``: the share of the update's energy at that step that lies in the other step's subspace. The angles
        count every direction alike; the overlap counts the large ones more. NaN where an update is zero.

    Raises:
        ValueError: On another side, or a spacing that no two checkpoints have.
    """
    if side not in ("writes", "reads"):
        raise ValueError(f"side must be 'writes' or 'reads', got {side!r}")
    steps = trajectory.steps
    gap = int(np.median(np.diff(steps))) if spacing is None else spacing
    row = {step: i for i, step in enumerate(steps)}
    later = [(row[step], row[step + gap]) for step in steps if step + gap in row and gap > 0]
    if not later:
        raise ValueError(f"no two checkpoints are {gap} steps apart; the steps are {list(steps)[:8]}…")
    pairs = {"later": later, "end": [(i, len(steps) - 1) for i in range(len(steps))]}
    frames = []
    for site in trajectory.select(sites):
        bases, singular = _bases(site, side)
        for against, compared in pairs.items():
            told = [_compared(bases[a], singular[a], bases[b], singular[b]) for a, b in compared]
            frame = pd.DataFrame(told, columns=["largest", "mean", "overlap"])
            where = pd.DataFrame({"site": site.label, "step": [steps[a] for a, _ in compared], "against": against})
            frames.append(pd.concat([where, frame], axis=1))
    return pd.concat(frames, ignore_index=True)


def stacked_score(B: Float[Tensor, "step site d_out"], to: int = -1) -> Float[np.ndarray, " step"]:
    """``‖MᵀN‖_F / (‖M‖_F ‖N‖_F)`` of several written vectors side by side, with those of one step (2506.11613, App. G).

    ``M [d_out site]`` holds the B of rank-1 sites at a step, less their mean over sites, N the same at the step ``to``.
    It does not reach 1 at that step itself, unless the vectors are parallel: compare within one curve only.

    Raises:
        ValueError: With fewer than two sites.
    """
    if B.shape[1] < 2:
        raise ValueError(f"{B.shape[1]} site: without its mean nothing is left; two sites at least are compared")
    M = B.double() - B.double().mean(1, keepdim=True)
    top = torch.einsum("tid,jd->tij", M, M[to]).flatten(1).norm(dim=1)
    return (top / (M.flatten(1).norm(dim=1) * M[to].norm())).numpy()


def _bases(site: SiteTrajectory, side: str) -> tuple[list[Tensor], list[Tensor]]:
    """Orthonormal basis ``[dim rank]`` and singular values of the update at each step."""
    written, read = site.B, site.A.transpose(1, 2)
    outer, inner = (written, read) if side == "writes" else (read, written)
    bases, singular = [], []
    for step in range(len(outer)):
        _, R = torch.linalg.qr(inner[step].double())
        U, S, _ = torch.linalg.svd(outer[step].double() @ R.T, full_matrices=False)
        kept = _NO_WIDTH * S[0] < S
        bases.append(U[:, kept])
        singular.append(S[kept])
    return bases, singular


def _compared(first: Tensor, energy: Tensor, second: Tensor, other: Tensor) -> tuple[float, float, float]:
    """Largest and mean principal angle, and the share of the first one's energy in the second one's subspace."""
    if not len(energy) or not len(other):
        return float("nan"), float("nan"), float("nan")
    between = second.T @ first
    cosines = torch.linalg.svdvals(between).clamp(max=1)
    angles = torch.rad2deg(torch.arccos(cosines))
    overlap = ((between * energy) ** 2).sum() / (energy**2).sum()
    return float(angles.max()), float(angles.mean()), float(overlap.clamp(max=1))
