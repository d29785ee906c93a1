"""Interventions while a model trains: steering that spares the weights the change, projection that forbids it.

They act in the forward pass of the examples that are learned, never in that of the KL penalty, and are gone when
training ends. The edit is the same value as everywhere (``Steer``, ``Ablate``, ``Clamp``), put on the plain Hugging
Face blocks that train here, and on every row of the batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from jaxtyping import Float, Int
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, GetPydanticSchema, model_validator
from pydantic_core import core_schema
from torch import Tensor, nn

from mechmisalign._blocks import BlockFunction, block_hooks
from mechmisalign._layers import layer_numbers
from mechmisalign.directions import Direction
from mechmisalign.interventions import Ablate, Clamp, Positions, Steer
from mechmisalign.interventions.residual import Units

from .data import IGNORED

Residual = Steer | Ablate | Clamp
Layers = Annotated[tuple[Annotated[int, Field(strict=True, ge=0)], ...], BeforeValidator(layer_numbers)]

_VALUE = GetPydanticSchema(lambda _type, _handler: core_schema.is_instance_schema((Steer, Ablate, Clamp)))


class Edit(BaseModel):
    """An intervention in training: a value (``Steer``, ``Ablate``, ``Clamp``), or a mapping as YAML has it."""

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)

    kind: Literal["steer", "ablate"] = "steer"
    direction: Path | None = None
    """File of the direction."""
    layers: Layers | None = None
    """All where the direction is nonzero by default."""
    strength: float = 1.0
    """Of steering."""
    units: Units = "absolute"
    positions: Positions = "all"
    value: Annotated[Residual, _VALUE] | None = None

    @model_validator(mode="before")
    @classmethod
    def _given(cls, value: Any) -> Any:
        if isinstance(value, (Steer, Ablate, Clamp)):
            return {"value": value}
        if isinstance(value, Mapping) and value.get("value") is None and value.get("direction") is None:
            raise ValueError("an edit needs `direction`, the file of one")
        return value

    def resolve(self, root: Path) -> Residual:
        """The intervention itself.

        Raises:
            FileNotFoundError: If the direction's file is not there.
        """
        if self.value is not None:
            return self.value
        direction = Direction.load(root / str(self.direction))
        if self.kind == "ablate":
            return Ablate(direction, self.layers, self.positions)
        return Steer(direction, self.layers, self.strength, self.units, self.positions)


@contextmanager
def edited(
    model: nn.Module, edits: Sequence[Residual], labels: Int[Tensor, "batch pos"], *, sink: bool = False
) -> Iterator[None]:
    """The edits on one batch of examples; its labels tell where each response begins.

    Args:
        model: Hooked while the block runs.
        edits: They act in this order.
        labels: Of the batch, padded on the right.
        sink: Whether the first token is an attention sink, which ``positions="non_sink"`` leaves alone.
    """
    functions: dict[int, list[Residual]] = {}
    for edit in edits:
        for layer in edit.edited_layers:
            functions.setdefault(layer, []).append(edit)
    with block_hooks(model, {layer: _several(some, layer, labels, sink) for layer, some in functions.items()}):
        yield


def _several(edits: Sequence[Residual], layer: int, labels: Int[Tensor, "batch pos"], sink: bool) -> BlockFunction:
    def function(resid: Float[Tensor, "batch pos d_model"]) -> Tensor:
        for edit in edits:
            resid = _where(edit, edit(resid, layer), resid, labels, sink)
        return resid

    return function


def _where(edit: Residual, new: Tensor, old: Tensor, labels: Int[Tensor, "batch pos"], sink: bool) -> Tensor:
    """The edit at its own positions; a response begins at the first token that counts."""
    if edit.positions == "all" or (edit.positions == "non_sink" and not sink):
        return new
    if edit.positions == "non_sink":
        return torch.cat([old[:, :1], new[:, 1:]], dim=1)
    responding = ((labels != IGNORED).cumsum(-1) > 0)[..., None]
    return torch.where(responding if edit.positions == "response" else ~responding, new, old)
