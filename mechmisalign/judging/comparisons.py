"""Conditions against a reference: differences paired by prompt, and what is left of them when there are many."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from mechmisalign.statistics import clustered_differences

from ._counts import Grouped, beside, grouped, happened
from .labels import PAPER, Thresholds


def compare(
    judged: pd.DataFrame,
    against: object,
    by: str | Sequence[str] = "condition",
    *,
    outcome: str = "misaligned",
    family: str | Sequence[str] = (),
    cluster: str = "prompt_id",
    thresholds: Thresholds = PAPER,
    resamples: int | None = None,
    flips: int = 10_000,
    seed: int = 0,
) -> pd.DataFrame:
    """Difference of each condition to a reference, paired by prompt, and corrected for the number of comparisons.

    Own intervals are :func:`mechmisalign.statistics.paired_intervals`; p-values flip the signs of whole prompts.
    Multiplicity is met twice: ``q`` is the
    false discovery rate of Benjamini and Hochberg; ``p_max`` and the band hold for all comparisons of a family at once,
    by the max-statistic over shared flips (:func:`mechmisalign.statistics.sign_flips`), which knows that neighbouring
    layers agree. With fewer than six prompts no flip test reaches 0.05, and the bands say so.

    Args:
        judged: Answers as for :func:`mechmisalign.rates`; a condition and its reference answer the same prompts.
        against: The reference: its value of ``by``; a tuple where ``by`` has several columns; or a mapping from some of
            these columns to the values that make a reference: ``{"series": "random control"}`` compares each layer and
            strength with the control at the same layer and strength.
        by: Columns that make a condition.
        outcome: What is counted, as in :func:`mechmisalign.per_prompt`: ``misaligned``, ``coherent``, ``refusal`` …
        family: Columns of ``by`` whose values are families of their own; without them, all comparisons are one.
        cluster: The unit that is paired and flipped.
        thresholds: Where classes begin.
        resamples: Has no effect any more: nothing is drawn for the intervals.
        flips: Sign flips; all of them, where there are no more.
        seed: Of the flips.

    Returns:
        One row per condition that is no reference: the columns of ``by``; ``against``: the reference in words;
        ``difference, low, high`` (95 %); ``p, q, p_max``; ``band_low, band_high`` (95 % for the whole family); ``rate,
        n, judged``, the same of the reference as ``against_rate, against_n, against_judged``, and ``prompts``.

    Raises:
        ValueError: If a column is missing, there is no such reference or nothing to compare with it, or a condition and
            its reference answer different prompts.
    """
    del resamples
    groups = grouped(judged, by, cluster)
    treated, reference = _pairs(groups.keys, against)
    _refuse_unpaired(groups, treated, reference, cluster)
    families = _families(groups.keys.iloc[treated], family)
    hits, sizes = groups.count(happened(judged, outcome, thresholds)), groups.sizes
    told = clustered_differences(
        (hits[treated], sizes[treated]),
        (hits[reference], sizes[reference]),
        families=families,
        flips=flips,
        seed=seed,
    )
    n, scored = sizes.sum(1), groups.count(happened(judged, "judged", thresholds)).sum(1)
    names = groups.keys.astype(str).agg(", ".join, axis=1).to_numpy()
    found = {"against": names[reference], "difference": told.value, "low": told.low, "high": told.high, "p": told.p}
    found |= {"q": _false_discovery_rates(told.p, families), "p_max": told.p_max}
    found |= {"band_low": told.band_low, "band_high": told.band_high}
    for prefix, rows in (("", treated), ("against_", reference)):
        found |= {f"{prefix}rate": (hits.sum(1) / n)[rows], f"{prefix}n": n.astype(int)[rows]}
        found |= {f"{prefix}judged": (scored / n)[rows]}
    found["prompts"] = (sizes > 0).sum(1)[treated]
    return beside(groups.keys.iloc[treated].reset_index(drop=True), found)


def _pairs(keys: pd.DataFrame, against: object) -> tuple[Int[np.ndarray, " cell"], Int[np.ndarray, " cell"]]:
    """The rows of ``keys`` that are compared, and the row of each one's reference."""
    columns = list(keys.columns)
    wanted = _as_mapping(columns, against)
    rows = [tuple(row) for row in keys.itertuples(index=False, name=None)]
    place = {row: i for i, row in enumerate(rows)}
    replaced = [tuple(wanted.get(name, value) for name, value in zip(columns, row, strict=True)) for row in rows]
    treated = [i for i, row in enumerate(rows) if row != replaced[i]]
    lost = next((replaced[i] for i in treated if replaced[i] not in place), None)
    if lost is not None:
        raise ValueError(f"no answers of the reference {_told(columns, lost)}; there are {_some(columns, rows)}")
    if not treated:
        raise ValueError(f"nothing but the reference {against!r} is there; there are {_some(columns, rows)}")
    return np.array(treated), np.array([place[replaced[i]] for i in treated])


def _as_mapping(columns: list[str], against: object) -> Mapping[str, object]:
    if isinstance(against, Mapping):
        unknown = [name for name in against if name not in columns]
        if unknown or not against:
            raise ValueError(f"against= names the columns {list(against)}; it takes some of by={columns}")
        return against
    values = (against,) if len(columns) == 1 else against
    if not isinstance(values, tuple) or len(values) != len(columns):
        raise ValueError(
            f"against={against!r} names no reference by {columns}; pass one value for each in a tuple, or a mapping"
        )
    return dict(zip(columns, values, strict=True))


def _told(columns: list[str], row: tuple[object, ...]) -> str:
    plain = [value.item() if isinstance(value, np.generic) else value for value in row]
    return ", ".join(f"{name} {value!r}" for name, value in zip(columns, plain, strict=True))


def _some(columns: list[str], rows: list[tuple[object, ...]], most: int = 6) -> str:
    more = f" and {len(rows) - most} more" if len(rows) > most else ""
    return "; ".join(_told(columns, row) for row in rows[:most]) + more


def _refuse_unpaired(
    groups: Grouped, treated: Int[np.ndarray, " cell"], reference: Int[np.ndarray, " cell"], cluster: str
) -> None:
    differ = (groups.sizes[treated] > 0) != (groups.sizes[reference] > 0)
    if not differ.any():
        return
    cell, column = np.argwhere(differ)[0]
    lost = _told([cluster], (groups.clusters[column],))
    names = [_told(list(groups.keys.columns), tuple(groups.keys.iloc[rows[cell]])) for rows in (treated, reference)]
    raise ValueError(
        f"{lost} was answered by only one of {names[0]} and its reference {names[1]}; a paired comparison needs the "
        "same prompts on both sides"
    )


def _families(keys: pd.DataFrame, family: str | Sequence[str]) -> Int[np.ndarray, " cell"]:
    columns = [family] if isinstance(family, str) else list(family)
    unknown = [name for name in columns if name not in keys.columns]
    if unknown:
        raise ValueError(f"family={columns} names {unknown}, which are none of by={list(keys.columns)}")
    if not columns:
        return np.zeros(len(keys), dtype=int)
    return keys.groupby(columns, sort=False, dropna=False, observed=True).ngroup().to_numpy()


def _false_discovery_rates(
    p: Float[np.ndarray, " cell"], families: Int[np.ndarray, " cell"]
) -> Float[np.ndarray, " cell"]:
    from scipy.stats import false_discovery_control

    adjusted = np.empty_like(p)
    for family in np.unique(families):
        adjusted[families == family] = false_discovery_control(p[families == family], method="bh")
    return adjusted
