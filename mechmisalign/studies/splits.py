"""Which prompts a study chooses on, and which it reports on.

What is best among many conditions is best on these prompts too: fresh answers to the same prompts would still be an
optimistic reading of it. So layer, strength and estimator are chosen on one half of the prompts, and the rates of what
was chosen are those on the other half, on fresh answers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

if TYPE_CHECKING:
    from .sampling import Run
    from .trials import Trial

CHOICE, REPORT, BOTH = "choice", "report", "both"
MIN_PROMPTS = 8
"""With fewer prompts than this, halves say too little: choice and report differ in their samples alone."""
_LABELS = ("domain", "category")
_QUESTION = "question_id"


@dataclass(frozen=True)
class Halves:
    """The prompts of a study, divided.

    Attributes:
        table: ``prompt_id, split``: ``"choice"`` or ``"report"``; ``"both"`` where there are too few prompts.
    """

    table: pd.DataFrame

    @property
    def choice(self) -> frozenset[str]:
        """Prompts on which something is chosen."""
        return self._of(CHOICE)

    @property
    def report(self) -> frozenset[str]:
        """Prompts on which what was chosen is reported."""
        return self._of(REPORT)

    @property
    def name(self) -> str:
        """What tables of rates say in their column ``split``: ``"report"``, or ``"both"``."""
        return BOTH if self.table["split"].eq(BOTH).all() else REPORT

    def to_choose_on(self, run: Run, trial: Trial) -> pd.DataFrame:
        """Rates of a stage on the prompts on which something is chosen."""
        return trial.on(self.choice).rates(run).assign(split=BOTH if self.name == BOTH else CHOICE)

    def to_report(self, run: Run, trial: Trial) -> pd.DataFrame:
        """Rates of a stage on the other prompts."""
        return trial.on(self.report).rates(run).assign(split=self.name)

    def _of(self, half: str) -> frozenset[str]:
        return frozenset(self.table.loc[self.table["split"].isin([half, BOTH]), "prompt_id"])


def halves(prompts: pd.DataFrame, seed: int) -> Halves:
    """Divide the prompts: at random by the seed, evenly in each domain, variants of one question together.

    Args:
        prompts: ``prompt_id``, and where they have them ``domain`` (or ``category``) and ``question_id``.
        seed: Of the study.
    """
    frame = prompts.assign(_unit=prompts[_QUESTION if _QUESTION in prompts else "prompt_id"].astype(str))
    label = next((name for name in _LABELS if name in frame), None)
    units = frame.drop_duplicates("_unit").sort_values("_unit", kind="stable")
    if len(units) < MIN_PROMPTS:
        return Halves(pd.DataFrame({"prompt_id": prompts["prompt_id"].to_numpy(), "split": BOTH}))
    rng = np.random.default_rng(seed)
    drawn = units.iloc[rng.permutation(len(units))]
    if label is not None:  # domains one after the other, and every second unit: halves of each, and of all
        drawn = drawn.sort_values(label, key=lambda column: column.astype(str), kind="stable")
    sides = pd.Series(np.where(np.arange(len(drawn)) % 2, REPORT, CHOICE), index=drawn["_unit"])
    return Halves(
        pd.DataFrame({"prompt_id": prompts["prompt_id"].to_numpy(), "split": sides[frame["_unit"]].to_numpy()})
    )
