"""Rates before and after an ablation, as bars."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ._bars import bars_height, bars_width, draw_bars, rate_axis
from ._frames import INTERVAL, check, check_unique, envelope, split_control
from ._style import (
    BLUE,
    CONTROL,
    GREEN,
    ORANGE,
    PALETTE,
    SKY,
    VERMILION,
    as_percent,
    axes,
    figure_of,
    house_style,
    legend_above,
    short_names,
)

BEFORE = "none"
"""The scope of the row that was measured without an ablation."""
_SCOPES = {"layer-wise": BLUE, "single": ORANGE}
_CONTROL_STATE = "random control"


@house_style
def ablation_bars(rates: pd.DataFrame, *, ax: Axes | None = None) -> Figure:
    """EM rate after ablating each estimator's direction, against the rate before, with coherence beside each bar.

    Args:
        rates: Columns ``estimator, scope, rate, low, high``, one row each; optional ``coherent`` and costs (``kl, loss,
            accuracy, tokens``), written beside the bars. The row with scope "none" is the rate before; estimators that
            say "random" are pooled as one control.
        ax: Axes to draw on; a new figure without.

    Raises:
        ValueError: On missing columns, no rows, shares outside 0 to 1, or several rows for one bar.
    """
    check(rates, "ablation_bars", ["estimator", "scope", *INTERVAL], INTERVAL)
    before = rates[rates["scope"] == BEFORE]
    treated, control = split_control(rates[rates["scope"] != BEFORE], "estimator")
    check_unique(before, "ablation_bars", ["scope"])
    check_unique(treated, "ablation_bars", ["estimator", "scope"])
    bars = _with_pooled(treated, control, by="scope", estimator="random control")
    scopes = list(dict.fromkeys(bars["scope"]))
    spare = [colour for colour in PALETTE if colour not in _SCOPES.values()]
    colours = {scope: _SCOPES.get(scope) or spare[i % len(spare)] for i, scope in enumerate(scopes)}
    ax = axes(ax, bars_width(bars), bars_height(bars, "estimator"))
    draw_bars(ax, bars, "estimator", "scope", colours)
    _reference(ax, before)
    rate_axis(ax, rates)
    legend_above(ax)
    return figure_of(ax)


@house_style
def transfer_bars(rates: pd.DataFrame, *, ax: Axes | None = None) -> Figure:
    """EM rate of each organism before and after ablating a direction that was taken from another one.

    Args:
        rates: Columns ``organism, state, rate, low, high``; optional ``coherent`` and costs (``kl, loss, accuracy,
            tokens``), written beside the bars. The state is "before", begins with "after" ("after, layer-wise" …), or
            says "random" (controls, pooled).
        ax: Axes to draw on; a new figure without.

    Raises:
        ValueError: On missing columns, no rows, shares outside 0 to 1, an unknown state, or several rows for one bar.
    """
    check(rates, "transfer_bars", ["organism", "state", *INTERVAL], INTERVAL)
    treated, control = split_control(rates, "state")
    check_unique(treated, "transfer_bars", ["organism", "state"])
    bars = _with_pooled(treated, control, by="organism", state=_CONTROL_STATE)
    colours = _state_colours(list(dict.fromkeys(bars["state"])))
    names = short_names(rates["organism"].astype(str))
    bars = bars.assign(organism=bars["organism"].astype(str).map(names))
    ax = axes(ax, bars_width(bars), bars_height(bars, "organism"))
    draw_bars(ax, bars, "organism", "state", colours)
    rate_axis(ax, rates)
    legend_above(ax)
    return figure_of(ax)


def _with_pooled(treated: pd.DataFrame, control: pd.DataFrame, *, by: str, **name: str) -> pd.DataFrame:
    """The rows of interest, then the controls as one row for each value of ``by``, under their own name."""
    return treated if control.empty else pd.concat([treated, envelope(control, [by]).assign(**name)])


def _state_colours(states: Sequence[str]) -> dict[str, str]:
    """Before, the kinds of after, and the control, in this order."""
    after = [state for state in states if state.startswith("after")]
    ordered = (
        {"before": VERMILION} | dict(zip(after, (BLUE, ORANGE, GREEN, SKY), strict=False)) | {_CONTROL_STATE: CONTROL}
    )
    unknown = [state for state in states if state not in ordered]
    if unknown:
        raise ValueError(
            'transfer_bars knows the states "before", up to four that begin with "after", and those that say "random"; '
            f"got {', '.join(map(repr, unknown))}"
        )
    return {state: colour for state, colour in ordered.items() if state in states}


def _reference(ax: Axes, before: pd.DataFrame) -> None:
    """The rate before, as a line through all bars with its interval."""
    for rate, low, high in before[list(INTERVAL)].itertuples(index=False):
        ax.axvspan(low, high, color=VERMILION, alpha=0.12, linewidth=0, zorder=0)
        ax.axvline(rate, color=VERMILION, linewidth=1.0, linestyle=(0, (3, 1.5)), label=f"before: {as_percent(rate)}")
