"""Intervals and tests for shares, clustered by prompt.

Answers to one prompt resemble each other: the rate of misalignment is nearly a function of the prompt. So the prompt is
the unit that is counted or flipped, and 400 answers to 8 prompts do not count as 400 independent ones.

Many shares at once are *cells*: arrays ``hits`` and ``sizes`` of shape ``[cell cluster]`` hold the events and the
answers of each cell in each cluster.
"""

from .differences import Difference, Differences, SignFlips, clustered_difference, clustered_differences, sign_flips
from .pairs import Intervals, paired_intervals, paired_ratios
from .ranks import RankCorrelation, rank_correlation
from .shares import (
    CONFIDENCE,
    Share,
    Shares,
    clustered_share,
    clustered_shares,
    effective_sizes,
    exact_interval,
    wilson_interval,
)

__all__ = [
    "CONFIDENCE",
    "Difference",
    "Differences",
    "Intervals",
    "RankCorrelation",
    "Share",
    "Shares",
    "SignFlips",
    "clustered_difference",
    "clustered_differences",
    "clustered_share",
    "clustered_shares",
    "effective_sizes",
    "exact_interval",
    "paired_intervals",
    "paired_ratios",
    "rank_correlation",
    "sign_flips",
    "wilson_interval",
]
