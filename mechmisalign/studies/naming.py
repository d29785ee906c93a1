"""What a reader sees instead of the names that stages and tables use among themselves.

The study's mean difference is taken between pools with as many answers of either class to every prompt, which
``mm.mean_difference`` by itself does not ask for, and is another thing than the mean of prompt-wise differences
(``mm.matched_mean_difference``). Stored tables, stages and conditions keep the short name: names seed the samples.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import pandas as pd

from mechmisalign import report
from mechmisalign.report import ReportTable

from .steps import MEAN_DIFFERENCE

POOLED = "matched-pool mean difference"
_SHORT = re.compile(rf"(?<!matched-pool ){MEAN_DIFFERENCE}")
_NAMES = ("condition", "series", "estimator", "state", "cure", "scope")


def shown(name: str) -> str:
    """A name as it is to be read."""
    return _SHORT.sub(POOLED, name)


def displayed(table: pd.DataFrame) -> pd.DataFrame:
    """A table with its names as they are to be read."""
    named = [name for name in _NAMES if name in table and not pd.api.types.is_numeric_dtype(table[name])]
    return table.assign(**{name: [shown(str(value)) for value in table[name]] for name in named})


def rates_table(rates: pd.DataFrame, by: Sequence[str], caption: str) -> ReportTable:
    """As :func:`mechmisalign.report.rates_table`, with names as they are to be read."""
    return report.rates_table(displayed(rates), by, caption)
