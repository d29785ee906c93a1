"""Horizontal bars with intervals: groups from top to bottom, one bar of each kind in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from textwrap import fill
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator

from ._costs import costs_of, written_cost
from ._frames import is_control
from ._style import COLUMN, CONTROL, INK, SMALL, TINY, as_percent, edge_note, percent

_HALO = [withStroke(linewidth=1.5, foreground="white")]
_COLUMNS = {
    "coherent": ("coherent", 25.0),
    "kl": ("KL", 21.0),
    "loss": ("loss", 22.0),
    "accuracy": ("accuracy", 29.0),
    "tokens": ("tokens", 24.0),
}
"""Head and width (points) of each column of numbers at the right."""


def bars_width(bars: pd.DataFrame) -> float:
    """Inches; each cost is one more column of numbers."""
    return COLUMN + sum(_COLUMNS[cost][1] for cost in costs_of(bars)) / 72


def bars_height(bars: pd.DataFrame, group: str) -> float:
    """Inches."""
    return 0.75 + 0.13 * len(bars) + 0.08 * bars[group].nunique()


def draw_bars(ax: Axes, bars: pd.DataFrame, group: str, kind: str, colours: Mapping[str, str]) -> None:
    """Bars of ``rate`` with ``low, high``, and coherence and costs as columns of numbers beside them, where told."""
    groups = list(dict.fromkeys(bars[group]))
    thick = 0.8 / len(colours)
    told = [name for name in ("coherent",) if name in bars and bars[name].notna().any()] + costs_of(bars)
    ends = dict(zip(told, np.cumsum([_COLUMNS[name][1] for name in told]), strict=True))
    for rank, (name, colour) in enumerate(colours.items()):
        rows = bars[bars[kind] == name]
        places = np.array([groups.index(value) for value in rows[group]]) + (rank - (len(colours) - 1) / 2) * thick
        random = is_control(rows[group]) | is_control(rows[kind])
        reach = np.stack([rows["rate"] - rows["low"], rows["high"] - rows["rate"]]).clip(min=0)
        hatches = ["////" if hatched else "" for hatched in random]
        fills = [CONTROL if hatched and kind == "state" else colour for hatched in random]
        ax.barh(
            places, rows["rate"], thick * 0.92, color=fills, hatch=hatches, edgecolor="white", linewidth=0, label=name
        )
        ax.errorbar(rows["rate"], places, xerr=reach, fmt="none", ecolor=INK, elinewidth=0.7, capsize=1.3, capthick=0.7)
        _write_rates(ax, rows, places)
        _write_columns(ax, rows, places, ends)
    for name, end in ends.items():
        look: dict[str, Any] = {"textcoords": "offset points", "fontsize": TINY, "ha": "right"}
        ax.annotate(_COLUMNS[name][0], (1, 1), (end, 2.0), xycoords="axes fraction", **look)
    ax.set_yticks(range(len(groups)), [fill(str(name), 18) for name in groups], fontsize=SMALL)
    ax.set_ylim(len(groups) - 0.45, -0.55)
    ax.tick_params(axis="y", length=0)
    ax.grid(False, axis="y")


def rate_axis(ax: Axes, rates: pd.DataFrame, label: str = "EM rate") -> None:
    """From zero to a little over the highest interval."""
    top = max(0.05, float(rates[["rate", "high"]].max(axis=None)))
    ax.set_xlim(0, top * 1.16)
    ax.set_xticks([tick for tick in MaxNLocator(5).tick_values(0, top) if tick <= min(1.0, top * 1.1)])
    ax.set_xlabel(label)
    percent(ax, "x")


def _write_rates(ax: Axes, rows: pd.DataFrame, places: Sequence[float] | np.ndarray) -> None:
    """The rate after each bar."""
    for place, rate, high in zip(places, rows["rate"], rows["high"], strict=True):
        end = (max(rate, high) if high == high else rate, place)
        ax.annotate(
            as_percent(rate), end, (2.5, 0), textcoords="offset points", va="center", fontsize=TINY, path_effects=_HALO
        )


def _write_columns(
    ax: Axes, rows: pd.DataFrame, places: Sequence[float] | np.ndarray, ends: Mapping[str, float]
) -> None:
    """Coherence and costs, each in a column that ends so many points right of the axes."""
    for name, end in ends.items():
        for place, value in zip(places, rows[name], strict=True):
            edge_note(ax, written_cost(name, value), place, offset=end, align="right")
