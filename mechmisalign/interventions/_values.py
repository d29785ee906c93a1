"""What interventions are made of: the protocols that a batch's plan knows, positions, and numbers per row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

if TYPE_CHECKING:
    from mechmisalign.adapters import Adapter, LoraSite
    from mechmisalign.directions import Direction

Positions = Literal["all", "non_sink", "prompt", "response"]
"""Which tokens an edit touches. ``"non_sink"`` leaves out each conversation's first token where the model makes it an
attention sink (:func:`mechmisalign.massive_activations`); in a model without one it is ``"all"``."""

Strength = float | Sequence[float] | Tensor
"""One number, or one per batch row."""


@runtime_checkable
class Intervention(Protocol):
    """What ``Organism.apply`` and ``generate`` take: an edit of the residual stream, or of the adapter's sites."""

    @property
    def positions(self) -> Positions:
        """Which positions it touches."""


@dataclass(frozen=True)
class Terms:
    """An edit of the residual stream as ``x' = x + add + (value - x·unit) unit``; what is None stays out.

    Edits of this form can be fused: a batch whose rows differ in them is edited by a few tensor operations.
    """

    add: Float[Tensor, " d_model"] | None = None
    unit: Float[Tensor, " d_model"] | None = None
    value: float = 0.0


@runtime_checkable
class ResidualIntervention(Intervention, Protocol):
    """An edit of the residual stream after some layers.

    It may have a method ``terms(layer) -> Terms | None`` too; then rows that differ in it are edited together.
    """

    @property
    def direction(self) -> Direction:
        """What it acts along."""

    @property
    def edited_layers(self) -> tuple[int, ...]:
        """The layers at which it acts."""

    def __call__(self, resid: Float[Tensor, "batch pos d_model"], layer: int) -> Float[Tensor, "batch pos d_model"]:
        """The edited residual stream, a new tensor."""


@runtime_checkable
class SiteIntervention(Intervention, Protocol):
    """An edit of what some sites of the adapter write: of their scalars ``s = A x``, or of ``W = scaling · B``.

    A site writes ``W s``. With the edited ``s'`` and ``W'`` it writes ``W' s'``: the difference is added to the
    matrix's output, so no weight is touched, merged or live.
    """

    def edited_sites(self, adapter: Adapter) -> tuple[LoraSite, ...]:
        """The sites on which it acts; refuses (``ValueError``, ``KeyError``) an adapter that it does not fit."""

    def read(
        self, scalars: Float[Tensor, "batch pos rank"], site: LoraSite, positions: Int[Tensor, "batch pos"]
    ) -> Float[Tensor, "batch pos rank"]:
        """The scalars that the site is to use, in the gauge of ``site.gauged``."""

    def write(self, W: Float[Tensor, "d_out rank"], site: LoraSite) -> Float[Tensor, "d_out rank"]:
        """The matrix that the site is to write with."""

    def check_model(self, provenance: Mapping[str, Any], d_model: int, n_layers: int) -> None:
        """Refuse a model that it does not belong to."""


def check_positions(positions: str) -> None:
    """Refuse an unknown name of positions.

    Raises:
        ValueError: Listing the valid ones.
    """
    if positions not in get_args(Positions):
        raise ValueError(f"positions must be one of {get_args(Positions)}, got {positions!r}")


def one_number(strength: Strength) -> float | None:
    """The strength, if it is the same for every row (and nobody differentiates by it)."""
    value = torch.as_tensor(strength, dtype=torch.float64)
    return None if value.ndim or value.requires_grad else float(value)


def per_row(strength: Strength, like: Tensor) -> Tensor:
    """Strength as a float32 tensor (float64 for such a stream) that multiplies ``like``, ``[batch pos width]``."""
    precision = torch.promote_types(like.dtype, torch.float32)
    value = torch.as_tensor(strength, dtype=precision, device=like.device)
    if value.ndim == 0:
        return value
    if value.shape != like.shape[:1]:
        raise ValueError(f"{len(value)} strengths for a batch of {len(like)} rows; give one number, or one per row")
    return value[:, None, None]
