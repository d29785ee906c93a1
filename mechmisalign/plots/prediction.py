"""What was predicted before training and what came of it; and a fine-tune as it is watched."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import fill
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from ._dots import dots_height
from ._frames import check, check_finite
from ._panels import stack_below
from ._style import (
    BAND,
    BLUE,
    COLUMN,
    CONTROL,
    GREEN,
    INK,
    PALETTE,
    SMALL,
    VERMILION,
    axes,
    edge_note,
    figure_of,
    house_style,
    legend_above,
    marker,
    percent,
)

_LETTERS = 24
"""Longer names are broken into lines."""
_KINDS = {"direction": VERMILION, "cheap": "#E69F00", "text": BLUE, "random": CONTROL}
"""Colours of the kinds of predictors."""


@house_style
def dataset_ranking(
    table: pd.DataFrame,
    *,
    correlation: pd.Series | None = None,
    label: str = "projection difference",
    ax: Axes | None = None,
) -> Figure:
    """Score of each dataset before training against its EM rate after it, both with 95 % intervals.

    Args:
        table: ``Prediction.table``: ``score, score_low, score_high, rate, low, high``; optional ``kind`` (colours), and
            ``random_low, random_high`` (grey: where scores along random directions lie).
        correlation: A row of ``Prediction.correlations``, to be written into the figure.
        label: Of the score.
        ax: Axes to draw on; a new figure without.

    Raises:
        ValueError: On missing columns, no rows, or shares outside 0 to 1.
    """
    check(
        table, "dataset_ranking", ["score", "score_low", "score_high", "rate", "low", "high"], ["rate", "low", "high"]
    )
    ax = axes(ax, COLUMN, 2.6)
    frame = table if "kind" in table.columns else table.assign(kind="")
    handles: list[Artist] = []
    if {"random_low", "random_high"} <= set(frame.columns) and frame["random_low"].notna().all():
        ax.axvspan(frame["random_low"].min(), frame["random_high"].max(), color=CONTROL, alpha=BAND, linewidth=0)
        handles.append(Patch(color=CONTROL, alpha=BAND, label="random directions"))
    kinds = list(dict.fromkeys(frame["kind"]))
    if len(kinds) > len(PALETTE):
        raise ValueError(f"dataset_ranking tells {len(PALETTE)} kinds apart, got {len(kinds)}; name fewer")
    for kind, colour in zip(kinds, PALETTE, strict=False):
        rows = frame[frame["kind"] == kind]
        ax.hlines(rows["rate"], rows["score_low"], rows["score_high"], color=colour, linewidth=0.9, alpha=0.6)
        ax.vlines(rows["score"], rows["low"], rows["high"], color=colour, linewidth=0.9, alpha=0.6)
        ax.plot(rows["score"], rows["rate"], "o", color=colour, markersize=3.6, markeredgewidth=0, zorder=3)
        handles.append(Line2D([], [], color=colour, marker="o", linestyle="", markersize=3.6, label=str(kind)))
    ax.set(xlabel=label, ylabel="EM rate after training")
    percent(ax, "y")
    if correlation is not None:
        ends = f"[{correlation['low']:.2f}, {correlation['high']:.2f}]"
        told = f"Spearman {correlation['spearman']:.2f} {ends}\n{int(correlation['n'])} datasets"
        ax.annotate(
            told, (0, 1), (5, -5), xycoords="axes fraction", textcoords="offset points", va="top", fontsize=SMALL
        )
    if kinds != [""] or len(handles) > 1:
        legend_above(ax, [handle for handle in handles if handle.get_label()])
    return figure_of(ax)


@house_style
def predictor_ranks(correlations: pd.DataFrame, *, ax: Axes | None = None) -> Figure:
    """Spearman's correlation of each predictor with the EM rates after training, with 95 % intervals.

    Random directions share a row. In few dimensions one may rank datasets as well as any, but for its sign, which
    nobody knows beforehand.

    Args:
        correlations: ``Prediction.correlations``: ``predictor, kind, spearman, low, high``.
        ax: Axes to draw on; a new figure without.

    Raises:
        ValueError: On missing columns or no rows.
    """
    check(correlations, "predictor_ranks", ["predictor", "kind", "spearman", "low", "high"])
    random = correlations["kind"] == "random"
    names = [fill(str(name), _LETTERS) for name in correlations.loc[~random, "predictor"]]
    names += [f"random directions ({random.sum()})"] if random.any() else []
    places = np.where(random, len(names) - 1, (~random).cumsum() - 1).astype(float)
    places[random] += np.linspace(-0.3, 0.3, max(2, random.sum()))[: random.sum()]
    ax = axes(ax, COLUMN, dots_height(len(names), 1) + 0.12 * sum(name.count("\n") for name in names) + 0.1)
    colours = [_KINDS.get(kind, INK) for kind in correlations["kind"]]
    ax.hlines(places, correlations["low"], correlations["high"], color=colours, linewidth=1.1, alpha=0.6)
    ax.scatter(correlations["spearman"], places, c=colours, s=np.where(random, 6, 13), linewidths=0, zorder=3)
    ax.axvline(0, color=INK, linewidth=0.6, zorder=1)
    ax.set_yticks(range(len(names)), names, fontsize=SMALL)
    ax.set_ylim(len(names) - 0.4, -0.5)
    ax.set_xlim(-1.04, 1.04)
    ax.tick_params(axis="y", length=0)
    ax.grid(False, axis="y")
    ax.set_xlabel("Spearman with EM rate")
    return figure_of(ax)


@house_style
def score_histogram(
    scores: pd.DataFrame,
    *,
    score: str = "difference",
    by: str = "kind",
    label: str | None = None,
    ax: Axes | None = None,
) -> Figure:
    """Scores of single examples, one outline for each kind of example, each with the same area.

    Args:
        scores: Rows of one direction at one layer from :func:`mechmisalign.projection_difference`.
        score: Column to draw.
        by: Column of the kinds.
        label: Of the x axis; by default the score's name.
        ax: Axes to draw on; a new figure without.

    Raises:
        ValueError: On missing columns, no rows, scores that are not finite, rows of several layers or directions, or
            more kinds than can be told apart.
    """
    check(scores, "score_histogram", [score, by])
    check_finite(scores, "score_histogram", score)
    for column in ("direction", "layer"):
        if column in scores.columns and scores[column].nunique() > 1:
            raise ValueError(f"score_histogram draws one {column}, got {list(scores[column].unique())}; select one")
    kinds = list(dict.fromkeys(scores[by]))
    if len(kinds) > len(PALETTE):
        raise ValueError(f"score_histogram tells {len(PALETTE)} kinds apart, got {len(kinds)}; select some of them")
    ax = axes(ax, COLUMN, 2.0)
    edges = np.histogram_bin_edges(scores[score].astype(float), bins=min(60, max(10, len(scores) // 20)))
    handles = []
    for kind, colour in zip(kinds, PALETTE, strict=False):
        values = scores.loc[scores[by] == kind, score].astype(float)
        heights, _ = np.histogram(values, edges, density=True)
        ax.stairs(heights, edges, color=colour, fill=True, alpha=BAND)
        ax.stairs(heights, edges, color=colour, linewidth=1.2)
        handles.append(Line2D([], [], color=colour, label=f"{kind} ({len(values)})"))
    ax.set(xlabel=score if label is None else label, ylabel="density of examples")
    ax.set_ylim(0)
    ax.set_yticks([])
    legend_above(ax, handles)
    return figure_of(ax)


@house_style
def trait_watch(
    log: pd.DataFrame,
    *,
    threshold: float | None = None,
    behaviour: pd.DataFrame | None = None,
    by: str = "trait",
    ax: Axes | None = None,
) -> Figure:
    """What a watch saw over the steps of one or several runs, with the range of harmless runs, and the behaviour below.

    Args:
        log: ``TraitWatch.log``; several runs have a column ``run``. ``z`` is drawn where a threshold is given,
            ``drift`` otherwise.
        threshold: ``HarmlessDrift.threshold``; the range up to it is grey.
        behaviour: Optional ``step, rate, low, high`` (and the column ``by``, for colours): EM at checkpoints.
        by: Column of the colours: ``trait``, or a kind of run.
        ax: Axes to draw on; a new figure without.

    Raises:
        ValueError: On missing columns or no rows, or more colours than can be told apart.
    """
    value = "drift" if threshold is None else "z"
    check(log, "trait_watch", ["step", value, by])
    ax = axes(ax, COLUMN, 2.2)
    names = list(dict.fromkeys(log[by]))
    if len(names) > len(PALETTE):
        raise ValueError(f"trait_watch tells {len(PALETTE)} {by}s apart, got {len(names)}; select some of them")
    colours = dict(zip(names, PALETTE, strict=False))
    apart = [column for column in ("run", "trait") if column in log.columns]
    for _, rows in log.sort_values("step").groupby(apart or [by], sort=False, observed=True):
        shown = rows[rows[value].notna()]
        alone = len(log.groupby(apart or [by], observed=True)) <= len(PALETTE)
        look: dict[str, Any] = {"marker": marker(len(shown)) if alone else "", "linewidth": 1.2 if alone else 0.7}
        ax.plot(shown["step"], shown[value], color=colours[rows[by].iloc[0]], alpha=1 if alone else 0.7, **look)
    handles: list[Artist] = [Line2D([], [], color=colour, label=str(name)) for name, colour in colours.items()]
    if threshold is not None:
        bottom = min(float(log[value].min()), -threshold)
        ax.axhspan(bottom * 1.05, threshold, color=CONTROL, alpha=BAND, linewidth=0, zorder=0)
        ax.axhline(threshold, color=INK, linewidth=0.7, linestyle="--", zorder=1)
        edge_note(ax, "alarm", threshold, offset=2, align="left")
        ax.set_ylim(bottom=bottom * 1.05)
        handles.append(Patch(color=CONTROL, alpha=BAND, label="as in harmless runs"))
    ax.set(xlabel="step", ylabel="drift in harmless spreads" if threshold is not None else "drift of the projection")
    if behaviour is not None:
        check(behaviour, "trait_watch", ["step", "rate", "low", "high"], ["rate", "low", "high"])
        _below(ax, behaviour, by, colours)
    legend_above(ax, handles)
    return figure_of(ax)


def _below(ax: Axes, behaviour: pd.DataFrame, by: str, colours: dict[str, str]) -> None:
    for panel in stack_below(ax, [1.0]):
        groups: Sequence[tuple[str, pd.DataFrame]] = (
            list(behaviour.groupby(by, sort=False, observed=True)) if by in behaviour.columns else [("", behaviour)]
        )
        for name, rows in groups:
            for _, line in rows.groupby("run", sort=False, observed=True) if "run" in rows.columns else [("", rows)]:
                ordered = line.sort_values("step")
                colour = colours.get(name, GREEN)
                panel.fill_between(
                    ordered["step"], ordered["low"], ordered["high"], color=colour, alpha=BAND, linewidth=0
                )
                panel.plot(ordered["step"], ordered["rate"], color=colour, marker=marker(len(ordered)))
        panel.set_ylabel("EM rate")
        panel.set_ylim(bottom=0)
        percent(panel, "y")
