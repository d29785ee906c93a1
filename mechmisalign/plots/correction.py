"""Cures side by side, what comes back of the misalignment, and doses of a prevention."""

from __future__ import annotations

from textwrap import fill

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from ._frames import INTERVAL, check, check_unique, condition_colours, is_control
from ._style import (
    BAND,
    BLUE,
    CONTROL,
    GREEN,
    INK,
    ORANGE,
    PAGE,
    PURPLE,
    SKY,
    SMALL,
    TINY,
    VERMILION,
    NotebookFigure,
    axes,
    figure_of,
    house_style,
    legend_above,
    marker,
    percent,
)

_PANELS = {
    "em": ("EM rate,\nother domains", VERMILION),
    "narrow_harm": ("harm in the\ntrained domain", ORANGE),
    "narrow_coherent": ("coherent in the\ntrained domain", GREEN),
    "coherent": ("coherent,\nother domains", BLUE),
    "kl": ("KL to chat\n(nats)", PURPLE),
    "accuracy": ("harmless\nquestions right", SKY),
}
"""Column of the cure table, what its panel is called, its colour; from left to right."""
_SHARES = ("em", "narrow_harm", "narrow_coherent", "coherent", "accuracy")
_WAYS = (BLUE, ORANGE, VERMILION, PURPLE, SKY, GREEN)
_REFERENCE = (0, (3, 1.5))


@house_style
def cure_panels(table: pd.DataFrame, *, against: str = "uncured") -> Figure:
    """Every cure in its row: misalignment, narrow skill, coherence and cost in panels side by side, with intervals.

    Args:
        table: As :func:`mechmisalign.correction.cure_table` gives it: ``cure, em`` and whichever there are of
            ``narrow_harm, narrow_coherent, coherent, kl, accuracy``, each with ``_low, _high``. Rows that
            say "random" are grey.
        against: The cure whose values are drawn as dashed lines.

    Raises:
        ValueError: On missing columns, no rows, shares outside 0 to 1, or two rows for one cure.
    """
    shown = [name for name in _PANELS if name in table.columns]
    check(table, "cure_panels", ["cure", "em"], [name for name in shown if name in _SHARES])
    check_unique(table, "cure_panels", ["cure"])
    figure, columns = _rows_of_panels(len(table), len(shown))
    for name, ax in zip(shown, columns, strict=True):
        title, colour = _PANELS[name]
        _panel(ax, table, name, colour, against)
        ax.set_title(title, fontsize=SMALL, color=INK)
    _cure_names(columns[0], table["cure"])
    return figure


@house_style
def comeback(back: pd.DataFrame, *, against: str = "uncured") -> Figure:
    """The EM rate of each cure as it is, in every other state and behind every cue, in panels side by side.

    Where fewer than half of the answers are coherent the dot is hollow: a low rate there is no health.

    Args:
        back: As :func:`mechmisalign.correction.comes_back` gives it: ``cure, way, rate, low, high``, optional
            ``coherent``; up to six ways. Rows that say "random" are grey.
        against: The cure whose values are drawn as dashed lines.

    Raises:
        ValueError: On missing columns, no rows, shares outside 0 to 1, more than six ways, or two rows for one dot.
    """
    check(back, "comeback", ["cure", "way", *INTERVAL], INTERVAL)
    check_unique(back, "comeback", ["cure", "way"])
    most = back["cure"].value_counts(sort=True).index[0]
    ways = list(dict.fromkeys([*back.loc[back["cure"] == most, "way"], *back["way"]]))
    if len(ways) > len(_WAYS):
        raise ValueError(
            f"comeback tells {len(_WAYS)} ways apart, got {len(ways)}: {', '.join(ways)}; select some of them"
        )
    cures = pd.Series(list(dict.fromkeys(back["cure"])))
    figure, columns = _rows_of_panels(len(cures), len(ways))
    for way, colour, ax in zip(ways, _WAYS, columns, strict=False):
        rows = back[back["way"] == way].set_index("cure").reindex(list(cures)).rename_axis("cure").reset_index()
        named = rows.rename(columns={"rate": "em", "low": "em_low", "high": "em_high"})
        _panel(ax, named, "em", colour, against)
        broken = rows[rows["coherent"] < 0.5] if "coherent" in rows else rows.iloc[:0]
        ax.scatter(broken["rate"], broken.index, s=3, c="white", linewidths=0, zorder=4)
        ax.set_title(fill(str(way), 16), fontsize=SMALL, color=INK)
    _cure_names(columns[0], cures)
    broken_anywhere = "coherent" in back and bool((back["coherent"] < 0.5).any())
    figure.supxlabel(
        "EM rate, other domains" + ("; hollow: under half coherent" if broken_anywhere else ""), fontsize=8
    )
    return figure


@house_style
def prevention(doses: pd.DataFrame, *, against: str = "uncured") -> Figure:
    """Dose and response of a cure in training: EM, narrow harm, coherence and cost against the strength.

    Args:
        doses: ``series, strength`` and the columns of a cure table. The row of the series ``against`` becomes dashed
            lines; series that say "random" are grey.
        against: The series without the cure.

    Raises:
        ValueError: On missing columns, no rows, shares outside 0 to 1, two rows for one point, or too many series.
    """
    shown = [name for name in ("em", "narrow_harm", "coherent", "kl") if name in doses.columns]
    check(doses, "prevention", ["series", "strength", "em"], [name for name in shown if name in _SHARES])
    check_unique(doses, "prevention", ["series", "strength"])
    treated = doses[doses["series"] != against]
    colours = condition_colours(treated["series"], "prevention")
    figure = NotebookFigure(figsize=(PAGE, 2.3), layout="constrained")
    columns = figure.subplots(1, len(shown), squeeze=False)[0]
    for name, ax in zip(shown, columns, strict=True):
        axes(ax, 1, 1)
        for series, colour in colours.items():
            rows = treated[treated["series"] == series].sort_values("strength")
            if {f"{name}_low", f"{name}_high"} <= set(rows.columns):
                ends = rows[f"{name}_low"], rows[f"{name}_high"]
                ax.fill_between(rows["strength"], *ends, color=colour, alpha=BAND, linewidth=0)
            ax.plot(rows["strength"], rows[name], color=colour, marker=marker(len(rows)), label=str(series))
        for value in doses.loc[doses["series"] == against, name]:
            ax.axhline(value, color=INK, linewidth=0.8, linestyle=_REFERENCE)
        ax.set_title(_PANELS[name][0], fontsize=SMALL, color=INK)
        ax.set_xlabel("strength in training")
        _y_axis(ax, name)
    dashed = Line2D([], [], color=INK, linewidth=0.8, linestyle=_REFERENCE, label=against)
    legend_above(columns[0], [*columns[0].get_legend_handles_labels()[0], dashed], most=4)
    return figure


def _rows_of_panels(rows: int, columns: int) -> tuple[Figure, list[Axes]]:
    """Panels side by side over the same rows."""
    figure = NotebookFigure(figsize=(PAGE, 0.75 + 0.19 * rows), layout="constrained")
    return figure, [axes(ax, 1, 1) for ax in figure.subplots(1, columns, sharey=True, squeeze=False)[0]]


def _panel(ax: Axes, table: pd.DataFrame, name: str, colour: str, against: str) -> None:
    places = np.arange(len(table))
    colours = np.where(is_control(table["cure"]), CONTROL, colour)
    low, high = f"{name}_low", f"{name}_high"
    if {low, high} <= set(table.columns):
        ax.hlines(places, table[low], table[high], color=colours, linewidth=1.3, zorder=2)
    ax.scatter(table[name], places, s=12, c=colours, linewidths=0, zorder=3)
    for value in table.loc[table["cure"] == against, name]:
        ax.axvline(value, color=INK, linewidth=0.7, linestyle=_REFERENCE, zorder=1)
    for row in range(0, len(table), 2):
        ax.axhspan(row - 0.5, row + 0.5, color="#F5F5F5", linewidth=0, zorder=0)
    ax.grid(False, axis="y")
    if name in _SHARES:
        ax.set_xlim(-0.04, 1.04)
        ax.set_xticks([0, 0.5, 1])
        percent(ax, "x")
    else:
        top = float(np.nanmax(table[[column for column in (name, high) if column in table]]))
        ax.set_xlim(-0.04 * top, 1.06 * top if top > 0 else 1)
        ax.xaxis.set_major_locator(MaxNLocator(2))
    ax.tick_params(axis="x", labelsize=TINY)


def _cure_names(ax: Axes, names: pd.Series) -> None:
    ax.set_yticks(np.arange(len(names)), [fill(str(name), 34) for name in names], fontsize=SMALL, color=INK)
    ax.set_ylim(len(names) - 0.5, -0.5)
    for one in figure_of(ax).axes:
        one.tick_params(axis="y", length=0)


def _y_axis(ax: Axes, name: str) -> None:
    if name in _SHARES:
        ax.set_ylim(-0.03, 1.03)
        percent(ax, "y")
    else:
        ax.set_ylim(bottom=0)
