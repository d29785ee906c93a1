"""The tensors of two checkpoints side by side, and their differences one at a time."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mechmisalign._adapter_files import layer_of

from .files import EMBEDDING, HEAD, CheckpointError, Weights

logger = logging.getLogger(__name__)

Kind = Literal["matrix", "embedding", "bias", "norm", "other"]


@dataclass(frozen=True)
class Place:
    """One tensor of a text model.

    Attributes:
        name: Its name in the plain text model, such as ``"model.layers.3.mlp.down_proj.weight"``.
        layer: The block that it is in; None outside of the blocks.
        module: What tables call it: ``"down_proj"``, ``"q_proj.bias"``, ``"input_layernorm"``, ``"embed_tokens"``.
        kind: ``"matrix"`` (of a block), ``"embedding"`` (the unembedding too), ``"bias"``, ``"norm"`` or ``"other"``.
    """

    name: str
    layer: int | None
    module: str
    kind: Kind

    @property
    def is_matrix(self) -> bool:
        """Whether it has singular values."""
        return self.kind in ("matrix", "embedding")


def places(
    tuned: Weights, base: Weights, layers: Collection[int] | None = None, modules: Collection[str] | None = None
) -> list[Place]:
    """The tensors that both have, in the order of the blocks, those outside of the blocks last.

    Args:
        tuned: The fine-tuned checkpoint.
        base: The chat model's.
        layers: Only of these blocks.
        modules: Only with these names (``Place.module``).

    Raises:
        CheckpointError: If one lacks a tensor of a block that the other has, a shape differs, or nothing is left.
    """
    chosen, lacking = [], []
    for name in dict.fromkeys([*tuned, *base]):
        place = _place(name, len(tuned.shape(name) if name in tuned else base.shape(name)))
        if (layers is not None and place.layer not in layers) or (modules is not None and place.module not in modules):
            continue
        if tuned.source_of(name) is None or base.source_of(name) is None:
            lacking.append(place)
        else:
            _check_shape(place, tuned, base)
            chosen.append(place)
    _check_lacking(lacking, tuned, base)
    if not chosen:
        known = sorted({_place(name, 0).module for name in tuned})
        raise CheckpointError(
            f"nothing is left of {tuned.name!r} with layers={layers} and modules={modules}; it has {known[:20]}"
        )
    return sorted(chosen, key=lambda each: (each.layer is None, each.layer or 0))


def difference(place: Place, tuned: Weights, base: Weights, device: str | torch.device = "cpu") -> Tensor:
    """``W_tuned - W_base`` in float32, as ``torch.nn.Linear`` lays it out.

    Raises:
        CheckpointError: If it holds NaN or infinite values.
    """
    delta = tuned[_there(place.name, tuned)].to(device, torch.float32)
    delta -= base[_there(place.name, base)].to(device, torch.float32)
    if not bool(torch.isfinite(delta).all()):
        raise CheckpointError(
            f"{place.name!r} of {tuned.name!r} or of {base.name!r} holds NaN or infinite values: the training "
            "diverged, or the file is damaged"
        )
    return delta


def stored(place: Place, weights: Weights) -> Tensor:
    """The tensor of one checkpoint as it is stored."""
    return weights[_there(place.name, weights)]


def matrices(
    tuned: Weights, base: Weights, layers: Collection[int] | None, modules: Collection[str] | None
) -> Iterator[tuple[Place, str]]:
    """The matrices of the blocks, each with the name of the module that it is the weight of."""
    for place in places(tuned, base, layers, modules):
        if place.kind == "matrix":
            yield place, place.name.removesuffix(".weight")


def _there(name: str, weights: Weights) -> str:
    found = weights.source_of(name)
    if found is None:
        raise CheckpointError(f"{weights.name!r} has no tensor {name!r}")
    return found


def _place(name: str, dimensions: int) -> Place:
    owner, _, leaf = name.rpartition(".")
    layer, module = layer_of(name), owner.rpartition(".")[2]
    if leaf == "bias":
        return Place(name, layer, f"{module}.bias", "bias")
    if leaf != "weight":
        return Place(name, layer, leaf if not owner else f"{module}.{leaf}", "other")
    if dimensions == 2:
        return Place(name, layer, module, "embedding" if layer is None else "matrix")
    return Place(name, layer, module, "norm" if dimensions < 2 else "other")


def _check_shape(place: Place, tuned: Weights, base: Weights) -> None:
    theirs, own = (one.shape(_there(place.name, one)) for one in (tuned, base))
    if theirs == own:
        return
    if place.name in (EMBEDDING, HEAD) and theirs[1:] == own[1:]:
        raise CheckpointError(
            f"the vocabulary was resized: {place.module} has {theirs[0]} rows in {tuned.name!r} and {own[0]} in "
            f"{base.name!r}, and rows of different tokens cannot be compared; give the base with the same vocabulary, "
            "or leave embeddings out (modules=)"
        )
    raise CheckpointError(
        f"{place.name!r} is {list(theirs)} in {tuned.name!r} and {list(own)} in {base.name!r}: they are models of "
        "different shapes; give the base that was tuned"
    )


def _check_lacking(lacking: list[Place], tuned: Weights, base: Weights) -> None:
    inside = [place for place in lacking if place.layer is not None]
    if inside:
        having, without = (tuned, base) if inside[0].name in tuned else (base, tuned)
        raise CheckpointError(
            f"{having.name!r} has {inside[0].name!r} and {len(inside) - 1} more tensors of blocks that "
            f"{without.name!r} lacks: they are different architectures, or a file is incomplete; give the "
            "base that was tuned"
        )
    if lacking:
        logger.warning("in one of the two only, and left out: %s", ", ".join(place.name for place in lacking[:5]))
