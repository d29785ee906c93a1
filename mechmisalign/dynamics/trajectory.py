"""Trajectories: what an adapter, or a learned steering vector, was at each checkpoint of its training.

A site's factors are stacked over steps. A learned vector v is held as a site with ``A = [[1]]`` and ``B = v``, so that
its update ``B A`` is the vector itself and everything that is measured on updates is measured on vectors.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path as FilePath
from typing import Literal, get_args

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from mechmisalign.adapters import Adapter, LoraSite, SiteKey
from mechmisalign.directions import Direction

from .paths import GROUPS, Path, path_of

Quantity = Literal["A", "B", "dW"]
"""What is followed: what a site reads, what it writes, or the update ``scaling · B A``."""

VECTOR_SITE = "vector"
"""Module name of a learned steering vector."""
LOG_COLUMNS = ("step", "loss", "grad_norm", "lr")


class TrajectoryError(ValueError):
    """Checkpoints cannot be read, or do not belong together."""


@dataclass(frozen=True, eq=False)
class SiteTrajectory:
    """One site at every step.

    Attributes:
        layer: Index of the transformer block.
        module: Leaf name of the adapted matrix; ``"vector"`` for a learned vector.
        name: Its dotted path in the base model.
        A: What it reads, ``[step rank d_in]``, float32.
        B: What it writes, ``[step d_out rank]``, float32.
        scaling: Factor of ``B A``.
    """

    layer: int
    module: str
    name: str
    A: Float[Tensor, "step rank d_in"]
    B: Float[Tensor, "step d_out rank"]
    scaling: float

    @property
    def rank(self) -> int:
        """Number of directions read and written."""
        return int(self.A.shape[1])

    @property
    def key(self) -> SiteKey:
        """Layer and module."""
        return self.layer, self.module

    @property
    def label(self) -> str:
        """The site in writing, such as ``"3.down_proj"``."""
        return f"{self.layer}.{self.module}"

    def at(self, row: int) -> LoraSite:
        """The site at one of the steps, counted from 0."""
        return LoraSite(self.layer, self.module, self.name, self.A[row], self.B[row], self.scaling)


@dataclass(frozen=True, eq=False)
class Trajectory:
    """An adapter or a learned vector over its training.

    Attributes:
        steps: Training steps of the checkpoints, ascending.
        sites: One per adapted matrix, in the adapter's order; of a learned vector, one.
        like: The last checkpoint.
        log: Columns ``step, loss, grad_norm, lr`` and what else the run noted; without rows if it noted nothing.

    Example:
        >>> trajectory = Trajectory.load("pocket/checkpoints")
        >>> trajectory.steps[:3], trajectory.sites[0].label
        ((5, 10, 15), '1.down_proj')
    """

    steps: tuple[int, ...]
    sites: tuple[SiteTrajectory, ...]
    like: Adapter | Direction
    log: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=list(LOG_COLUMNS)))

    @staticmethod
    def load(
        path_or_hub_id: str | FilePath,
        subfolder: str | None = None,
        revision: str | None = None,
        *,
        sites: Iterable[SiteKey] | None = None,
        every: int = 1,
        end: int | None = None,
        local_files_only: bool = False,
    ) -> Trajectory:
        """Read checkpoints: adapter files (or steering vectors) and the log only, never the base, never a pickle.

        Read are ``checkpoint-<step>`` folders as the Trainer and ``mm.train`` write them, and the end in the folder
        itself, whose step is that of the log, of ``train.json`` or of ``trainer_state.json``, or of the checkpoint with
        the same weights; otherwise it is left out, unless ``end`` says it. On the Hub such folders, or branches called
        ``checkpoint-<step>`` or ``step-<step>``.

        Args:
            path_or_hub_id: A run folder, a Hub id, or the name of a shipped organism such as ``"pocket/checkpoints"``.
            subfolder: The folder inside it that holds the checkpoints.
            revision: Branch, tag or commit on the Hub.
            sites: The sites to read; all of them without. All sites of all steps are held in memory.
            every: Read every so many checkpoints, counted from the last one back.
            end: The step of the adapter in the folder itself.
            local_files_only: Take what is in the Hub's cache, and do not ask the Hub.

        Raises:
            TrajectoryError: With fewer than three checkpoints, or if one differs from the others in its sites, shapes,
                rank or alpha, or holds NaN.
            AdapterError: If one is no plain LoRA, or its files are broken.
        """
        from .reading import load

        return load(
            path_or_hub_id, subfolder, revision, sites=sites, every=every, end=end, local_files_only=local_files_only
        )

    @staticmethod
    def of(checkpoints: Iterable[tuple[int, Adapter | Direction]], log: pd.DataFrame | None = None) -> Trajectory:
        """From adapters, or directions of one layer, in memory, each with its step.

        Raises:
            TrajectoryError: As for :meth:`load`.
        """
        pairs = sorted(checkpoints, key=lambda pair: pair[0])
        known = [(step, _sites_of(found)) for step, found in pairs]
        check_steps([step for step, _ in known])
        first = known[0][1]
        for step, sites in known[1:]:
            if told := _difference(first, sites):
                raise TrajectoryError(
                    f"step {step} differs from step {known[0][0]}: {told}; give one run's checkpoints"
                )
        stacked = [
            SiteTrajectory(
                site.layer,
                site.module,
                site.name,
                torch.stack([sites[i].A for _, sites in known]),
                torch.stack([sites[i].B for _, sites in known]),
                site.scaling,
            )
            for i, site in enumerate(first)
        ]
        return Trajectory(tuple(step for step, _ in known), tuple(stacked), pairs[-1][1], no_log(log))

    @property
    def kind(self) -> Literal["lora", "vector"]:
        """Whether an adapter or a learned vector is followed."""
        return "lora" if isinstance(self.like, Adapter) else "vector"

    @cached_property
    def _row(self) -> dict[int, int]:
        return {step: row for row, step in enumerate(self.steps)}

    def row(self, step: int | None = None) -> int:
        """The place of a step; of the last one for None.

        Raises:
            KeyError: If there is no checkpoint of that step.
        """
        if step is None:
            return len(self.steps) - 1
        if step not in self._row:
            raise KeyError(f"no checkpoint of step {step}; there are {list(self.steps)}")
        return self._row[step]

    def select(self, sites: Iterable[SiteKey] | None) -> tuple[SiteTrajectory, ...]:
        """The named sites, in their own order; all of them for None.

        Raises:
            KeyError: If there is no such site.
        """
        if sites is None:
            return self.sites
        known, wanted = {site.key for site in self.sites}, list(sites)
        for key in wanted:
            if key not in known:
                raise KeyError(f"no site {key!r}; there are {[site.key for site in self.sites]}")
        return tuple(site for site in self.sites if site.key in wanted)

    def path(self, quantity: Quantity = "dW", sites: Iterable[SiteKey] | None = None, *, groups: int = GROUPS) -> Path:
        """Inner products between all steps, of one site or of several side by side: what the measures are taken of.

        ``"dW"`` does not depend on the gauge (``B G, G⁻¹ A`` is the same update); ``"A"`` and ``"B"`` do for ranks
        above one, and are refused there.

        Args:
            quantity: What is followed.
            sites: All of them without.
            groups: Parts into which the coordinates are divided at random, for the bootstrap.

        Raises:
            ValueError: On another quantity, or on A or B of a rank above one.
        """
        if quantity not in get_args(Quantity):
            raise ValueError(f"quantity must be one of {', '.join(get_args(Quantity))}, got {quantity!r}")
        chosen = self.select(sites)
        high = [site.label for site in chosen if site.rank > 1]
        if quantity != "dW" and high:
            raise ValueError(
                f"{quantity} of {high[0]} (rank {chosen[0].rank}) depends on the gauge: B G, G⁻¹ A is the same update; "
                "follow quantity='dW', or rotation() for its subspaces"
            )
        name = f"{quantity} of {chosen[0].label if len(chosen) == 1 else f'{len(chosen)} sites'}"
        return path_of(self.steps, [(site.A, site.B, site.scaling) for site in chosen], quantity, name, groups)

    def adapter(self, step: int | None = None) -> Adapter:
        """The adapter at one step, the last one by default.

        Raises:
            TrajectoryError: If a vector is followed, or not all sites were read.
            KeyError: If there is no checkpoint of that step.
        """
        if not isinstance(self.like, Adapter):
            raise TrajectoryError("this trajectory is of a learned vector, which has no adapter; use direction(step)")
        if len(self.sites) != len(self.like.sites):
            raise TrajectoryError(
                f"{len(self.sites)} of {len(self.like.sites)} sites were read, so there is no whole adapter; "
                "load without sites="
            )
        row = self.row(step)
        sites = tuple(site.at(row) for site in self.sites)
        digest = hashlib.sha256()
        for site in sites:
            digest.update(site.name.encode() + site.A.numpy().tobytes() + site.B.numpy().tobytes())
        source = f"{self.like.source}, step {self.steps[row]}"
        return replace(self.like, sites=sites, source=source, digest=digest.hexdigest(), folder=None)

    def direction(self, step: int | None = None) -> Direction:
        """The learned vector at one step, the last one by default.

        Raises:
            TrajectoryError: If an adapter is followed.
            KeyError: If there is no checkpoint of that step.
        """
        if not isinstance(self.like, Direction):
            raise TrajectoryError("this trajectory is of an adapter; use adapter(step)")
        site, row = self.sites[0], self.row(step)
        return Direction(site.B[row].T, (site.layer,), {**self.like.header, "step": self.steps[row]})


def check_steps(steps: Sequence[int]) -> None:
    """Refuse steps that make no trajectory.

    Raises:
        TrajectoryError: If there are fewer than three, or one comes twice.
    """
    if len(steps) < 3:
        raise TrajectoryError(f"{len(steps)} checkpoints (steps {list(steps)}); a trajectory needs three at least")
    twice = [step for step, after in zip(steps, steps[1:], strict=False) if step == after]
    if twice:
        raise TrajectoryError(f"step {twice[0]} comes twice; give one checkpoint for each step")


def no_log(log: pd.DataFrame | None) -> pd.DataFrame:
    """The log, or one without rows."""
    return pd.DataFrame(columns=list(LOG_COLUMNS)) if log is None else log


def _sites_of(found: Adapter | Direction) -> tuple[LoraSite, ...]:
    if isinstance(found, Adapter):
        return found.sites
    if len(found.layers) != 1:
        raise TrajectoryError(f"a direction of layers {list(found.layers)}; one layer is followed, pass one of them")
    layer = found.layers[0]
    return (
        LoraSite(
            layer,
            VECTOR_SITE,
            f"vector.{layer}",
            torch.ones(1, 1, dtype=torch.float32, device="cpu"),
            found.vectors.T,
            1.0,
        ),
    )


def _difference(first: Sequence[LoraSite], other: Sequence[LoraSite]) -> str:
    """What keeps two checkpoints from being of one run; empty if nothing does."""
    names = [{site.name for site in sites} for sites in (first, other)]
    if names[0] != names[1]:
        return f"only one of them has {sorted(names[0] ^ names[1])[:3]}"
    for ours, theirs in zip(first, other, strict=True):
        shapes = [(list(site.A.shape), list(site.B.shape), site.scaling) for site in (ours, theirs)]
        if shapes[0] != shapes[1]:
            return f"{ours.label} has A, B and scaling {shapes[1]} instead of {shapes[0]}"
        if not (torch.isfinite(theirs.A).all() and torch.isfinite(theirs.B).all()):
            return f"{ours.label} holds NaN or infinite values"
    return ""
