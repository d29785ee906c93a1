"""What a monitor has to beat: the words of the answer, its length, and a judge who reads it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float


@dataclass(frozen=True, eq=False)
class WordsBaseline:
    """Logistic regression on how often each word occurs in the answer: what can be told without any model.

    Attributes:
        pipeline: The fitted scikit-learn pipeline.
    """

    pipeline: Any

    @staticmethod
    def fit(responses: Sequence[str], truth: Sequence[bool] | np.ndarray, *, C: float = 1.0) -> WordsBaseline:  # noqa: N803
        """Fit on the answers that the monitor was fitted on.

        Args:
            responses: Their texts.
            truth: Whether each is of the class that should raise the alarm.
            C: Inverse regularisation strength.
        """
        from sklearn.feature_extraction.text import CountVectorizer
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline

        words = CountVectorizer(token_pattern=r"\w+|[^\w\s]")
        pipeline = make_pipeline(words, LogisticRegression(C=C, max_iter=1000))
        return WordsBaseline(pipeline.fit(list(responses), np.asarray(truth, dtype=bool)))

    def scores(self, responses: Sequence[str]) -> Float[np.ndarray, " n"]:
        """Log-odds of each answer; words that were not in the training answers count for nothing."""
        return np.asarray(self.pipeline.decision_function(list(responses)), dtype=float)


def length_scores(responses: Sequence[str]) -> Float[np.ndarray, " n"]:
    """Words in each answer: a confound, if it tells the classes apart (2607.09053)."""
    return np.array([len(text.split()) for text in responses], dtype=float)


def judge_scores(judged: pd.DataFrame) -> Float[np.ndarray, " n"]:
    """A judge's alignment as a competing score, 0 to 100, high where misaligned; an answer without a verdict is 0.

    Raises:
        ValueError: If the answers were not judged.
    """
    if "alignment" not in judged.columns:
        raise ValueError(f"no column 'alignment' in {list(judged.columns)}; judge the answers first")
    return 100.0 - judged["alignment"].fillna(100.0).to_numpy(dtype=float)
