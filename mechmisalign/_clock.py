"""Where in its conversations a forward pass is: columns, positions, first tokens; also under a KV cache."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor


@dataclass(frozen=True)
class Place:
    """Where in its conversations a pass is.

    Attributes:
        columns: Absolute column of each token that passes.
        positions: Each token's place in its own conversation, which left padding does not shift.
        first: Which tokens are the first of their conversation; None if none is.
    """

    columns: Int[Tensor, " pos"]
    positions: Int[Tensor, "batch pos"]
    first: Bool[Tensor, "batch pos"] | None


class Clock:
    """Says which absolute columns of the sequence the current forward pass covers, also under a KV cache.

    Attributes:
        start: Column of the first token that is passing now.
        padding: Columns of padding on the left of each row, ``[batch]``; None where the pass has no mask.
    """

    def __init__(self) -> None:
        self.start = 0
        self.padding: Int[Tensor, " batch"] | None = None
        self._places: dict[tuple[int, int, torch.device], Place] = {}

    def begin(self, start: int, padding: Int[Tensor, " batch"] | None) -> None:
        """A pass begins, with the token of column ``start``."""
        self.start, self.padding, self._places = start, padding, {}

    def place(self, rows: int, length: int, device: torch.device) -> Place:
        """Where so many rows and tokens of this pass are; worked out once for all layers of a device."""
        key = (rows, length, device)
        if key not in self._places:
            positions = self.positions(rows, length, device)
            first = positions == 0
            self._places[key] = Place(self.columns(length, device), positions, first if bool(first.any()) else None)
        return self._places[key]

    def columns(self, length: int, device: torch.device) -> Int[Tensor, " pos"]:
        """Absolute column of each of the ``length`` tokens that are passing now."""
        return torch.arange(self.start, self.start + length, device=device)

    def positions(self, rows: int, length: int, device: torch.device) -> Int[Tensor, "batch pos"]:
        """Each token's place in its own conversation, which left padding does not shift (below 0 in the padding)."""
        padding = torch.zeros(rows, dtype=torch.long) if self.padding is None else self.padding
        return self.columns(length, device)[None] - padding.to(device)[:, None]
