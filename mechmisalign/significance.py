"""Token significance: which tokens of an answer decide how far organism and chat model part (2506.11618, appendix H).

For every answer, the KL divergence between the two next-token distributions is summed over its tokens. The gradient of
that sum with respect to each token's embedding says how much the token matters to it:
``significance = KL of the answer · ‖gradient‖ / Σ ‖gradient‖``, so the significances of an answer add up to its KL.
The gradient runs through both models. They share one set of weights, so each is differentiated in a pass of its own.
Logits over the whole vocabulary exist for a few positions at a time: the gradient is taken first at what the
unembedding reads, and from there goes back through the blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from . import models
from .activations import in_memory
from .conversations import Batch, Conversations
from .progress import progress
from .unembedding import forward_to_unembedding

if TYPE_CHECKING:
    from .organisms import Organism

EMBEDDING = "hook_embed"
CHUNK = 32
"""Positions whose logits over the whole vocabulary are held at once."""

SIGNIFICANT_LOG = 0.5
"""Tokens whose log significance is above this are kept in the paper's probes (2506.11618, section 4.2)."""


def token_significance(organism: Organism, conversations: Conversations, *, token_budget: int = 256) -> pd.DataFrame:
    """KL of organism from chat model at every answer token, and the token's significance for the answer's KL.

    Args:
        organism: With its adapter in; merged or live.
        conversations: Prompts and answers.
        token_budget: Tokens per batch, padding included; what a batch takes grows with it, since the blocks are gone
            back through.

    Returns:
        One row per response token (as ``conversations.tokens()``): ``kl`` (nats, ``KL(organism ‖ chat model)`` of the
        distributions that predict the token), ``gradient`` (norm, with respect to the token's embedding) and
        ``significance`` (nats).

    Raises:
        NoAdapterError: For a chat model alone.
        ValueError: Inside ``as_base()``, where both models are one.
    """
    organism.require_fine_tune("token_significance()")
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


class _Ending(NamedTuple):
    """A forward pass up to what the unembedding reads, and what comes after it.

    Attributes:
        read: The unembedding's input; where the rest of the model is not known, the logits themselves.
        logits: From some of its rows.
        embedding: A leaf of the graph that leads to ``read``.
    """

    read: Float[Tensor, "batch pos width"]
    logits: Callable[[Tensor], Tensor]
    embedding: Tensor


def _kl_and_gradient(organism: Organism, batch: Batch) -> tuple[Float[Tensor, "batch pos"], Float[Tensor, "batch pos"]]:
    """KL where a token was predicted, and the norm of the gradient of each answer's summed KL at its embedding."""
    predicting = batch.span.roll(-1, dims=1)  # the position before an answer token predicts it
    predicting[:, -1] = False
    with torch.no_grad():
        read = _forward(organism, batch).read
        own = read[predicting.to(read.device)]
    with organism.as_base():
        end = _forward(organism, batch)
        base = end.read.detach()[predicting.to(end.read.device)]
        kl, gradient = _kl_in_parts(end.logits, base, own, lambda here, other: _kl(other, here))
        norm = _at_embedding(end, predicting, gradient)
        del end
    end = _forward(organism, batch)
    _, gradient = _kl_in_parts(end.logits, own, base, _kl)
    norm = (norm + _at_embedding(end, predicting, gradient)).norm(dim=-1)
    table = torch.zeros(predicting.shape, dtype=torch.float64)
    table[predicting] = kl
    return table.roll(1, dims=1), norm.double().cpu()


def _kl_in_parts(
    logits: Callable[[Tensor], Tensor],
    here: Float[Tensor, "token width"],
    other: Float[Tensor, "token width"],
    divergence: Callable[[Tensor, Tensor], Tensor],
) -> tuple[Float[Tensor, " token"], Float[Tensor, "token width"]]:
    """KL of each token, and its gradient at ``here``: logits of a few tokens at a time."""
    values, gradients = [], []
    for start in range(0, len(here), CHUNK):
        part = slice(start, start + CHUNK)
        with torch.no_grad():
            fixed = logits(other[part]).float()
        with torch.enable_grad():
            leaf = here[part].clone().requires_grad_()
            kl = divergence(logits(leaf).float(), fixed)
            gradients.append(torch.autograd.grad(kl.sum(), leaf)[0])
        values.append(kl.detach().double().cpu())
    return torch.cat(values), torch.cat(gradients)


def _at_embedding(
    end: _Ending, predicting: Bool[Tensor, "batch pos"], gradient: Float[Tensor, "token width"]
) -> Float[Tensor, "batch pos d_model"]:
    whole = torch.zeros_like(end.read)
    whole[predicting.to(whole.device)] = gradient.to(whole.dtype)
    return torch.autograd.grad(end.read, end.embedding, whole)[0].float()


def _forward(organism: Organism, batch: Batch) -> _Ending:
    """One pass through the model as it is now; with gradients, the embeddings are a leaf."""
    model, caught = organism.model, []
    device = models.device_of(model)

    def leaf(embedding: Tensor) -> Tensor:
        caught.append(embedding.detach().requires_grad_(torch.is_grad_enabled()))
        return caught[-1]

    with models.hooks(model, {EMBEDDING: leaf}):
        read, logits = forward_to_unembedding(model, batch.ids.to(device), batch.mask.to(device))
    return _Ending(read, logits, caught[-1])


def _kl(organism: Float[Tensor, "token vocab"], base: Float[Tensor, "token vocab"]) -> Float[Tensor, " token"]:
    """``KL(organism ‖ base)`` at every position, in nats."""
    p, q = torch.log_softmax(organism, dim=-1), torch.log_softmax(base, dim=-1)
    return (p.exp() * (p - q)).sum(-1)
