"""Watching: a probe or a direction that reads a model while conversations pass, and says which of them raise an alarm.

:mod:`.monitor` is the artifact that scores, :mod:`.fitting` chooses its layer with whole prompts held out,
:mod:`.calibration` its threshold on harmless conversations, :mod:`.streams` scores lines of JSON as they come,
:mod:`.discrimination` says how well scores tell classes apart, :mod:`.drift` whether they have moved,
:mod:`.baselines` what the words alone give away, and :mod:`.answers` makes conversations of the pocket world.
"""

from .baselines import WordsBaseline, judge_scores, length_scores
from .calibration import Calibration, needed
from .discrimination import Auroc, auroc, auroc_difference, discrimination, roc
from .drift import drift
from .monitor import Monitor, MonitorMismatchError
from .streams import score_lines
from .tally import Tally

__all__ = [
    "Auroc",
    "Calibration",
    "Monitor",
    "MonitorMismatchError",
    "Tally",
    "WordsBaseline",
    "auroc",
    "auroc_difference",
    "discrimination",
    "drift",
    "judge_scores",
    "length_scores",
    "needed",
    "roc",
    "score_lines",
]
