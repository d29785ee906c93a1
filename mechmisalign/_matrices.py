"""One weight matrix inside a TransformerLens model, and the hook points around it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from . import _hooked, _placement


@dataclass(frozen=True)
class Matrix:
    """One weight matrix inside a TransformerLens model.

    Attributes:
        parameter: Where it lives, in the engine's own layout; None where a quantiser keeps other tensors instead.
        layout: How the engine lays out ``"d_out d_in"`` (einops); None: as ``torch.nn.Linear`` does.
        module: The Hugging Face module whose ``weight`` it is; None in a ``HookedTransformer``.
    """

    parameter: Any
    layout: str | None = None
    module: nn.Module | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """``(d_out, d_in)``, also of a quantised matrix, which is stored in another shape."""
        inner: Any = None if self.module is None else _placement.unwrapped(self.module)
        if hasattr(inner, "in_features"):
            return int(inner.out_features), int(inner.in_features)
        d_out, d_in = self.read().shape
        return d_out, d_in

    @property
    def held(self) -> Tensor:
        """The values in the parameter's own layout; of an offloaded one, where they wait between two passes."""
        own: Tensor = self.parameter.data if self.module is None else _placement.stored(self.module)
        return own

    def put(self, values: Tensor) -> None:
        """Let the parameter have these values, in its own layout and dtype."""
        if self.module is None:
            self.parameter.data = values.to(self.parameter.device)
        else:
            _placement.put(self.module, values)

    def read(self) -> Float[Tensor, "d_out d_in"]:
        """The matrix as ``torch.nn.Linear`` lays it out (it may share memory with the parameter)."""
        return self.held if self.layout is None else _hooked.as_linear(self.held, self.layout)

    def own(self, matrix: Float[Tensor, "d_out d_in"]) -> Tensor:
        """A matrix in the parameter's own layout and dtype, on its device."""
        moved = matrix.to(self.held)
        return moved if self.layout is None else _hooked.as_own(moved, self.layout, self.parameter.shape)


@dataclass(frozen=True)
class Port:
    """One end of an adapted matrix: the hook point where its input or output passes.

    Attributes:
        name: The hook point.
        weight: What the activation is still to be multiplied with (a norm's weight that acts behind the hook point).
    """

    name: str
    weight: Tensor | None = None

    def flat(self, activation: Tensor) -> Float[Tensor, "batch pos width"]:
        """The activation as the matrix sees it, heads side by side."""
        joined = activation.flatten(2)
        return joined if self.weight is None else joined * self.weight
