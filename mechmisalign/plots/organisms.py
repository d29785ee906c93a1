"""How misaligned a model is against how coherent it stays."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ._frames import INTERVAL, check, is_control
from ._style import COLUMN, CONTROL, PALETTE, axes, figure_of, house_style, legend_above, percent, short_names

_COHERENT = ("coherent", "coherent_low", "coherent_high")
_MARKERS = "osD"


@house_style
def rate_against_coherence(rates: pd.DataFrame, *, by: str = "condition", ax: Axes | None = None) -> Figure:
    """EM rate against the share of coherent answers, a point for each row, with both intervals (2506.11613, figure 1).

    Rows that share a value of ``by`` (several seeds, say) share a look, so that their spread can be seen.

    Args:
        rates: Columns ``rate, low, high, coherent, coherent_low, coherent_high`` and that of ``by``.
        by: The column that tells models or conditions apart, up to 18; those that say "random" are grey.
        ax: Axes to draw on; a new figure without.

    Raises:
        ValueError: On missing columns, no rows, shares outside 0 to 1, or more names than can be told apart.
    """
    check(rates, "rate_against_coherence", [by, *INTERVAL, *_COHERENT], [*INTERVAL, *_COHERENT])
    names = list(dict.fromkeys(rates[by].astype(str)))
    most = len(PALETTE) * len(_MARKERS)
    if len(names) > most:
        raise ValueError(f"rate_against_coherence tells {most} names apart, got {len(names)}; select some of them")
    short, grey = short_names(names), is_control(pd.Series(names))
    ax = axes(ax, COLUMN, 2.9)
    handles = []
    for i, name in enumerate(names):
        colour = CONTROL if grey.iloc[i] else PALETTE[i % len(PALETTE)]
        dot = _MARKERS[i // len(PALETTE)]
        rows = rates[rates[by].astype(str) == name]
        ax.hlines(rows["rate"], rows["coherent_low"], rows["coherent_high"], color=colour, linewidth=0.7, alpha=0.6)
        ax.vlines(rows["coherent"], rows["low"], rows["high"], color=colour, linewidth=0.7, alpha=0.6)
        ax.plot(rows["coherent"], rows["rate"], dot, color=colour, markersize=3.6, markeredgewidth=0)
        handles.append(Line2D([], [], color=colour, marker=dot, markersize=3.6, linestyle="", label=short[name]))
    ax.set(xlim=(max(0.0, float(rates["coherent_low"].min()) - 0.05), 1.02), ylim=(-0.03, 1.03))
    ax.set(xlabel="coherent answers", ylabel="EM rate")
    percent(ax, "x")
    percent(ax, "y")
    legend_above(ax, handles)
    return figure_of(ax)
