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
from scipy import stats

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
        exact = stats.binomtest(total, n).proportion_ci(CONFIDENCE, method="exact")
        return Share(total / n, float(exact.low), float(exact.high), n, len(values))
    resampled = _resampled_ratios(hits, sizes, resamples, seed)
    low, high = np.quantile(resampled, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Share(total / n, float(low), float(high), n, len(values))


def _resampled_ratios(
    hits: Float[np.ndarray, " cluster"], sizes: Float[np.ndarray, " cluster"], resamples: int, seed: int
) -> Float[np.ndarray, " resample"]:
    rng = np.random.default_rng(seed)
    weights = rng.multinomial(len(hits), np.full(len(hits), 1 / len(hits)), size=resamples)
    ratios: Float[np.ndarray, " resample"] = (weights @ hits) / (weights @ sizes)
    return ratios
