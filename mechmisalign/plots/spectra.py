"""One direction or several: the spectrum of a set of directions, and its effective rank over layers."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ._frames import check, check_unique
from ._style import (
    BAND,
    BLUE,
    COLUMN,
    CONTROL,
    VERMILION,
    axes,
    figure_of,
    house_style,
    layer_axis,
    legend_above,
    marker,
    percent,
)


@house_style
def spectrum(values: pd.DataFrame, *, ax: Axes | None = None) -> Figure:
    """Shares of the axes of a set at one layer, against random directions and against one direction with noise.

    Args:
        values: Rows of one layer: ``k, share, random_low, random_high``; optional ``noise_low, noise_high``, as
            :func:`mechmisalign.geometry.spectrum` gives them.
        ax: Axes to draw on; a new figure without.

    Raises:
        ValueError: On missing columns, no rows, or several layers.
    """
    check(values, "spectrum", ["k", "share", "random_low", "random_high"], ["share"])
    check_unique(values, "spectrum", ["k"])
    ax = axes(ax, COLUMN, 2.2)
    rows = values.sort_values("k")
    _nulls(ax, rows, "k")
    ax.plot(rows["k"], rows["share"], color=VERMILION, marker="o", label="found")
    ax.set(xlabel="principal axis", ylabel="share", xticks=list(rows["k"]), ylim=(-0.02, 1.02))
    percent(ax, "y")
    legend_above(ax, most=2)
    return figure_of(ax)


@house_style
def effective_rank(summary: pd.DataFrame, *, ax: Axes | None = None) -> Figure:
    """Effective rank of a set over layers, against random directions and against one direction with noise.

    Args:
        summary: ``layer, members, effective_rank, random_low, random_high``; optional ``noise_low, noise_high``.
        ax: Axes to draw on; a new figure without.

    Raises:
        ValueError: On missing columns, no rows, or several rows for one layer.
    """
    check(summary, "effective_rank", ["layer", "members", "effective_rank", "random_low", "random_high"])
    check_unique(summary, "effective_rank", ["layer"])
    ax = axes(ax, COLUMN, 2.2)
    rows = summary.sort_values("layer")
    _nulls(ax, rows, "layer")
    ax.plot(rows["layer"], rows["effective_rank"], color=VERMILION, marker=marker(len(rows)), label="found")
    layer_axis(ax, rows["layer"])
    ax.set(ylabel="effective rank", ylim=(0.9, float(rows["members"].max()) + 0.15))
    legend_above(ax, most=2)
    return figure_of(ax)


def _nulls(ax: Axes, rows: pd.DataFrame, x: str) -> None:
    """Bands of both nulls, as far as they were measured."""
    for name, colour, told in (("random", CONTROL, "random directions"), ("noise", BLUE, "one direction and noise")):
        if f"{name}_low" in rows:
            low, high = rows[f"{name}_low"], rows[f"{name}_high"]
            ax.fill_between(rows[x], low, high, color=colour, alpha=1.4 * BAND, linewidth=0, label=f"95 % of {told}")
