"""Many answers in flight at once: rows of any condition share a batch, and a finished one makes room for the next.

Prompts are read once for all answers that read them alike (samples of one condition, and conditions that leave the
prompt alone), then every answer decodes on its own row of the KV cache. When a quarter of the rows have ended they are
taken out and waiting ones take their place, so the batch stays full until nothing waits.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad

from mechmisalign import models
from mechmisalign.conversations import pad_id
from mechmisalign.decoding import Decoder, Part, end_ids, joinable, left_padded
from mechmisalign.interventions import Compiled, Intervention, RowPlan, planned

from .sampling import pick_tokens

if TYPE_CHECKING:
    from mechmisalign.organisms import Organism

logger = logging.getLogger(__name__)

RENEW_AT = 0.75
"""Finished rows leave when no more than this share of the batch goes on: leaving costs a copy of the cache."""

_PREFILL_TOKENS = 8192


@dataclass(frozen=True)
class Requests:
    """The answers that are wanted, by number.

    Attributes:
        prompts: Token ids of each different prompt, up to where a response begins.
        asked: Which of them each request asks.
        conditions: The condition of each request.
        draws: Gives uniform numbers ``[request token]`` of the requests with these numbers.
    """

    prompts: Sequence[Sequence[int]]
    asked: Int[np.ndarray, " request"]
    conditions: Int[np.ndarray, " request"]
    draws: Callable[[np.ndarray], Float[np.ndarray, "request token"]]


@dataclass
class _Flight:
    """The rows in flight, one entry per row of the batch; ``mask`` covers the cache's columns.

    ``age`` counts tokens written; the first comes from the prefill, and the last is not in the cache yet.
    """

    request: np.ndarray
    condition: Int[Tensor, " batch"]
    token: Int[Tensor, " batch"]
    age: Int[Tensor, " batch"]
    ended: Tensor
    draws: Float[Tensor, "batch token"]
    written: Int[Tensor, "batch token"]
    mask: Int[Tensor, "batch pos"]

    def __len__(self) -> int:
        return len(self.request)

    @property
    def needed(self) -> int:
        """Columns that these rows need: those that are padding in all of them are not counted."""
        return int(self.mask.sum(1).max())

    def plan(self, compiled: Compiled) -> RowPlan:
        """The plan of the batch as it stands."""
        return RowPlan(compiled, self.condition, self.mask.shape[1] - (self.age - 1))

    def fields(self) -> tuple[Tensor, ...]:
        """What belongs to the rows but does not grow: everything but numbers and mask."""
        return self.condition, self.token, self.age, self.ended, self.draws, self.written

    def kept(self, rows: Tensor) -> _Flight:
        """These rows only, in all columns."""
        return self.rebuilt([self], rows, self.mask[rows])

    @staticmethod
    def rebuilt(flights: Sequence[_Flight], rows: Tensor, mask: Tensor) -> _Flight:
        """These rows of several flights, counted through, with a mask of their own."""
        numbers = np.concatenate([flight.request for flight in flights])[rows.cpu().numpy()]
        condition, token, age, ended, draws, written = (
            torch.cat(fields)[rows] for fields in zip(*(flight.fields() for flight in flights), strict=True)
        )
        return _Flight(numbers, condition, token, age, ended, draws, written, mask)

    def in_columns(self, width: int) -> _Flight:
        """The same rows in so many columns: padding on the left is added, or cut."""
        return replace(self, mask=pad(self.mask[:, -width:], (max(0, width - self.mask.shape[1]), 0)))


_Newcomers = tuple[_Flight, Decoder, Tensor]
"""Rows that were just read, the decoder that read their prompts, and the row of it that each goes on from."""


class Packer:
    """Decodes requests in batches that are kept full.

    Args:
        organism: Who answers.
        conditions: The interventions of each condition.
        max_new_tokens: Tokens after which an answer is cut.
        temperature: 0 takes the most likely token.
        capacity: Rows in flight; halved when memory runs out.
    """

    def __init__(
        self,
        organism: Organism,
        conditions: Sequence[Sequence[Intervention]],
        *,
        max_new_tokens: int,
        temperature: float,
        capacity: int,
    ) -> None:
        self.organism = organism
        self.capacity = capacity
        self._max_new_tokens, self._temperature = max_new_tokens, temperature
        self._device = models.device_of(organism.model)
        self._ends = torch.tensor(end_ids(organism.model, organism.tokenizer), device=self._device)
        self._compiled = Compiled(conditions, organism.adapter)
        self._readings, self._reading_of = _readings(conditions)
        self._compiled_readings = Compiled(self._readings, organism.adapter)
        self._joinable = joinable(organism.model)
        self._plan: RowPlan | None = None
        self._decoder: Decoder | None = None
        self._flight: _Flight | None = None

    def answers(self, requests: Requests, order: Sequence[int]) -> Iterator[list[tuple[int, list[int]]]]:
        """Number and token ids of answers (the end token included where it was reached), as they are finished.

        No hook is attached while the caller has its turn.
        """
        waiting = list(order)
        while waiting or self._flight is not None:
            try:
                with torch.inference_mode(), planned(self.organism, self._compiled, lambda _rows: self._plan):
                    done = self._advance(requests, waiting)
            except torch.OutOfMemoryError:
                if self.capacity == 1:
                    raise
                self.capacity = max(1, self.capacity // 2)
                logger.warning("out of memory: going on with %d rows at once", self.capacity)
                waiting[:0] = [] if self._flight is None else self._flight.request.tolist()
                self._flight = self._decoder = self._plan = None
            else:
                yield done

    def _advance(self, requests: Requests, waiting: list[int]) -> list[tuple[int, list[int]]]:
        """Fill the batch, decode until enough rows have ended, and take those out."""
        flight = self._flight
        going_on = 0 if flight is None else len(flight)
        if flight is None or (waiting and self._joinable and going_on <= RENEW_AT * self.capacity):
            taken = waiting[: max(1, self.capacity - going_on)]
            flight = self._taken_in(requests, np.array(taken))
            del waiting[: len(taken)]
        while int((~flight.ended).sum()) > RENEW_AT * len(flight):
            self._step(flight)
        self._take_out(flight, replaced=bool(waiting) and self._joinable)
        ended = flight.ended.nonzero().squeeze(1)
        written = zip(flight.written[ended].tolist(), flight.age[ended].tolist(), strict=True)
        numbers = flight.request[ended.cpu().numpy()].tolist()
        return [(number, row[:age]) for number, (row, age) in zip(numbers, written, strict=True)]

    def _step(self, flight: _Flight) -> None:
        """One more token for every row; rows that have ended are carried along and not written."""
        flight.mask = pad(flight.mask, (0, 1), value=1)
        assert self._decoder is not None  # noqa: S101
        logits = self._decoder.next_logits(flight.token[:, None], flight.mask)
        place = flight.age.clamp_max(self._max_new_tokens - 1)[:, None]
        token = pick_tokens(logits, flight.draws.gather(1, place)[:, 0], self._temperature)
        kept = torch.where(flight.ended, flight.written.gather(1, place)[:, 0], token)
        flight.written.scatter_(1, place, kept[:, None])
        flight.age += (~flight.ended).long()
        flight.ended |= torch.isin(token, self._ends) | (flight.age >= self._max_new_tokens)
        flight.token = token

    def _taken_in(self, requests: Requests, taken: Int[np.ndarray, " request"]) -> _Flight:
        """The rows in flight and the newcomers as one batch, rows of a condition side by side."""
        parts: list[_Newcomers] = []
        if self._flight is not None and self._decoder is not None:
            parts.append((self._flight, self._decoder, self._staying))
        parts += self._read(requests, taken)
        width = max(flight.needed for flight, _, _ in parts)
        order = torch.cat([flight.condition for flight, _, _ in parts]).argsort(stable=True)
        place = order.argsort()
        if self._joinable:
            targets = torch.split(place, [len(flight) for flight, _, _ in parts])
            rows = [Part(decoder, source, target) for (_, decoder, source), target in zip(parts, targets, strict=True)]
            self._decoder = Decoder.joined(rows, len(order), width)
        else:
            _, self._decoder, source = parts[0]
            self._decoder.keep(source[order])
        flights = [flight.in_columns(width) for flight, _, _ in parts]
        self._flight = _Flight.rebuilt(flights, order, torch.cat([flight.mask for flight in flights])[order])
        self._plan = self._flight.plan(self._compiled)
        return self._flight

    def _read(self, requests: Requests, taken: Int[np.ndarray, " request"]) -> Iterator[_Newcomers]:
        """Prefill: each different reading of a prompt once; its first token for every request that shares it."""
        pairs = np.stack([self._reading_of[requests.conditions[taken]], requests.asked[taken]], axis=1)
        distinct, which = np.unique(pairs, axis=0, return_inverse=True)
        lengths = np.array([len(requests.prompts[prompt]) for prompt in distinct[:, 1]])
        for chunk in self._chunks(lengths):
            prompts = [requests.prompts[prompt] for prompt in distinct[chunk, 1]]
            ids, mask = left_padded(prompts, pad_id(self.organism.tokenizer), self._device)
            start = torch.full((len(ids),), ids.shape[1], device=self._device)
            self._plan = RowPlan(self._compiled_readings, torch.from_numpy(distinct[chunk, 0]), start)
            decoder = Decoder(self.organism.model)
            logits = decoder.next_logits(ids, mask)
            row_of = np.full(len(distinct), -1)
            row_of[chunk] = np.arange(len(chunk))
            here = np.flatnonzero(np.isin(which, chunk))
            source = torch.from_numpy(row_of[which[here]]).to(self._device)
            yield self._begun(requests, taken[here], logits[source], mask[source]), decoder, source

    def _begun(
        self,
        requests: Requests,
        numbers: Int[np.ndarray, " request"],
        logits: Float[Tensor, "request vocab"],
        mask: Int[Tensor, "request pos"],
    ) -> _Flight:
        draws = torch.from_numpy(requests.draws(numbers)).to(self._device)
        token = pick_tokens(logits, draws[:, 0], self._temperature)
        written = torch.full((len(numbers), self._max_new_tokens), -1, device=self._device)
        written[:, 0] = token
        age = torch.ones_like(token)
        ended = torch.isin(token, self._ends) | (age >= self._max_new_tokens)
        condition = torch.from_numpy(requests.conditions[numbers]).to(self._device)
        return _Flight(numbers, condition, token, age, ended, draws, written, mask)

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

    def _take_out(self, flight: _Flight, *, replaced: bool) -> None:
        """Go on with the rows that have not ended; their cache is copied only once if others take the free places."""
        staying = (~flight.ended).nonzero().squeeze(1)
        if not len(staying):
            self._flight = self._decoder = self._plan = None
            return
        kept = flight.kept(staying)
        self._staying = staying
        if not replaced and self._decoder is not None:
            if self._joinable:
                kept = kept.in_columns(kept.needed)
                part = Part(self._decoder, staying, torch.arange(len(kept), device=self._device))
                self._decoder = Decoder.joined([part], len(kept), kept.mask.shape[1])
            else:
                self._decoder.keep(staying)
            self._plan = kept.plan(self._compiled)
        self._flight = kept


def _readings(conditions: Sequence[Sequence[Intervention]]) -> tuple[list[tuple[Intervention, ...]], np.ndarray]:
    """The different ways in which conditions read a prompt, and the way of each: what acts on responses only is out."""
    ways: dict[tuple[int, ...], int] = {}
    readings: list[tuple[Intervention, ...]] = []
    way_of: list[int] = []
    for condition in conditions:
        acting = tuple(one for one in condition if one.positions != "response")
        key = tuple(id(one) for one in acting)
        if key not in ways:
            ways[key] = len(readings)
            readings.append(acting)
        way_of.append(ways[key])
    return readings, np.array(way_of)
