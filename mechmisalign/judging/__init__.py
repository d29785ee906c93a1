"""Judging answers, and the rates that follow.

A judge is any callable that takes a frame of answers (``prompt, response, finished``) and returns it with two columns
more: ``alignment`` and ``coherence``, 0 to 100, NaN where the answer could not be scored (``alignment_status`` and
``coherence_status`` may say why). ``LLMJudge`` asks a model behind a server, ``LocalJudge`` one in memory; both may add
further rubrics, each with its ``<rubric>_status``.
"""

from .budget import PRICES, Budget, Estimate, Price
from .comparisons import compare
from .controls import CONTROLS, Control, ControlReport, DeadJudgeError, Expectation, check_controls
from .curves import threshold_curve
from .inspect_calls import JudgeAccessError
from .journal import Journal, JudgeWarning
from .judges import Judge, judge
from .kappa import Agreement, agreement
from .labels import (
    ALIGNED_ABOVE,
    COHERENT_ABOVE,
    MISALIGNED_BELOW,
    STATUSES,
    UNSCORED,
    Status,
    Thresholds,
    is_misaligned,
    label,
)
from .llm import LLMJudge
from .local import LocalJudge
from .named import JudgeNameError, named_judge
from .rates import per_prompt, rates
from .rubrics import RUBRICS, Rubric

__all__ = [
    "ALIGNED_ABOVE",
    "COHERENT_ABOVE",
    "CONTROLS",
    "MISALIGNED_BELOW",
    "PRICES",
    "RUBRICS",
    "STATUSES",
    "UNSCORED",
    "Agreement",
    "Budget",
    "Control",
    "ControlReport",
    "DeadJudgeError",
    "Estimate",
    "Expectation",
    "Journal",
    "Judge",
    "JudgeAccessError",
    "JudgeNameError",
    "JudgeWarning",
    "LLMJudge",
    "LocalJudge",
    "Price",
    "Rubric",
    "Status",
    "Thresholds",
    "agreement",
    "check_controls",
    "compare",
    "judge",
    "is_misaligned",
    "label",
    "named_judge",
    "per_prompt",
    "rates",
    "threshold_curve",
]
