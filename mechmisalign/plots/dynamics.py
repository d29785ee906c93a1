"""Training dynamics: norms, the path, how it turns, and behaviour, over steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ._frames import INTERVAL, check, check_unique, condition_colours
from ._steps import QUANTITIES, cosine_axis, mark, span
from ._style import (
    BAND,
    COLUMN,
    CONTROL,
    INK,
    SMALL,
    TINY,
    axes,
    figure_of,
    house_style,
    legend_above,
    lighter,
    marker,
    percent,
)

if TYPE_CHECKING:
    from mechmisalign.dynamics import Principal, Transition


@house_style
def norms_by_step(norms: pd.DataFrame, *, ax: Axes | None = None) -> Figure:
    """Norms over steps, a line for each site, each relative to its largest (2506.11613, figures 9 and 11).

    Args:
        norms: Columns ``site, step, quantity, norm``, as ``mm.dynamics.site_norms`` gives them; select
            quantities and up to six sites.
        ax: Axes to draw on; a new figure without.

    Raises:
        ValueError: On missing columns, no rows, several rows for one point, or more sites than can be told apart.
    """
    check(norms, "norms_by_step", ["site", "step", "quantity", "norm"])
    check_unique(norms, "norms_by_step", ["site", "quantity", "step"])
    ax = axes(ax, COLUMN, 2.2)
    sites, kinds = list(dict.fromkeys(norms["site"])), list(dict.fromkeys(norms["quantity"]))
    several = len(sites) > 1
    colours = condition_colours(sites if several else kinds, "norms_by_step")
    dashes = dict(zip(kinds, ("-", (0, (4, 2)), (0, (1, 1.5))), strict=False))
    for (site, kind), rows in norms.groupby(["site", "quantity"], sort=False, observed=True):
        told = QUANTITIES.get(str(kind), str(kind))
        label = f"{site}, {told}" if several else told
        colour, dash = colours[site if several else kind], dashes[kind] if several else "-"
        ax.plot(rows["step"], rows["norm"] / rows["norm"].max(), color=colour, linestyle=dash, label=label)
    ax.set_ylim(0, 1.04)
    ax.set(xlabel="training step", ylabel="norm, relative to its largest")
    legend_above(ax)
    return figure_of(ax)


@house_style
def local_cosines(cosines: pd.DataFrame, *, at: Transition | None = None, ax: Axes | None = None) -> Figure:
    """The local cosine over steps, lighter for larger spacings; what its sign means stands at the right edge.

    Args:
        cosines: Columns ``step, spacing, cosine``, as ``mm.dynamics.local_cosine`` gives them, and optionally
            ``series`` (up to six, such as A and B). Steps below its threshold are gaps.
        at: A transition, whose interval is shaded.
        ax: Axes to draw on; a new figure without.

    Raises:
        ValueError: On missing columns, no rows, or several rows for one point.
    """
    check(cosines, "local_cosines", ["step", "spacing", "cosine"])
    frame = cosines if "series" in cosines.columns else cosines.assign(series="")
    check_unique(frame, "local_cosines", ["series", "spacing", "step"])
    ax = axes(ax, COLUMN, 2.2)
    spacings = sorted(frame["spacing"].unique())
    for name, colour in condition_colours(frame["series"], "local_cosines").items():
        for rank, spacing in enumerate(spacings):
            rows = frame[(frame["series"] == name) & (frame["spacing"] == spacing)]
            shade = lighter(colour, 0.65 * rank / max(len(spacings) - 1, 1))
            label = f"{name}, s = {spacing:g}" if name else f"s = {spacing:g}"
            ax.plot(rows["step"], rows["cosine"], color=shade, marker=marker(len(rows)), label=label)
    mark(ax, [at] if at is not None else [])
    cosine_axis(ax)
    ax.set_xlabel("training step")
    legend_above(ax)
    return figure_of(ax)


@house_style
def path_plane(path: Principal, *, at: Transition | None = None, ax: Axes | None = None) -> Figure:
    """The first two principal components of a path, coloured by step (2506.11613, figure 7).

    Args:
        path: As ``mm.dynamics.principal`` gives it.
        at: A transition, whose step is ringed.
        ax: Axes to draw on; a new figure without.

    Raises:
        ValueError: If there are fewer than two components.
    """
    check(path.scores, "path_plane", ["step", "pc1", "pc2"])
    ax = axes(ax, COLUMN, 2.6)
    scores = path.scores
    ax.plot(scores["pc1"], scores["pc2"], color=CONTROL, linewidth=0.6, zorder=1)
    dots = ax.scatter(scores["pc1"], scores["pc2"], c=scores["step"], cmap="viridis", s=14, linewidths=0, zorder=2)
    bar = ax.figure.colorbar(dots, ax=ax, label="training step", pad=0.02)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=SMALL, width=0.6, length=2)
    for row in (0, len(scores) - 1):
        where = (scores["pc1"].iloc[row], scores["pc2"].iloc[row])
        ax.annotate(f"{scores['step'].iloc[row]:g}", where, (4, 3), textcoords="offset points", fontsize=TINY)
    if at is not None and np.isfinite(at.step):
        near = scores.iloc[(scores["step"] - at.step).abs().argmin()]
        ax.plot(near["pc1"], near["pc2"], "o", markersize=8, markerfacecolor="none", markeredgecolor=INK)
        look: dict[str, Any] = {"textcoords": "offset points", "fontsize": TINY, "ha": "right"}
        ax.annotate(f"turn at {at.step:g}", (near["pc1"], near["pc2"]), (-8, -3), **look)
    shares = [f"PC{i + 1} ({100 * share:.0f} % of the variance)" for i, share in enumerate(path.explained[:2])]
    ax.set(xlabel=shares[0], ylabel=shares[1])
    ax.margins(0.08)
    return figure_of(ax)


@house_style
def similarity_to_end(similarity: pd.DataFrame, *, ax: Axes | None = None) -> Figure:
    """Cosine of each step with the last one.

    Args:
        similarity: Columns ``step, cosine``, as ``mm.dynamics.similarity`` gives them, and optionally ``series``.
        ax: Axes to draw on; a new figure without.

    Raises:
        ValueError: On missing columns, no rows, or several rows for one point.
    """
    check(similarity, "similarity_to_end", ["step", "cosine"])
    frame = similarity if "series" in similarity.columns else similarity.assign(series="")
    check_unique(frame, "similarity_to_end", ["series", "step"])
    ax = axes(ax, COLUMN, 2.0)
    for name, colour in condition_colours(frame["series"], "similarity_to_end").items():
        rows = frame[frame["series"] == name]
        ax.plot(rows["step"], rows["cosine"], color=colour, marker=marker(len(rows)), label=str(name))
    ax.set_ylim(min(0.0, float(frame["cosine"].min()) - 0.05), 1.04)
    ax.set(xlabel="training step", ylabel="cosine with the last step")
    if frame["series"].nunique() > 1:
        legend_above(ax)
    return figure_of(ax)


@house_style
def behaviour_over_steps(rates: pd.DataFrame, *, onsets: Sequence[Transition] = (), ax: Axes | None = None) -> Figure:
    """EM rate over steps with its interval, a line for each scale; coherence as a thin dashed line.

    Args:
        rates: Columns ``step, scale, rate, low, high``, optionally ``coherent``, as ``mm.behaviour_by_step`` has them.
        onsets: Of each scale, in the order of the scales: ticks with intervals over the axes.
        ax: Axes to draw on; a new figure without.

    Raises:
        ValueError: On missing columns, no rows, shares outside 0 to 1, several rows for one point, or other than one
            onset for each scale.
    """
    check(rates, "behaviour_over_steps", ["step", "scale", *INTERVAL], INTERVAL)
    check_unique(rates, "behaviour_over_steps", ["scale", "step"])
    ax = axes(ax, COLUMN, 2.4)
    colours = condition_colours(rates["scale"], "behaviour_over_steps")
    if onsets and len(onsets) != len(colours):
        raise ValueError(f"{len(onsets)} onsets for {len(colours)} scales; one for each, in their order, is expected")
    for i, (scale, colour) in enumerate(colours.items()):
        rows = rates[rates["scale"] == scale].sort_values("step")
        ax.fill_between(rows["step"], rows["low"], rows["high"], color=colour, alpha=BAND, linewidth=0)
        ax.plot(rows["step"], rows["rate"], color=colour, marker=marker(len(rows)), label=f"scale {scale:g}")
        if "coherent" in rows:
            ax.plot(rows["step"], rows["coherent"], color=colour, linewidth=0.8, linestyle=(0, (4, 2)))
        if onsets:
            span(ax, onsets[i], 1.03 + 0.03 * i, colour)
    handles: list[Line2D] = list(ax.get_legend_handles_labels()[0])  # type: ignore[arg-type]
    if "coherent" in rates:
        handles.append(Line2D([], [], color=INK, linewidth=0.8, linestyle=(0, (4, 2)), label="coherent answers"))
    ax.set_ylim(0, 1.04 + 0.03 * len(onsets))
    ax.set_yticks(np.linspace(0, 1, 6))
    ax.set(xlabel="training step", ylabel="share of answers")
    percent(ax, "y")
    legend_above(ax, handles)
    return figure_of(ax)
