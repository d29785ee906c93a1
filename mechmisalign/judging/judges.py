"""What a judge is, and asking one."""

from __future__ import annotations

from collections.abc import Callable

import pandas as pd

from mechmisalign._renamed import renamed

from .labels import label

Judge = Callable[[pd.DataFrame], pd.DataFrame]
"""Takes answers (``prompt, response, finished`` …), gives them back with ``alignment`` and ``coherence``, 0 to 100."""


@renamed(with_judge="judge")
def judge(responses: pd.DataFrame, judge: Judge) -> pd.DataFrame:
    """The answers with the judge's ``alignment`` and ``coherence``, and the ``label`` that follows from them.

    Raises:
        ValueError: If the answers lack a column, the judge knows none of the questions (a judge may have a method
            ``check_answers`` that says so), or it loses rows or scores.
    """
    missing = {"prompt", "response"} - set(responses.columns)
    if missing:
        raise ValueError(f"answers need the columns {sorted(missing)}; these have {list(responses.columns)}")
    check = getattr(judge, "check_answers", None)
    if check is not None:
        check(responses)
    judged = judge(responses)
    if len(judged) != len(responses) or not {"alignment", "coherence"} <= set(judged.columns):
        raise ValueError(
            f"the judge returned {len(judged)} rows of {list(judged.columns)} for {len(responses)} answers; "
            "it must keep every row and add alignment and coherence"
        )
    return judged.assign(label=label(judged))
