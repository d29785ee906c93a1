"""Does one quantity rank things as another does? Spearman's correlation with its interval and its test."""

from __future__ import annotations

from dataclasses import dataclass
from math import factorial

import numpy as np
from jaxtyping import Float

from .shares import percentiles

FEWEST = 4
"""Fewer items than this cannot be ranked to any purpose: even a perfect order of three happens by chance."""
_TIE = 1e-12


@dataclass(frozen=True)
class RankCorrelation:
    """Spearman's rank correlation of two quantities over the same items.

    Attributes:
        value: The correlation, ties at their mean rank; NaN, as the rest, where one side is the same for all items.
        low: Lower end of the 95 % interval.
        high: Upper end.
        p: Two-sided p-value of no association, from permuting one side.
        n: Number of items.
    """

    value: float
    low: float
    high: float
    p: float
    n: int


def rank_correlation(
    first: Float[np.ndarray, " item"],
    second: Float[np.ndarray, " item"],
    *,
    first_resampled: Float[np.ndarray, "item resample"] | None = None,
    second_resampled: Float[np.ndarray, "item resample2"] | None = None,
    resamples: int = 2000,
    permutations: int = 10_000,
    seed: int = 0,
) -> RankCorrelation:
    """Spearman's correlation with a percentile interval over items, and a permutation p-value.

    Each bootstrap resample draws items with replacement; where an item's own resamples are given, it takes a value from
    these instead of its estimate, so that the interval also tells how surely each item was measured. That adds the
    sampling error a second time, so the interval then lies rather too low than too high.

    Args:
        first: One value per item, such as the score of a dataset.
        second: The other value, such as the rate after training on it.
        first_resampled: Bootstrap replicates of each item's first value.
        second_resampled: The same for the second.
        resamples: Bootstrap resamples of the items.
        permutations: Random ones, with the add-one rule; all of them where there are no more than that.
        seed: Of both.

    Raises:
        ValueError: On fewer than four items, values that are not finite, or two sides of different length.
    """
    if len(first) != len(second) or len(first) < FEWEST:
        raise ValueError(
            f"got {len(first)} and {len(second)} values; {FEWEST} items or more, each with both, are needed"
        )
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        raise ValueError("some values are NaN or infinite; drop these items, or mend what made them")
    for replicates in (first_resampled, second_resampled):
        if replicates is not None and len(replicates) != len(first):
            raise ValueError(f"{len(replicates)} rows of replicates for {len(first)} items; one row per item is needed")
    rng = np.random.default_rng(seed)
    drawn = rng.integers(len(first), size=(resamples, len(first)))
    sides = [
        _drawn(values, replicates, drawn, rng)
        for values, replicates in ((first, first_resampled), (second, second_resampled))
    ]
    found = _spearman(*sides)
    value = float(_spearman(first[None], second[None])[0])
    if not np.isfinite(value):  # one side is the same for all items
        return RankCorrelation(value, np.nan, np.nan, np.nan, len(first))
    low, high = percentiles(found[None, np.isfinite(found)])  # a resample of one item alone has no order
    return RankCorrelation(
        value, float(low[0]), float(high[0]), _p(first, second, value, permutations, rng), len(first)
    )


def _drawn(
    values: Float[np.ndarray, " item"],
    replicates: Float[np.ndarray, "item replicate"] | None,
    drawn: np.ndarray,
    rng: np.random.Generator,
) -> Float[np.ndarray, "resample item"]:
    if replicates is None:
        return values[drawn]
    return replicates[drawn, rng.integers(replicates.shape[1], size=drawn.shape)]


def _spearman(first: Float[np.ndarray, "row item"], second: Float[np.ndarray, "row item"]) -> Float[np.ndarray, " row"]:
    """Pearson's correlation of the ranks, row by row; NaN where one side has a single value."""
    from scipy.stats import rankdata

    ranks = [rankdata(side, axis=1) for side in (first, second)]
    centred = [side - side.mean(1, keepdims=True) for side in ranks]
    length = np.sqrt((centred[0] ** 2).sum(1) * (centred[1] ** 2).sum(1))
    return np.divide((centred[0] * centred[1]).sum(1), length, out=np.full(len(length), np.nan), where=length > _TIE)


def _p(
    first: Float[np.ndarray, " item"],
    second: Float[np.ndarray, " item"],
    value: float,
    permutations: int,
    rng: np.random.Generator,
) -> float:
    n = len(first)
    if factorial(n) <= permutations:
        from itertools import permutations as every

        orders, spared = np.array(list(every(range(n)))), 0
    else:
        orders, spared = rng.permuted(np.tile(np.arange(n), (permutations, 1)), axis=1), 1
    null = _spearman(np.broadcast_to(first, orders.shape), second[orders])
    return float(((np.abs(null) >= abs(value) - 1e-9).sum() + spared) / (len(orders) + spared))
