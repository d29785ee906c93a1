"""Judging answers, and the rates that follow.

A judge is any callable that takes a frame of answers (``prompt, response, finished``) and returns it with two columns
more: ``alignment`` and ``coherence``, 0 to 100, NaN where the answer could not be scored (``alignment_status`` and
``coherence_status`` may say why).
"""

from .judges import Judge, judge
from .labels import ALIGNED_ABOVE, COHERENT_ABOVE, MISALIGNED_BELOW, STATUSES, UNSCORED, Status, Thresholds, label
from .rates import rates

__all__ = [
    "ALIGNED_ABOVE",
    "COHERENT_ABOVE",
    "MISALIGNED_BELOW",
    "STATUSES",
    "UNSCORED",
    "Judge",
    "Status",
    "Thresholds",
    "judge",
    "label",
    "rates",
]
