"""The library steering-vectors: ``SteeringVector.layer_activations``, block -> the vector added to its output.

With its layer type ``decoder_block`` that is the residual stream after the block, so layers keep their numbers. Its
other types (``mlp``, ``self_attn`` …) act elsewhere and are refused. The library saves by pickling its own class, which
is never read here: hand over the object, or the bare dict.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from mechmisalign._layers import layer_numbers
from mechmisalign.directions import Direction

from ._reading import Model, chosen, imported, one_vector


def from_layer_activations(steering: Any, *, model: Model | None = None, method: str = "steering-vectors") -> Direction:
    """A direction from a ``SteeringVector`` in memory, or from a dict block -> vector ``[d_model]``.

    Args:
        steering: The object, or the dict.
        model: The base, for the header: a name, or ``organism.provenance``.
        method: How it was made, for the header.

    Raises:
        TypeError: If it is neither.
        ValueError: If it does not act on the output of blocks, or a vector is not one.

    Example:
        >>> direction = from_layer_activations(steering_vectors.train_steering_vector(...))  # doctest: +SKIP
    """
    rows = getattr(steering, "layer_activations", steering)
    if not isinstance(rows, Mapping):
        raise TypeError(
            f"got a {type(steering).__name__}; a SteeringVector or a dict of layers and vectors is expected"
        )
    kind = getattr(steering, "layer_type", "decoder_block")
    if kind != "decoder_block":
        raise ValueError(f"the steering vector acts on {kind!r}; only 'decoder_block' is the residual stream")
    found = {_block(layer): one_vector(value, f"the vector of layer {layer}") for layer, value in rows.items()}
    return imported(found, method, None, model, layer_type=kind)


def _block(layer: Any) -> int:
    """The number of a block; JSON has made text of some."""
    return (
        int(layer) if isinstance(layer, str) and layer.isdecimal() else layer_numbers(layer, "the layers of vectors")[0]
    )


def layer_activations(direction: Direction, *, layers: Sequence[int] | None = None) -> dict[int, Tensor]:
    """The other way: ``steering_vectors.SteeringVector(layer_activations(direction))``.

    Args:
        direction: What to hand over.
        layers: Only these; by default those in which the direction is nonzero.

    Returns:
        Block -> vector ``[d_model]``, float32.
    """
    return chosen(direction, layers)
