"""Rates over layers, and over strengths."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ._costs import costs_of, draw_costs, panels_below
from ._frames import INTERVAL, check, check_unique, envelope, split_control
from ._style import (
    BAND,
    BLUE,
    COLUMN,
    CONTROL,
    INK,
    PALETTE,
    TINY,
    axes,
    figure_of,
    house_style,
    layer_axis,
    legend_above,
    lighter,
    marker,
    percent,
)

_COHERENT = ("coherent", "coherent_low", "coherent_high")
_Dash = str | tuple[int, tuple[int, int]]
_DASHED: _Dash = (0, (4, 2))


@house_style
def layer_sweep(rates: pd.DataFrame, *, ax: Axes | None = None) -> Figure:
    """EM rate over layers, with its interval; random controls as a grey band; coherence as a thin dashed line.

    Args:
        rates: Columns ``layer, rate, low, high``. Optional: ``series`` (one line each; rows whose series says "random"
            become the control band: the mean of all of them, and the widest of their intervals), ``strength`` (several
            per layer give a line each; one that differs from layer to layer is written at its point), ``coherent``,
            and costs (``kl, loss, accuracy, tokens``; each in a small panel below, with a band where ``<cost>_low`` and
            ``<cost>_high`` are there).
        ax: Axes to draw on; a new figure without.

    Raises:
        ValueError: On missing columns, no rows, shares outside 0 to 1, or several rows for one point.
    """
    check(rates, "layer_sweep", ["layer", *INTERVAL], INTERVAL)
    ax = axes(ax, COLUMN, 2.4)
    treated, control = split_control(rates, "series")
    curves = list(_curves(treated))
    for label, colour, curve in curves:
        _line(ax, curve, "layer", INTERVAL, colour, label)
        if "coherent" in curve:
            ax.plot(curve["layer"], curve["coherent"], color=colour, linewidth=0.8, linestyle=_DASHED)
        _write_strengths(ax, curve, colour)
    _control_band(ax, control, "layer")
    layer_axis(ax, rates["layer"])
    _share_axis(ax, rates)
    alone = str(treated["series"].iloc[0]) if "series" in treated and treated["series"].nunique() == 1 else None
    title = alone if len(curves) > 1 else None
    draw_costs(panels_below(ax, costs_of(rates)), "layer", [(colour, curve) for _, colour, curve in curves], control)
    key = [_key("coherent answers", _DASHED)] if "coherent" in treated else []
    legend_above(ax, [*ax.get_legend_handles_labels()[0], *key], title=title)
    return figure_of(ax)


@house_style
def dose_response(rates: pd.DataFrame, *, ax: Axes | None = None) -> Figure:
    """EM rate (solid) and coherence (dashed) against steering strength; random controls in grey.

    Args:
        rates: Columns ``strength, rate, low, high, coherent, coherent_low, coherent_high``; optional ``series`` (rows
            whose series says "random" are the control), and costs (``kl, loss, accuracy, tokens``; each in a small
            panel below, with a band where ``<cost>_low`` and ``<cost>_high`` are there).
        ax: Axes to draw on; a new figure without.

    Raises:
        ValueError: On missing columns, no rows, shares outside 0 to 1, or several rows for one point.
    """
    check(rates, "dose_response", ["strength", *INTERVAL, *_COHERENT], [*INTERVAL, *_COHERENT])
    ax = axes(ax, COLUMN, 2.4)
    treated, control = split_control(rates, "series")
    groups = _by_series(treated, "strength")
    alone = len(groups) == 1
    for i, (name, curve) in enumerate(groups):
        colour = PALETTE[i % len(PALETTE)]
        _line(ax, curve, "strength", INTERVAL, colour, "misaligned" if alone else name)
        _line(ax, curve, "strength", _COHERENT, BLUE if alone else colour, "coherent" if alone else None, _DASHED)
    _control_band(ax, control, "strength")
    _strength_ticks(ax, rates["strength"])
    ax.set_xlabel("steering strength")
    _share_axis(ax, rates)
    ax.set_ylabel("share of answers")
    costly = [(INK if alone else PALETTE[i % len(PALETTE)], curve) for i, (_, curve) in enumerate(groups)]
    draw_costs(panels_below(ax, costs_of(rates)), "strength", costly, control)
    key = [] if alone else [_key("misaligned", "-"), _key("coherent", _DASHED)]
    legend_above(ax, [*ax.get_legend_handles_labels()[0], *key])
    return figure_of(ax)


def _by_series(treated: pd.DataFrame, x: str) -> list[tuple[str, pd.DataFrame]]:
    """Each series in order of appearance, sorted along the x axis."""
    if "series" not in treated.columns:
        treated = treated.assign(series="steered")
    groups = [(str(name), frame.sort_values(x)) for name, frame in treated.groupby("series", sort=False, observed=True)]
    for name, frame in groups:
        check_unique(frame, f"the series {name!r}", [x])
    return groups


def _curves(treated: pd.DataFrame) -> Iterator[tuple[str, str, pd.DataFrame]]:
    """Label, colour and rows of each line: one per series, or per strength where a layer has several."""
    if "series" not in treated.columns:
        treated = treated.assign(series="steered")
    for i, (name, frame) in enumerate(treated.groupby("series", sort=False, observed=True)):
        colour = PALETTE[i % len(PALETTE)]
        if "strength" not in frame or not frame.duplicated("layer").any():
            check_unique(frame, f"the series {str(name)!r}", ["layer"])
            yield str(name), colour, frame.sort_values("layer")
            continue
        strengths = sorted(frame["strength"].unique())
        for rank, strength in enumerate(strengths):
            curve = frame[frame["strength"] == strength].sort_values("layer")
            check_unique(curve, f"the series {str(name)!r}", ["layer", "strength"])
            fade = 0.7 * (1 - (rank + 1) / len(strengths))
            prefix = f"{name}, " if treated["series"].nunique() > 1 else ""
            yield f"{prefix}strength {strength:g}", lighter(colour, fade), curve


def _line(
    ax: Axes,
    curve: pd.DataFrame,
    x: str,
    columns: tuple[str, str, str],
    colour: str,
    label: str | None,
    linestyle: _Dash = "-",
) -> None:
    middle, low, high = columns
    ax.fill_between(curve[x], curve[low], curve[high], color=colour, alpha=BAND, linewidth=0)
    ax.plot(curve[x], curve[middle], color=colour, marker=marker(len(curve)), linestyle=linestyle, label=label)


def _control_band(ax: Axes, control: pd.DataFrame, x: str) -> None:
    if control.empty:
        return
    band = envelope(control, [x]).sort_values(x)
    place = list(dict.fromkeys([x, *(["strength"] if "strength" in control else [])]))
    count = int(control.groupby(place, observed=True).size().max())
    label = "random control" if count == 1 else f"random control ({count} directions)"
    ax.fill_between(band[x], band["low"], band["high"], color=CONTROL, alpha=0.3, linewidth=0, zorder=1)
    ax.plot(band[x], band["rate"], color=CONTROL, linewidth=1.0, label=label, zorder=1.5)
    if "coherent" in band:
        ax.plot(band[x], band["coherent"], color=CONTROL, linewidth=0.8, linestyle=_DASHED, zorder=1.5)


def _write_strengths(ax: Axes, curve: pd.DataFrame, colour: str) -> None:
    """The strength over each point, where it differs from layer to layer."""
    if "strength" not in curve or curve["strength"].nunique() < 2:
        return
    for layer, high, strength in zip(curve["layer"], curve["high"], curve["strength"], strict=True):
        ax.annotate(
            f"×{strength:g}",
            (layer, high),
            (0, 1.5),
            textcoords="offset points",
            ha="center",
            fontsize=TINY,
            color=colour,
        )


def _key(label: str, linestyle: _Dash) -> Line2D:
    """An entry that explains a line style, whatever the colour."""
    return Line2D([], [], color="#444444", linewidth=0.9, linestyle=linestyle, label=label)


def _share_axis(ax: Axes, rates: pd.DataFrame) -> None:
    top = rates[[column for column in ("high", "coherent") if column in rates]].max(axis=None)
    ax.set_ylim(0, max(0.05, min(1.04, float(np.nan_to_num(top, nan=1.0)) * 1.12)))
    ax.set_ylabel("EM rate")
    percent(ax, "y")


def _strength_ticks(ax: Axes, strengths: pd.Series) -> None:
    """A tick at every strength, unless they would run into each other."""
    known = np.sort(strengths.unique())
    reach = known[-1] - known[0]
    if 1 < len(known) <= 12 and np.diff(known).min() >= 0.055 * reach:
        ax.set_xticks(known, [f"{strength:g}" for strength in known])
