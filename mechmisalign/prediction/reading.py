"""One pass over conversations: how far each lies along some directions, and how surprising its span is to the model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from mechmisalign import models
from mechmisalign._batching import Batch
from mechmisalign.activations import in_memory
from mechmisalign.conversations import Conversations, Span
from mechmisalign.progress import progress

CHUNK = 256
"""Positions whose log-probabilities are in float32 at a time."""


class Read(NamedTuple):
    """What was read of each conversation.

    Attributes:
        projection: Mean over the span's tokens of ``x · v̂``, ``[row layer direction]``.
        loss: Mean cross entropy of the span's tokens in nats, ``[row]``; NaN where it was not asked for.
        tokens: Tokens of the span, ``[row]``.
    """

    projection: Float64[np.ndarray, "row layer direction"]
    loss: Float64[np.ndarray, " row"]
    tokens: np.ndarray


def read(
    model: Any,
    conversations: Conversations,
    units: Mapping[int, Float[Tensor, "direction d_model"]],
    *,
    span: Span,
    loss: bool,
    token_budget: int,
) -> Read:
    """Project every conversation onto unit vectors, layer by layer.

    Nothing of size ``[row token d_model]`` is kept: each batch leaves one number per row, layer and direction. Without
    the loss the pass ends after the last layer that is asked for.

    Args:
        model: A TransformerLens model.
        conversations: What it reads.
        units: Layer to unit vectors.
        span: Which tokens count.
        loss: Whether the loss is wanted.
        token_budget: Tokens per batch, padding included; halved by itself when memory runs out.
    """
    directions = len(next(iter(units.values())))
    projection = np.zeros((len(conversations), len(units), directions))
    losses, tokens = np.full(len(conversations), np.nan), np.zeros(len(conversations), dtype=np.int64)
    for batch in progress(conversations.batches(span, token_budget=token_budget), "reading projections"):
        for part, (sums, loss_sums) in in_memory(batch, lambda part: _sums(model, part, units, loss)):
            counts = part.span.sum(1)
            tokens[part.rows] = counts.numpy()
            projection[part.rows] = (sums / counts[:, None, None]).numpy()
            if loss_sums is not None:
                losses[part.rows] = (loss_sums / counts).numpy()
    return Read(projection, losses, tokens)


@torch.inference_mode()
def _sums(
    model: Any, batch: Batch, units: Mapping[int, Tensor], loss: bool
) -> tuple[Float64[Tensor, "batch layer direction"], Float64[Tensor, " batch"] | None]:
    """Sums over each row's span, on the CPU."""
    device = models.device_of(model)
    weights = batch.span.to(device, torch.float32)
    sums: dict[int, Tensor] = {}

    def reader(layer: int) -> models.HookFunction:
        def project(resid: Tensor) -> None:
            along = resid.float() @ units[layer].to(resid.device).T
            sums[layer] = torch.einsum("bp,bpk->bk", weights.to(resid.device), along)

        return project

    hooks = {layer: reader(layer) for layer in units}
    ids, mask = batch.ids.to(device), batch.mask.to(device)
    losses = None
    if loss:
        with models.residual_hooks(model, hooks):
            losses = _loss_sums(models.forward(model, ids, mask), batch)
    else:
        models.run_until(model, ids, mask, hooks)
    return torch.stack([sums[layer].cpu() for layer in units], dim=1).double(), losses


def _loss_sums(logits: Float[Tensor, "batch pos vocab"], batch: Batch) -> Float64[Tensor, " batch"]:
    """Summed cross entropy of the span's tokens, row by row."""
    counted = batch.span[:, 1:]
    predicting = logits[:, :-1][counted.to(logits.device)]
    targets = batch.ids[:, 1:][counted].to(logits.device)
    parts = [
        torch.nn.functional.cross_entropy(
            predicting[at : at + CHUNK].float(), targets[at : at + CHUNK], reduction="none"
        )
        for at in range(0, len(targets), CHUNK)
    ]
    rows = counted.nonzero()[:, 0]
    return torch.zeros(len(batch.rows), dtype=torch.float64).index_add_(0, rows, torch.cat(parts).double().cpu())
