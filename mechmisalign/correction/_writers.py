"""The matrices of a Hugging Face model that write to the residual stream."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from mechmisalign._blocks import blocks, has_post_norms
from mechmisalign.adapters import RESIDUAL_WRITERS

_PAIRS = (("o_proj", "down_proj"), ("dense", "fc2"))
"""Output of the attention and of the MLP, as most call them, and Phi-2."""


def writers(model: Any) -> Iterator[tuple[str, nn.Linear]]:
    """Name and matrix of everything in the blocks that writes to the residual stream.

    Raises:
        ValueError: If the architecture is none whose writers are known: a post norm, fused experts, other names.
    """
    name = type(model).__name__
    if has_post_norms(model):
        raise ValueError(
            f"in {name} a norm stands between the matrices and the residual stream, so no edit of the matrices keeps a "
            "direction out of it; use mm.Ablate on the residual stream"
        )
    stack = blocks(model)
    fused = [key for key, parameter in stack.named_parameters() if parameter.ndim > 2]
    if fused:
        raise ValueError(f"{name} has fused matrices such as {fused[0]!r} (experts?), which are not known to this edit")
    place = next(key for key, module in model.named_modules() if module is stack)  # not those of a vision tower
    found = [
        (f"{place}.{key}", module)
        for key, module in stack.named_modules()
        if isinstance(module, nn.Linear) and key.rpartition(".")[2] in RESIDUAL_WRITERS
    ]
    for number, block in enumerate(stack):
        own = {key.rpartition(".")[2] for key, module in block.named_modules() if isinstance(module, nn.Linear)}
        if not any(set(pair) <= own for pair in _PAIRS):
            raise ValueError(
                f"layer {number} of {name} has no linear {' and '.join(_PAIRS[0])} (it has {sorted(own)}): "
                "its residual-writing matrices are called otherwise, and are not known to this edit"
            )
    yield from found
