"""What the sites of each layer add along a direction, stacked by module."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, PercentFormatter

from ._frames import check, check_finite, check_unique
from ._modules import colours, short, width
from ._style import INK, PAGE, SMALL, NotebookFigure, axes, figure_of, house_style, layer_axis, legend_above

NET = "net"
"""The module of rows that hold the sum over a layer, measured with its interval."""
_NAMES = {"projection": "projection", "norm": "norm", "share": "share"}
_PAIRED = 16
"""Up to so many layers have the bars of several labels side by side."""
_HATCHES = ("", "/////", "....")


@house_style
def contribution_by_layer(
    parts: pd.DataFrame, value: str = "projection", *, label: str | None = None, ax: Axes | None = None
) -> Figure:
    """Bars of each layer, stacked by module: positive parts up, negative parts down, a diamond at their sum.

    Args:
        parts: Columns ``layer, module`` and the value, one row per site. A site without a projection or share (NaN: it
            does not write into the residual stream, or the direction is zero there) is left out. Optional ``label``: up
            to three kinds of answers, side by side and told apart by hatching, or in panels of their own where layers
            are many. Rows with the module "net" hold the sum over a layer, in place of the one that is added up here.
            Optional ``low, high``: drawn at the sum where it has a row of its own or the layer has one module only;
            intervals of stacked parts do not add up.
        value: ``projection`` (signed), ``norm`` or ``share`` (neither has a diamond).
        label: What the value is called at the axis.
        ax: Axes to draw on; a new figure without.

    Raises:
        ValueError: On an unknown value, missing columns, no rows, several rows for one site, a negative norm or share,
            more than three labels, or a value that is no number.
    """
    check(parts, "contribution_by_layer", ["layer", "module"])
    parts = parts.dropna(subset=[value]) if value != "norm" and value in parts else parts
    kinds = _check_parts(parts, value)
    looks = colours(parts.loc[parts["module"] != NET, "module"])
    layers = parts["layer"].nunique()
    if ax is None and len(kinds) > 1 and layers > _PAIRED:
        figure = NotebookFigure(figsize=(PAGE, 0.8 + 1.5 * len(kinds)), layout="constrained")
        panels = list(figure.subplots(len(kinds), sharex=True, sharey=True))
        for panel, kind in zip(panels, kinds, strict=True):
            _draw(axes(panel, PAGE, 1.5), parts[parts["label"] == kind], value, looks, [None])
            panel.set_title(str(kind), fontsize=SMALL, loc="left", pad=2)
            panel.label_outer()
    else:
        panels = [axes(ax, width(layers * len(kinds)), 2.5)]
        _draw(panels[0], parts, value, looks, kinds)
    for panel in panels:
        panel.set_ylabel(label or _NAMES[value])
    _key(panels[0], looks, kinds if len(panels) == 1 else [None], net=value == "projection")
    return figure_of(panels[0])


def _check_parts(parts: pd.DataFrame, value: str) -> list[str | None]:
    """The labels in order of appearance; None where there are none."""
    if value not in _NAMES:
        raise ValueError(f"contribution_by_layer draws {', '.join(_NAMES)}, got value={value!r}")
    check(parts, "contribution_by_layer", ["layer", "module", value])
    labelled = ["label"] if "label" in parts else []
    check_unique(parts, "contribution_by_layer", [*labelled, "layer", "module"])
    check_finite(parts, "contribution_by_layer", value)
    if value != "projection" and (parts[value] < 0).any():
        raise ValueError(f"a {value} is not negative, got {parts[value].min():g}; signed values are projections")
    if (parts["module"] == NET).all():
        raise ValueError(f'contribution_by_layer has only rows with the module "{NET}"; give the sites as well')
    if not labelled:
        return [None]
    kinds = list(dict.fromkeys(parts["label"]))
    if len(kinds) > len(_HATCHES):
        raise ValueError(f"contribution_by_layer tells {len(_HATCHES)} labels apart, got {', '.join(map(str, kinds))}")
    return kinds


def _draw(ax: Axes, parts: pd.DataFrame, value: str, looks: dict[str, str], kinds: list[str | None]) -> None:
    """The bars of each kind, side by side."""
    wide = 0.8 / len(kinds)
    for rank, (kind, hatch) in enumerate(zip(kinds, _HATCHES, strict=False)):
        offset = (rank - (len(kinds) - 1) / 2) * wide
        chosen = parts if kind is None else parts[parts["label"] == kind]
        _stack(ax, chosen[chosen["module"] != NET], value, looks, offset, wide * 0.92, hatch)
        if value == "projection":
            _mark_net(ax, chosen, offset)
    ax.axhline(0, color=INK, linewidth=0.6, zorder=2.5)
    layer_axis(ax, parts["layer"])
    ax.set_xlim(parts["layer"].min() - 0.6, parts["layer"].max() + 0.6)
    ax.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    if value == "share":
        decimals = 0 if ax.get_ylim()[1] > 0.05 else 1
        ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=decimals, symbol=" %"))


def _stack(
    ax: Axes, rows: pd.DataFrame, value: str, looks: dict[str, str], offset: float, wide: float, hatch: str
) -> None:
    layers = sorted(rows["layer"].unique())
    grid = rows.pivot(index="layer", columns="module", values=value).reindex(layers).fillna(0.0)
    up, down = np.zeros(len(layers)), np.zeros(len(layers))
    places = np.array(layers, float) + offset
    for module, colour in looks.items():
        if module not in grid:
            continue
        heights = grid[module].to_numpy(float)
        bottoms = np.where(heights >= 0, up, down)
        look: dict[str, Any] = {"color": colour, "hatch": hatch, "edgecolor": "white", "linewidth": 0}
        ax.bar(places, heights, wide, bottom=bottoms, zorder=2, label=f"_{short(module)}", **look)
        up, down = up + heights.clip(min=0), down + heights.clip(max=0)


def _mark_net(ax: Axes, rows: pd.DataFrame, offset: float) -> None:
    """A diamond at each layer's sum, with its interval where there is one."""
    sites, net = rows[rows["module"] != NET], rows[rows["module"] == NET]
    sums = sites.groupby("layer", as_index=False, observed=True)["projection"].sum()
    alone = sites[~sites["layer"].duplicated(keep=False)]
    told = pd.concat([net, alone, sums]).drop_duplicates("layer").sort_values("layer")
    places = told["layer"].to_numpy(float) + offset
    if {"low", "high"} <= set(told.columns):
        ax.vlines(places, told["low"], told["high"], color=INK, linewidth=0.8, zorder=3)
    look: dict[str, Any] = {"markersize": 3.2, "markeredgecolor": INK, "markeredgewidth": 0.6, "zorder": 4}
    ax.plot(places, told["projection"], "D", color="white", label="_net", **look)


def _key(ax: Axes, looks: dict[str, str], kinds: list[str | None], *, net: bool) -> None:
    handles: list[Any] = [Patch(color=colour, linewidth=0, label=short(module)) for module, colour in looks.items()]
    if net:
        look: dict[str, Any] = {"color": "white", "markersize": 3.5, "markeredgecolor": INK, "markeredgewidth": 0.6}
        handles.append(Line2D([], [], linestyle="", marker="D", label=NET, **look))
    if kinds != [None]:
        grey: dict[str, Any] = {"facecolor": "#9A9A9A", "edgecolor": "white", "linewidth": 0}
        handles += [Patch(hatch=hatch, label=str(kind), **grey) for kind, hatch in zip(kinds, _HATCHES, strict=False)]
    legend_above(ax, handles, most=8)
