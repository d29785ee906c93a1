"""Layer by strength: where steering works, and where it only breaks the answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator, PercentFormatter

from ._frames import check, check_unique, is_control
from ._modules import width
from ._style import INK, SMALL, TINY, NotebookFigure, axes, figure_of, house_style, legend_above, readable

_ROW = 0.21
"""Height of a row, inches."""
_WRITTEN = 16
"""Up to so many layers have their rate written in each cell."""
_BROKEN: dict[str, Any] = {"facecolor": "#EDEDED", "edgecolor": "#A8A8A8", "hatch": "/////", "linewidth": 0}
_BEST: dict[str, Any] = {"facecolor": "none", "edgecolor": INK, "linewidth": 1.3}


@house_style
def layer_strength_heatmap(rates: pd.DataFrame, *, min_coherent: float = 0.8) -> Figure:
    """EM rate by layer and strength, one map for each series; cells whose answers are broken are hatched.

    The best cell is the one with the highest rate among those that stay coherent: a rate that is bought with word
    salad is no result. Of several such, it is the most coherent, then the one of the lowest strength and layer. Cells
    that were not measured stay white.

    Args:
        rates: Columns ``layer, strength, rate, coherent``, one row per cell; optional ``series`` (those that say
            "random" are controls, and have no best cell).
        min_coherent: A cell with a smaller share of coherent answers is broken.

    Raises:
        ValueError: On missing columns, no rows, shares outside 0 to 1, or several rows for one cell.
    """
    check(rates, "layer_strength_heatmap", ["layer", "strength", "rate", "coherent"], ["rate", "coherent"])
    frame = rates if "series" in rates.columns else rates.assign(series="")
    check_unique(frame, "layer_strength_heatmap", ["series", "layer", "strength"])
    names = list(dict.fromkeys(frame["series"]))
    layers = range(int(frame["layer"].min()), int(frame["layer"].max()) + 1)
    strengths = sorted(frame["strength"].unique())
    strip, panels = _panels(len(names), len(layers), len(strengths))
    image = ScalarMappable(cmap="Oranges")
    image.set_clim(0, max(0.05, float(np.nanmax(frame["rate"]))))
    for name, ax in zip(names, panels, strict=True):
        rows = frame[frame["series"] == name]
        table = rows.pivot(index="strength", columns="layer").reindex(index=strengths)
        cells = [table[value].reindex(columns=list(layers)).to_numpy(float) for value in ("rate", "coherent")]
        broken = cells[1] < min_coherent
        _draw_cells(ax, image, cells[0], broken)
        sound = np.where(broken, np.nan, cells[0])
        if not is_control(pd.Series([name])).item() and np.nanmax(np.nan_to_num(sound)) > 0:
            ranks = np.lexsort((-np.nan_to_num(cells[1]).ravel(), -np.nan_to_num(sound, nan=-1.0).ravel()))
            row, column = np.unravel_index(ranks[0], sound.shape)
            ax.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, zorder=3, **_BEST))
        ax.set_title(str(name), fontsize=SMALL, loc="left", pad=3, color=INK)
        _cell_axes(ax, layers, strengths)
    for ax in panels[:-1]:
        ax.tick_params(labelbottom=False)
        ax.set_xlabel("")
    _colour_strip(strip, image)
    keys = [Patch(label=f"fewer than {100 * min_coherent:.0f} % coherent", **_BROKEN)]
    legend_above(panels[0], [*keys, Patch(label="best coherent cell", **_BEST)])
    return figure_of(strip)


def _panels(count: int, layers: int, strengths: int) -> tuple[Axes, list[Axes]]:
    """A strip for the colours, and under it one map for each series."""
    wide = width(layers) if layers > 4 else 1.9 + 0.4 * layers
    high = _ROW * strengths
    figure = NotebookFigure(figsize=(wide, 1.15 + count * (high + 0.22)), layout="constrained")
    grid = figure.add_gridspec(1 + count, 1, height_ratios=[0.07, *[high] * count])
    strip = figure.add_subplot(grid[0])
    return strip, [axes(figure.add_subplot(grid[1 + i]), wide, high) for i in range(count)]


def _draw_cells(ax: Axes, image: ScalarMappable, rates: np.ndarray, broken: np.ndarray) -> None:
    ax.grid(False)
    low, high = image.get_clim()
    ax.imshow(np.ma.masked_invalid(rates), image.cmap, vmin=low, vmax=high, aspect="auto", origin="lower", zorder=1)
    for row, column in np.argwhere(broken):
        ax.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, zorder=1.5, **_BROKEN))
    if rates.shape[1] > _WRITTEN:
        return
    for row, column in np.argwhere(np.isfinite(rates)):
        ground = _BROKEN["facecolor"] if broken[row, column] else image.to_rgba(rates[row, column])[:3]
        look: dict[str, Any] = {"fontsize": TINY, "color": readable(ground), "ha": "center", "va": "center"}
        if broken[row, column]:
            look |= {"color": "#555555", "bbox": {"facecolor": ground, "linewidth": 0, "pad": 0.6}}
        ax.text(column, row, f"{100 * rates[row, column]:.0f}", zorder=2, **look)


def _cell_axes(ax: Axes, layers: range, strengths: Sequence[float]) -> None:
    step = next(step for step in (1, 2, 4, 5, 10, 20, 50) if len(layers) / step <= 16)
    shown = [layer for layer in layers if layer % step == 0]
    ax.set_xticks([layer - layers[0] for layer in shown], [str(layer) for layer in shown])
    ax.set_yticks(range(len(strengths)), [f"{strength:g}" for strength in strengths])
    ax.hlines(np.arange(1, len(strengths)) - 0.5, -0.5, len(layers) - 0.5, color="white", linewidth=0.6, zorder=1.8)
    ax.vlines(np.arange(1, len(layers)) - 0.5, -0.5, len(strengths) - 0.5, color="white", linewidth=0.6, zorder=1.8)
    ax.set_xlim(-0.5, len(layers) - 0.5)
    ax.set_ylim(-0.5, len(strengths) - 0.5)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    ax.set(xlabel="layer", ylabel="strength")


def _colour_strip(strip: Axes, image: ScalarMappable) -> None:
    bar = strip.figure.colorbar(image, cax=strip, orientation="horizontal", ticklocation="top")
    bar.set_label("EM rate", fontsize=8, color=INK)
    bar.ax.tick_params(labelsize=SMALL, width=0.6, length=2)
    bar.locator = MaxNLocator(4, steps=[1, 2, 5, 10])
    bar.formatter = PercentFormatter(1.0, decimals=0, symbol=" %")
    bar.outline.set_visible(False)
