"""What is wanted, and the rows that are being decoded for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad

from mechmisalign.decoding import Decoder
from mechmisalign.interventions import Compiled, RowPlan

NOTHING_YET = -2
"""Where no token is written yet."""


@dataclass(frozen=True)
class Requests:
    """The answers that are wanted, by number.

    Attributes:
        prompts: Token ids of each different prompt, up to where a response begins.
        asked: Which of them each request asks.
        conditions: The condition of each request.
        limits: Tokens after which each answer is cut.
        draws: Gives uniform numbers ``[request token]`` of the requests with these numbers.
    """

    prompts: Sequence[Sequence[int]]
    asked: Int[np.ndarray, " request"]
    conditions: Int[np.ndarray, " request"]
    limits: Int[np.ndarray, " request"]
    draws: Callable[[np.ndarray], Float[np.ndarray, "request token"]]


@dataclass
class Flight:
    """The rows in flight, one entry per row of the batch; ``mask`` covers the cache's columns.

    ``age`` counts tokens written, ``limit`` at most; the first comes from the prefill, and the last is not in the
    cache yet.
    """

    request: np.ndarray
    condition: Int[Tensor, " batch"]
    token: Int[Tensor, " batch"]
    age: Int[Tensor, " batch"]
    limit: Int[Tensor, " batch"]
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
        return self.condition, self.token, self.age, self.limit, self.ended, self.draws, self.written

    def kept(self, rows: Tensor) -> Flight:
        """These rows only, in all columns."""
        return self.rebuilt([self], rows, self.mask[rows])

    @staticmethod
    def rebuilt(flights: Sequence[Flight], rows: Tensor, mask: Tensor) -> Flight:
        """These rows of several flights, counted through, with a mask of their own."""
        numbers = np.concatenate([flight.request for flight in flights])[rows.cpu().numpy()]
        condition, token, age, limit, ended, draws, written = (
            torch.cat(fields)[rows] for fields in zip(*(flight.fields() for flight in flights), strict=True)
        )
        return Flight(numbers, condition, token, age, limit, ended, draws, written, mask)

    def in_columns(self, width: int) -> Flight:
        """The same rows in so many columns: padding on the left is added, or cut."""
        return replace(self, mask=pad(self.mask[:, -width:], (max(0, width - self.mask.shape[1]), 0)))


@dataclass(frozen=True)
class Batch:
    """Rows in flight, the decoder that has their keys and values, and the row of it that each goes on from."""

    flight: Flight
    decoder: Decoder
    source: Int[Tensor, " batch"]
