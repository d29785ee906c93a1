"""The blocks of a plain Hugging Face decoder, and hooks on the residual stream after them.

A block returns a tensor in newer transformers and a tuple in older ones; either way every row of the batch is edited.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ._wrapped_names import in_tower

BlockFunction = Callable[[Tensor], Tensor | None]
_STACKS = ("layers", "h", "blocks", "layer")
_POST_NORMS = ("post_feedforward_layernorm", "post_self_attn_layernorm", "post_mlp_layernorm")
"""Norms of what a block's halves have computed: Gemma 2 and 3, OLMo 2, GLM 4."""


def blocks(model: nn.Module) -> nn.ModuleList:
    """The transformer blocks of a Hugging Face model, with or without an adapter.

    Raises:
        ValueError: If there is no list of modules as long as the model is deep.
    """
    config = getattr(model, "config", None)
    config = getattr(config, "text_config", config)
    depth = getattr(config, "num_hidden_layers", None)
    for name, module in model.named_modules():
        if in_tower(f"{name}."):  # a vision tower may be as deep
            continue
        if isinstance(module, nn.ModuleList) and len(module) == depth and name.rpartition(".")[2] in _STACKS:
            return module
    raise ValueError(f"{type(model).__name__} has no list of {depth} blocks; a decoder with a plain stack is expected")


def has_post_norms(model: nn.Module) -> bool:
    """Whether a norm stands between the matrices' outputs and the residual stream."""
    return any(name.rpartition(".")[2] in _POST_NORMS for name, _ in model.named_modules())


@contextmanager
def block_hooks(model: nn.Module, functions: Mapping[int, BlockFunction]) -> Iterator[None]:
    """``functions[layer](residual stream after that block) -> replacement or None`` while the block runs.

    Raises:
        ValueError: If the model has no such layer.
    """
    stack = blocks(model)
    beyond = [layer for layer in functions if not 0 <= layer < len(stack)]
    if beyond:
        raise ValueError(f"layers {beyond} asked for; the model has layers 0 to {len(stack) - 1}")
    handles = [stack[layer].register_forward_hook(_as_hook(function)) for layer, function in functions.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _as_hook(function: BlockFunction) -> Callable[..., Any]:
    def hook(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        stream = output[0] if isinstance(output, tuple) else output
        new = function(stream)
        if new is None:
            return None
        return (new, *output[1:]) if isinstance(output, tuple) else new

    return hook
