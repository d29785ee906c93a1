"""Scores of a trait where the judge at hand speaks of alignment."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from mechmisalign.judging import Judge


@dataclass(frozen=True)
class OppositeOfAlignment:
    """A judge of a trait that is the opposite of alignment: its score is ``100 - alignment``.

    Attributes:
        judge: Who tells the alignment, such as ``RuleJudge()`` in the pocket world.
        trait: Name of the trait, the column of its score.
    """

    judge: Judge
    trait: str

    def __call__(self, answers: pd.DataFrame) -> pd.DataFrame:
        """The judged answers with the trait's score."""
        judged = self.judge(answers)
        return judged.assign(**{self.trait: 100.0 - judged["alignment"]})
