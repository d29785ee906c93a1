"""Directions: one vector per layer of the residual stream, and their algebra.

A direction knows where it comes from (its header) and refuses to be mixed with, or applied to, another model. Where
the vector of a layer is exactly zero (a model difference below the first adapted layer, say) it has no unit: asking for
one is an error, never NaN. The estimators are in :mod:`mechmisalign.estimators`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ._artifacts import base_name, load_artifact, same_base, write_artifact
from ._layers import Layers, layer_numbers

SCHEMA = 1
HOOK = "blocks.{layer}.hook_resid_post"
DIRECTION_FILE = "direction.safetensors"
"""What a direction is called in a repository."""


class ZeroDirectionError(ValueError):
    """A unit vector was asked for where the direction is exactly zero."""


class DirectionMismatchError(ValueError):
    """Two directions, or a direction and a model, do not belong together."""


@dataclass(frozen=True, eq=False)
class Direction:
    """One vector per layer, in the residual basis of the Hugging Face model.

    Attributes:
        vectors: ``[layer d_model]``, float32, on the CPU.
        layers: The layer that each row belongs to; layer ``i`` is the residual stream after block ``i``.
        header: Provenance: method, model, adapter, span, hook, template, data, versions.
        resid_norm: Mean residual norm of each layer, ``[layer]``, if it was measured: the unit ``"resid_norm"``.
    """

    vectors: Float[Tensor, "layer d_model"]
    layers: tuple[int, ...]
    header: Mapping[str, Any]
    resid_norm: Float[Tensor, " layer"] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", layer_numbers(self.layers) if len(self.layers) else ())
        if self.vectors.ndim != 2:
            raise ValueError(f"the vectors have the shape {list(self.vectors.shape)}; [layer d_model] is expected")
        if len(self.layers) != len(self.vectors):
            raise ValueError(
                f"{len(self.vectors)} vectors for {len(self.layers)} layers; one vector per layer is needed"
            )
        if not torch.isfinite(self.vectors).all():
            raise ValueError("the vectors hold NaN or infinite values; check the activations that they came from")
        object.__setattr__(self, "vectors", self.vectors.detach().to("cpu", torch.float32))

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return int(self.vectors.shape[1])

    @property
    def nonzero_layers(self) -> tuple[int, ...]:
        """The layers in which the direction has a unit vector."""
        return tuple(layer for layer, vector in zip(self.layers, self.vectors, strict=True) if bool(vector.any()))

    def at(self, layer: int) -> Float[Tensor, " d_model"]:
        """The vector of one layer."""
        return self.vectors[self._row(layer)]

    def unit(self, layer: int) -> Float[Tensor, " d_model"]:
        """The vector of one layer, scaled to norm 1 (computed in float64).

        Raises:
            ZeroDirectionError: If the vector of that layer is exactly zero.
        """
        vector = self.at(layer).double()
        if not bool(vector.any()):
            raise ZeroDirectionError(
                f"the direction ({self._method}) is exactly zero at layer {layer} and has no unit there; "
                f"it is nonzero at layers {list(self.nonzero_layers)}"
            )
        return (vector / vector.norm()).float()

    def norm(self, layer: int) -> float:
        """Euclidean norm of the vector of one layer."""
        return float(self.at(layer).double().norm())

    def mean_resid_norm(self, layer: int) -> float:
        """Mean residual norm of one layer, where the direction was measured.

        Raises:
            ValueError: If the direction carries no residual norms.
        """
        if self.resid_norm is None:
            raise ValueError(
                "this direction carries no residual norms, so units='resid_norm' has no meaning for it; "
                "estimate it from moments, or use units='absolute'"
            )
        return float(self.resid_norm[self._row(layer)])

    def everywhere(self, layer: int, layers: Layers | None = None) -> Direction:
        """The one vector of ``layer`` at every layer (2506.11618, section 3.4: a single direction at all layers)."""
        chosen = self.layers if layers is None else layer_numbers(layers)
        vectors = self.at(layer).expand(len(chosen), -1).clone()
        header = {**self.header, "method": f"{self.header.get('method', 'direction')} of layer {layer}, everywhere"}
        norms = self.resid_norm if chosen == self.layers else None
        return Direction(vectors, chosen, header, norms)

    def orthogonal_to(self, other: Direction) -> Direction:
        """This direction without its component along ``other``, layer by layer."""
        self._check_compatible(other)
        rows = [
            vector if layer not in other.nonzero_layers else vector - (vector @ other.unit(layer)) * other.unit(layer)
            for layer, vector in zip(self.layers, self.vectors, strict=True)
        ]
        return self._derived(torch.stack(rows), f"({self._method}) orthogonal to ({other._method})")

    def __add__(self, other: Direction) -> Direction:
        self._check_compatible(other)
        return self._derived(self.vectors + other.vectors, f"({self._method}) + ({other._method})")

    def __sub__(self, other: Direction) -> Direction:
        self._check_compatible(other)
        return self._derived(self.vectors - other.vectors, f"({self._method}) - ({other._method})")

    def __mul__(self, factor: float) -> Direction:
        return self._derived(self.vectors * factor, f"{factor:g} * ({self._method})")

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> Direction:
        return self * (1.0 / divisor)

    def __neg__(self) -> Direction:
        return self * -1.0

    def map_layers(self, function: Callable[[Tensor, int], Tensor], method: str) -> Direction:
        """A new direction with ``function(vector, layer)`` in each layer."""
        rows = [function(vector, layer) for layer, vector in zip(self.layers, self.vectors, strict=True)]
        return self._derived(torch.stack(rows), method)

    def check_model(self, provenance: Mapping[str, Any], d_model: int, n_layers: int) -> None:
        """Refuse a model that this direction does not belong to.

        Args:
            provenance: The model's, as in ``Organism.provenance``: ``model`` and, if known, ``base_fingerprint``.
            d_model: Width of the model.
            n_layers: Depth of the model.

        Raises:
            DirectionMismatchError: On another base model, another width, or layers that the model does not have.
        """
        if not same_base(self.header, provenance):
            raise DirectionMismatchError(
                f"this direction was found in {base_name(self.header)} and cannot be used in "
                f"{base_name(provenance)}: residual bases differ between models"
            )
        if self.d_model != d_model or max(self.layers) >= n_layers:
            raise DirectionMismatchError(
                f"this direction has width {self.d_model} and layers up to {max(self.layers)}; "
                f"the model has width {d_model} and layers up to {n_layers - 1}"
            )

    def save(self, path: str | Path) -> Path:
        """Write a safetensors file with the header as JSON metadata; returns the path."""
        header = {**self.header, "schema": SCHEMA, "kind": "direction", "hook": HOOK, "layers": list(self.layers)}
        tensors = {"vectors": self.vectors.contiguous()}
        if self.resid_norm is not None:
            tensors["resid_norm"] = self.resid_norm.contiguous()
        return write_artifact(path, tensors, header)

    @staticmethod
    def load(path: str | Path, *, revision: str | None = None, local_files_only: bool = False) -> Direction:
        """Read a direction back.

        Args:
            path: The file, a folder that holds a ``direction.safetensors``, or a repository on the Hub that does.
            revision: Branch, tag or commit on the Hub; the header of what is read names the commit (``hub_revision``).
            local_files_only: Take what is in the Hub's cache, and do not ask the Hub.

        Raises:
            ValueError: If the file is not a direction of this schema and layer convention, or the Hub does not give it.
        """
        header, tensors = load_artifact(path, DIRECTION_FILE, revision=revision, local_files_only=local_files_only)
        found = (header.get("kind"), header.get("schema"), header.get("hook"))
        if found != ("direction", SCHEMA, HOOK):
            raise ValueError(
                f"{path} is not a direction this version reads: kind, schema, hook are {found}, "
                f"expected {('direction', SCHEMA, HOOK)}"
            )
        return Direction(tensors["vectors"], tuple(header["layers"]), header, tensors.get("resid_norm"))

    @property
    def _method(self) -> str:
        return str(self.header.get("method", "direction"))

    def _row(self, layer: int) -> int:
        if layer not in self.layers:
            raise ValueError(f"no vector for layer {layer}; this direction has layers {list(self.layers)}")
        return self.layers.index(layer)

    def _derived(self, vectors: Tensor, method: str) -> Direction:
        return replace(self, vectors=vectors, header={**self.header, "method": method})

    def _check_compatible(self, other: Direction) -> None:
        if not same_base(self.header, other.header):
            names = f"{base_name(self.header)} and {base_name(other.header)}"
            raise DirectionMismatchError(f"directions of different models, {names}, do not share a basis")
        if self.layers != other.layers or self.d_model != other.d_model:
            raise DirectionMismatchError(
                f"shapes differ: layers {list(self.layers)} x {self.d_model} and {list(other.layers)} x {other.d_model}"
            )


def random_direction(like: Direction, *, seed: int) -> Direction:
    """The norm-matched control: a random direction with the norm of ``like`` in each layer.

    The vector is drawn on the sphere and scaled to ``‖v‖``; a Gaussian times ``‖v‖`` would be longer by the square root
    of ``d_model``.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    noise = torch.randn(like.vectors.shape, generator=generator, dtype=torch.float64, device="cpu")
    scaled = noise / noise.norm(dim=-1, keepdim=True) * like.vectors.double().norm(dim=-1, keepdim=True)
    return like._derived(scaled.float(), f"random, norm of ({like._method}), seed {seed}")
