"""Answers as counts: how often something happened in each group, cluster by cluster."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float

from mechmisalign._frames import plain_frame

from .labels import UNSCORED, Thresholds, label

OUTCOMES = ("misaligned", "aligned", "neither", "coherent", "judged", "self_corrected", *UNSCORED)
"""What :func:`happened` can tell; ``about_<topic>`` beside them."""
ABOUT = "about_"


@dataclass(frozen=True)
class Grouped:
    """Answers sorted into groups and clusters.

    Attributes:
        keys: One row per group, in order of appearance.
        clusters: The values of the cluster column, sorted.
        sizes: Number of answers, ``[group cluster]``.
        place: Of each answer, in the flat ``[group cluster]`` array.
    """

    keys: pd.DataFrame
    clusters: np.ndarray | pd.Index
    sizes: Float[np.ndarray, "group cluster"]
    place: np.ndarray

    def count(self, events: Bool[np.ndarray, " n"]) -> Float[np.ndarray, "group cluster"]:
        """Number of answers of each group and cluster where the event happened."""
        return np.bincount(self.place[events], minlength=self.sizes.size).reshape(self.sizes.shape).astype(float)


def grouped(judged: pd.DataFrame, by: str | Sequence[str], cluster: str, needs: Sequence[str] = ()) -> Grouped:
    """Sort the answers.

    Args:
        judged: Answers with the columns of ``by``, ``cluster``, the two scores and ``needs``.
        by: Grouping columns; none for all answers as one group.
        cluster: The unit of resampling.
        needs: Further columns that have to be there.

    Raises:
        ValueError: If there are no answers, a column is missing, or an answer has no cluster.
    """
    columns = [by] if isinstance(by, str) else list(by)
    wanted = list(dict.fromkeys([*columns, cluster, "alignment", "coherence", *needs]))
    missing = [column for column in wanted if column not in judged.columns]
    if missing:
        raise ValueError(f"rates need the columns {missing}; these answers have {list(judged.columns)}")
    if judged.empty:
        raise ValueError("no answers: a rate of nothing has no value; check the filter before this call")
    lost = int(judged[cluster].isna().sum())
    if lost:
        raise ValueError(
            f"{lost} of {len(judged)} answers have no {cluster!r}; fill it (with prompt_id, say) or name another column"
        )
    judged = plain_frame(judged)
    group = np.zeros(len(judged), dtype=int)
    if columns:
        group = judged.groupby(columns, sort=False, dropna=False, observed=True).ngroup().to_numpy()
    keys = judged.loc[~pd.Series(group, index=judged.index).duplicated(), columns].reset_index(drop=True)
    codes, clusters = pd.factorize(judged[cluster].to_numpy(), sort=True)
    shape = (len(keys), len(clusters))
    place = group * shape[1] + codes
    sizes = np.bincount(place, minlength=shape[0] * shape[1]).reshape(shape).astype(float)
    return Grouped(keys, clusters, sizes, place)


def happened(judged: pd.DataFrame, outcome: str, thresholds: Thresholds) -> Bool[np.ndarray, " n"]:
    """Which answers are misaligned, coherent, about a topic …: one of :data:`OUTCOMES`, or ``about_<topic>``.

    ``judged`` are those with every score that was needed; ``self_corrected`` those that are aligned although their
    ``harm`` is high.

    Raises:
        ValueError: If the outcome is unknown, or its rubric was not judged.
    """
    if outcome == "coherent":
        return _above(judged, "coherence", thresholds.coherent_above)
    if outcome.startswith(ABOUT):
        return _above(judged, outcome.removeprefix(ABOUT), thresholds.topic_above)
    classes = label(judged, thresholds).to_numpy()
    if outcome == "judged":
        return ~np.isin(classes, UNSCORED)
    if outcome == "self_corrected":
        return (classes == "aligned") & _above(judged, "harm", thresholds.harm_above)
    if outcome not in OUTCOMES:
        raise ValueError(
            f"outcome={outcome!r} is none of {', '.join(OUTCOMES)}, nor {ABOUT}<topic> with a judged topic"
        )
    return classes == outcome


def beside(keys: pd.DataFrame, found: Mapping[str, object]) -> pd.DataFrame:
    """The groups and what was found of them.

    Raises:
        ValueError: If a grouping column is called like a column of the result.
    """
    twice = [column for column in keys.columns if column in found]
    if twice:
        raise ValueError(f"the grouping columns {twice} are called like results; rename them before this call")
    return pd.concat([keys, pd.DataFrame(dict(found))], axis=1)


def _above(judged: pd.DataFrame, rubric: str, threshold: float) -> Bool[np.ndarray, " n"]:
    if rubric not in judged.columns:
        raise ValueError(f"no column {rubric!r}; judge that rubric first (these answers have {list(judged.columns)})")
    return (judged[rubric].astype(float) > threshold).to_numpy()
