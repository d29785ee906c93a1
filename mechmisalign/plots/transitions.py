"""Every signal of a fine-tune over one axis of steps, and where each has its transition."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from textwrap import fill
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ._frames import INTERVAL, check
from ._steps import QUANTITIES, colours_of, cosine_axis, mark, span, tag
from ._style import BAND, COLUMN, CONTROL, INK, TINY, NotebookFigure, axes, house_style, lighter, percent

if TYPE_CHECKING:
    from mechmisalign.dynamics import Transition


@house_style
def transition(
    curves: Mapping[str, pd.DataFrame], transitions: Sequence[Transition], *, log: pd.DataFrame | None = None
) -> Figure:
    """All signals over one axis of steps, and under them where each has its transition, with intervals.

    Args:
        curves: Any of ``"cosine"`` (as of :func:`local_cosines`), ``"similarity"`` (of :func:`similarity_to_end`),
            ``"norms"`` (of :func:`norms_by_step`), ``"behaviour"`` (of :func:`behaviour_over_steps`).
        transitions: In the order from top to bottom; one that was not found is said to be so.
        log: With ``step, grad_norm``: one more panel.

    Raises:
        ValueError: On an unknown curve or nothing to draw, or as for the figures of each.
    """
    drawers = {
        "behaviour": _behaviour_panel,
        "cosine": _cosine_panel,
        "similarity": _similarity_panel,
        "norms": _norms_panel,
        "gradient": _gradient_panel,
    }
    given = {**curves, **({"gradient": log} if log is not None and "grad_norm" in log else {})}
    unknown = sorted(given.keys() - drawers.keys())
    if unknown or not given:
        raise ValueError(f"transition draws {', '.join(drawers)}; got {unknown or 'no curves'}")
    names = [name for name in drawers if name in given]
    heights = [1.05] * len(names) + [0.2 + 0.22 * max(len(transitions), 1)]
    figure = NotebookFigure(figsize=(COLUMN + 1.2, 0.6 + sum(heights)), layout="constrained")
    grid = figure.add_gridspec(len(heights), 1, height_ratios=heights, hspace=0.05)
    panels = [axes(figure.add_subplot(grid[0]), 1, 1)]
    panels += [axes(figure.add_subplot(grid[i], sharex=panels[0]), 1, 1) for i in range(1, len(heights))]
    for name, ax in zip(names, panels, strict=False):
        drawers[name](ax, given[name])
        mark(ax, transitions)
        ax.tick_params(axis="x", labelbottom=False)
    _transition_rows(panels[-1], transitions)
    figure.align_ylabels(panels[:-1])
    return figure


def _behaviour_panel(ax: Axes, rates: pd.DataFrame) -> None:
    check(rates, "transition", ["step", "scale", *INTERVAL], INTERVAL)
    scales = list(dict.fromkeys(rates["scale"]))
    for i, scale in enumerate(scales):
        colour = lighter(INK, 0.6 * i / max(len(scales) - 1, 1))
        rows = rates[rates["scale"] == scale].sort_values("step")
        ax.fill_between(rows["step"], rows["low"], rows["high"], color=colour, alpha=BAND, linewidth=0)
        ax.plot(rows["step"], rows["rate"], color=colour)
        peak = rows.iloc[int(rows["rate"].argmax())]
        ax.annotate(f"×{scale:g}", (peak["step"], peak["rate"]), (0, 3), textcoords="offset points", **tag(colour))
    ax.set_ylim(0, min(1.05, float(rates["high"].max()) * 1.25 + 0.02))
    ax.set_ylabel("EM rate")
    percent(ax, "y")


def _cosine_panel(ax: Axes, cosines: pd.DataFrame) -> None:
    check(cosines, "transition", ["step", "spacing", "cosine"])
    spacings = sorted(cosines["spacing"].unique())
    for rank, spacing in enumerate(spacings):
        rows = cosines[cosines["spacing"] == spacing]
        shade = lighter(INK, 0.6 * rank / max(len(spacings) - 1, 1))
        ax.plot(rows["step"], rows["cosine"], color=shade, linewidth=1.1)
    cosine_axis(ax)
    ax.set_ylabel("local cosine")


def _similarity_panel(ax: Axes, similarity: pd.DataFrame) -> None:
    check(similarity, "transition", ["step", "cosine"])
    ax.plot(similarity["step"], similarity["cosine"], color=INK, linewidth=1.1)
    ax.set_ylim(min(0.0, float(similarity["cosine"].min())), 1.05)
    ax.set_ylabel("cosine\nwith the end")


def _norms_panel(ax: Axes, norms: pd.DataFrame) -> None:
    check(norms, "transition", ["step", "quantity", "norm"])
    for (_, kind), rows in norms.groupby([norms.get("site", ""), "quantity"], sort=False, observed=True):
        shade = {"A": 0.55, "B": 0.3}.get(str(kind), 0.0)
        relative = rows["norm"] / rows["norm"].max()
        ax.plot(rows["step"], relative, color=lighter(INK, shade), linewidth=1.1)
        where = (rows["step"].iloc[-1], relative.iloc[-1])
        if norms.groupby("quantity", observed=True).ngroups > 1 and norms.get("site", pd.Series("")).nunique() == 1:
            place = {"A": 5, "B": -9, "dW": -18}.get(str(kind), 0)
            ax.annotate(QUANTITIES.get(str(kind), str(kind)), where, (0, place), textcoords="offset points", **tag(INK))
    ax.set_ylim(0, 1.18)
    ax.set_ylabel("norm,\nrelative")


def _gradient_panel(ax: Axes, log: pd.DataFrame) -> None:
    ax.plot(log["step"], log["grad_norm"], color=lighter(INK, 0.5), linewidth=0.8)
    ax.set_ylim(0, None)
    ax.set_ylabel("gradient\nnorm")


def _transition_rows(ax: Axes, transitions: Sequence[Transition]) -> None:
    """Where each transition is, from top to bottom, and what was not found."""
    for row, (one, colour) in enumerate(zip(transitions, colours_of(transitions), strict=True)):
        if np.isfinite(one.step):
            span(ax, one, row, colour)
        else:
            note = f"none (p = {one.p:.2f})"
            look: dict[str, Any] = {"fontsize": TINY, "color": CONTROL, "va": "center"}
            ax.annotate(note, (0.01, row), xycoords=ax.get_yaxis_transform(), **look)
    ax.set_yticks(range(len(transitions)), [fill(one.signal, 18) for one in transitions], fontsize=TINY)
    ax.set_ylim(max(len(transitions), 1) - 0.5, -0.5)
    ax.grid(False, axis="y")
    ax.tick_params(axis="y", length=0)
    ax.set_xlabel("training step")
