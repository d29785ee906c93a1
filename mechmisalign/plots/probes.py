"""How well probes tell answers apart, against their controls, and what they rest on."""

from __future__ import annotations

from textwrap import fill
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ._dots import dots, dots_height
from ._frames import check, check_finite, check_unique
from ._modules import width
from ._style import (
    BAND,
    BLUE,
    COLUMN,
    CONTROL,
    GREEN,
    INK,
    ORANGE,
    PALETTE,
    PURPLE,
    SKY,
    SMALL,
    TINY,
    VERMILION,
    axes,
    edge_note,
    figure_of,
    house_style,
    layer_axis,
    legend_above,
    marker,
)

_CONTROLS: dict[str, tuple[str, Any]] = {
    "shuffled labels": (CONTROL, (0, (4, 1.5))),
    "random coordinates": (CONTROL, (0, (1, 1.2))),
    "prompt only": (INK, (0, (5, 1.5, 1, 1.5))),
}
"""Colour and dash of what a probe has to beat."""
_PROBES = (VERMILION, BLUE, GREEN, ORANGE, SKY, PURPLE)
_METRICS = {"auroc": "AUROC", "f1": "F1"}
_CHANCE = ("auroc", "accuracy", "balanced accuracy", "balanced_accuracy")
"""Metrics that are one half for a guess."""
_SPLITS = {"token split": ORANGE, "grouped by prompt": BLUE}


@house_style
def probe_scores(scores: pd.DataFrame, metric: str = "auroc", *, ax: Axes | None = None) -> Figure:
    """Scores of probes over layers with their intervals, the controls in grey, the chance level as a line.

    Without layers, one row of dots per series; a ``split`` column then shows splits side by side: a score that falls
    when prompts are kept together was a leak.

    Args:
        scores: Columns ``series, metric, score, low, high``, one row each; optional ``layer`` (a series without layers,
            NaN, is a level line) and, without layers, ``split``. The series "shuffled labels", "random coordinates" and
            "prompt only" are controls.
        metric: Which rows to draw.
        ax: Axes to draw on; a new figure without.

    Raises:
        ValueError: On missing columns, no rows, a metric that is not there, or several rows for one point.
    """
    check(scores, "probe_scores", ["series", "metric", "score", "low", "high"])
    rows = scores[scores["metric"] == metric]
    if rows.empty:
        known = ", ".join(map(str, scores["metric"].unique()))
        raise ValueError(f"probe_scores found no metric {metric!r}; the frame has {known}")
    check_finite(rows, "probe_scores", "score")
    name = _METRICS.get(metric, metric.replace("_", " "))
    chance = metric in _CHANCE
    if "layer" not in rows or rows["layer"].isna().all():
        return _by_split(rows, name, ax, chance=chance)
    return _by_layer(rows, name, ax, chance=chance)


@house_style
def coefficient_violins(coefficients: pd.DataFrame, *, label: str = "feature", ax: Axes | None = None) -> Figure:
    """How the coefficient of each feature spreads over repeats, with its median (2506.11618, figure 6).

    Args:
        coefficients: Columns ``feature, coefficient``, one row per repeat; optional ``contrast``: up to three, side by
            side.
        label: What the features are, "layer of the site".
        ax: Axes to draw on; a new figure without.

    Raises:
        ValueError: On missing columns, no rows, more than three contrasts, or a coefficient that is no number.
    """
    check(coefficients, "coefficient_violins", ["feature", "coefficient"])
    check_finite(coefficients, "coefficient_violins", "coefficient")
    frame = coefficients if "contrast" in coefficients else coefficients.assign(contrast="coefficient")
    contrasts = list(dict.fromkeys(frame["contrast"]))
    if len(contrasts) > 3:
        raise ValueError(f"coefficient_violins shows three contrasts at most, got {', '.join(map(str, contrasts))}")
    features = list(dict.fromkeys(frame["feature"]))
    ax = axes(ax, width(len(features) * len(contrasts), 18), 2.4)
    apart = 0.84 / len(contrasts)
    for rank, (contrast, colour) in enumerate(zip(contrasts, (BLUE, VERMILION, GREEN), strict=False)):
        offset = (rank - (len(contrasts) - 1) / 2) * apart
        _violins(ax, frame[frame["contrast"] == contrast], features, offset, apart * 0.9, colour)
        ax.plot([], [], "s", color=colour, label=str(contrast))
    ax.axhline(0, color=INK, linewidth=0.6, zorder=1.5)
    _feature_axis(ax, features)
    ax.set(xlabel=label, ylabel="coefficient")
    if "contrast" in coefficients:
        legend_above(ax)
    return figure_of(ax)


def _by_layer(rows: pd.DataFrame, name: str, ax: Axes | None, *, chance: bool) -> Figure:
    check_unique(rows, "probe_scores", ["series", "layer"])
    layers = rows["layer"].dropna().astype(int)
    ax = axes(ax, COLUMN, 2.4)
    probes = [series for series in dict.fromkeys(rows["series"]) if series not in _CONTROLS]
    for series, curve in sorted(
        rows.groupby("series", sort=False, observed=True), key=lambda pair: pair[0] in _CONTROLS
    ):
        colour, dash = _CONTROLS.get(series) or (PALETTE[probes.index(series) % len(PALETTE)], "-")
        curve = curve.sort_values("layer")
        if curve["layer"].isna().all():
            curve = pd.concat([curve.assign(layer=end) for end in (layers.min() - 0.4, layers.max() + 0.4)])
        control = series in _CONTROLS
        ax.fill_between(curve["layer"], curve["low"], curve["high"], color=colour, alpha=BAND * 0.7, linewidth=0)
        look: dict[str, Any] = {"linewidth": 1.0 if control else 1.4, "marker": "" if control else marker(len(curve))}
        ax.plot(curve["layer"], curve["score"], color=colour, linestyle=dash, label=str(series), **look)
    if chance:
        ax.axhline(0.5, color=INK, linewidth=0.6, zorder=1)
        edge_note(ax, "chance", 0.5, offset=1.5, align="left")
    layer_axis(ax, layers)
    ax.set_ylabel(name)
    legend_above(ax)
    return figure_of(ax)


def _by_split(rows: pd.DataFrame, name: str, ax: Axes | None, *, chance: bool) -> Figure:
    split = "split" in rows
    check_unique(rows, "probe_scores", ["series", "split"] if split else ["series"])
    rows = rows.assign(split=rows["split"] if split else "score")
    splits = list(dict.fromkeys(rows["split"]))
    spare = [colour for colour in _PROBES if colour not in _SPLITS.values()]
    looks = {found: _SPLITS.get(found) or spare[i % len(spare)] for i, found in enumerate(splits)}
    ax = axes(ax, COLUMN, dots_height(rows["series"].nunique(), len(splits)))
    dots(ax, rows, "series", "split", "score", looks if split else {"score": BLUE})
    for tick, series in zip(ax.get_yticklabels(), dict.fromkeys(rows["series"]), strict=True):
        if series in _CONTROLS:
            tick.set(color="#777777", style="italic")
    if chance:
        ax.axvline(0.5, color=INK, linewidth=0.6, zorder=1)
        look: dict[str, Any] = {"fontsize": TINY, "color": "#555555", "ha": "center", "va": "bottom"}
        edge = ax.get_xaxis_transform()
        ax.annotate("chance", (0.5, 1), (0, 1), xycoords=edge, textcoords="offset points", **look)
    ax.set_xlabel(name)
    if split:
        legend_above(ax)
    return figure_of(ax)


def _violins(ax: Axes, rows: pd.DataFrame, features: list[str], offset: float, wide: float, colour: str) -> None:
    found = {
        feature: group.to_numpy(float)
        for feature, group in rows.groupby("feature", sort=False, observed=True)["coefficient"]
    }
    places = [features.index(feature) + offset for feature in found]
    drawn: dict[str, Any] = dict(ax.violinplot(list(found.values()), places, widths=wide, showextrema=False))
    for body in drawn["bodies"]:
        body.set(facecolor=colour, edgecolor=colour, alpha=0.45, linewidth=0.6, zorder=2)
    medians = [float(np.median(values)) for values in found.values()]
    ax.plot(places, medians, "_", color=colour, markersize=5, markeredgewidth=1.2, label="_median", zorder=3)


def _feature_axis(ax: Axes, features: list[str]) -> None:
    """Every feature named where they fit, lying or standing; otherwise some."""
    room = ax.bbox.width / ax.figure.dpi * 72 / len(features)
    longest = max(max(map(len, fill(str(name), 12).splitlines())) for name in features)
    step = int(np.ceil(TINY * 1.1 / room))
    named = features[::step]
    lying = 0.6 * SMALL * longest <= room
    standing = {"rotation": 90 if room < 14 else 40, "ha": "right", "va": "center", "rotation_mode": "anchor"}
    look: dict[str, Any] = {} if lying else standing | {"fontsize": TINY if room < 9 else SMALL}
    told = [fill(str(name), 12) if lying else str(name) for name in named]
    ax.set_xticks(range(0, len(features), step), told, **look)
    ax.set_xlim(-0.6, len(features) - 0.4)
    ax.grid(False, axis="x")
