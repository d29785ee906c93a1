"""One streaming pass over conversations: from text to moments, at about the cost of the bare forward pass.

Nothing of size ``[example layer token]`` is kept: each batch leaves one sum per row and layer, added up in float64. The
pass ends after the last layer that is asked for, so the blocks behind it and the unembedding are never computed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float64
from torch import Tensor

from . import models
from ._layers import Layers, layer_numbers
from .conversations import Batch, Conversations, Span
from .massive import without_sink
from .moments import Moments
from .progress import progress

if TYPE_CHECKING:
    from .organisms import Organism

logger = logging.getLogger(__name__)

Result = TypeVar("Result")


def collect(
    organism: Organism,
    conversations: Conversations,
    *,
    span: Span = "response",
    by: str | Sequence[str] = "label",
    layers: Layers | None = None,
    first: int | None = None,
    positions: Literal["all", "non_sink"] = "non_sink",
    token_budget: int = 2048,
) -> Moments:
    """Moments of the residual stream over one span of every conversation, for each group and layer.

    Args:
        organism: The model to read (inside ``organism.as_base()`` it is the chat model).
        conversations: What it reads. Every token of the span counts once (2506.11618, section 3.1).
        span: ``"response"`` (without header and end token), ``"prompt"``, ``"template"`` or ``"all"``.
        by: Grouping columns of the conversations' frame, the class first. Add ``"prompt_id"`` for matched differences
            and intervals, and the sample for probes.
        layers: Layers to read; all by default.
        first: Read only the first so many tokens of the span.
        positions: ``"non_sink"`` leaves out the first token of a conversation where the model makes it an attention
            sink, whose activations are no mean's business; ``"all"`` counts every token of the span.
        token_budget: Tokens per batch, padding included; halved by itself when memory runs out.

    Raises:
        ValueError: On unknown columns, spans or layers.
    """
    if positions not in ("all", "non_sink"):
        raise ValueError(f"positions must be 'all' or 'non_sink', got {positions!r}")
    columns = [by] if isinstance(by, str) else list(by)
    codes, groups = _grouping(conversations.frame, columns)
    chosen = checked_layers(layers, models.n_layers(organism.model))
    sums = torch.zeros(len(groups), len(chosen), models.d_model(organism.model), dtype=torch.float64, device="cpu")
    norms = torch.zeros(len(groups), len(chosen), dtype=torch.float64, device="cpu")
    tokens = np.zeros(len(groups), dtype=np.int64)
    for batch in progress(conversations.batches(span, token_budget=token_budget, first=first), "reading activations"):
        batch = without_sink(organism, batch) if positions == "non_sink" else batch
        for part, (row_sums, row_norms) in in_memory(batch, lambda part: _row_sums(organism.model, part, chosen)):
            index = torch.from_numpy(codes[part.rows])
            sums.index_add_(0, index, row_sums)
            norms.index_add_(0, index, row_norms)
            np.add.at(tokens, codes[part.rows], part.span.sum(1).numpy())
    _refuse_untouched(tokens, groups, span)
    counts = torch.from_numpy(tokens).double()
    return Moments(
        groups.assign(tokens=tokens),
        sums / counts[:, None, None],
        norms / counts[:, None],
        chosen,
        header_of(organism, conversations, span, first),
    )


def in_memory(batch: Batch, compute: Callable[[Batch], Result]) -> Iterator[tuple[Batch, Result]]:
    """The batch with what ``compute`` makes of it; one that does not fit in memory is computed in two halves."""
    try:
        yield batch, compute(batch)
    except torch.OutOfMemoryError:
        if len(batch.rows) == 1:
            raise
        logger.warning("out of memory with %d rows of %d tokens: halving the batch", *batch.ids.shape)
    else:
        return
    middle = len(batch.rows) // 2
    for half in (slice(None, middle), slice(middle, None)):
        yield from in_memory(batch.part(half), compute)


@torch.inference_mode()
def _row_sums(
    model: Any, batch: Batch, layers: tuple[int, ...]
) -> tuple[Float64[Tensor, "batch layer d_model"], Float64[Tensor, "batch layer"]]:
    device = models.device_of(model)
    weights = batch.span.to(device, torch.float32)
    sums: dict[int, Tensor] = {}
    norms: dict[int, Tensor] = {}

    def reader(layer: int) -> models.HookFunction:
        def read(resid: Tensor) -> None:
            resid = resid.float()  # a row's sum in float32, everything beyond a row in float64
            here = weights.to(resid.device)
            sums[layer] = torch.bmm(here.unsqueeze(1), resid).squeeze(1)
            norms[layer] = (torch.linalg.vector_norm(resid, dim=-1) * here).sum(1)

        return read

    models.run_until(model, batch.ids.to(device), batch.mask.to(device), {layer: reader(layer) for layer in layers})
    return _stacked(sums, layers), _stacked(norms, layers)


def _stacked(by_layer: dict[int, Tensor], layers: tuple[int, ...]) -> Tensor:
    return torch.stack([by_layer[layer].cpu() for layer in layers], dim=1).double()


def _grouping(frame: pd.DataFrame, columns: list[str]) -> tuple[np.ndarray, pd.DataFrame]:
    missing = [column for column in columns if column not in frame.columns]
    if missing:
        raise ValueError(f"no column {missing} to group by; the conversations have {list(frame.columns)}")
    grouped = frame.groupby(columns, sort=True, dropna=False, observed=True)
    groups = grouped.size().reset_index()[columns]
    return grouped.ngroup().to_numpy(np.int64), groups


def checked_layers(layers: Layers | None, n_layers: int) -> tuple[int, ...]:
    """The layers asked for, each once and in order; all by default.

    Raises:
        ValueError: If one is not in the model, or there is none.
    """
    chosen = tuple(range(n_layers)) if layers is None else tuple(sorted(set(layer_numbers(layers))))
    if chosen[0] < 0 or chosen[-1] >= n_layers:
        raise ValueError(f"layers must be within 0 to {n_layers - 1}, got {list(chosen)}")
    return chosen


def _refuse_untouched(tokens: np.ndarray, groups: pd.DataFrame, span: str) -> None:
    if (tokens == 0).any():
        empty = groups[tokens == 0].to_dict("records")[:3]
        raise ValueError(f"no {span} tokens in {int((tokens == 0).sum())} group(s), e.g. {empty}; drop those rows")


def header_of(organism: Organism, conversations: Conversations, span: Span, first: int | None) -> dict[str, Any]:
    """Where activations come from, as JSON values for the headers of what is made of them."""
    return {
        **organism.provenance,
        "span": span if first is None else f"{span}[:{first}]",
        "system": conversations.system,
        "data_hash": conversations.data_hash,
        "versions": {name: version(name) for name in ("mechmisalign", "torch", "transformers", "transformer-lens")},
    }
