"""Fused matrices (``qkv_proj`` and ``gate_up_proj`` of Phi-3 and Phi-4-mini) inside a TransformerBridge.

When it boots, TransformerBridge copies the rows of a fused matrix into one linear map for queries, one for keys …, and
never uses the matrix itself again: a live adapter on it would be left out, and weights that are put into it later (as
``as_base()`` does) would change nothing, both in silence. Here those maps become views of what the matrix computes now,
adapter included, and the matrix gets hook points of its own. The hook points of queries, keys, values, gate and up
stay as they were.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

FUSED = ("qkv_proj", "gate_up_proj")
"""Matrices whose rows are laid end to end: queries, keys, values; gate, up."""


def mend(model: Any) -> None:
    """Let the parts of fused matrices be computed by the matrices themselves, in a freshly booted bridge."""
    found = [*_attentions(model), *_mlps(model)]
    if found:
        model._scan_existing_hooks(model, "")


def is_mended(module: Any) -> bool:
    """Whether this is an attention whose queries, keys and values are rows of what its fused matrix computes."""
    return isinstance(getattr(getattr(module, "q", None), "original_component", None), _Rows)


def is_copied(model: nn.Module, name: str) -> bool:
    """Whether a bridge computes with copies of a matrix, so that the matrix itself is never asked.

    Args:
        model: The Hugging Face model inside a bridge, mended.
        name: The matrix.
    """
    parent = model.get_submodule(name.rpartition(".")[0])
    leaf = name.rpartition(".")[2]
    return hasattr(parent, "split_qkv_matrix") and leaf not in FUSED and leaf not in _unfused(parent)


def _unfused(attention: Any) -> set[str]:
    """Names that a joint attention has for matrices of their own."""
    return {part.name for key, part in attention.submodules.items() if key not in ("q", "k", "v", "qkv")}


def _attentions(model: Any) -> list[Any]:
    from transformer_lens.model_bridge.generalized_components.joint_qkv_attention import JointQKVAttentionBridge

    found = []
    for attention in model.modules():
        if isinstance(attention, JointQKVAttentionBridge) and getattr(attention.qkv, "name", None) == FUSED[0]:
            _share(attention.qkv, [attention.q, attention.k, attention.v])
            found.append(attention)
    return found


def _mlps(model: Any) -> list[Any]:
    from transformer_lens.model_bridge.generalized_components.joint_gate_up_mlp import JointGateUpMLPBridge
    from transformer_lens.model_bridge.generalized_components.linear import LinearBridge

    found = []
    for mlp in model.modules():
        if isinstance(mlp, JointGateUpMLPBridge) and mlp.fused_attr == FUSED[1]:
            matrix = getattr(mlp.original_component, FUSED[1])
            whole = LinearBridge(name=FUSED[1]).train(matrix.training)
            whole.set_original_component(matrix)
            setattr(mlp.original_component, FUSED[1], whole)
            mlp.add_module("gate_up", whole)
            _share(whole, [mlp.gate, getattr(mlp, "in")])
            found.append(mlp)
    return found


def _share(whole: Any, parts: Sequence[Any]) -> None:
    """Let parts, which lie end to end, read their rows of the whole.

    Raises:
        ValueError: If they are not these rows.
    """
    weights = [part.original_component.weight for part in parts]
    own = whole.original_component.weight
    if own.is_meta or not torch.equal(torch.cat(list(weights)), own):
        raise ValueError(f"the parts of {whole.name!r} are not its rows, one after the other; it cannot be hooked here")
    shared, start = _Shared(whole, len(parts)), 0
    for part, weight in zip(parts, weights, strict=True):
        rows = _Rows(shared, slice(start, start := start + len(weight)))
        part.set_original_component(rows.train(whole.training))


class _Shared:
    """What the whole matrix makes of one input, computed once for all its parts."""

    def __init__(self, whole: Any, parts: int) -> None:
        self.whole = whole
        self._parts = parts
        self._input: Tensor | None = None
        self._output: Tensor | None = None
        self._taken = 0

    def __call__(self, x: Tensor) -> Tensor:
        if self._input is not x or self._output is None:  # a hook may give each part an input of its own
            self._input, self._output, self._taken = x, self.whole(x), 0
        output = self._output
        self._taken += 1
        if self._taken == self._parts:  # held no longer than needed
            self._input = self._output = None
        return output


class _Rows(nn.Module):
    """Some rows of a fused matrix, as a linear map."""

    def __init__(self, shared: _Shared, rows: slice) -> None:
        super().__init__()
        self._shared, self._rows = shared, rows

    @property
    def weight(self) -> Tensor:
        """These rows of the matrix as they are now."""
        rows: Tensor = self._shared.whole.original_component.weight[self._rows]
        return rows

    @property
    def bias(self) -> Tensor | None:
        """Their biases."""
        bias = self._shared.whole.original_component.bias
        return None if bias is None else bias[self._rows]

    def forward(self, x: Tensor) -> Tensor:
        """These columns of what the whole matrix makes of the input."""
        return self._shared(x)[..., self._rows]
