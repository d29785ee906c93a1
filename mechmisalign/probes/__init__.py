"""Probes: linear classifiers on features of a model, with their controls, and as artifacts that know their model.

:mod:`.estimators` are the probes (scikit-learn's grammar), :mod:`.folds` says who is trained on and who is tested,
:mod:`.evaluation` scores a probe beside its controls, and :mod:`.monitor` keeps a fitted probe for later use.
"""

from .estimators import LogisticProbe, MeanDifferenceProbe, lda, logistic
from .evaluation import METRICS, Evaluation, evaluate, evaluate_layers, leak, paper_setting
from .folds import SPLITS
from .monitor import Probe, ProbeMismatchError

__all__ = [
    "METRICS",
    "SPLITS",
    "Evaluation",
    "LogisticProbe",
    "MeanDifferenceProbe",
    "Probe",
    "ProbeMismatchError",
    "evaluate",
    "evaluate_layers",
    "lda",
    "leak",
    "logistic",
    "paper_setting",
]
