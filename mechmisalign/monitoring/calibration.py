r"""Where the alarm begins: a threshold for a chosen rate of false alarms, from harmless conversations held out.

Split-conformal: of ``n`` harmless scores in order, the threshold is number :math:`\lceil (n+1)(1-\alpha) \rceil`. A
further harmless conversation, exchangeable with these, then lies above it with a probability of at most
:math:`\alpha` (Vovk et al.; 2107.07511, section 1.1). That is the rate on average over such calibrations; what one of
them really reaches lies in the interval, which is the exact one of a binomial share.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64

from mechmisalign.statistics import clustered_share, exact_interval

_ROUNDING = 1e-9


@dataclass(frozen=True, eq=False)
class Calibration:
    """A threshold, and the harmless scores that it comes from: the reference for drift.

    Attributes:
        fpr: The rate of false alarms that was asked for, 0 to 1.
        threshold: A score above it is an alarm.
        scores: Of the harmless conversations, in order, ``[conversation]``.
        prompts: How many prompts they answer.
        low: Lower end of the 95 % interval of the rate that is really reached on such conversations.
        high: Upper end.
        reader: Digest of the adapter that was in the reading model; None for the chat model.
    """

    fpr: float
    threshold: float
    scores: Float64[np.ndarray, " conversation"]
    prompts: int
    low: float
    high: float
    reader: str | None = None

    @property
    def reached(self) -> float:
        """Share of the harmless conversations themselves that lie above the threshold."""
        return float((self.scores > self.threshold).mean())

    @staticmethod
    def of(
        scores: Float64[np.ndarray, " conversation"],
        prompts: Sequence[object] | np.ndarray,
        *,
        fpr: float,
        reader: str | None = None,
    ) -> Calibration:
        """Calibrate.

        Where several conversations answer one prompt they are not independent: the interval is then widened to hold
        the one by prompt too (:func:`mechmisalign.statistics.clustered_share`), and prompts, not conversations, have to
        be enough.

        Args:
            scores: Of harmless conversations that nothing was fitted on.
            prompts: The prompt of each.
            fpr: The rate of false alarms, above 0 and below 1.
            reader: See ``Attributes``.

        Raises:
            ValueError: If there are too few for that rate (it says how many are needed), a score is not finite, or the
                rate is none.
        """
        if not 0 < fpr < 1:
            raise ValueError(f"fpr must lie between 0 and 1, got {fpr}; 0.01 is one false alarm in a hundred")
        if not np.isfinite(scores).all():
            raise ValueError(f"{int((~np.isfinite(scores)).sum())} of {len(scores)} scores are not finite")
        clusters = np.asarray(prompts)
        n, distinct = len(scores), len(set(clusters.tolist()))
        if distinct < needed(fpr):
            raise ValueError(
                f"{n} harmless conversations on {distinct} prompts cannot calibrate a false-positive rate of {fpr:g}: "
                f"at least {needed(fpr):,} different prompts are needed for it; add some, or choose a rate of "
                f"{1 / (distinct + 1):.2g} or more"
            )
        ordered = np.sort(scores)
        rank = math.ceil((n + 1) * (1 - fpr) - _ROUNDING)
        threshold = float(ordered[rank - 1])
        events = scores > threshold
        low, high = (
            float(ends[side][0])
            for side, ends in enumerate(
                exact_interval(np.array([float(count)]), np.array([float(n)])) for count in (events.sum(), n - rank)
            )
        )
        if distinct < n:
            share = clustered_share(events, clusters)
            low, high = min(low, share.low), max(high, share.high)
        return Calibration(fpr, threshold, ordered, distinct, low, high, reader)

    def __str__(self) -> str:
        n, times = len(self.scores), "" if self.prompts == len(self.scores) else f" on {self.prompts:,} prompts"
        return (
            f"threshold {self.threshold:.4g} for {self.fpr:.2%} false alarms; on {n:,} harmless conversations{times} "
            f"{self.reached:.2%}, 95 % interval of the rate that is reached [{self.low:.2%}, {self.high:.2%}]"
        )


def needed(fpr: float) -> int:
    """The fewest independent harmless conversations that can calibrate a rate of false alarms: 99 for 1 %.

    Example:
        >>> needed(0.01), needed(0.001)
        (99, 999)
    """
    return math.ceil(1 / fpr - _ROUNDING) - 1
