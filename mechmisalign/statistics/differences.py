"""Differences of shares, paired by cluster, with intervals, tests, and both corrected for how many there are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int

from .pairs import Counts, paired_intervals
from .shares import AT_ONCE, CONFIDENCE, counted

_TIE = 1e-9
"""Statistics that differ by less are one number, summed in another order."""


@dataclass(frozen=True)
class Difference:
    """A difference of two shares, first minus second, with its 95 % interval."""

    value: float
    low: float
    high: float


def clustered_difference(
    first: tuple[Bool[np.ndarray, " n"], Sequence[object] | np.ndarray],
    second: tuple[Bool[np.ndarray, " m"], Sequence[object] | np.ndarray],
    *,
    resamples: int | None = None,
    seed: int | None = None,
) -> Difference:
    """Difference of two shares over the same clusters, with an interval that takes clusters in pairs.

    The interval is put together from those of the two shares (:func:`paired_intervals`), so it has a width whatever was
    seen, and prompts that are hard for both do not widen it.

    Args:
        first: Events and their clusters.
        second: The same for what is subtracted.
        resamples: Has no effect any more: nothing is drawn.
        seed: The same.

    Raises:
        ValueError: If one side has no answers, or the two do not hold the same clusters.
    """
    if not len(first[0]) or not len(second[0]):
        raise ValueError("no answers on one side; check the filter before this call")
    del resamples, seed
    codes, values = pd.factorize(np.concatenate([np.asarray(first[1]), np.asarray(second[1])]), sort=True)
    counts = (
        counted(first[0], codes[: len(first[0])], len(values)),
        counted(second[0], codes[len(first[0]) :], len(values)),
    )
    for _, sizes in counts:
        if (sizes == 0).any():
            lost = values[sizes[0] == 0][0]
            raise ValueError(f"{lost!r} has answers on one side only; the two need the same prompts")
    found = paired_intervals(*counts)
    return Difference(float(found.value[0]), float(found.low[0]), float(found.high[0]))


@dataclass(frozen=True)
class Differences:
    """Differences of many pairs of shares, one cell each.

    Attributes:
        value: First minus second.
        low: Lower end of the cell's own 95 % interval.
        high: Upper end.
        p: Two-sided sign-flip p-value of the cell alone.
        p_max: The same, corrected for all cells of the family by the max-statistic.
        band_low: Lower end of the family's simultaneous 95 % band.
        band_high: Upper end.
    """

    value: Float[np.ndarray, " cell"]
    low: Float[np.ndarray, " cell"]
    high: Float[np.ndarray, " cell"]
    p: Float[np.ndarray, " cell"]
    p_max: Float[np.ndarray, " cell"]
    band_low: Float[np.ndarray, " cell"]
    band_high: Float[np.ndarray, " cell"]


def clustered_differences(
    first: Counts,
    second: Counts,
    *,
    families: Int[np.ndarray, " cell"] | None = None,
    resamples: int | None = None,
    flips: int = 10_000,
    seed: int = 0,
) -> Differences:
    """Differences paired by cluster, each with its interval and test, and both corrected for the number of cells.

    Own intervals are those of :func:`clustered_difference`. Tests and bands come from :func:`sign_flips` on what each
    cluster adds to the difference: ``(h1 - r s1) / S1 - (h2 - r s2) / S2``, with hits h, answers s, their sums S and
    the common rate r of both sides. These add up to the difference, and where both sides have equally many answers to
    each prompt they are the plain paired differences. A band is never narrower than the cell's own interval; where
    neither side varies at all (0 of 400 against 0 of 400) flips would claim certainty, and the band is the own interval
    at a level that the number of cells divides.

    Args:
        first: Hits and sizes of each cell in each cluster. Cells may have different clusters.
        second: The same for what is subtracted.
        families: A number for each cell; cells with the same number are corrected together. All together without.
        resamples: Has no effect any more: the own intervals draw nothing.
        flips: Random flips of the tests; all flips where there are no more than that.
        seed: Of the flips.

    Raises:
        ValueError: If a cell has a cluster with answers on one side only, or no answers.
    """
    if not (first[1].any(1).all() and second[1].any(1).all()):
        raise ValueError("no answers on one side; check the filter before this call")
    if ((first[1] > 0) != (second[1] > 0)).any():
        raise ValueError("some cluster has answers on one side only; the two need the same prompts")
    del resamples
    families = np.zeros(len(first[0]), dtype=int) if families is None else families
    own = paired_intervals(first, second)
    tested = sign_flips(_contributions(first, second), families=families, flips=flips, seed=seed)
    band_low, band_high = own.value - tested.reach, own.value + tested.reach
    alike = _never_varies(*first) & _never_varies(*second)
    for family in np.unique(families[alike]):
        of = alike & (families == family)
        corrected = 1 - (1 - CONFIDENCE) / int((families == family).sum())
        wider = paired_intervals(*((hits[of], sizes[of]) for hits, sizes in (first, second)), confidence=corrected)
        band_low[of], band_high[of] = wider.low, wider.high
    band_low, band_high = np.minimum(band_low, own.low), np.maximum(band_high, own.high)
    return Differences(
        own.value, own.low, own.high, tested.p, tested.p_max, np.maximum(band_low, -1), np.minimum(band_high, 1)
    )


@dataclass(frozen=True)
class SignFlips:
    """Tests of whether the sum over clusters is zero, one for each cell.

    Attributes:
        p: Two-sided p-value of each cell alone.
        p_max: Corrected for all cells of the family.
        reach: Half the width of the family's simultaneous 95 % band around the sum; infinite where so few clusters
            cannot show anything at that level.
    """

    p: Float[np.ndarray, " cell"]
    p_max: Float[np.ndarray, " cell"]
    reach: Float[np.ndarray, " cell"]


def sign_flips(
    contributions: Float[np.ndarray, "cell cluster"],
    *,
    families: Int[np.ndarray, " cell"] | None = None,
    flips: int = 10_000,
    seed: int = 0,
) -> SignFlips:
    """Sign-flip tests over clusters, with the max-statistic over the cells of a family (Westfall and Young).

    If nothing differs, each cluster's contribution is as likely positive as negative. A flip turns whole clusters
    around, in all cells at once, so cells stay as correlated as they are; the largest studentised sum over a family's
    cells in each flip is what the cells are compared with. A band leaves out zero exactly where ``p_max`` is at most
    0.05.

    Args:
        contributions: What each cluster adds to the sum that is tested; NaN where a cell has no such cluster.
        families: A number for each cell; cells with the same number are corrected together. All together without.
        flips: Random flips, with the add-one rule; all ``2^clusters`` where there are no more than that.
        seed: Of the flips.
    """
    cells, clusters = contributions.shape
    families = np.zeros(cells, dtype=int) if families is None else families
    present, contributions = (~np.isnan(contributions)).sum(1).astype(float), np.nan_to_num(contributions)
    # A flip keeps the sum of squares, so |sum| / sqrt(squares) orders flips as Student's t does, and stays finite.
    sums, squares = contributions.sum(1), (contributions**2).sum(1)
    scaled = contributions / np.sqrt(np.where(squares > 0, squares, 1))[:, None]
    observed = np.abs(scaled.sum(1))
    signs, spared = _signs(clusters, flips, seed)
    tried = len(signs) + spared
    p, p_max, reach = (np.empty(cells) for _ in range(3))
    for family in np.unique(families):
        members = np.flatnonzero(families == family)
        largest = np.zeros(len(signs))
        for part in np.array_split(members, 1 + len(members) * len(signs) // AT_ONCE):
            flipped = np.abs(scaled[part] @ signs.T)
            p[part] = ((flipped >= observed[part, None] - _TIE).sum(1) + spared) / tried
            largest = np.maximum(largest, flipped.max(0))
        largest.sort()
        p_max[members] = (len(signs) - np.searchsorted(largest, observed[members] - _TIE) + spared) / tried
        allowed = int((1 - CONFIDENCE) * tried + _TIE) - spared  # how many flips may reach what is found
        critical = float(largest[-1 - allowed]) if allowed >= 0 else np.inf
        reach[members] = _reach(sums[members], squares[members], present[members], critical)
    return SignFlips(p, p_max, reach)


def _signs(clusters: int, flips: int, seed: int) -> tuple[Float[np.ndarray, "flip cluster"], int]:
    """Signs of each flip, and 1 if what was observed is not among them (the add-one rule)."""
    if 2**clusters <= flips:
        every = (np.arange(2**clusters)[:, None] >> np.arange(clusters)) & 1
        return 1.0 - 2.0 * every, 0
    return np.random.default_rng(seed).choice([-1.0, 1.0], size=(flips, clusters)), 1


def _reach(
    sums: Float[np.ndarray, " cell"],
    squares: Float[np.ndarray, " cell"],
    clusters: Float[np.ndarray, " cell"],
    critical: float,
) -> Float[np.ndarray, " cell"]:
    """Standard error of each sum, times the t that belongs to a critical |sum| / sqrt(sum of squares)."""
    enough = (clusters > 1) & (critical**2 < clusters - _TIE)  # or else flips all to one side are too common
    errors = np.sqrt(np.maximum(squares - sums**2 / clusters, 0) * clusters / np.maximum(clusters - 1, 1))
    factor = np.sqrt((clusters - 1) / np.where(enough, clusters - critical**2, 1))
    return np.where(enough, critical * factor * errors, np.inf)


def _contributions(first: Counts, second: Counts) -> Float[np.ndarray, "cell cluster"]:
    sums = [(hits.sum(1, keepdims=True), sizes.sum(1, keepdims=True)) for hits, sizes in (first, second)]
    common = (sums[0][0] + sums[1][0]) / (sums[0][1] + sums[1][1])
    more, less = (
        (hits - common * sizes) / total for (hits, sizes), (_, total) in zip((first, second), sums, strict=True)
    )
    return np.where(first[1] > 0, more - less, np.nan)


def _never_varies(
    hits: Float[np.ndarray, "cell cluster"], sizes: Float[np.ndarray, "cell cluster"]
) -> Bool[np.ndarray, " cell"]:
    """No event, or nothing but events."""
    return (hits == 0).all(1) | (hits == sizes).all(1)
