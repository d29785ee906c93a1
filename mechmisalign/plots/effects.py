"""What scaling sites, or leaving them out, does to the answers."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import fill
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ._dots import dots, dots_height
from ._frames import check, check_finite, check_unique
from ._style import (
    BLUE,
    COLUMN,
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
    figure_of,
    house_style,
    legend_above,
    lighter,
    percent,
    readable,
)

_OUTCOMES = {"misaligned": VERMILION, "aligned": BLUE, "neither": "#C4C4C4", "refusal": PURPLE, "incoherent": "#6E6E6E"}
_SPARE_OUTCOMES = (GREEN, ORANGE, SKY)
_KINDS = {"leave one out": BLUE, "only one": ORANGE, "Shapley": VERMILION, "gradient": GREEN}
_WHOLE = 1 + 1e-6
_LEGIBLE = 0.05
"""A part at least so wide has its percent written in it."""


@house_style
def scaling_bars(outcomes: pd.DataFrame, *, ax: Axes | None = None) -> Figure:
    """How the answers of each condition divide into outcomes, as one bar each (2506.11618, figure 7).

    Args:
        outcomes: Columns ``condition, outcome, share``, one row each. Outcomes that agree up to a comma ("misaligned,
            own domain", "misaligned, other") are shades of one colour. Conditions and outcomes stay in order of
            appearance; what a condition lacks to the whole stays blank.
        ax: Axes to draw on; a new figure without.

    Raises:
        ValueError: On missing columns, no rows, shares outside 0 to 1, several rows for one part, or more than a whole.
    """
    check(outcomes, "scaling_bars", ["condition", "outcome", "share"], ["share"])
    check_unique(outcomes, "scaling_bars", ["condition", "outcome"])
    check_finite(outcomes, "scaling_bars", "share")
    totals = outcomes.groupby("condition", sort=False, observed=True)["share"].sum()
    if (totals > _WHOLE).any():
        raise ValueError(
            f"the shares of {totals.idxmax()!r} add up to {totals.max():.4g}, more than a whole; "
            "outcomes must exclude each other"
        )
    conditions = list(totals.index)
    ax = axes(ax, COLUMN, 0.95 + 0.27 * len(conditions))
    ends = np.zeros(len(conditions))
    for outcome, colour in _outcome_colours(list(dict.fromkeys(outcomes["outcome"]))).items():
        rows = outcomes[outcomes["outcome"] == outcome].set_index("condition")["share"]
        shares = rows.reindex(conditions, fill_value=0.0).to_numpy(float)
        ax.barh(range(len(conditions)), shares, 0.72, left=ends, color=colour, linewidth=0, label=str(outcome))
        _write_shares(ax, shares, ends, colour)
        ends = ends + shares
    ax.set_yticks(range(len(conditions)), [fill(str(name), 24) for name in conditions], fontsize=SMALL)
    ax.set_ylim(len(conditions) - 0.5, -0.5)
    ax.tick_params(axis="y", length=0)
    ax.grid(False, axis="y")
    ax.set(xlim=(0, 1), xlabel="share of answers")
    percent(ax, "x")
    legend_above(ax)
    return figure_of(ax)


@house_style
def site_effects(effects: pd.DataFrame, *, label: str = "effect on the EM rate", ax: Axes | None = None) -> Figure:
    """What each site does, measured in several ways: dots with intervals, sites from top to bottom.

    Args:
        effects: Columns ``site, kind, value``, one row each; optional ``low, high``, NaN for a value without interval
            (a gradient). Kinds are "leave one out", "only one", "Shapley", "gradient", or any other.
        label: What the value is.
        ax: Axes to draw on; a new figure without.

    Raises:
        ValueError: On missing columns, no rows, several rows for one dot, or a value that is no number.
    """
    check(effects, "site_effects", ["site", "kind", "value"])
    check_unique(effects, "site_effects", ["site", "kind"])
    check_finite(effects, "site_effects", "value")
    kinds = list(dict.fromkeys(effects["kind"]))
    spare = [colour for colour in PALETTE if colour not in _KINDS.values()]
    looks = {kind: _KINDS.get(kind) or spare[i % len(spare)] for i, kind in enumerate(kinds)}
    ax = axes(ax, COLUMN, dots_height(effects["site"].nunique(), len(kinds)))
    dots(ax, effects, "site", "kind", "value", looks)
    ax.axvline(0, color=INK, linewidth=0.6, zorder=1)
    ax.set_xlabel(label)
    legend_above(ax, most=4)
    return figure_of(ax)


def _outcome_colours(outcomes: Sequence[str]) -> dict[str, str]:
    """One colour for each family, lighter from member to member."""
    families: dict[str, list[str]] = {}
    for outcome in outcomes:
        families.setdefault(str(outcome).partition(",")[0].strip(), []).append(outcome)
    spare = iter(_SPARE_OUTCOMES * len(families))
    found = {}
    for family, members in families.items():
        colour = _OUTCOMES.get(family) or next(spare)
        for rank, member in enumerate(members):
            found[member] = lighter(colour, 0.55 * rank / max(len(members) - 1, 1))
    return {outcome: found[outcome] for outcome in outcomes}


def _write_shares(ax: Axes, shares: np.ndarray, ends: np.ndarray, colour: str) -> None:
    look: dict[str, Any] = {"fontsize": TINY, "color": readable(colour), "ha": "center", "va": "center"}
    for place, (share, end) in enumerate(zip(shares, ends, strict=True)):
        if share >= _LEGIBLE:
            ax.text(end + share / 2, place, f"{100 * share:.0f}", **look)
