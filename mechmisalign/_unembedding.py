"""A forward pass that stops before the unembedding, whose logits over all words are often most of the memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from .loading.wrappers import text_config

_SAME = 1e-4
"""Largest difference from the model's own logits, as a share of the largest, in float32."""


def forward_to_unembedding(
    forward: Callable[[], Tensor], hf: Any
) -> tuple[Float[Tensor, "batch pos width"], Callable[[Tensor], Tensor]]:
    """What the unembedding reads in one pass, and the function that makes logits of it.

    The function is compared with the model's own logits of the first position. Where they differ (a head of an unknown
    kind), what is given is the logits themselves and the identity.

    Args:
        forward: Computes the model's logits, ``[batch pos vocab]``.
        hf: The Hugging Face model in which it does.
    """
    head = hf.get_output_embeddings()
    if head is None:
        return forward(), _unchanged
    read: list[Tensor] = []

    def keep(_: Any, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        read.append(given[0])
        return (given[0][:, :1], *given[1:])

    handle = head.register_forward_pre_hook(keep)
    try:
        own = forward()
    finally:
        handle.remove()

    def logits(rows: Tensor) -> Tensor:
        return _scaled(head(rows), hf)

    if len(read) != 1 or not _agree(logits, read[0][:, :1], own):
        return forward(), _unchanged
    return read[0], logits


def _scaled(logits: Tensor, hf: Any) -> Tensor:
    """What the families do to logits: Cohere and Granite scale them, Gemma caps them."""
    config = text_config(hf.config)
    logits = logits * (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
    cap = getattr(config, "final_logit_softcapping", None)
    return logits if not cap else torch.tanh(logits / cap) * cap


@torch.no_grad()
def _agree(logits: Callable[[Tensor], Tensor], read: Tensor, own: Tensor) -> bool:
    found = logits(read).to(own.device)
    if found.shape != own.shape:
        return False
    tolerance = _SAME if own.dtype == torch.float32 else 0.05
    return bool((found - own).abs().max() <= tolerance * own.abs().max())


def _unchanged(logits: Tensor) -> Tensor:
    return logits
