"""One weight matrix inside a TransformerLens model, and the hook points around it."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor, nn

from . import _hooked


@dataclass(frozen=True)
class Matrix:
    """One weight matrix inside a TransformerLens model.

    Attributes:
        parameter: Where it lives, in the engine's own layout.
        layout: How the engine lays out ``"d_out d_in"`` (einops); None: as ``torch.nn.Linear`` does.
    """

    parameter: nn.Parameter
    layout: str | None = None

    def read(self) -> Float[Tensor, "d_out d_in"]:
        """The matrix as ``torch.nn.Linear`` lays it out (it may share memory with the parameter)."""
        data = self.parameter.data
        return data if self.layout is None else _hooked.as_linear(data, self.layout)

    def own(self, matrix: Float[Tensor, "d_out d_in"]) -> Tensor:
        """A matrix in the parameter's own layout, dtype and device."""
        moved = matrix.to(self.parameter)
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
