"""Batches of token rows: neighbours in length, padded on the right."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor


class Batch(NamedTuple):
    """Rows of similar length, right-padded.

    Attributes:
        rows: Positions of the rows in ``Conversations.frame``.
        ids: Token ids, ``[batch pos]``.
        mask: 1 on real tokens, ``[batch pos]``.
        span: True on the tokens of the asked span, ``[batch pos]``.
    """

    rows: np.ndarray
    ids: Int[Tensor, "batch pos"]
    mask: Int[Tensor, "batch pos"]
    span: Bool[Tensor, "batch pos"]

    def part(self, rows: slice) -> Batch:
        """Some of the rows."""
        return Batch(self.rows[rows], self.ids[rows], self.mask[rows], self.span[rows])


def batches_by_length(
    ids: Sequence[Sequence[int]], marked: Sequence[Sequence[int]], pad: int, *, token_budget: int
) -> Iterator[Batch]:
    """Batches of neighbours in length, each at most ``token_budget`` tokens with its padding; the longest come first.

    Sorting by length keeps the padding small; it is on the right, where causal attention does not see it.

    Args:
        ids: Token ids of each row.
        marked: The positions of each row that ``Batch.span`` marks.
        pad: Id of the padding.
        token_budget: Rows times longest row of a batch; a longer row is a batch of its own.
    """
    order = np.argsort([len(row) for row in ids], kind="stable")[::-1].copy()
    start = 0
    while start < len(order):
        longest = len(ids[order[start]])
        rows = order[start : start + max(1, token_budget // longest)]
        yield _padded(rows, ids, marked, pad)
        start += len(rows)


def pad_id(tokenizer: Any) -> int:
    """The padding id, or the end token's where there is none (padding is masked, so any id would do)."""
    return int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0)


def _padded(rows: np.ndarray, ids: Sequence[Sequence[int]], marked: Sequence[Sequence[int]], pad: int) -> Batch:
    width = max(len(ids[row]) for row in rows)
    padded = np.full((len(rows), width), pad, dtype=np.int64)
    mask = np.zeros((len(rows), width), dtype=np.int64)
    span = np.zeros((len(rows), width), dtype=bool)
    for i, row in enumerate(rows):
        padded[i, : len(ids[row])] = ids[row]
        mask[i, : len(ids[row])] = 1
        span[i, list(marked[row])] = True
    return Batch(rows, torch.from_numpy(padded), torch.from_numpy(mask), torch.from_numpy(span))
