"""Alignment against coherence, answer by answer."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from mechmisalign.judging import COHERENT_ABOVE, MISALIGNED_BELOW, UNSCORED, label

from ._frames import check
from ._style import COLUMN, CONTROL, PALETTE, VERMILION, as_percent, axes, figure_of, house_style, legend_above

_JITTER = (2.2, 3.2)
"""Half the width of the jitter along each axis, in points of the score: exact judges give a few values only."""
_MARGIN = 6


@house_style
def alignment_coherence(judged: pd.DataFrame, *, ax: Axes | None = None, seed: int = 0) -> Figure:
    """Every answer by its two scores, coloured by condition; the corner that counts as EM is shaded.

    Answers without one of the scores have no place on the plane; the legend counts them, in grey by reason where the
    judge told it.

    Args:
        judged: Columns ``alignment, coherence`` (0 to 100) and ``condition``, one row per answer; optional
            ``alignment_status, coherence_status``.
        ax: Axes to draw on; a new figure without.
        seed: Seed of the jitter that pulls equal scores apart.

    Raises:
        ValueError: On missing columns or no rows.
    """
    check(judged, "alignment_coherence", ["alignment", "coherence", "condition"])
    ax = axes(ax, COLUMN, 3.0)
    corner = (-_MARGIN, COHERENT_ABOVE), MISALIGNED_BELOW + _MARGIN, 100 - COHERENT_ABOVE + _MARGIN
    ax.add_patch(Rectangle(*corner, facecolor=VERMILION, alpha=0.1, linewidth=0, zorder=0))
    ax.annotate(
        "EM", (MISALIGNED_BELOW, COHERENT_ABOVE), (-3, 3), textcoords="offset points", ha="right", color=VERMILION
    )
    conditions = list(dict.fromkeys(judged["condition"]))
    colours = {condition: PALETTE[i % len(PALETTE)] for i, condition in enumerate(conditions)}
    rng = np.random.default_rng(seed)
    placed = judged.dropna(subset=["alignment", "coherence"]).sample(frac=1, random_state=seed)
    spots = placed[["alignment", "coherence"]].to_numpy(float) + rng.uniform(-1, 1, (len(placed), 2)) * _JITTER
    ax.scatter(spots[:, 0], spots[:, 1], s=5, c=placed["condition"].map(colours), alpha=0.4, linewidths=0)
    ends = (-_MARGIN, 100 + _MARGIN)
    ax.set(xlim=ends, ylim=ends, xlabel="alignment", ylabel="coherence")
    _count_by_condition(ax, judged, colours)
    return figure_of(ax)


def _count_by_condition(ax: Axes, judged: pd.DataFrame, colours: dict[object, str]) -> None:
    """A legend that also says how many answers there are, and how many lie in the corner or nowhere."""
    handles = []
    labelled = judged.assign(label=label(judged))
    for condition, group in labelled.groupby("condition", sort=False, observed=True):
        inside = int((group["label"] == "misaligned").sum())
        told = f"{condition}: EM {as_percent(inside / len(group))} of {len(group)}"
        nowhere = int(group[["alignment", "coherence"]].isna().any(axis=1).sum())
        told += f", {nowhere} unscored" if nowhere else ""
        handles.append(Line2D([], [], linestyle="", marker="o", color=colours[condition], label=told))
    reasons = labelled["label"].value_counts().reindex(UNSCORED).dropna()
    if len(reasons) and {"alignment_status", "coherence_status"} & set(judged.columns):
        told = "no verdict: " + ", ".join(f"{count:.0f} {reason}" for reason, count in reasons.items())
        handles.append(Line2D([], [], linestyle="", marker="o", color=CONTROL, label=told))
    legend_above(ax, handles)
