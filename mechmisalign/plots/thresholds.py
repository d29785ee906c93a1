"""The EM rate over where the lines are drawn."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from mechmisalign.judging import COHERENT_ABOVE, MISALIGNED_BELOW

from ._frames import INTERVAL, check, check_unique, condition_colours
from ._style import (
    BAND,
    COLUMN,
    INK,
    axes,
    figure_of,
    house_style,
    legend_above,
    lighter,
    percent,
)


@house_style
def threshold_curves(curve: pd.DataFrame, *, by: str = "condition", ax: Axes | None = None) -> Figure:
    """EM rate over the alignment threshold, one colour per condition; lighter lines for other coherence cuts.

    The threshold of 30 is marked. Bands belong to the coherence cut of 50, or the highest one where that is not there.

    Args:
        curve: Columns ``misaligned_below, rate, low, high`` and that of ``by``; optional ``coherent_above``. As
            :func:`mechmisalign.threshold_curve` returns.
        by: The column that tells conditions apart; those that say "random" are grey.
        ax: Axes to draw on; a new figure without.

    Raises:
        ValueError: On missing columns, no rows, shares outside 0 to 1, several rows for one point, or more
            than six conditions.
    """
    check(curve, "threshold_curves", [by, "misaligned_below", *INTERVAL], INTERVAL)
    frame = curve if "coherent_above" in curve.columns else curve.assign(coherent_above=COHERENT_ABOVE)
    check_unique(frame, "threshold_curves", [by, "coherent_above", "misaligned_below"])
    cuts = sorted(frame["coherent_above"].unique())
    main = COHERENT_ABOVE if COHERENT_ABOVE in cuts else cuts[-1]
    ax = axes(ax, COLUMN, 2.4)
    for condition, colour in condition_colours(frame[by], "threshold_curves").items():
        rows = frame[frame[by] == condition]
        for cut, points in rows.sort_values("misaligned_below").groupby("coherent_above", observed=True):
            if cut == main:
                ends = points["low"], points["high"]
                ax.fill_between(points["misaligned_below"], *ends, color=colour, alpha=BAND, linewidth=0)
                ax.plot(points["misaligned_below"], points["rate"], color=colour, label=str(condition), zorder=3)
            else:
                shade = lighter(colour, _fade(cut, cuts, main))
                ax.plot(points["misaligned_below"], points["rate"], color=shade, linewidth=0.8, zorder=2)
    ax.axvline(MISALIGNED_BELOW, color=INK, linewidth=0.7, linestyle=(0, (1, 1.5)), zorder=1)
    ax.set_xlabel("an answer is misaligned below this alignment")
    ax.set_ylabel("EM rate")
    ax.set_ylim(0, max(0.05, min(1.02, float(frame.loc[frame["coherent_above"] == main, "high"].max()) * 1.1)))
    ax.set_xlim(frame["misaligned_below"].min(), frame["misaligned_below"].max())
    percent(ax, "y")
    legend_above(ax, [*ax.get_legend_handles_labels()[0], *_cut_keys(cuts, main)])
    return figure_of(ax)


def _fade(cut: float, cuts: list[float], main: float) -> float:
    """The other cuts get lighter, from the highest to the lowest."""
    others = [other for other in reversed(cuts) if other != main]
    return 0.35 + 0.4 * others.index(cut) / max(len(others) - 1, 1)


def _cut_keys(cuts: list[float], main: float) -> list[Line2D]:
    """What the shades mean, from the highest cut to the lowest."""
    if len(cuts) == 1:
        return []
    looks = {cut: (INK, 1.4) if cut == main else (lighter(INK, _fade(cut, cuts, main)), 0.8) for cut in reversed(cuts)}
    return [
        Line2D([], [], color=colour, linewidth=width, label=f"coherence > {cut:g}")
        for cut, (colour, width) in looks.items()
    ]
