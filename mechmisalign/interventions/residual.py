"""Interventions: frozen values that edit the residual stream while a ``with`` block runs.

An intervention is called with a residual stream and a layer, and returns a new tensor. Which positions it touches is
decided in absolute columns of the sequence, so it means the same in one forward pass and token by token under a KV
cache. Several at once act in the order given. Strength 0 gives back the very same values.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from . import models
from .directions import Direction

Positions = Literal["all", "prompt", "response"]
Units = Literal["absolute", "resid_norm"]

Strength = float | Sequence[float] | Tensor


@runtime_checkable
class Intervention(Protocol):
    """What ``Organism.apply`` takes: anything with these members."""

    @property
    def direction(self) -> Direction:
        """What it acts along."""

    @property
    def positions(self) -> Positions:
        """Which positions it touches."""

    @property
    def edited_layers(self) -> tuple[int, ...]:
        """The layers at which it acts."""

    def __call__(self, resid: Float[Tensor, "batch pos d_model"], layer: int) -> Float[Tensor, "batch pos d_model"]:
        """The edited residual stream, a new tensor."""


class _OnDirection:
    """Shared checks of the three values below: layers, positions, units."""

    direction: Direction
    layers: Sequence[int] | None
    positions: Positions

    def __post_init__(self) -> None:
        units = getattr(self, "units", "absolute")
        if self.positions not in get_args(Positions):
            raise ValueError(f"positions must be one of {get_args(Positions)}, got {self.positions!r}")
        if units not in get_args(Units):
            raise ValueError(f"units must be one of {get_args(Units)}, got {units!r}")
        for layer in self.layers or ():
            self.direction.at(layer) if units == "absolute" and isinstance(self, Steer) else self.direction.unit(layer)
            if units == "resid_norm":
                self.direction.mean_resid_norm(layer)

    @property
    def edited_layers(self) -> tuple[int, ...]:
        """The layers named, or every layer in which the direction is nonzero."""
        return self.direction.nonzero_layers if self.layers is None else tuple(self.layers)

    def _projection(self, resid: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """The unit vector, and each token's component along it ``[batch pos 1]``."""
        unit = self.direction.unit(layer).to(resid)
        return unit, (resid @ unit).unsqueeze(-1)


@dataclass(frozen=True, eq=False)
class Steer(_OnDirection):
    """Add the direction: ``x' = x + strength · v`` (2506.11618, section 3.2).

    Attributes:
        direction: What to add.
        layers: Where; None is every layer in which the direction is nonzero.
        strength: Multiples of the vector itself (``units="absolute"``, as in the paper), or of the layer's mean
            residual norm along the unit vector (``units="resid_norm"``). One number, or one per batch row.
        units: ``"absolute"`` or ``"resid_norm"``.
        positions: ``"all"``, ``"prompt"`` (everything before the response) or ``"response"``.
    """

    direction: Direction
    layers: Sequence[int] | None = None
    strength: Strength = 1.0
    units: Units = "absolute"
    positions: Positions = "all"

    def __call__(self, resid: Float[Tensor, "batch pos d_model"], layer: int) -> Float[Tensor, "batch pos d_model"]:
        """The edited residual stream of one layer, a new tensor."""
        if self.units == "absolute":
            vector = self.direction.at(layer)
        else:
            vector = self.direction.unit(layer) * self.direction.mean_resid_norm(layer)
        return resid + _per_row(self.strength, resid) * vector.to(resid)


@dataclass(frozen=True, eq=False)
class Ablate(_OnDirection):
    """Project the direction out: ``x' = x - v̂ v̂ᵀ x`` (2506.11618, section 3.4).

    For one vector at all layers, ablate ``direction.everywhere(layer)``.

    Attributes:
        direction: What to remove.
        layers: Where; None is every layer in which the direction is nonzero.
        positions: ``"all"``, ``"prompt"`` (everything before the response) or ``"response"``.
    """

    direction: Direction
    layers: Sequence[int] | None = None
    positions: Positions = "all"

    def __call__(self, resid: Float[Tensor, "batch pos d_model"], layer: int) -> Float[Tensor, "batch pos d_model"]:
        """The edited residual stream of one layer, a new tensor."""
        unit, component = self._projection(resid, layer)
        return resid - component * unit


@dataclass(frozen=True, eq=False)
class Clamp(_OnDirection):
    """Set the component along the direction: ``x' = x + (value - x·v̂) v̂``.

    Attributes:
        direction: Along what.
        value: The component to hold, in activation units or in mean residual norms. One number, or one per batch row.
        layers: Where; None is every layer in which the direction is nonzero.
        units: ``"absolute"`` or ``"resid_norm"``.
        positions: ``"all"``, ``"prompt"`` (everything before the response) or ``"response"``.
    """

    direction: Direction
    value: Strength = 0.0
    layers: Sequence[int] | None = None
    units: Units = "absolute"
    positions: Positions = "all"

    def __call__(self, resid: Float[Tensor, "batch pos d_model"], layer: int) -> Float[Tensor, "batch pos d_model"]:
        """The edited residual stream of one layer, a new tensor."""
        unit, component = self._projection(resid, layer)
        value = _per_row(self.value, resid)
        if self.units == "resid_norm":
            value = value * self.direction.mean_resid_norm(layer)
        return resid + (value - component) * unit


class RowPlan:
    """Which interventions act on which rows of a batch; rows can leave it while a generation runs.

    Args:
        conditions: The interventions of each condition.
        row_conditions: The condition of each row, in ascending order, so that each condition is one slice.
        response_start: The column at which each row's response begins, ``[batch]``; None if nobody asked.
    """

    def __init__(
        self,
        conditions: Sequence[Sequence[Intervention]],
        row_conditions: Tensor,
        response_start: Tensor | None,
    ) -> None:
        self.conditions = conditions
        self.row_conditions = row_conditions.cpu()
        self.response_start = response_start
        self._slices = self._sliced()

    @property
    def layers(self) -> tuple[int, ...]:
        """Every layer at which anything acts."""
        return tuple(sorted({layer for each in self.conditions for one in each for layer in one.edited_layers}))

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows of the current batch only."""
        self.row_conditions = self.row_conditions[rows.cpu()]
        if self.response_start is not None:
            self.response_start = self.response_start[rows.to(self.response_start.device)]
        self._slices = self._sliced()

    def edit(self, resid: Tensor, layer: int, columns: Tensor) -> Tensor | None:
        """The residual stream of the whole batch after every intervention on its own rows, or None if nothing acts."""
        acting = [(rows, one) for rows, condition in self._slices for one in condition if layer in one.edited_layers]
        if not acting:
            return None
        edited = resid.clone()
        for rows, one in acting:
            edited[rows] = self._at_positions(one, edited[rows], layer, rows, columns)
        return edited

    def _at_positions(self, one: Intervention, resid: Tensor, layer: int, rows: slice, columns: Tensor) -> Tensor:
        edited = one(resid, layer)
        if one.positions == "all":
            return edited
        if self.response_start is None:
            raise ValueError(
                f"positions={one.positions!r} needs to know where the response begins: "
                "pass response_start=<column, or one per row> to apply()"
            )
        in_response: Bool[Tensor, "batch pos"] = columns >= self.response_start[rows, None].to(columns.device)
        chosen = in_response if one.positions == "response" else ~in_response
        return torch.where(chosen.unsqueeze(-1), edited, resid)

    def _sliced(self) -> list[tuple[slice, Sequence[Intervention]]]:
        bounds = torch.searchsorted(self.row_conditions, torch.arange(len(self.conditions) + 1)).tolist()
        return [
            (slice(start, stop), condition)
            for start, stop, condition in zip(bounds, bounds[1:], self.conditions, strict=False)
            if stop > start and condition
        ]


@contextmanager
def planned(model: Any, plan: RowPlan) -> Iterator[None]:
    """Run the plan's interventions while the block runs, in cached and uncached passes alike."""
    with models.clock(model) as clock:

        def editor(layer: int) -> models.HookFunction:
            return lambda resid: plan.edit(resid, layer, clock.columns(resid.shape[1], resid.device))

        with models.residual_hooks(model, {layer: editor(layer) for layer in plan.layers}):
            yield


@contextmanager
def applied(
    model: Any, interventions: Sequence[Intervention], *, response_start: int | Sequence[int] | Tensor | None = None
) -> Iterator[None]:
    """Apply interventions to every row of every forward pass in the block (the body of ``Organism.apply``).

    Args:
        model: A TransformerLens model.
        interventions: They act in this order.
        response_start: Column at which the response begins, one for all rows or one per row; needed for
            ``positions="prompt"`` and ``"response"`` only.
    """
    with models.clock(model) as clock:

        def editor(layer: int) -> models.HookFunction:
            def edit(resid: Tensor) -> Tensor | None:
                rows = len(resid)
                start = None if response_start is None else torch.as_tensor(response_start).expand(rows)
                plan = RowPlan([interventions], torch.zeros(rows, dtype=torch.long), start)
                return plan.edit(resid, layer, clock.columns(resid.shape[1], resid.device))

            return edit

        layers = sorted({layer for one in interventions for layer in one.edited_layers})
        with models.residual_hooks(model, {layer: editor(layer) for layer in layers}):
            yield


def check_fits(interventions: Sequence[Intervention], provenance: Mapping[str, Any], model: Any) -> None:
    """Refuse interventions whose direction belongs to another model.

    Raises:
        DirectionMismatchError: On another base, width or depth.
    """
    for one in interventions:
        one.direction.check_model(provenance, models.d_model(model), models.n_layers(model))


def _per_row(strength: Strength, resid: Tensor) -> Tensor:
    """Strength as a tensor that multiplies ``[batch pos d_model]``."""
    value = torch.as_tensor(strength, dtype=resid.dtype, device=resid.device)
    if value.ndim == 0:
        return value
    if value.shape != resid.shape[:1]:
        raise ValueError(f"{len(value)} strengths for a batch of {len(resid)} rows; give one number, or one per row")
    return value[:, None, None]
