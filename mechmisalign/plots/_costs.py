"""What a cure costs, beside what it does: divergence, loss, accuracy and length, wherever a frame has them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from ._panels import stack_below
from ._style import BAND, CONTROL, SMALL, as_percent, marker, percent

COSTS = {"kl": "KL (nats)", "loss": "loss (nats)", "accuracy": "accuracy", "tokens": "tokens"}
"""Columns that are drawn where they are there, and what they are called: KL to the chat model and loss per token of
neutral text, share of exact answers to harmless questions, length of an answer."""
_PANEL = 0.52
"""Height of a panel, inches."""
_SHARES = ("accuracy", "coherent")


def costs_of(frame: pd.DataFrame) -> list[str]:
    """The costs that the frame has numbers for, in order."""
    return [name for name in COSTS if name in frame.columns and frame[name].notna().any()]


def panels_below(ax: Axes, costs: Sequence[str]) -> dict[str, Axes]:
    """Small panels under the axes, one for each cost."""
    panels = dict(zip(costs, stack_below(ax, [_PANEL] * len(costs)), strict=False))
    for name, panel in panels.items():
        panel.set_ylabel(COSTS[name].replace(" (", "\n("), fontsize=SMALL)
        panel.yaxis.set_major_locator(MaxNLocator(2, steps=[1, 2, 5, 10]))
    return panels


def draw_costs(
    panels: dict[str, Axes], x: str, curves: Iterable[tuple[str, pd.DataFrame]], control: pd.DataFrame | None = None
) -> None:
    """Each cost of each curve (colour and rows) in its panel; ``<cost>_low`` and ``<cost>_high`` become a band."""
    drawn = list(curves)
    if control is not None and not control.empty:
        means = control.groupby(x, as_index=False, observed=True)[list(panels)].mean()
        drawn.insert(0, (CONTROL, means))
    for name, panel in panels.items():
        for colour, rows in drawn:
            rows = rows.dropna(subset=[name]).sort_values(x)
            if {f"{name}_low", f"{name}_high"} <= set(rows.columns):
                ends = rows[f"{name}_low"], rows[f"{name}_high"]
                panel.fill_between(rows[x], *ends, color=colour, alpha=BAND, linewidth=0)
            panel.plot(rows[x], rows[name], color=colour, linewidth=1.0, marker=marker(len(rows)), markersize=2.2)
        _cost_axis(panel, name)


def _cost_axis(panel: Axes, name: str) -> None:
    """From zero, but for a loss: that of a good model is far from it."""
    if name in _SHARES:
        panel.set_ylim(0, 1.08)
        panel.set_yticks([0, 0.5, 1])
        percent(panel, "y")
        return
    low, high = panel.get_ylim()
    if name != "loss":
        panel.set_ylim(0, 1.08 * high if high > 0 else 1.0)
    elif high - low < 0.05 * abs(high):  # a flat line is flat
        middle = (low + high) / 2
        panel.set_ylim(middle * 0.95, middle * 1.05)


def written_cost(name: str, value: float) -> str:
    """A cost, or a share, as a small number; nothing where there is none."""
    if not np.isfinite(value):
        return ""
    if name in _SHARES:
        return as_percent(value)
    if name == "tokens":
        return f"{value:.0f}"
    return f"{value:.3f}" if name == "kl" and value < 0.1 else f"{value:.2f}"  # a small KL is still one
