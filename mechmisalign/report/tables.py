"""Shares and frames in writing."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from .values import ReportTable

_NUMBER = re.compile(r"[-+−×]?\d[\d\s.,]*(e[-+]?\d+)?\s?%?(\s*\[.*\])?|–?")


def share(record: Mapping[str, Any] | pd.Series) -> str:
    """A share with its interval in writing: "41.2 % [36.0, 46.5]"; needs ``rate``, takes ``low`` and ``high``."""
    return f"{percent(record['rate'])} {interval(record)}".rstrip()


def percent(rate: float) -> str:
    """A share as percent with one decimal, "41.2 %"; a dash where there is none."""
    return "–" if pd.isna(rate) else f"{100 * rate:.1f} %"


def interval(record: Mapping[str, Any] | pd.Series) -> str:
    """The interval of a share in percent, "[36.0, 46.5]"; empty where there is none."""
    low, high = record.get("low"), record.get("high")
    if low is None or high is None or pd.isna(low) or pd.isna(high):
        return ""
    return f"[{100 * low:.1f}, {100 * high:.1f}]"


def rates_table(rates: pd.DataFrame, by: Sequence[str], caption: str) -> ReportTable:
    """A frame of :func:`mechmisalign.rates` as it is to be read.

    Args:
        rates: Columns ``rate, low, high``; optional ``n``, ``coherent, coherent_low, coherent_high``, ``unparsable``.
        by: The columns that name a row, in order.
        caption: Caption of the table.

    Raises:
        ValueError: On missing columns.
    """
    missing = [column for column in (*by, "rate", "low", "high") if column not in rates.columns]
    if missing:
        raise ValueError(
            f"rates_table misses the columns {', '.join(missing)}; the frame has {', '.join(rates.columns)}"
        )
    told = rates[list(by)].copy()
    told["EM rate"] = [share(row) for _, row in rates.iterrows()]
    if "coherent" in rates:
        ends = {"coherent": "rate", "coherent_low": "low", "coherent_high": "high"}
        coherent = rates.reindex(columns=list(ends)).rename(columns=ends)
        told["coherent"] = [share(row) for _, row in coherent.iterrows()]
    if "unparsable" in rates:
        told["unparsable"] = [percent(value) for value in rates["unparsable"]]
    if "n" in rates:
        told["n"] = rates["n"]
    return ReportTable(told, caption)


@dataclass(frozen=True)
class Column:
    """A column in writing."""

    name: str
    cells: tuple[str, ...]
    is_number: bool


def columns(frame: pd.DataFrame) -> tuple[Column, ...]:
    """The columns of a frame as they are to be read."""
    told = []
    for name, values in frame.items():
        cells = tuple(cell(value) for value in values)
        told.append(Column(str(name), cells, all(_NUMBER.fullmatch(written) for written in cells)))
    return tuple(told)


def cell(value: Any) -> str:
    """One value as it is to be read: three significant digits, yes or no, a dash for what is missing."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return "–" if pd.isna(value) else f"{value:.3g}"
    return "–" if value is None or value is pd.NA else str(value)
