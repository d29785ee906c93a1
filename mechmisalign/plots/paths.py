"""What the geometry does to behaviour: rates along a path between two organisms, and in a cone of directions."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ._frames import INTERVAL, check, check_unique
from ._style import (
    BAND,
    BLUE,
    COLUMN,
    CONTROL,
    INK,
    PALETTE,
    SMALL,
    TINY,
    VERMILION,
    axes,
    figure_of,
    house_style,
    legend_above,
    marker,
    percent,
)

_COHERENT = ("coherent", "coherent_low", "coherent_high")


@house_style
def interpolation_path(rates: pd.DataFrame, *, ends: tuple[str, str] | None = None, ax: Axes | None = None) -> Figure:
    """EM rate (solid) and coherence (dashed) along a path between two organisms, with intervals.

    Args:
        rates: ``t, rate, low, high, coherent, coherent_low, coherent_high``; optional ``series``: the first is drawn
            with both, the others (controls) with their EM rate only.
        ends: Names of the organisms at 0 and 1.
        ax: Axes to draw on; a new figure without.

    Raises:
        ValueError: On missing columns, no rows, shares outside 0 to 1, or several rows for one point.
    """
    check(rates, "interpolation_path", ["t", *INTERVAL, *_COHERENT], [*INTERVAL, *_COHERENT])
    series = ["series"] if "series" in rates else []
    check_unique(rates, "interpolation_path", ["t", *series])
    ax = axes(ax, COLUMN, 2.6)
    groups = list(rates.groupby("series", sort=False, observed=True)) if series else [("misaligned", rates)]
    for i, (name, rows) in enumerate(groups):
        rows, colour = rows.sort_values("t"), PALETTE[0] if i == 0 else PALETTE[2 + (i - 1) % 4]
        ax.fill_between(rows["t"], rows["low"], rows["high"], color=colour, alpha=BAND, linewidth=0)
        ax.plot(rows["t"], rows["rate"], color=colour, marker=marker(len(rows)), label=f"{name}")
    path = groups[0][1].sort_values("t")
    ax.fill_between(path["t"], path["coherent_low"], path["coherent_high"], color=BLUE, alpha=BAND, linewidth=0)
    told = "coherent" if len(groups) == 1 else f"{groups[0][0]}: coherent"
    ax.plot(path["t"], path["coherent"], color=BLUE, linestyle=(0, (4, 2)), linewidth=1.0, label=told)
    for place, end in zip((0.0, 1.0), ends or ("", ""), strict=True):
        ax.axvline(place, color=INK, linewidth=0.6, linestyle=(0, (1, 1.5)), zorder=1)
        ax.annotate(
            end, (place, 1.0), (0, 2), xycoords=("data", "axes fraction"), textcoords="offset points",
            ha="center", fontsize=TINY, color="#555555",
        )  # fmt: skip
    ax.xaxis.set_major_formatter("{x:g}")
    ax.set(xlabel="place on the path", ylabel="share of answers", ylim=(-0.03, 1.03))
    percent(ax, "y")
    legend_above(ax, most=2)
    return figure_of(ax)


@house_style
def cone_rates(kinds: pd.DataFrame, members: pd.DataFrame, *, ax: Axes | None = None) -> Figure:
    """EM rate of each group of directions with its interval, and of each member as a small dot.

    Args:
        kinds: ``kind, rate, low, high``, a row for each group, from top to bottom.
        members: ``kind, rate``, a row for each direction; optional ``member``, written beside the dots of groups with
            fewer than ten.
        ax: Axes to draw on; a new figure without.

    Raises:
        ValueError: On missing columns, no rows, shares outside 0 to 1, or several rows for one group.
    """
    check(kinds, "cone_rates", ["kind", *INTERVAL], INTERVAL)
    check(members, "cone_rates", ["kind", "rate"], ["rate"])
    check_unique(kinds, "cone_rates", ["kind"])
    names = list(kinds["kind"])
    ax = axes(ax, COLUMN, 0.75 + 0.3 * len(names))
    for row, name in enumerate(names):
        found = np.sort(members.loc[members["kind"] == name, "rate"].to_numpy(float))
        spread = np.linspace(-0.22, 0.22, len(found)) if len(found) > 1 else np.zeros(len(found))
        ax.plot(found, row + spread, "o", color=CONTROL, markersize=2.4, alpha=0.8, markeredgewidth=0, zorder=2)
    places = range(len(names))
    ax.hlines(places, kinds["low"], kinds["high"], color=VERMILION, linewidth=1.4, zorder=3)
    ax.plot(kinds["rate"], places, "D", color=VERMILION, markersize=4, zorder=4)
    ax.set_yticks(places, names, fontsize=SMALL)
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.grid(False, axis="y")
    ax.set(
        xlabel="EM rate", xlim=(-0.02, min(1.02, 1.08 * float(max(kinds["high"].max(), members["rate"].max())) + 0.02))
    )
    percent(ax, "x")
    handles = [
        Line2D([], [], color=VERMILION, marker="D", markersize=4, linewidth=1.4, label="all of them"),
        Line2D([], [], color=CONTROL, marker="o", markersize=2.4, linestyle="", label="each direction"),
    ]
    legend_above(ax, handles)
    return figure_of(ax)
