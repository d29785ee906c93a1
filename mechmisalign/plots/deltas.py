"""How much of a full fine-tune's weight difference is low-rank, by layer and module."""

from __future__ import annotations

import re

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from ._frames import check, check_unique
from ._modules import in_order, short
from ._style import (
    BLUE,
    COLUMN,
    CONTROL,
    GREEN,
    INK,
    ORANGE,
    PAGE,
    SMALL,
    VERMILION,
    NotebookFigure,
    axes,
    figure_of,
    house_style,
    layer_axis,
    legend_above,
    marker,
    percent,
)

_COLOURS = (VERMILION, BLUE, GREEN, ORANGE)
_SHARE = re.compile(r"share_(\d+)")
_ACROSS = 4


@house_style
def delta_shares(deltas: pd.DataFrame, *, ax: Axes | None = None) -> Figure:
    """Share of ``‖ΔW‖²`` in the largest singular values over layers, a panel for each module; dashed: a random matrix.

    Args:
        deltas: As :func:`mechmisalign.weight_deltas` gives them: ``layer, module, kind`` and, for up to four ranks,
            ``share_r, random_r``. Matrices of blocks are drawn, other rows left out. Optional ``near_rounding``: grey
            behind layers whose difference is partly rounding noise.
        ax: Axes to draw one module on; a new figure without.

    Raises:
        ValueError: On missing columns, no matrix that differs, no ranks or more than four, several rows for one place,
            or several modules for one pair of axes.
    """
    check(deltas, "delta_shares", ["layer", "module", "kind"])
    ranks = sorted(int(match[1]) for column in deltas.columns if (match := _SHARE.fullmatch(str(column))))
    if not 1 <= len(ranks) <= len(_COLOURS):
        raise ValueError(f"delta_shares draws one to {len(_COLOURS)} ranks (columns share_r), got {ranks}")
    shares = [f"share_{rank}" for rank in ranks]
    rows = deltas[deltas["kind"] == "matrix"].dropna(subset=shares)
    check(rows, "delta_shares", [*shares, *(f"random_{rank}" for rank in ranks)], shares)
    check_unique(rows, "delta_shares", ["layer", "module"])
    rows = rows.astype({"layer": int})
    modules = in_order(rows["module"])
    if ax is not None and len(modules) > 1:
        raise ValueError(f"one pair of axes has room for one module, got {modules}; select one of them")
    panels = _panels(len(modules)) if ax is None else [axes(ax, COLUMN, 2.0)]
    for panel, module in zip(panels, modules, strict=False):
        _draw(panel, rows[rows["module"] == module].sort_values("layer"), ranks, layers=rows["layer"].tolist())
        panel.set_title(short(module), fontsize=SMALL, loc="left", pad=2)
    _label(panels[: len(modules)])
    noisy = "near_rounding" in rows and bool(rows["near_rounding"].any())
    legend_above(panels[0], _handles(ranks, noisy=noisy), most=6)
    return figure_of(panels[0])


def _panels(count: int) -> list[Axes]:
    columns = min(count, _ACROSS)
    lines = -(-count // columns)
    wide = PAGE if columns > 2 else COLUMN
    figure = NotebookFigure(figsize=(wide, 0.75 + 1.15 * lines), layout="constrained")
    grid = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
    found = [axes(panel, wide / columns, 1.1) for panel in np.ravel(grid)]
    for spare in found[count:]:
        spare.set_visible(False)
    return found


def _draw(ax: Axes, rows: pd.DataFrame, ranks: list[int], *, layers: list[int]) -> None:
    if "near_rounding" in rows:
        for layer in rows.loc[rows["near_rounding"].astype(bool), "layer"]:
            ax.axvspan(float(layer) - 0.5, float(layer) + 0.5, color="#EFEFEF", linewidth=0, zorder=0)
    places = rows["layer"].to_numpy(float)
    for rank, colour in zip(ranks, _COLOURS, strict=False):
        ax.plot(places, rows[f"random_{rank}"].to_numpy(float), color=colour, linewidth=0.9, linestyle=(0, (3, 2)))
        ax.plot(places, rows[f"share_{rank}"].to_numpy(float), color=colour, marker=marker(len(rows)), zorder=3)
    layer_axis(ax, layers)
    ax.set_ylim(-0.03, 1.03)
    percent(ax, "y")


def _label(panels: list[Axes]) -> None:
    """Words at the left and at the lowest panel of each column."""
    columns = min(len(panels), _ACROSS)
    for place, panel in enumerate(panels):
        panel.set_ylabel("share of ‖ΔW‖²" if place % columns == 0 else "")
        lowest = place + columns >= len(panels)
        panel.set_xlabel("layer" if lowest else "")
        panel.tick_params(labelbottom=lowest, labelleft=place % columns == 0)


def _handles(ranks: list[int], *, noisy: bool) -> list[Line2D | Patch]:
    found: list[Line2D | Patch] = [
        Line2D([], [], color=colour, marker="o", label=f"rank {rank}")
        for rank, colour in zip(ranks, _COLOURS, strict=False)
    ]
    found.append(Line2D([], [], color=CONTROL, linewidth=0.9, linestyle=(0, (3, 2)), label="random matrix"))
    if noisy:
        found.append(Patch(facecolor="#EFEFEF", edgecolor=INK, linewidth=0.3, label="near rounding"))
    return found
