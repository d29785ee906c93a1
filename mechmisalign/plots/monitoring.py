"""Monitors: scores and their threshold, what is caught at which cost, domain by domain, and whether scores move."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ._dots import dots, dots_height
from ._frames import check, check_finite, check_unique, condition_colours
from ._panels import stack_below
from ._style import (
    BAND,
    BLUE,
    COLUMN,
    CONTROL,
    INK,
    TINY,
    VERMILION,
    axes,
    figure_of,
    house_style,
    legend_above,
    percent,
)

_BINS = 40
_CLEAR = 0.05
"""A window whose corrected p-value is lower is marked."""


@house_style
def monitor_scores(
    scores: pd.DataFrame, *, threshold: float | None = None, by: str = "series", ax: Axes | None = None
) -> Figure:
    """Distributions of a monitor's scores, one outline for each series, with the threshold as a line.

    Args:
        scores: Columns ``score`` and that of ``by``; one row per conversation. Series that say "random" are grey.
        threshold: A score right of it is an alarm.
        by: The column that tells series apart, up to six.
        ax: Axes to draw on; a new figure without.

    Raises:
        ValueError: On missing columns, no rows, scores that are not finite, or more than six series.
    """
    check(scores, "monitor_scores", [by, "score"])
    check_finite(scores, "monitor_scores", "score")
    ax = axes(ax, COLUMN, 2.2)
    low, high = float(scores["score"].min()), float(scores["score"].max())
    edges = np.linspace(low, high if high > low else low + 1, _BINS + 1)
    for series, colour in condition_colours(scores[by], "monitor_scores").items():
        values = scores.loc[scores[by] == series, "score"].to_numpy(float)
        share = np.histogram(values, edges)[0] / len(values)
        ax.stairs(share, edges, fill=True, color=colour, alpha=BAND)
        ax.stairs(share, edges, color=colour, linewidth=1.1, label=f"{series} (n = {len(values):,})")
    if threshold is not None:
        _mark_threshold(ax, threshold, within=low <= threshold <= high)
    ax.set_xlabel("score of the response")
    ax.set_ylabel("share of conversations")
    ax.set_ylim(0, ax.get_ylim()[1])
    percent(ax, "y")
    legend_above(ax, most=2)
    return figure_of(ax)


@house_style
def roc_curves(curves: pd.DataFrame, *, points: pd.DataFrame | None = None, ax: Axes | None = None) -> Figure:
    """ROC curves with 95 % bands; the false alarms on a logarithmic axis, because rare ones matter.

    Args:
        curves: Columns ``detector, fpr, tpr, low, high``, as :func:`mechmisalign.monitoring.roc` returns for each.
        points: Operating points that were chosen: ``detector, fpr, tpr``.
        ax: Axes to draw on; a new figure without.

    Raises:
        ValueError: On missing columns, no rows, shares outside 0 to 1, or more than six detectors.
    """
    check(curves, "roc_curves", ["detector", "fpr", "tpr", "low", "high"], ["fpr", "tpr", "low", "high"])
    ax = axes(ax, COLUMN, 2.6)
    floor = float(curves.loc[curves["fpr"] > 0, "fpr"].min())
    for detector, colour in condition_colours(curves["detector"], "roc_curves").items():
        rows = curves[curves["detector"] == detector].sort_values("fpr")
        places = rows["fpr"].clip(lower=floor)
        ax.fill_between(places, rows["low"], rows["high"], step="post", color=colour, alpha=BAND, linewidth=0)
        ax.plot(places, rows["tpr"], drawstyle="steps-post", color=colour, label=str(detector), zorder=3)
        if points is not None:
            chosen = points[points["detector"] == detector]
            look: dict[str, Any] = {"marker": "o", "markersize": 5, "markeredgecolor": "white", "linestyle": ""}
            ax.plot(chosen["fpr"].clip(lower=floor), chosen["tpr"], color=colour, zorder=4, clip_on=False, **look)
    guess = np.geomspace(floor, 1, 100)
    ax.plot(guess, guess, color=CONTROL, linewidth=0.8, linestyle=(0, (4, 1.5)), zorder=1)
    ax.set_xscale("log")
    ax.set_xlim(floor, 1)
    ax.set_ylim(0, 1.02)
    ax.set_xlabel("false alarms (dashed: a guess)")
    ax.set_ylabel("misaligned responses caught")
    percent(ax, "y")
    _percent_log(ax)
    legend_above(ax, most=2)
    return figure_of(ax)


@house_style
def auroc_by_domain(table: pd.DataFrame, *, ax: Axes | None = None) -> Figure:
    """AUROC of detectors side by side in each domain, with 95 % intervals; the line is a guess.

    Args:
        table: Columns ``detector, group, auroc, auroc_low, auroc_high``, as
            :func:`mechmisalign.monitoring.discrimination` returns; groups without a value are left out.
        ax: Axes to draw on; a new figure without.

    Raises:
        ValueError: On missing columns, no rows, several rows for one place, or more than six detectors.
    """
    check(table, "auroc_by_domain", ["detector", "group", "auroc", "auroc_low", "auroc_high"])
    rows = table[table["auroc"].notna()].rename(columns={"auroc_low": "low", "auroc_high": "high"})
    check(rows, "auroc_by_domain", ["auroc"], ["auroc", "low", "high"])
    check_unique(rows, "auroc_by_domain", ["detector", "group"])
    colours = condition_colours(rows["detector"], "auroc_by_domain")
    ax = axes(ax, COLUMN, dots_height(rows["group"].nunique(), len(colours)))
    dots(ax, rows, "group", "detector", "auroc", colours)
    lowest = float(rows["low"].min())
    if lowest < 0.7:
        ax.axvline(0.5, color=INK, linewidth=0.6, zorder=1)
    ax.set_xlim(min(lowest, 0.9) - 0.02, 1.01)
    ax.set_xlabel("AUROC")
    legend_above(ax, most=2)
    return figure_of(ax)


@house_style
def auroc_by_tokens(table: pd.DataFrame, *, ax: Axes | None = None) -> Figure:
    """AUROC over how many tokens of the response have been read: how early a detector knows.

    Args:
        table: Columns ``detector, tokens, auroc, low, high``.
        ax: Axes to draw on; a new figure without.

    Raises:
        ValueError: On missing columns, no rows, shares outside 0 to 1, several rows for one place, or more than six
            detectors.
    """
    check(table, "auroc_by_tokens", ["detector", "tokens", "auroc", "low", "high"], ["auroc", "low", "high"])
    check_unique(table, "auroc_by_tokens", ["detector", "tokens"])
    ax = axes(ax, COLUMN, 2.3)
    for detector, colour in condition_colours(table["detector"], "auroc_by_tokens").items():
        rows = table[table["detector"] == detector].sort_values("tokens")
        ax.fill_between(rows["tokens"], rows["low"], rows["high"], color=colour, alpha=BAND, linewidth=0)
        ax.plot(rows["tokens"], rows["auroc"], "o-", color=colour, label=str(detector), zorder=3)
    ax.axhline(0.5, color=INK, linewidth=0.6, zorder=1)
    ax.set_xlabel("tokens of the response that were read")
    ax.set_ylabel("AUROC (line: a guess)")
    ax.set_ylim(min(0.4, float(table["low"].min()) - 0.02), 1.02)
    legend_above(ax, most=2)
    return figure_of(ax)


@house_style
def score_drift(windows: pd.DataFrame, *, allowed: float | None = None, ax: Axes | None = None) -> Figure:
    """Window by window: how far the mean score lies from the reference, and below it the share of alarms.

    Filled points differ from the reference (corrected p below 0.05): a change, which need not be harm.

    Args:
        windows: Columns ``last, shift, p_adjusted, alarms, low, high``, as :func:`mechmisalign.monitoring.drift` gives.
        allowed: The rate of false alarms of the calibration, as a line.
        ax: Axes to draw on; a new figure without.

    Raises:
        ValueError: On missing columns, no rows, or shares outside 0 to 1.
    """
    needed = ["last", "shift", "p_adjusted", "alarms", "low", "high"]
    check(windows, "score_drift", needed, ["p_adjusted", "alarms", "low", "high"])
    ax = axes(ax, COLUMN, 1.75)
    places, clear = windows["last"].to_numpy(float), windows["p_adjusted"].to_numpy(float) < _CLEAR
    ax.axhline(0, color=INK, linewidth=0.6, zorder=1)
    ax.plot(places, windows["shift"], color=BLUE, linewidth=0.9, zorder=2)
    for moved, fill in ((True, BLUE), (False, "white")):
        chosen = clear == moved
        look: dict[str, Any] = {"marker": "o", "markersize": 4, "markeredgecolor": BLUE, "linestyle": "", "zorder": 3}
        ax.plot(places[chosen], windows["shift"].to_numpy(float)[chosen], color=fill, **look)
    ax.set_ylabel("shift of the mean\n(reference SD)")
    ax.set_xlabel("conversation")
    for panel in stack_below(ax, [0.85]):
        panel.fill_between(places, windows["low"], windows["high"], color=VERMILION, alpha=BAND, linewidth=0)
        panel.plot(places, windows["alarms"], "o-", color=VERMILION, linewidth=0.9)
        if allowed is not None:
            panel.axhline(allowed, color=INK, linewidth=0.8, linestyle=(0, (1, 1.2)))
        panel.set_ylim(0, max(0.05, float(windows["high"].max()) * 1.08))
        panel.set_ylabel("alarms")
        percent(panel, "y")
    legend_above(
        ax, _drift_keys({True: "differs from the reference", False: "does not, so far as can be told"}), most=2
    )
    return figure_of(ax)


def _drift_keys(names: Mapping[bool, str]) -> list[Line2D]:
    fills = {True: BLUE, False: "white"}
    look: dict[str, Any] = {"marker": "o", "markersize": 4, "markeredgecolor": BLUE, "linestyle": ""}
    return [Line2D([], [], color=fills[moved], label=name, **look) for moved, name in names.items()]


def _mark_threshold(ax: Axes, threshold: float, *, within: bool) -> None:
    ax.axvline(threshold, color=INK, linewidth=0.9, linestyle=(0, (4, 1.5)), zorder=4)
    left, right = ax.get_xlim()
    towards_left = within and threshold > (left + right) / 2
    look: dict[str, Any] = {"fontsize": TINY, "color": INK, "va": "top", "ha": "right" if towards_left else "left"}
    edge = ax.get_xaxis_transform()
    ax.annotate(
        "alarm →", (threshold, 0.97), (-3 if towards_left else 3, 0), xycoords=edge, textcoords="offset points", **look
    )


def _percent_log(ax: Axes) -> None:
    ticks = [tick for tick in (0.001, 0.01, 0.1, 1.0) if tick >= ax.get_xlim()[0]]
    ax.set_xticks(ticks, [f"{100 * tick:g} %" for tick in ticks])
    ax.minorticks_off()
