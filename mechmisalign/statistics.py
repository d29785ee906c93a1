"""Intervals for shares, clustered by prompt.

Answers to one prompt resemble each other: the rate of misalignment is nearly a function of the prompt. So the prompt is
the unit that is resampled, and 400 answers to 8 prompts do not count as 400 independent ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Share:
    """A share with its interval.

    Attributes:
        rate: Events over answers, 0 to 1.
        low: Lower end of the 95 % interval.
        high: Upper end of the 95 % interval.
        n: Number of answers.
        clusters: Number of prompts that they answer.
    """

    rate: float
    low: float
    high: float
    n: int
    clusters: int


def clustered_share(
    events: Bool[np.ndarray, " n"], clusters: Sequence[object] | np.ndarray, *, resamples: int = 2000, seed: int = 0
) -> Share:
    """Share of events with a percentile interval from resampling whole clusters.

    With no event at all, or nothing but events, or a single cluster, resampling clusters says nothing; the exact
    Clopper-Pearson interval over the answers stands in.

    Raises:
        ValueError: If there is no answer.
    """
    if len(events) == 0:
        raise ValueError("no answers: a share of nothing has no value; check the filter before this call")
    codes, values = pd.factorize(np.asarray(clusters), sort=True)
    hits = np.bincount(codes, weights=events.astype(float), minlength=len(values))
    sizes = np.bincount(codes, minlength=len(values)).astype(float)
    total, n = int(hits.sum()), len(events)
    if total in (0, n) or len(values) == 1:
        from scipy import stats  # takes longer to import than most tables take to make

        exact = stats.binomtest(total, n).proportion_ci(CONFIDENCE, method="exact")
        return Share(total / n, float(exact.low), float(exact.high), n, len(values))
    resampled = _resampled_ratios(hits, sizes, resamples, seed)
    low, high = np.quantile(resampled, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Share(total / n, float(low), float(high), n, len(values))


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
    resamples: int = 2000,
    seed: int = 0,
) -> Difference:
    """Difference of two shares over the same clusters, with a percentile interval from resampling clusters in pairs.

    Prompts that are hard for both do not widen the interval, since each resample takes a prompt's answers on both
    sides.

    Args:
        first: Events and their clusters.
        second: The same for what is subtracted.
        resamples: Bootstrap resamples.
        seed: Of the resamples.

    Raises:
        ValueError: If one side has no answers, or the two do not hold the same clusters.
    """
    if not len(first[0]) or not len(second[0]):
        raise ValueError("no answers on one side; check the filter before this call")
    codes, values = pd.factorize(np.concatenate([np.asarray(first[1]), np.asarray(second[1])]), sort=True)
    ratios = []
    for events, of in ((first[0], codes[: len(first[0])]), (second[0], codes[len(first[0]) :])):
        hits = np.bincount(of, weights=events.astype(float), minlength=len(values))
        sizes = np.bincount(of, minlength=len(values)).astype(float)
        if (sizes == 0).any():
            raise ValueError(f"{values[sizes == 0][0]!r} has answers on one side only; the two need the same prompts")
        ratios.append((hits.sum() / sizes.sum(), _resampled_ratios(hits, sizes, resamples, seed)))
    low, high = np.quantile(ratios[0][1] - ratios[1][1], [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Difference(float(ratios[0][0] - ratios[1][0]), float(low), float(high))


def _resampled_ratios(
    hits: Float[np.ndarray, " cluster"], sizes: Float[np.ndarray, " cluster"], resamples: int, seed: int
) -> Float[np.ndarray, " resample"]:
    rng = np.random.default_rng(seed)
    weights = rng.multinomial(len(hits), np.full(len(hits), 1 / len(hits)), size=resamples)
    ratios: Float[np.ndarray, " resample"] = (weights @ hits) / (weights @ sizes)
    return ratios
