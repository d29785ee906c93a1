"""Interventions on the residual stream: called with the stream and a layer, they return a new tensor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from jaxtyping import Float
from torch import Tensor

from mechmisalign._layers import Layers, layer_numbers
from mechmisalign.directions import Direction

from ._values import Positions, Strength, Terms, check_positions, one_number, per_row

Units = Literal["absolute", "resid_norm"]


class _OnDirection:
    """Shared checks of the three values below: layers, positions, units."""

    direction: Direction
    layers: Layers | None
    positions: Positions

    def __post_init__(self) -> None:
        units = getattr(self, "units", "absolute")
        check_positions(self.positions)
        if units not in get_args(Units):
            raise ValueError(f"units must be one of {get_args(Units)}, got {units!r}")
        if self.layers is not None:  # as a tuple, whatever it was given as
            object.__setattr__(self, "layers", layer_numbers(self.layers))
        for layer in () if self.layers is None else self.edited_layers:
            self.direction.at(layer) if units == "absolute" and isinstance(self, Steer) else self.direction.unit(layer)
            if units == "resid_norm":
                self.direction.mean_resid_norm(layer)

    @property
    def edited_layers(self) -> tuple[int, ...]:
        """The layers named, or every layer in which the direction is nonzero."""
        return self.direction.nonzero_layers if self.layers is None else layer_numbers(self.layers)

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
        positions: ``"all"``, ``"non_sink"`` (everything but the attention sink), ``"prompt"`` (everything before the
            response) or ``"response"``.
    """

    direction: Direction
    layers: Layers | None = None
    strength: Strength = 1.0
    units: Units = "absolute"
    positions: Positions = "all"

    def __call__(self, resid: Float[Tensor, "batch pos d_model"], layer: int) -> Float[Tensor, "batch pos d_model"]:
        """The edited residual stream of one layer, a new tensor."""
        return resid + (per_row(self.strength, resid) * self._vector(layer).to(resid.device)).to(resid)

    def terms(self, layer: int) -> Terms | None:
        """The edit as terms that a batch can fuse; None if each row has a strength of its own."""
        strength = one_number(self.strength)
        return None if strength is None else Terms(add=strength * self._vector(layer))

    def _vector(self, layer: int) -> Float[Tensor, " d_model"]:
        if self.units == "absolute":
            return self.direction.at(layer)
        return self.direction.unit(layer) * self.direction.mean_resid_norm(layer)


@dataclass(frozen=True, eq=False)
class Ablate(_OnDirection):
    """Project the direction out: ``x' = x - v̂ v̂ᵀ x`` (2506.11618, section 3.4).

    For one vector at all layers, ablate ``direction.everywhere(layer)``.

    Attributes:
        direction: What to remove.
        layers: Where; None is every layer in which the direction is nonzero.
        positions: ``"non_sink"`` (everything but the attention sink, whose massive activations hold the model
            together), ``"all"``, ``"prompt"`` (everything before the response) or ``"response"``.
    """

    direction: Direction
    layers: Layers | None = None
    positions: Positions = "non_sink"

    def __call__(self, resid: Float[Tensor, "batch pos d_model"], layer: int) -> Float[Tensor, "batch pos d_model"]:
        """The edited residual stream of one layer, a new tensor."""
        unit, component = self._projection(resid, layer)
        return resid - component * unit

    def terms(self, layer: int) -> Terms:
        """The edit as terms that a batch can fuse."""
        return Terms(unit=self.direction.unit(layer))


@dataclass(frozen=True, eq=False)
class Clamp(_OnDirection):
    """Set the component along the direction: ``x' = x + (value - x·v̂) v̂``.

    Attributes:
        direction: Along what.
        value: The component to hold, in activation units or in mean residual norms. One number, or one per batch row.
        layers: Where; None is every layer in which the direction is nonzero.
        units: ``"absolute"`` or ``"resid_norm"``.
        positions: ``"non_sink"`` (everything but the attention sink), ``"all"``, ``"prompt"`` (everything before the
            response) or ``"response"``.
    """

    direction: Direction
    value: Strength = 0.0
    layers: Layers | None = None
    units: Units = "absolute"
    positions: Positions = "non_sink"

    def __call__(self, resid: Float[Tensor, "batch pos d_model"], layer: int) -> Float[Tensor, "batch pos d_model"]:
        """The edited residual stream of one layer, a new tensor."""
        unit, component = self._projection(resid, layer)
        value = (per_row(self.value, resid) * self._unit_of_value(layer)).to(resid)
        return resid + (value - component) * unit

    def terms(self, layer: int) -> Terms | None:
        """The edit as terms that a batch can fuse; None if each row has a value of its own."""
        value = one_number(self.value)
        if value is None:
            return None
        return Terms(unit=self.direction.unit(layer), value=value * self._unit_of_value(layer))

    def _unit_of_value(self, layer: int) -> float:
        return self.direction.mean_resid_norm(layer) if self.units == "resid_norm" else 1.0
