"""Differences to a reference, with the band that holds for all of them at once."""

from __future__ import annotations

from textwrap import fill
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ._dots import dots_height
from ._frames import check, is_control
from ._style import (
    BLUE,
    COLUMN,
    CONTROL,
    INK,
    SMALL,
    axes,
    figure_of,
    house_style,
    legend_above,
    lighter,
    percent,
)

_LEVEL = 0.05
_LETTERS = 28
"""Longer names are broken into lines."""


@house_style
def difference_forest(
    compared: pd.DataFrame, *, label: str = "difference of EM rates", ax: Axes | None = None
) -> Figure:
    """Each condition's difference to its reference: its own interval thick, the simultaneous band thin.

    A dot is filled where the difference stands after correction for all of the family (``p_max`` at most 0.05).

    Args:
        compared: What :func:`mechmisalign.compare` returns: the columns that make a condition, then ``against,
            difference, low, high, p_max, band_low, band_high``.
        label: What the difference is of.
        ax: Axes to draw on; a new figure without.

    Raises:
        ValueError: On missing columns or no rows.
    """
    check(compared, "difference_forest", ["against", "difference", "low", "high", "p_max", "band_low", "band_high"])
    by = list(compared.columns[: list(compared.columns).index("against")])
    names = _names(compared, by)
    grey = is_control(names)
    told = [fill(name, _LETTERS) for name in names]
    lines = max(name.count("\n") + 1 for name in told)
    ax = axes(ax, COLUMN, 0.3 + dots_height(len(compared), 1) + 0.08 * (lines - 1) * len(compared))
    places = np.arange(len(compared))
    colours = np.where(grey, CONTROL, BLUE)
    bands = [lighter(colour, 0.45) for colour in colours]
    ax.hlines(places, compared["band_low"], compared["band_high"], color=bands, linewidth=0.9, zorder=2)
    ax.hlines(places, compared["low"], compared["high"], color=colours, linewidth=2.2, zorder=2.5)
    stands = compared["p_max"].to_numpy() <= _LEVEL
    fills = np.where(stands, colours, "white")
    ax.scatter(compared["difference"], places, s=13, c=fills, edgecolors=colours, linewidths=0.9, zorder=3)
    ax.axvline(0, color=INK, linewidth=0.6, zorder=1)
    ax.set_yticks(places, told, fontsize=SMALL)
    ax.set_ylim(len(compared) - 0.5, -0.5)
    ax.tick_params(axis="y", length=0)
    ax.grid(False, axis="y")
    references = compared["against"].astype(str).unique()
    ax.set_xlabel(f"{label}\n(minus {references[0]})" if len(references) == 1 else label)
    percent(ax, "x")
    legend_above(ax, _keys())
    return figure_of(ax)


def _names(compared: pd.DataFrame, by: list[str]) -> pd.Series:
    """What each row is called: numbers with the name of their column, columns with one value left out."""
    told = [column for column in by if compared[column].nunique() > 1] or by
    parts = [
        compared[column].map(lambda value, column=column: f"{column} {value:g}")
        if pd.api.types.is_numeric_dtype(compared[column])
        else compared[column].astype(str)
        for column in told
    ]
    if not parts:
        return pd.Series("", index=compared.index)
    return pd.Series([", ".join(row) for row in zip(*parts, strict=True)], index=compared.index)


def _keys() -> list[Line2D]:
    dot: dict[str, Any] = {"color": BLUE, "marker": "o", "markersize": 3.6, "linestyle": ""}
    return [
        Line2D([], [], color=BLUE, linewidth=2.2, label="95 %, each alone"),
        Line2D([], [], color=lighter(BLUE, 0.45), linewidth=0.9, label="95 %, all at once"),
        Line2D([], [], label="corrected p ≤ 0.05", **dot),
        Line2D([], [], label="p > 0.05", markerfacecolor="white", **dot),
    ]
