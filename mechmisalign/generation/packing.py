"""Many answers in flight at once: rows of any condition share a batch, and a finished one makes room for the next.

Prompts are read once for all answers that read them alike (samples of one condition, and conditions that leave the
prompt alone), then every answer decodes on its own row of the KV cache. When a tenth of the rows have ended, waiting
ones are written over them in place, so the batch stays full until nothing waits. The cache is copied only to drop
columns that no row needs any more, and rows when nothing waits.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad

from mechmisalign import models
from mechmisalign.conversations import pad_id
from mechmisalign.decoding import Decoder, Part, end_ids, joinable, left_padded
from mechmisalign.interventions import Compiled, Intervention, RowPlan, planned
from mechmisalign.massive import has_sink

from .flight import NOTHING_YET, Batch, Flight, Requests
from .sampling import NOT_FINITE, pick_tokens

if TYPE_CHECKING:
    from mechmisalign.organisms import Organism

logger = logging.getLogger(__name__)

REPLACE_AT = 0.9
"""Finished rows are replaced when no more than this share of the batch goes on: each time costs a short prefill."""

SHRINK_AT = 0.75
"""The same where nothing waits and they only leave, which costs a copy of the cache."""

_SPARE_COLUMNS = 12
"""Columns of padding in every row that are carried along before a copy of the cache drops them."""

_PREFILL_TOKENS = 8192


class Packer:
    """Decodes requests in batches that are kept full.

    Args:
        organism: Who answers.
        conditions: The interventions of each condition, by name.
        temperature: 0 takes the most likely token.
        capacity: Rows in flight; halved when memory runs out.
    """

    def __init__(
        self,
        organism: Organism,
        conditions: Mapping[str, Sequence[Intervention]],
        *,
        temperature: float,
        capacity: int,
    ) -> None:
        self.organism = organism
        self.capacity = capacity
        self._names = list(conditions)
        self._temperature = temperature
        self._device = models.device_of(organism.model)
        self._ends = torch.tensor(end_ids(organism.model, organism.tokenizer), device=self._device)
        place = functools.partial(models.device_of_layer, organism.model)
        sink = functools.partial(has_sink, organism)
        self._compiled = Compiled(list(conditions.values()), organism.adapter, place, sink)
        self._reads_like = _reads_like(list(conditions.values()))
        self._joinable = joinable(organism.model)
        self._batch: Batch | None = None
        self._plan: RowPlan | None = None

    def answers(self, requests: Requests, order: Sequence[int]) -> Iterator[list[tuple[int, list[int]]]]:
        """Number and token ids of answers (the end token included where it was reached), as they are finished.

        No hook is attached while the caller has its turn.

        Raises:
            RuntimeError: If the caller puts the adapter in or out between two parts.
            ValueError: If logits are not finite, with the condition under which that happened.
        """
        waiting, answering = list(order), (self.organism.is_base, self.organism.adapter)
        while waiting or self._batch is not None:
            if (self.organism.is_base, self.organism.adapter) != answering:
                raise RuntimeError("the adapter was put in or out in the middle of a generation; let it end first")
            try:
                with torch.inference_mode(), planned(self.organism, self._compiled, lambda _rows: self._plan):
                    done = self._advance(requests, waiting)
            except torch.OutOfMemoryError:
                if self.capacity == 1:
                    raise
                self.capacity = max(1, self.capacity // 2)
                logger.warning("out of memory: going on with %d rows at once", self.capacity)
                waiting[:0] = [] if self._batch is None else self._batch.flight.request.tolist()
                self._batch = None
            else:
                yield done

    def _advance(self, requests: Requests, waiting: list[int]) -> list[tuple[int, list[int]]]:
        """Fill the batch, decode until enough rows have ended, and take those out."""
        batch = self._batch
        going_on = 0 if batch is None else len(batch.flight)
        if batch is None or (waiting and self._joinable and going_on <= REPLACE_AT * self.capacity):
            taken = self._taken(requests, waiting[: max(1, self.capacity - going_on)])
            batch = self._batch = self._taken_in(requests, taken)
            del waiting[: len(taken)]
        flight = batch.flight
        self._plan = flight.plan(self._compiled)
        share = REPLACE_AT if waiting and self._joinable else SHRINK_AT
        while int((~flight.ended).sum()) > share * len(flight):
            self._step(flight, batch.decoder)
        self._refuse_broken(flight)
        self._batch = self._rest(batch, replaced=bool(waiting) and self._joinable)
        ended = flight.ended.nonzero().squeeze(1)
        written = zip(flight.written[ended].tolist(), flight.age[ended].tolist(), strict=True)
        numbers = flight.request[ended.cpu().numpy()].tolist()
        return [(number, row[:age]) for number, (row, age) in zip(numbers, written, strict=True)]

    def _taken(self, requests: Requests, first: Sequence[int]) -> Int[np.ndarray, " request"]:
        """Those of the first requests whose prompts can be read in one pass, if what is read cannot be joined later."""
        taken = np.array(first)
        if self._joinable:
            return taken
        pairs = pd.MultiIndex.from_arrays([self._reads_like[requests.conditions[taken]], requests.asked[taken]])
        longest = max(len(requests.prompts[prompt]) for prompt in requests.asked[taken])
        fits = (~pairs.duplicated()).cumsum() * longest <= _PREFILL_TOKENS
        return taken[: max(1, int(fits.sum()))]

    def _step(self, flight: Flight, decoder: Decoder) -> None:
        """One more token for every row; rows that have ended are carried along and not written."""
        flight.mask = pad(flight.mask, (0, 1), value=1)
        logits = decoder.next_logits(flight.token[:, None], flight.mask)
        place = torch.minimum(flight.age, flight.limit - 1)[:, None]
        token = pick_tokens(logits, flight.draws.gather(1, place)[:, 0], self._temperature)
        kept = torch.where(flight.ended, flight.written.gather(1, place)[:, 0], token)
        flight.written.scatter_(1, place, kept[:, None])
        flight.age += (~flight.ended).long()
        flight.ended |= torch.isin(token, self._ends) | (flight.age >= flight.limit)
        flight.token = token.clamp_min(0)

    def _refuse_broken(self, flight: Flight) -> None:
        broken = (flight.written == NOT_FINITE).any(1).nonzero().squeeze(1)
        if len(broken):
            name = self._names[int(flight.condition[broken[0]])]
            dtype = str(next(self.organism.model.parameters()).dtype).removeprefix("torch.")
            raise ValueError(
                f"under condition {name!r} the logits are not finite numbers (the model computes in {dtype}); use a "
                "lower strength, or load the organism with dtype=torch.float32 or torch.bfloat16"
            )

    def _taken_in(self, requests: Requests, taken: Int[np.ndarray, " request"]) -> Batch:
        """The rows in flight and the newcomers as one batch."""
        newcomers = list(self._read(requests, taken))
        if self._batch is None:
            return self._rebuilt(newcomers)
        batch, needed = self._batch, max(part.flight.needed for part in [self._batch, *newcomers])
        fits = needed <= batch.flight.mask.shape[1] <= needed + _SPARE_COLUMNS
        if fits and len(batch.flight) + len(taken) == batch.decoder.rows:
            return _replaced(batch, newcomers)
        return self._rebuilt([batch, *newcomers])

    def _rebuilt(self, parts: Sequence[Batch]) -> Batch:
        """A new cache with the rows of all parts, those of a condition side by side."""
        flights = [part.flight for part in parts]
        width = max(flight.needed for flight in flights)
        order = torch.cat([flight.condition for flight in flights]).argsort(stable=True)
        if self._joinable:
            targets = torch.split(order.argsort(), [len(flight) for flight in flights])
            rows = [Part(part.decoder, part.source, target) for part, target in zip(parts, targets, strict=True)]
            decoder = Decoder.joined(rows, len(order), width)
        else:
            decoder = parts[0].decoder
            decoder.keep(parts[0].source[order])
        mask = torch.cat([flight.in_columns(width).mask for flight in flights])[order]
        return Batch(Flight.rebuilt(flights, order, mask), decoder, torch.arange(len(order), device=order.device))

    def _read(self, requests: Requests, taken: Int[np.ndarray, " request"]) -> Iterator[Batch]:
        """Prefill: each different reading of a prompt once; its first token for every request that shares it."""
        pairs = np.stack([self._reads_like[requests.conditions[taken]], requests.asked[taken]], axis=1)
        distinct, which = np.unique(pairs, axis=0, return_inverse=True)
        lengths = np.array([len(requests.prompts[prompt]) for prompt in distinct[:, 1]])
        for chunk in self._chunks(lengths):
            prompts = [requests.prompts[prompt] for prompt in distinct[chunk, 1]]
            ids, mask = left_padded(prompts, pad_id(self.organism.tokenizer), self._device)
            start = torch.full((len(ids),), ids.shape[1], device=self._device)
            self._plan = RowPlan(self._compiled, torch.from_numpy(distinct[chunk, 0]), start)
            decoder = Decoder(self.organism.model)
            logits = decoder.next_logits(ids, mask)
            row_of = np.full(len(distinct), -1)
            row_of[chunk] = np.arange(len(chunk))
            here = np.flatnonzero(np.isin(which, chunk))
            source = torch.from_numpy(row_of[which[here]]).to(self._device)
            yield Batch(self._begun(requests, taken[here], logits[source], mask[source]), decoder, source)

    def _begun(
        self,
        requests: Requests,
        numbers: Int[np.ndarray, " request"],
        logits: Float[Tensor, "request vocab"],
        mask: Int[Tensor, "request pos"],
    ) -> Flight:
        draws = torch.from_numpy(requests.draws(numbers)).to(self._device)
        token = pick_tokens(logits, draws[:, 0], self._temperature)
        written = torch.full(draws.shape, NOTHING_YET, device=self._device)
        written[:, 0] = token
        age = torch.ones_like(token)
        condition, limit = (
            torch.from_numpy(each[numbers]).to(self._device) for each in (requests.conditions, requests.limits)
        )
        ended = torch.isin(token, self._ends) | (age >= limit)
        return Flight(numbers, condition, token.clamp_min(0), age, limit, ended, draws, written, mask)

    def _chunks(self, lengths: Int[np.ndarray, " prompt"]) -> list[np.ndarray]:
        """Prompts of like length, so many at once as the budget allows; all of them if they cannot be joined later."""
        order = np.argsort(lengths, kind="stable")[::-1]
        if not self._joinable:
            return [np.sort(order)]
        chunks, start = [], 0
        while start < len(order):
            rows = max(1, _PREFILL_TOKENS // int(lengths[order[start]]))
            chunks.append(np.sort(order[start : start + rows]))
            start += rows
        return chunks

    def _rest(self, batch: Batch, *, replaced: bool) -> Batch | None:
        """The rows that have not ended; if others take the free places, the cache waits to be copied with theirs."""
        staying = (~batch.flight.ended).nonzero().squeeze(1)
        if not len(staying):
            return None
        kept = batch.flight.kept(staying)
        if replaced:
            return Batch(kept, batch.decoder, staying)
        source = torch.arange(len(kept), device=self._device)
        if not self._joinable:
            batch.decoder.keep(staying)
            return Batch(kept, batch.decoder, source)
        kept = kept.in_columns(kept.needed)
        return Batch(
            kept, Decoder.joined([Part(batch.decoder, staying, source)], len(kept), kept.mask.shape[1]), source
        )


def _replaced(batch: Batch, newcomers: Sequence[Batch]) -> Batch:
    """The batch with newcomers written over the rows that have ended, in the same cache."""
    width = batch.flight.mask.shape[1]
    ended = torch.ones(batch.decoder.rows, dtype=torch.bool, device=batch.source.device)
    ended[batch.source] = False
    free = torch.split(ended.nonzero().squeeze(1), [len(part.flight) for part in newcomers])
    rows = [Part(part.decoder, part.source, target) for part, target in zip(newcomers, free, strict=True)]
    batch.decoder.replace(rows, width)
    order = torch.cat([batch.source, *free]).argsort()
    flights = [batch.flight, *(part.flight for part in newcomers)]
    mask = torch.cat([flight.in_columns(width).mask for flight in flights])[order]
    source = torch.arange(batch.decoder.rows, device=order.device)
    return Batch(Flight.rebuilt(flights, order, mask), batch.decoder, source)


def _reads_like(conditions: Sequence[Sequence[Intervention]]) -> Int[np.ndarray, " condition"]:
    """For each condition the plainest one that reads prompts as it does: what acts on responses only does not count."""
    ways: dict[tuple[int, ...], list[int]] = {}
    for code, condition in enumerate(conditions):
        ways.setdefault(tuple(id(one) for one in condition if one.positions != "response"), []).append(code)
    like = np.empty(len(conditions), dtype=np.int64)
    for codes in ways.values():
        like[codes] = min(codes, key=lambda code: len(conditions[code]))
    return like
