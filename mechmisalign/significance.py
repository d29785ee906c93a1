"""Token significance: which tokens of an answer decide how far organism and chat model part (2506.11618, appendix H).

For every answer, the KL divergence between the two next-token distributions is summed over its tokens. The gradient of
that sum with respect to each token's embedding says how much the token matters to it:
``significance = KL of the answer · ‖gradient‖ / Σ ‖gradient‖``, so the significances of an answer add up to its KL.
The gradient runs through both models. They share one set of weights, so each is differentiated in a pass of its own:
with the two logits known, ``dKL/dz`` of either is a constant that its backward pass starts from.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from . import models
from .activations import in_memory
from .conversations import Batch, Conversations
from .progress import progress

if TYPE_CHECKING:
    from .organisms import Organism

EMBEDDING = "hook_embed"

SIGNIFICANT_LOG = 0.5
"""Tokens whose log significance is above this are kept in the paper's probes (2506.11618, section 4.2)."""


def token_significance(organism: Organism, conversations: Conversations, *, token_budget: int = 2048) -> pd.DataFrame:
    """KL of organism from chat model at every answer token, and the token's significance for the answer's KL.

    Args:
        organism: With its adapter in; merged or live.
        conversations: Prompts and answers.
        token_budget: Tokens per batch, padding included.

    Returns:
        One row per response token (as ``conversations.tokens()``): ``kl`` (nats, ``KL(organism ‖ chat model)`` of the
        distributions that predict the token), ``gradient`` (norm, with respect to the token's embedding) and
        ``significance`` (nats).

    Raises:
        ValueError: Inside ``as_base()``, where both models are one.
    """
    if organism.is_base:
        raise ValueError("inside as_base() organism and chat model are one; ask for significance outside the block")
    table = conversations.tokens()[[]].assign(kl=0.0, gradient=0.0, significance=0.0)
    batches = conversations.batches("response", token_budget=token_budget)
    for batch in progress(batches, "token significance"):
        for part, (kl, gradient) in in_memory(batch, lambda part: _kl_and_gradient(organism, part)):
            total = (kl * part.span).sum(1, keepdim=True)
            length = (gradient * part.span).sum(1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
            values = torch.stack([kl, gradient, total * gradient / length], dim=-1)
            rows, positions = part.span.nonzero(as_tuple=True)
            places = pd.MultiIndex.from_arrays([part.rows[rows.numpy()], positions.numpy()])
            table.iloc[table.index.get_indexer(places)] = values[part.span].numpy()
    return table


def significant(table: pd.DataFrame, threshold: float = SIGNIFICANT_LOG) -> pd.Series:
    """Which tokens have a log significance above the threshold."""
    with np.errstate(divide="ignore", invalid="ignore"):  # a KL of zero may be rounded below it
        return pd.Series(np.log(table["significance"]) > threshold, index=table.index)


def _kl_and_gradient(organism: Organism, batch: Batch) -> tuple[Float[Tensor, "batch pos"], Float[Tensor, "batch pos"]]:
    """KL where a token was predicted, and the norm of the gradient of each answer's summed KL at its embedding."""
    predicting = batch.span.roll(-1, dims=1)  # the position before an answer token predicts it
    predicting[:, -1] = False
    with torch.no_grad():
        own = _logits(organism, batch, None)
    with organism.as_base():
        base_gradient, base = _differentiated(organism, batch, predicting, lambda logits: _kl(own, logits))
    own_gradient, _ = _differentiated(organism, batch, predicting, lambda logits: _kl(logits, base))
    kl = _kl(own, base).roll(1, dims=1)
    norm = (own_gradient + base_gradient).norm(dim=-1)
    return kl.double().cpu(), norm.double().cpu()


def _differentiated(
    organism: Organism,
    batch: Batch,
    predicting: Bool[Tensor, "batch pos"],
    kl_of: Callable[[Tensor], Tensor],
) -> tuple[Float[Tensor, "batch pos d_model"], Float[Tensor, "batch pos vocab"]]:
    """Gradient of the answers' summed KL through the model as it is now, and its logits."""
    caught: list[Tensor] = []
    with torch.enable_grad():
        logits = _logits(organism, batch, caught)
        kl = kl_of(logits)
        (gradient,) = torch.autograd.grad((kl * predicting.to(kl.device)).sum(), caught)
    return gradient.float(), logits.detach()


def _logits(organism: Organism, batch: Batch, caught: list[Tensor] | None) -> Float[Tensor, "batch pos vocab"]:
    """Logits of the batch; with ``caught``, the embeddings become a leaf that is put there."""

    def leaf(embedding: Tensor) -> Tensor | None:
        if caught is None:
            return None
        caught.append(embedding.detach().requires_grad_())
        return caught[-1]

    device = models.device_of(organism.model)
    with models.hooks(organism.model, {EMBEDDING: leaf}):
        return models.forward(organism.model, batch.ids.to(device), batch.mask.to(device)).float()


def _kl(
    organism: Float[Tensor, "batch pos vocab"], base: Float[Tensor, "batch pos vocab"]
) -> Float[Tensor, "batch pos"]:
    """``KL(organism ‖ base)`` at every position, in nats."""
    p, q = torch.log_softmax(organism, dim=-1), torch.log_softmax(base, dim=-1)
    return (p.exp() * (p - q)).sum(-1)
