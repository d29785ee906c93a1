"""Prompt by prompt: most of the misalignment sits in some of the questions."""

from __future__ import annotations

from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ._dots import dots
from ._frames import INTERVAL, check, check_unique, condition_colours
from ._panels import stack_below
from ._style import COLUMN, PAGE, axes, figure_of, house_style, legend_above, percent

_NAMED = 30
"""Up to so many prompts have a row with their text; more are points along the axis."""
_TEXT = 42
"""Letters of a prompt that are shown."""
_PANEL = 0.75
"""Height of a condition's panel, inches."""


@house_style
def prompt_rates(
    per_prompt: pd.DataFrame, *, by: str = "condition", sort_by: str | None = None, ax: Axes | None = None
) -> Figure:
    """The rate at each prompt with its interval, by condition; prompts are sorted by the rate in one of them.

    Up to thirty prompts have a row each, with their text; more of them stand side by side without it, in one panel for
    each condition.

    Args:
        per_prompt: Columns ``prompt_id, rate, low, high`` and that of ``by``, as :func:`mechmisalign.per_prompt`
            returns (or ``question_id`` for ``prompt_id``); optional ``prompt``.
        by: The column that tells conditions apart, up to six of them beside random controls (grey).
        sort_by: The condition that gives the order; without it, the one with the highest mean rate.
        ax: Axes to draw on; a new figure without.

    Raises:
        ValueError: On missing columns, no rows, shares outside 0 to 1, several rows for one prompt and condition, more
            than six conditions, or an unknown one to sort by.
    """
    which = "question_id" if "question_id" in per_prompt and "prompt_id" not in per_prompt else "prompt_id"
    check(per_prompt, "prompt_rates", [by, which, *INTERVAL], INTERVAL)
    check_unique(per_prompt, "prompt_rates", [by, which])
    conditions = list(dict.fromkeys(per_prompt[by]))
    colours = condition_colours(conditions, "prompt_rates")
    means = per_prompt.groupby(by, sort=False, observed=True)["rate"].mean()
    leading = means.idxmax() if sort_by is None else sort_by
    if leading not in conditions:
        raise ValueError(f"sort_by={sort_by!r} is none of {', '.join(map(str, conditions))}")
    table = _sorted(per_prompt, by, which, leading)
    count = table["place"].nunique()
    if count <= _NAMED:
        high = 0.85 + count * max(0.06 * len(conditions) + 0.08, 0.16)
        ax = axes(ax, COLUMN if "prompt" not in table else 0.75 * PAGE, high)
        dots(ax, table, "text", by, "rate", colours, letters=2 * _TEXT, opacity=0.45)
        ax.set_xlabel("EM rate")
        ax.set_xlim(-0.02, 1.02)
        percent(ax, "x")
        legend_above(ax)
    else:
        ax = axes(ax, COLUMN if count <= 60 else PAGE, 0.75 + _PANEL)
        ax.set_xlabel(f"{count} prompts, sorted by their rate in {leading}")
        _side_by_side(ax, table, by, colours)
    return figure_of(ax)


def _sorted(per_prompt: pd.DataFrame, by: str, which: str, leading: object) -> pd.DataFrame:
    """The rows with the place of their prompt, and its name, from the highest rate downwards."""
    pivot = per_prompt.pivot(index=which, columns=by, values="rate")
    order = pivot.assign(mean=pivot.mean(axis=1)).sort_values([leading, "mean"], ascending=False, kind="stable").index
    places = pd.Series(range(len(order)), index=order)
    table = per_prompt.assign(place=per_prompt[which].map(places))
    names = table["prompt" if "prompt" in table.columns else which].astype(str)
    short = names.where(names.str.len() <= _TEXT, names.str.slice(0, _TEXT - 1).str.rstrip() + "…")
    table["text"] = short
    twice = table.groupby("text", observed=True)["place"].transform("nunique") > 1
    table.loc[twice, "text"] = short[twice] + " (" + table.loc[twice, which].astype(str) + ")"
    return table.sort_values("place", kind="stable")


def _side_by_side(ax: Axes, table: pd.DataFrame, by: str, colours: dict[object, str]) -> None:
    """Prompts as points along the x axis, each condition in a panel of its own (in one, where there is no room)."""
    panels = [ax, *stack_below(ax, [_PANEL] * (len(colours) - 1))]
    handles = []
    for i, (condition, colour) in enumerate(colours.items()):
        panel, rows = panels[i % len(panels)], table[table[by] == condition]
        panel.vlines(rows["place"], rows["low"], rows["high"], color=colour, linewidth=0.8, alpha=0.4)
        look: dict[str, Any] = {"markersize": 2.4, "markeredgewidth": 0, "label": str(condition)}
        handles += panel.plot(rows["place"], rows["rate"], "o", color=colour, **look)
        panel.set_ylim(-0.04, 1.04)
        panel.set_yticks([0, 0.5, 1])
        panel.set_ylabel("EM rate")
        percent(panel, "y")
    ax.set_xticks([])
    ax.set_xlim(-1, table["place"].max() + 1)
    legend_above(ax, handles)
