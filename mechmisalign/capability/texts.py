"""Loss and KL on neutral text, under many conditions.

For every counted token, ``loss = -log q(token)`` and ``kl = Σ_v p(v) (log p(v) - log q(v))`` over the whole vocabulary,
where ``p`` predicts it in the chat model and ``q`` under the condition; both in nats. The chat model's logits are
computed once for all conditions. They are kept in the model's own precision for as many texts as fit a fixed size, and
turned into float32 log-probabilities a few positions at a time, so memory does not grow with texts or conditions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from mechmisalign import models
from mechmisalign._batching import Batch, batches_by_length, pad_id
from mechmisalign.activations import in_memory
from mechmisalign.conversations import Conversations
from mechmisalign.generation import Conditions, as_set
from mechmisalign.generation.rows import refuse_numbers_per_row
from mechmisalign.interventions import Intervention
from mechmisalign.progress import progress_bar
from mechmisalign.statistics.shares import percentiles, resampled, resampled_ratios

if TYPE_CHECKING:
    from mechmisalign.organisms import Organism

Counted = Callable[[pd.DataFrame], np.ndarray]
"""Takes ``Conversations.tokens()``, says of each token whether it counts."""

REFERENCE_BYTES = 1 << 30
"""The chat model's logits that are held at a time, on the CPU."""

CHUNK = 256
"""Positions whose log-probabilities are in float32 at a time."""


class _Texts(NamedTuple):
    """Texts as token rows.

    Attributes:
        ids: Token ids of each text.
        counted: The positions of each text whose tokens count.
        response_start: Where each response begins; None for plain text.
        pad: Id of the padding.
    """

    ids: list[list[int]]
    counted: list[list[int]]
    response_start: Int[Tensor, " text"] | None
    pad: int


class _Reference(NamedTuple):
    """A batch and the chat model's logits where it predicts a counted token, ``[token vocab]``, on the CPU."""

    batch: Batch
    logits: Float[Tensor, "token vocab"]


class TextSums(NamedTuple):
    """Loss and KL of each text under each condition, in nats, summed over its counted tokens.

    Attributes:
        loss: Cross entropy, ``[condition text]``.
        kl: ``KL(chat model ‖ condition)``, ``[condition text]``.
        tokens: How many tokens of each text count.
    """

    loss: Float64[np.ndarray, "condition text"]
    kl: Float64[np.ndarray, "condition text"]
    tokens: Float64[np.ndarray, " text"]


def text_costs(
    organism: Organism,
    conditions: Conditions | None,
    texts: Conversations | pd.DataFrame | Sequence[str],
    *,
    counted: Counted | None = None,
    system: str | None = None,
    token_budget: int = 1024,
    resamples: int = 2000,
    seed: int = 0,
) -> pd.DataFrame:
    """Loss on neutral text and KL from the chat model, per token, under every condition.

    Call it outside ``organism.apply()``, which would edit the chat model too; name the interventions as conditions.

    Args:
        organism: Who is measured (inside ``organism.as_base()``: the chat model).
        conditions: Named sets of interventions; by default one, ``"none"``, without any.
        texts: Conversations (or their frame, with ``prompt`` and ``response``), of which the tokens of the responses
            count; or plain texts, of which every token counts that is predicted from one before. A plain text has no
            prompt, so interventions on positions ``"prompt"`` or ``"response"`` are refused for it.
        counted: Which response tokens count; all by default.
        system: System prompt of conversations that are given as a frame.
        token_budget: Tokens per batch, padding included; halved by itself when memory runs out.
        resamples: Bootstrap resamples of whole texts.
        seed: Of the resamples.

    Returns:
        One row per condition: ``condition, loss, loss_low, loss_high, kl, kl_low, kl_high, texts``. ``loss`` is the
        mean cross entropy and ``kl`` the mean ``KL(chat model ‖ condition)``, in nats per token; NaN ends for one text.

    Raises:
        ValueError: If nothing counts, a condition does not fit the texts, or there is none.
    """
    named: Conditions = {"none": ()} if conditions is None else conditions
    sums = text_sums(organism, named, texts, counted=counted, system=system, token_budget=token_budget)
    columns: dict[str, object] = {"condition": list(named)}
    for name, values in (("loss", sums.loss), ("kl", sums.kl)):
        columns |= dict(
            zip((name, f"{name}_low", f"{name}_high"), mean_interval(values, sums.tokens, resamples, seed), strict=True)
        )
    return pd.DataFrame(columns | {"texts": int((sums.tokens > 0).sum())})


def text_sums(
    organism: Organism,
    conditions: Conditions,
    texts: Conversations | pd.DataFrame | Sequence[str],
    *,
    counted: Counted | None = None,
    system: str | None = None,
    token_budget: int = 1024,
) -> TextSums:
    """What :func:`text_costs` averages, text by text: to compare conditions on the same texts.

    Raises:
        ValueError: As for :func:`text_costs`.
    """
    if not conditions:
        raise ValueError("no condition to measure; leave `conditions` out for the plain model")
    refuse_numbers_per_row(conditions)
    sets = [as_set(interventions) for interventions in conditions.values()]
    read = _read(organism, texts, counted, system)
    if read.response_start is None:
        _refuse_parts_of_plain_text(conditions)
    loss, kl = _sums(organism, sets, read, token_budget)
    return TextSums(loss, kl, np.array([len(positions) for positions in read.counted], dtype=float))


def mean_interval(
    sums: Float64[np.ndarray, "cell cluster"], sizes: Float64[np.ndarray, " cluster"], resamples: int, seed: int
) -> tuple[Float64[np.ndarray, " cell"], Float64[np.ndarray, " cell"], Float64[np.ndarray, " cell"]]:
    """Mean per unit of each cell, and its 95 % interval from resampling clusters; NaN ends where there is only one."""
    held = np.broadcast_to(sizes, sums.shape)
    low, high = np.full((2, len(sums)), np.nan)
    if (sizes > 0).sum() > 1:
        for cells, present, weights in resampled(held, np.arange(len(sums)), resamples, seed):
            at = np.ix_(cells, present)
            low[cells], high[cells] = percentiles(resampled_ratios(sums[at], held[at], weights))
    return sums.sum(1) / sizes.sum(), low, high


def _read(
    organism: Organism,
    texts: Conversations | pd.DataFrame | Sequence[str],
    counted: Counted | None,
    system: str | None,
) -> _Texts:
    pad = pad_id(organism.tokenizer)
    if isinstance(texts, pd.DataFrame):
        texts = Conversations(texts, organism.tokenizer, system=system)
    if not isinstance(texts, Conversations):
        if counted is not None:
            raise ValueError("`counted` chooses among the tokens of responses; plain texts have none")
        ids = organism.tokenizer(list(texts))["input_ids"] if len(texts) else []
        read = _Texts(ids, [list(range(1, len(row))) for row in ids], None, pad)
    else:
        table = texts.tokens("response")
        chosen = table.index if counted is None else table.index[counted(table)]
        positions: list[list[int]] = [[] for _ in range(len(texts))]
        for row, position in chosen:
            positions[row].append(position)
        start = torch.from_numpy(texts.spans["response_start"].to_numpy(np.int64, copy=True))
        read = _Texts([texts.ids(row) for row in range(len(texts))], positions, start, pad)
    if not any(read.counted):
        raise ValueError(f"no token counts in {len(read.ids)} texts; give texts of two tokens or more")
    return read


def _refuse_parts_of_plain_text(conditions: Conditions) -> None:
    for name, interventions in conditions.items():
        for one in as_set(interventions):
            if one.positions in ("prompt", "response"):
                raise ValueError(
                    f"condition {name!r} acts on positions={one.positions!r}, but plain texts have no prompt and no "
                    "response; give conversations (a frame with prompt and response)"
                )


def _sums(
    organism: Organism, sets: Sequence[Sequence[Intervention]], texts: _Texts, token_budget: int
) -> Float64[np.ndarray, "measure condition text"]:
    """Summed loss and KL of each text under each condition."""
    sums = torch.zeros(2, len(sets), len(texts.ids), dtype=torch.float64)
    batches = batches_by_length(texts.ids, texts.counted, texts.pad, token_budget=token_budget)
    with progress_bar("loss and KL", len(texts.ids) * len(sets), "text") as bar:
        for references in _references(organism, batches):
            for condition, interventions in enumerate(sets):
                for reference in references:
                    batch = reference.batch
                    start = None if texts.response_start is None else texts.response_start[torch.from_numpy(batch.rows)]
                    with organism.apply(*interventions, response_start=start):
                        own = _predicting(organism, batch)
                    row_of = torch.from_numpy(batch.rows)[batch.span.nonzero()[:, 0]]
                    sums[:, condition].index_add_(1, row_of, _loss_and_kl(own, reference))
                    bar.update(len(batch.rows))
    return sums.numpy()


def _references(organism: Organism, batches: Iterator[Batch]) -> Iterator[list[_Reference]]:
    """The chat model's logits for as many batches as may be held; the adapter is taken out once for all of them."""
    while True:
        held: list[_Reference] = []
        size = 0
        with organism.as_base():
            for batch in batches:
                for part, logits in in_memory(batch, lambda part: _predicting(organism, part).cpu()):
                    held.append(_Reference(part, logits))
                    size += logits.nbytes
                if size >= REFERENCE_BYTES:
                    break
        if not held:
            return
        yield held


@torch.inference_mode()
def _predicting(organism: Organism, batch: Batch) -> Float[Tensor, "token vocab"]:
    """Logits at the positions before the counted tokens, which predict them, row by row."""
    device = models.device_of(organism.model)
    logits = models.forward(organism.model, batch.ids.to(device), batch.mask.to(device))
    return logits[:, :-1][batch.span[:, 1:].to(logits.device)]


@torch.inference_mode()
def _loss_and_kl(own: Float[Tensor, "token vocab"], reference: _Reference) -> Float64[Tensor, "measure token"]:
    """Loss and KL of each counted token, on the CPU."""
    targets = reference.batch.ids[reference.batch.span].to(own.device)
    parts = []
    for start in range(0, len(own), CHUNK):
        here = slice(start, start + CHUNK)
        q = torch.log_softmax(own[here].float(), dim=-1)
        p = torch.log_softmax(reference.logits[here].to(own.device).float(), dim=-1)
        loss = -q.gather(-1, targets[here, None]).squeeze(-1)
        parts.append(torch.stack([loss, (p.exp() * (p - q)).sum(-1)]).double().cpu())
    return torch.cat(parts, dim=1)
