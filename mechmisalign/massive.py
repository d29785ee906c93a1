"""Massive activations: tokens whose residual norm is many times that of the others (2402.17762).

Most language models make the first token of a text an *attention sink* (2309.17453): its residual stream holds a few
huge coordinates, whatever the token is, and other tokens attend to it where they have nothing else to attend to. An
edit of that token, such as the ablation of any direction at all, breaks the model, and its norm hides those of the
others. So ablation, its random controls and mean activations leave it alone by default (``positions="non_sink"``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from . import models
from ._batching import Batch
from .conversations import Conversations, render_prompts

if TYPE_CHECKING:
    from .organisms import Organism

MASSIVE = 10.0
"""A token's residual norm is massive above so many times the median of its conversation."""

PROBES = ("What is the capital of France?", "Please write two sentences about a garden in the rain.")

COLUMNS = ("conversation", "position", "token", "layer", "norm", "ratio", "dimension", "share")


@dataclass(frozen=True, eq=False)
class MassiveActivations:
    """Which tokens have massive activations.

    Attributes:
        tokens: One row for each such token and layer: ``conversation, position, token, layer, norm``, ``ratio`` (to the
            median norm of the conversation's tokens), ``dimension`` (of the largest coordinate) and ``share`` (of the
            squared norm that it holds).
        sink: Whether the first token is massive in every conversation: it is the model's attention sink.
        conversations: How many were read.
        threshold: Ratio above which a norm is massive.
    """

    tokens: pd.DataFrame
    sink: bool
    conversations: int
    threshold: float

    @property
    def elsewhere(self) -> pd.DataFrame:
        """Massive tokens other than the first of a conversation: no default leaves these alone."""
        return self.tokens[self.tokens["position"] != 0]

    def __str__(self) -> str:
        if self.tokens.empty:
            return f"no token's residual norm is above {self.threshold:g} times the median of its conversation"
        top = self.tokens.loc[self.tokens["ratio"].idxmax()]
        others = self.elsewhere[["conversation", "position"]].drop_duplicates()
        return (
            f"the first token is {'an' if self.sink else 'no'} attention sink; the largest residual norm is "
            f"{top['ratio']:.0f} times the median of its conversation ({top['token']!r} at position {top['position']}, "
            f"layer {top['layer']}, dimension {top['dimension']}); {len(others)} other tokens are massive"
        )


def massive_activations(
    organism: Organism,
    texts: Conversations | Sequence[str] = PROBES,
    *,
    threshold: float = MASSIVE,
) -> MassiveActivations:
    """Find tokens whose residual norm is massive, in every layer.

    Args:
        organism: The model to read.
        texts: Conversations, or prompts that are rendered by the chat template.
        threshold: Ratio to the median norm of the conversation's tokens above which a norm is massive.

    Raises:
        ValueError: If there is no text, or the threshold is not above 1.

    Example:
        >>> print(mm.massive_activations(organism))  # doctest: +SKIP
    """
    if not threshold > 1:
        raise ValueError(f"threshold is {threshold}; expected a ratio above 1, such as {MASSIVE:g}")
    ids = (
        [texts.ids(row) for row in range(len(texts))]
        if isinstance(texts, Conversations)
        else [list(row) for row in render_prompts(list(texts), organism.tokenizer)]
    )
    if not ids:
        raise ValueError("there is no text to read; give prompts or conversations")
    found = [row for number, one in enumerate(ids) for row in _massive_in(organism, number, one, threshold)]
    table = pd.DataFrame(found, columns=list(COLUMNS))
    firsts = table.loc[table["position"] == 0, "conversation"].nunique()
    return MassiveActivations(table, firsts == len(ids), len(ids), threshold)


def has_sink(organism: Organism) -> bool:
    """Whether the model makes the first token of a conversation an attention sink; found out once for an organism."""
    if organism.attention_sink is not None:
        return organism.attention_sink
    found = massive_activations(organism).sink
    if not organism.applied:  # an open edit may have taken it away for now
        organism.attention_sink = found
    return found


def without_sink(organism: Organism, batch: Batch) -> Batch:
    """The batch with the attention sink, if the model has one, out of its span (padding is on the right)."""
    if not bool(batch.span[:, 0].any()) or not has_sink(organism):
        return batch
    span = batch.span.clone()
    span[:, 0] = False
    return Batch(batch.rows, batch.ids, batch.mask, span)


@torch.no_grad()
def first_token_is_sink(model: nn.Module, ids: Int[Tensor, "batch pos"], mask: Int[Tensor, "batch pos"]) -> bool:
    """The same of a Hugging Face model that is being trained, seen on one batch that is padded on the right."""
    with torch.random.fork_rng():
        states = model(input_ids=ids, attention_mask=mask, use_cache=False, output_hidden_states=True).hidden_states
    return any(bool((_ratios(resid, mask)[:, 0] > MASSIVE).all()) for resid in states)


def _ratios(resid: Float[Tensor, "batch pos d_model"], mask: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos"]:
    """Norm of each token, as a multiple of the median of its row."""
    norms = resid.float().norm(dim=-1)
    median = norms.masked_fill(mask.to(norms.device) == 0, float("nan")).nanmedian(dim=1, keepdim=True).values
    return norms / median.clamp_min(torch.finfo(torch.float32).tiny)


def _massive_in(
    organism: Organism, number: int, ids: Sequence[int], threshold: float
) -> list[tuple[int, int, str, int, float, float, int, float]]:
    """A row for each massive token and layer of one conversation."""
    rows = []
    for layer, resid in _residuals(organism, ids).items():
        norms = resid.norm(dim=-1)
        ratios = _ratios(resid[None], torch.ones(1, len(ids), dtype=torch.long, device="cpu"))[0]
        for position in (ratios > threshold).nonzero()[:, 0].tolist():
            largest, dimension = resid[position].abs().max(0)
            norm = float(norms[position])
            token = str(organism.tokenizer.decode([ids[position]]))
            share = (float(largest) / norm) ** 2
            rows.append((number, position, token, layer, norm, float(ratios[position]), int(dimension), share))
    return rows


@torch.inference_mode()
def _residuals(organism: Organism, ids: Sequence[int]) -> dict[int, Float[Tensor, "pos d_model"]]:
    """The residual stream of one conversation after every layer, float32, on the CPU."""
    kept: dict[int, Tensor] = {}

    def reader(layer: int) -> models.HookFunction:
        def read(resid: Tensor) -> None:
            kept[layer] = resid[0].float().cpu()

        return read

    device = models.device_of(organism.model)
    row = torch.tensor([list(ids)], dtype=torch.long, device=device)
    readers = {layer: reader(layer) for layer in range(models.n_layers(organism.model))}
    models.run_until(organism.model, row, torch.ones_like(row), readers)
    return kept
