"""General against narrow solutions: loss, noise and KL against the norm; what is hidden; KL sweeps and their paths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ._frames import INTERVAL, check, check_unique, condition_colours, split_control
from ._style import (
    BAND,
    COLUMN,
    CONTROL,
    INK,
    PAGE,
    PALETTE,
    SMALL,
    TINY,
    NotebookFigure,
    axes,
    figure_of,
    house_style,
    legend_above,
    marker,
    percent,
)

if TYPE_CHECKING:
    from mechmisalign.solutions import JointPath

_DASHED = (0, (4, 2))
_KEYS: dict[str, Any] = {"color": "#444444", "linewidth": 0.9}


@house_style
def loss_against_norm(curve: pd.DataFrame, *, ax: Axes | None = None) -> Figure:
    """Loss on the training data against the norm that each solution is scaled to; its own norm is a diamond.

    Args:
        curve: ``solution, factor, norm, loss, loss_low, loss_high``, as the ``curve`` of ``mm.solutions.efficiency``.
        ax: Axes to draw on; a new figure without.

    Raises:
        ValueError: On missing columns, no rows, several rows for one point, or more than six solutions.
    """
    check(curve, "loss_against_norm", ["solution", "factor", "norm", "loss", "loss_low", "loss_high"])
    ax = _lines(curve, "loss_against_norm", "norm", "loss", ax)
    colours = condition_colours(curve["solution"], "loss_against_norm")
    for name, row in curve[curve["factor"] == 1].set_index("solution").iterrows():
        ax.plot(row["norm"], row["loss"], "D", color=colours[name], markersize=5, zorder=4)
    ax.set(xlabel="norm", ylabel="loss on the training data (nats)")
    own = Line2D([], [], color="#444444", marker="D", markersize=4, linestyle="", label="as trained")
    legend_above(ax, [*ax.get_legend_handles_labels()[0], own])
    return figure_of(ax)


@house_style
def noise_curves(curve: pd.DataFrame, *, ax: Axes | None = None) -> Figure:
    """What noise takes away of what training gained, against the size of the noise.

    Args:
        curve: ``solution, epsilon, lost, lost_low, lost_high``, as the ``curve`` of ``mm.solutions.stability``;
            optional ``how``: solutions perturbed in several ways get a dash for each.
        ax: Axes to draw on; a new figure without.

    Raises:
        ValueError: On missing columns, no rows, several rows for one point, or more than six solutions.
    """
    check(curve, "noise_curves", ["solution", "epsilon", "lost", "lost_low", "lost_high"])
    ax = _lines(curve, "noise_curves", "epsilon", "lost", ax, dashes="how")
    ax.axhline(1, color=INK, linewidth=0.7, linestyle=(0, (1, 1.5)), zorder=1)
    ax.set(xlabel="size ε of the noise", ylabel="share of the gain that is lost", xlim=(0, 1.02))
    percent(ax, "y")
    handles = ax.get_legend_handles_labels()[0]
    if "how" in curve and curve["how"].nunique() > 1:
        handles += [Line2D([], [], **_KEYS, linestyle=dash, label=f"on {how}") for how, dash in _dashes(curve["how"])]
    legend_above(ax, handles)
    return figure_of(ax)


@house_style
def kl_against_norm(curve: pd.DataFrame, *, ax: Axes | None = None) -> Figure:
    """KL from the chat model on neutral text against the norm; each random solution is a grey line.

    Args:
        curve: ``solution, norm, kl, kl_low, kl_high``, as the ``curve`` of ``mm.solutions.significance``. Solutions
            whose name says "random" are the control.
        ax: Axes to draw on; a new figure without.

    Raises:
        ValueError: On missing columns, no rows, several rows for one point, or more than six solutions.
    """
    check(curve, "kl_against_norm", ["solution", "norm", "kl", "kl_low", "kl_high"])
    trained, control = split_control(curve, "solution")
    ax = axes(ax, COLUMN, 2.4)
    for i, (_, rows) in enumerate(control.groupby("solution", sort=False, observed=True)):
        label = f"random ({control['solution'].nunique()})" if i == 0 else None
        ax.plot(rows["norm"], rows["kl"], color=CONTROL, linewidth=0.8, label=label, zorder=1.5)
    if len(trained):
        _lines(trained, "kl_against_norm", "norm", "kl", ax)
    ax.set(xlabel="norm", ylabel="KL to the chat model\n(nats per token)")
    ax.set_ylim(bottom=0)
    legend_above(ax)
    return figure_of(ax)


@house_style
def multiplier_curves(rates: pd.DataFrame) -> Figure:
    """EM rate (solid) and coherence (dashed) against the multiplier, a panel for each set of questions.

    Args:
        rates: ``solution, multiplier, questions, rate, low, high, coherent``, as ``mm.solutions.hidden_em`` gives them.

    Raises:
        ValueError: On missing columns, no rows, shares outside 0 to 1, several rows for one point, or more than six
            solutions.
    """
    return _share_panels(rates, "multiplier_curves", "multiplier", "questions", "solution")


@house_style
def drift_over_steps(rates: pd.DataFrame) -> Figure:
    """EM rate (solid) and coherence (dashed) while solutions are trained further, a panel for each of them.

    Args:
        rates: ``series, step, questions, rate, low, high, coherent``; step 0 is where the further training starts.

    Raises:
        ValueError: As for :func:`multiplier_curves`.
    """
    return _share_panels(rates, "drift_over_steps", "step", "series", "questions")


@house_style
def kl_sweep(rates: pd.DataFrame, *, chosen: float | None = None, ax: Axes | None = None) -> Figure:
    """Rates against the weight of the KL penalty, a line for each set of questions; weight 0 stands at the left.

    Args:
        rates: ``weight, questions, rate, low, high``; the narrow questions are dashed.
        chosen: A weight to be marked.
        ax: Axes to draw on; a new figure without.

    Raises:
        ValueError: On missing columns, no rows, shares outside 0 to 1, several rows for one point, a negative weight,
            or more than six sets of questions.
    """
    check(rates, "kl_sweep", ["weight", "questions", *INTERVAL], INTERVAL)
    check_unique(rates, "kl_sweep", ["questions", "weight"])
    if (rates["weight"] < 0).any():
        raise ValueError(f"kl_sweep got the weight {rates['weight'].min():g}; a penalty has a weight of 0 or more")
    weights = sorted(rates["weight"].unique())
    place = {weight: i for i, weight in enumerate(weights)}
    ax = axes(ax, COLUMN, 2.4)
    for name, colour in condition_colours(rates["questions"], "kl_sweep").items():
        rows = rates[rates["questions"] == name].sort_values("weight")
        x, dash = rows["weight"].map(place), _DASHED if "narrow" in str(name) else "-"
        ax.fill_between(x, rows["low"], rows["high"], color=colour, alpha=BAND, linewidth=0)
        ax.plot(x, rows["rate"], color=colour, marker=marker(len(rows)), linestyle=dash, label=str(name))
    if chosen is not None:
        ax.axvline(place[chosen], color=INK, linewidth=0.7, linestyle=(0, (1, 1.5)), zorder=1)
        where: dict[str, Any] = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points"}
        ax.annotate("chosen", (place[chosen], 1), (0, 2), **where, ha="center", fontsize=TINY, color="#555555")
    ax.set_xticks(range(len(weights)), [f"{weight:g}" for weight in weights])
    ax.set(xlabel="weight of the KL penalty", ylabel="misaligned answers", ylim=(-0.03, 1.03))
    percent(ax, "y")
    legend_above(ax, most=2)
    return figure_of(ax)


@house_style
def joint_paths(
    found: JointPath, *, names: Mapping[object, str] | None = None, planes: Sequence[tuple[int, int]] = ((1, 2), (1, 3))
) -> Figure:
    """Paths of several runs in planes of their joint principal components, from the chat model (open ring) to the end.

    Args:
        found: As ``mm.solutions.joint_path`` gives it.
        names: What the runs are called in the legend.
        planes: Pairs of components, counted from 1.

    Raises:
        ValueError: If a plane names a component that is not there, or there are more runs than colours.
    """
    columns = [f"pc{i}" for i in sorted({i for plane in planes for i in plane})]
    check(found.scores, "joint_paths", ["run", "step", *columns])
    runs = found.scores.iloc[1:]
    colours = _shades(list(dict.fromkeys(runs["run"])))
    ring: dict[str, Any] = {"marker": "o", "markersize": 6, "markerfacecolor": "white", "markeredgecolor": INK}
    wide = PAGE if len(planes) > 1 else COLUMN
    figure = NotebookFigure(figsize=(wide, 2.6), layout="constrained")
    panels = [axes(ax, 1, 1) for ax in figure.subplots(1, len(planes), squeeze=False)[0]]
    for (i, j), ax in zip(planes, panels, strict=True):
        x, y = f"pc{i}", f"pc{j}"
        start = found.scores.iloc[0]
        for run, colour in colours.items():
            rows = runs[runs["run"] == run].sort_values("step")
            line = [start[x], *rows[x]], [start[y], *rows[y]]
            label = (names or {}).get(run, str(run))
            ax.plot(*line, color=colour, linewidth=1.0, marker=".", markersize=2.5, label=label)
            ax.plot(line[0][-1], line[1][-1], "o", color=colour, markersize=5, zorder=3)
        ax.plot(start[x], start[y], **ring, zorder=4)
        ax.set(xlabel=_named(found, i), ylabel=_named(found, j))
        ax.margins(0.08)
    chat = Line2D([], [], **ring, linestyle="", label="chat model")
    legend_above(panels[0], [*panels[0].get_legend_handles_labels()[0], chat], most=4)
    return figure


def _share_panels(rates: pd.DataFrame, figure_name: str, x: str, panel: str, line: str) -> Figure:
    """Rates and coherence over ``x``, with a panel and a line for each value of two further columns."""
    check(rates, figure_name, [panel, line, x, *INTERVAL, "coherent"], [*INTERVAL, "coherent"])
    check_unique(rates, figure_name, [panel, line, x])
    colours = condition_colours(rates[line], figure_name)
    names = list(dict.fromkeys(rates[panel]))
    figure = NotebookFigure(figsize=(PAGE if len(names) > 1 else COLUMN, 2.4), layout="constrained")
    panels = [axes(ax, 1, 1) for ax in figure.subplots(1, len(names), sharey=True, squeeze=False)[0]]
    for name, ax in zip(names, panels, strict=True):
        for series, colour in colours.items():
            rows = rates[(rates[panel] == name) & (rates[line] == series)].sort_values(x)
            ax.fill_between(rows[x], rows["low"], rows["high"], color=colour, alpha=BAND, linewidth=0)
            ax.plot(rows[x], rows["rate"], color=colour, marker=marker(len(rows)), label=str(series))
            ax.plot(rows[x], rows["coherent"], color=colour, linewidth=0.8, linestyle=_DASHED)
        ax.set_title(str(name), fontsize=SMALL, color=INK)
        ax.set(xlabel=x, ylim=(-0.03, 1.03))
    panels[0].set_ylabel("share of answers")
    percent(panels[0], "y")
    keys = [Line2D([], [], **_KEYS, label="misaligned"), Line2D([], [], **_KEYS, linestyle=_DASHED, label="coherent")]
    legend_above(panels[0], [*panels[0].get_legend_handles_labels()[0], *keys], most=4)
    return figure


def _lines(curve: pd.DataFrame, figure: str, x: str, y: str, ax: Axes | None, dashes: str | None = None) -> Axes:
    """A line with its band for each solution, and a dash for each value of a further column."""
    split = [dashes] if dashes is not None and dashes in curve else []
    check_unique(curve, figure, ["solution", *split, x])
    ax = axes(ax, COLUMN, 2.4)
    colours = condition_colours(curve["solution"], figure)
    looks = dict(_dashes(curve[split[0]])) if split else {}
    labelled: set[object] = set()
    for (name, *how), rows in curve.groupby(["solution", *split], sort=False, observed=True):
        rows = rows.sort_values(x)
        ax.fill_between(rows[x], rows[f"{y}_low"], rows[f"{y}_high"], color=colours[name], alpha=BAND, linewidth=0)
        dash = looks[how[0]] if how else "-"
        label = None if name in labelled else str(name)
        ax.plot(rows[x], rows[y], color=colours[name], linestyle=dash, marker=marker(len(rows)), label=label)
        labelled.add(name)
    return ax


def _dashes(ways: pd.Series) -> list[tuple[object, Any]]:
    return list(zip(dict.fromkeys(ways), ("-", _DASHED, (0, (1, 1.5)), (0, (6, 1.5, 1, 1.5))), strict=False))


def _shades(runs: Sequence[object]) -> dict[object, Any]:
    """Colours in order: the palette for a few runs, a scale for many."""
    import matplotlib as mpl

    if len(runs) <= len(PALETTE):
        return dict(zip(runs, PALETTE, strict=False))
    return dict(zip(runs, mpl.colormaps["viridis"](np.linspace(0, 0.92, len(runs))), strict=True))


def _named(found: JointPath, component: int) -> str:
    return f"PC{component} ({100 * found.explained[component - 1]:.0f} % of the variance)"
