"""What remains of a stream when it has passed: every score, the highest conversations, the lines that were lost."""

from __future__ import annotations

import heapq
from array import array
from collections.abc import Iterable, Iterator
from itertools import count
from typing import Any

import numpy as np
from jaxtyping import Float64

from mechmisalign.statistics import Share, exact_interval


class Tally:
    """Counts scored lines as they pass; memory grows by eight bytes a line.

    Args:
        most: Conversations that are kept whole, those with the highest scores.
        told: Lost lines that are kept with their reason.

    Attributes:
        alarms: Number of alarms.
        lost: Number of lines that could not be scored.
        errors: Number and reason of the first of them.
    """

    def __init__(self, most: int = 100, told: int = 100) -> None:
        self.alarms = 0
        self.lost = 0
        self.errors: list[tuple[int, str]] = []
        self._scores = array("d")
        self._highest: list[tuple[float, int, dict[str, Any]]] = []
        self._most, self._told, self._number = most, told, count()

    def watching(self, results: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """The results, counted as they pass."""
        for result in results:
            self.add(result)
            yield result

    def add(self, result: dict[str, Any]) -> None:
        """Count one result of :func:`score_lines`."""
        if "score" not in result:
            self.lost += 1
            if len(self.errors) < self._told:
                self.errors.append((int(result["line"]), str(result["error"])))
            return
        self.alarms += bool(result.get("alarm"))
        self._scores.append(result["score"])
        entry = (float(result["score"]), -next(self._number), result)  # of equals, the earlier ones are kept
        if len(self._highest) < self._most:
            heapq.heappush(self._highest, entry)
        elif self._most:
            heapq.heappushpop(self._highest, entry)

    @property
    def scores(self) -> Float64[np.ndarray, " n"]:
        """All scores, in the order of the stream."""
        return np.array(self._scores, dtype=np.float64)

    @property
    def highest(self) -> list[dict[str, Any]]:
        """The conversations with the highest scores, the highest first."""
        return [result for _, _, result in sorted(self._highest, key=lambda entry: entry[:2], reverse=True)]

    def share(self) -> Share:
        """Share of alarms among scored conversations, with its exact 95 % interval.

        Raises:
            ValueError: If nothing was scored.
        """
        n = len(self._scores)
        if not n:
            raise ValueError(
                f"no conversation was scored ({self.lost} lines were lost); is this a file of JSON lines with prompt "
                "and response?"
            )
        low, high = exact_interval(np.array([float(self.alarms)]), np.array([float(n)]))
        return Share(self.alarms / n, float(low[0]), float(high[0]), n, n)
