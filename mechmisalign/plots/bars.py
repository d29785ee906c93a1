"""Rates before and after an ablation, as bars."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from textwrap import fill

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator

from ._frames import INTERVAL, check, check_unique, envelope, is_control, split_control
from ._style import (
    BLUE,
    COLUMN,
    CONTROL,
    GREEN,
    INK,
    ORANGE,
    PALETTE,
    SKY,
    SMALL,
    TINY,
    VERMILION,
    as_percent,
    axes,
    edge_note,
    figure_of,
    house_style,
    legend_above,
    percent,
    short_names,
)

BEFORE = "none"
"""The scope of the row that was measured without an ablation."""
_SCOPES = {"layer-wise": BLUE, "single": ORANGE}
_CONTROL_STATE = "random control"
_HALO = [withStroke(linewidth=1.5, foreground="white")]


@house_style
def ablation_bars(rates: pd.DataFrame, *, ax: Axes | None = None) -> Figure:
    """EM rate after ablating each estimator's direction, against the rate before, with coherence beside each bar.

    Args:
        rates: Columns ``estimator, scope, rate, low, high``, one row each; optional ``coherent``. The row with scope
            "none" is the rate before; estimators that say "random" are pooled as one control.
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
    ax = axes(ax, COLUMN, _height(bars, "estimator"))
    _draw(ax, bars, "estimator", "scope", colours)
    _reference(ax, before)
    _rate_axis(ax, rates)
    legend_above(ax)
    return figure_of(ax)


@house_style
def transfer_bars(rates: pd.DataFrame, *, ax: Axes | None = None) -> Figure:
    """EM rate of each organism before and after ablating a direction that was taken from another one.

    Args:
        rates: Columns ``organism, state, rate, low, high``; optional ``coherent``. The state is "before", begins with
            "after" ("after, layer-wise" …), or says "random" (controls, pooled).
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
    ax = axes(ax, COLUMN, _height(bars, "organism"))
    _draw(ax, bars, "organism", "state", colours)
    _rate_axis(ax, rates)
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


def _height(bars: pd.DataFrame, group: str) -> float:
    return 0.75 + 0.13 * len(bars) + 0.08 * bars[group].nunique()


def _draw(ax: Axes, bars: pd.DataFrame, group: str, kind: str, colours: Mapping[str, str]) -> None:
    """Groups from top to bottom in order of appearance, one bar of each kind in them."""
    groups = list(dict.fromkeys(bars[group]))
    thick = 0.8 / len(colours)
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
        _write_numbers(ax, rows, places)
    if "coherent" in bars and bars["coherent"].notna().any():
        ax.annotate("coherent", (1, 1), (3, 2), xycoords="axes fraction", textcoords="offset points", fontsize=TINY)
    ax.set_yticks(range(len(groups)), [fill(str(name), 18) for name in groups], fontsize=SMALL)
    ax.set_ylim(len(groups) - 0.45, -0.55)
    ax.tick_params(axis="y", length=0)
    ax.grid(False, axis="y")


def _write_numbers(ax: Axes, rows: pd.DataFrame, places: Sequence[float] | np.ndarray) -> None:
    """The rate after each bar, and the coherence in a column at the right."""
    for place, rate, high in zip(places, rows["rate"], rows["high"], strict=True):
        end = (max(rate, high) if high == high else rate, place)
        ax.annotate(
            as_percent(rate), end, (2.5, 0), textcoords="offset points", va="center", fontsize=TINY, path_effects=_HALO
        )
    if "coherent" in rows:
        for place, coherent in zip(places, rows["coherent"], strict=True):
            told = "" if coherent != coherent else as_percent(coherent)
            edge_note(ax, told, place, offset=22, align="right")


def _reference(ax: Axes, before: pd.DataFrame) -> None:
    """The rate before, as a line through all bars with its interval."""
    for rate, low, high in before[list(INTERVAL)].itertuples(index=False):
        ax.axvspan(low, high, color=VERMILION, alpha=0.12, linewidth=0, zorder=0)
        ax.axvline(rate, color=VERMILION, linewidth=1.0, linestyle=(0, (3, 1.5)), label=f"before: {as_percent(rate)}")


def _rate_axis(ax: Axes, rates: pd.DataFrame) -> None:
    top = max(0.05, float(rates[["rate", "high"]].max(axis=None)))
    ax.set_xlim(0, top * 1.16)
    ax.set_xticks([tick for tick in MaxNLocator(5).tick_values(0, top) if tick <= min(1.0, top * 1.1)])
    ax.set_xlabel("EM rate")
    percent(ax, "x")
