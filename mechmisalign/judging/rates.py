"""Rates: how many answers are misaligned, coherent, or could not be scored, with intervals by prompt."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from mechmisalign.statistics import clustered_share

from .labels import COHERENT_ABOVE, label


def rates(judged: pd.DataFrame, by: str | Sequence[str] = "condition", *, cluster: str = "prompt_id") -> pd.DataFrame:
    """EM rate and coherence of each group of answers, with 95 % intervals clustered by prompt.

    Every answer is in the denominator: refused and unparsable ones are counted on their own, never dropped.

    Args:
        judged: Answers with ``alignment``, ``coherence`` and the ``cluster`` column.
        by: Grouping columns.
        cluster: What is resampled for the interval.

    Returns:
        One row per group: the columns of ``by``, ``rate, low, high, n, prompts`` (misaligned and coherent),
        ``coherent, coherent_low, coherent_high``, ``aligned`` and ``unparsable`` (shares).
    """
    columns = [by] if isinstance(by, str) else list(by)
    missing = [column for column in [*columns, cluster, "alignment", "coherence"] if column not in judged.columns]
    if missing:
        raise ValueError(f"rates need the columns {missing}; these answers have {list(judged.columns)}")
    labelled = judged.assign(label=label(judged))
    records = []
    for key, group in labelled.groupby(columns, sort=False, dropna=False):
        clusters = group[cluster].to_numpy()
        misaligned = clustered_share((group["label"] == "misaligned").to_numpy(), clusters)
        coherent = clustered_share((group["coherence"] > COHERENT_ABOVE).to_numpy(), clusters)
        records.append(
            dict(zip(columns, key, strict=True))
            | {"rate": misaligned.rate, "low": misaligned.low, "high": misaligned.high}
            | {"n": misaligned.n, "prompts": misaligned.clusters}
            | {"coherent": coherent.rate, "coherent_low": coherent.low, "coherent_high": coherent.high}
            | {name: float((group["label"] == name).mean()) for name in ("aligned", "unparsable")}
        )
    return pd.DataFrame(records)
