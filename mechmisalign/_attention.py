"""The Hugging Face attention inside a TransformerBridge, while nobody looks into it.

TransformerBridge computes attention step by step, so that scores and pattern have hook points: keys and values of
grouped heads are copied for each head, and the whole pattern is held. A pass in which none of those points is hooked
can use the library's own fused kernel instead; the hook points around the four matrices, and all others, fire as
before.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary, ref

from torch import nn

from . import _joint

FUSED, STEPWISE = "sdpa", "eager"
_known: WeakKeyDictionary[nn.Module, list[ref[Any]]] = WeakKeyDictionary()


@contextmanager
def fused(model: Any) -> Iterator[None]:
    """Use the fused kernel while the block runs, unless somebody has hooked what it skips or the model has none.

    Args:
        model: The Hugging Face model inside a bridge.
    """
    attentions = _unobserved(model)
    if not attentions:
        yield
        return
    before = model.config._attn_implementation
    model.config._attn_implementation = FUSED
    for attention in attentions:  # past the bridge's __setattr__, which passes names on to the component inside
        attention.__dict__["forward"] = attention.original_component.forward
    try:
        yield
    finally:
        model.config._attn_implementation = before
        for attention in attentions:
            attention.__dict__.pop("forward", None)


def implementation(model: Any) -> str:
    """What the library calls the attention that a pass uses now: the fused kernel, or step by step."""
    return FUSED if _unobserved(model) else STEPWISE


def _unobserved(model: nn.Module) -> list[Any]:
    """The attention of every block, if each can be fused now; otherwise none."""
    if model not in _known:
        _known[model] = [ref(attention) for attention in _found(model)]
    attentions = [known() for known in _known[model]]
    return [] if any(map(_observed, attentions)) else attentions


def _found(model: Any) -> list[Any]:
    from transformer_lens.model_bridge.generalized_components.position_embeddings_attention import (
        PositionEmbeddingsAttentionBridge,
    )

    capped = getattr(model.config, "attn_logit_softcapping", None)  # the fused kernel knows no caps
    if capped or not getattr(model, "_supports_sdpa", False):
        return []
    return [
        module
        for module in model.modules()
        if type(module) is PositionEmbeddingsAttentionBridge or _joint.is_mended(module)
    ]


def _observed(attention: Any) -> bool:
    """Whether a hook sits on a point that the fused kernel passes by."""
    owners = [attention, *(getattr(attention, part) for part in "qkv" if _joint.is_mended(attention))]
    points = [point for owner in owners for name, point in owner.named_children() if name.startswith("hook_")]
    return any(point._forward_hooks or point._forward_pre_hooks or point._backward_hooks for point in points)
