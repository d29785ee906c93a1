"""Horizontal dots with intervals: groups from top to bottom, one dot of each kind in them."""

from __future__ import annotations

from collections.abc import Mapping
from textwrap import fill
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from ._style import INK, SMALL

MARKERS = ("o", "s", "D", "^", "v", "P")


def dots(
    ax: Axes,
    frame: pd.DataFrame,
    group: str,
    kind: str,
    value: str,
    looks: Mapping[Any, str],
    *,
    letters: int = 22,
    opacity: float = 1.0,
) -> None:
    """Draw the rows of ``frame``.

    Args:
        ax: Axes to draw on.
        frame: One row per dot.
        group: Column of the row from top to bottom that a dot is in.
        kind: Column of the kinds within a row.
        value: Column of the dot's place; ``low, high`` its interval, where they are there.
        looks: The colour of each kind, in the order from top to bottom.
        letters: Longer names of groups are broken into lines.
        opacity: Of the intervals.
    """
    groups = list(dict.fromkeys(frame[group]))
    apart = 0.7 / len(looks)
    for rank, (name, colour) in enumerate(looks.items()):
        rows = frame[frame[kind] == name]
        middle = np.array([groups.index(found) for found in rows[group]], float)
        places = middle + (rank - (len(looks) - 1) / 2) * apart
        if {"low", "high"} <= set(rows.columns):
            ax.hlines(places, rows["low"], rows["high"], color=colour, linewidth=1.1, alpha=opacity, zorder=2)
        look: dict[str, Any] = {"color": colour, "marker": MARKERS[rank % len(MARKERS)], "markeredgewidth": 0}
        ax.plot(rows[value], places, linestyle="", markersize=3.6, zorder=3, label=str(name), **look)
    for row in range(0, len(groups), 2):
        ax.axhspan(row - 0.5, row + 0.5, color="#F5F5F5", linewidth=0, zorder=0)
    ax.set_yticks(range(len(groups)), [fill(str(name), letters) for name in groups], fontsize=SMALL, color=INK)
    ax.set_ylim(len(groups) - 0.5, -0.5)
    ax.tick_params(axis="y", length=0)
    ax.grid(False, axis="y")


def dots_height(groups: int, kinds: int) -> float:
    """Inches; rows draw closer together where there are many."""
    row = max(0.085 * kinds + 0.07, 0.15) if groups > 12 else max(0.1 * kinds + 0.1, 0.2)
    return 0.85 + row * groups
