"""The sites of an adapter, layer by module."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator

from ._frames import check, check_finite, check_unique
from ._modules import colours, in_order, short, width
from ._style import (
    COLUMN,
    INK,
    SMALL,
    TINY,
    NotebookFigure,
    axes,
    figure_of,
    house_style,
    layer_axis,
    legend_above,
    readable,
)

_NAMES = {"norm_delta": "norm of ΔW", "norm": "norm", "stable_rank": "stable rank"}
_WRITTEN = 60
"""Up to so many sites have their number written in their cell."""
_ROW = 0.2
"""Height of a row of the map, inches."""
_BAND_COLOUR = "#DADADA"


@house_style
def site_heatmap(
    anatomy: pd.DataFrame,
    value: str = "norm_delta",
    *,
    label: str | None = None,
    limits: tuple[float, float] | None = None,
    ax: Axes | None = None,
) -> Figure:
    """A value of each site as a map, layers by modules; places without a site are hatched.

    Args:
        anatomy: Columns ``layer, module`` and the value, one row per site; NaN where the value is not defined.
        value: The column to draw.
        label: What the value is called at the colour bar; the column's name without.
        limits: Ends of the colours. Without them, from zero to the largest value; around zero where signs differ.
        ax: Axes to draw on; a new figure without.

    Raises:
        ValueError: On missing columns, no rows, several rows for one site, or no value at all.
    """
    check(anatomy, "site_heatmap", ["layer", "module", value])
    check_unique(anatomy, "site_heatmap", ["layer", "module"])
    if not np.isfinite(anatomy[value].astype(float)).any():
        raise ValueError(f"site_heatmap found no number in {value!r}; name a column that has some")
    modules = in_order(anatomy["module"])
    layers = range(int(anatomy["layer"].min()), int(anatomy["layer"].max()) + 1)
    grid = anatomy.pivot(index="module", columns="layer", values=value).reindex(index=modules, columns=layers)
    cells = grid.to_numpy(float)
    ax, strip = _map_and_strip(ax, cells.shape)
    ax.grid(False)
    _hatch(ax, cells.shape)
    low, high = limits or _limits(cells)
    colours_of = "RdBu_r" if low < 0 else "Blues"
    image = ax.imshow(np.ma.masked_invalid(cells), colours_of, aspect="auto", vmin=low, vmax=high, zorder=1)
    _write_cells(ax, image, cells)
    _map_axes(ax, layers, modules, holes=bool(np.isnan(cells).any()))
    _colour_bar(ax, strip, image, label or _NAMES.get(value, value.replace("_", " ")))
    return figure_of(ax)


@house_style
def b_cosine(cosines: pd.DataFrame, *, ax: Axes | None = None) -> Figure:
    """The cosine between what each site writes (its B) and a direction, with what random vectors would give.

    Args:
        cosines: Columns ``layer, module, cosine``, one row per site; optional ``random_low, random_high``: the band in
            which the cosine of a random vector lies.
        ax: Axes to draw on; a new figure without.

    Raises:
        ValueError: On missing columns, no rows, several rows for one site, or a cosine that is no number.
    """
    check(cosines, "b_cosine", ["layer", "module", "cosine"])
    check_unique(cosines, "b_cosine", ["layer", "module"])
    check_finite(cosines, "b_cosine", "cosine")
    ax = axes(ax, width(cosines["layer"].nunique()), 2.2)
    looks = colours(cosines["module"])
    wide = 0.84 / len(looks)
    banded = {"random_low", "random_high"} <= set(cosines.columns)
    for rank, (module, colour) in enumerate(looks.items()):
        rows = cosines[cosines["module"] == module]
        places = rows["layer"] + (rank - (len(looks) - 1) / 2) * wide
        if banded:
            reach = rows["random_high"] - rows["random_low"]
            ax.bar(places, reach, wide, bottom=rows["random_low"], color=_BAND_COLOUR, linewidth=0, zorder=1)
        ax.vlines(places, 0, rows["cosine"], color=colour, linewidth=1.0, zorder=2)
        ax.plot(places, rows["cosine"], "o", color=colour, markersize=2.6, label=short(module), zorder=3)
    ax.axhline(0, color=INK, linewidth=0.6, zorder=1.5)
    layer_axis(ax, cosines["layer"])
    ax.set_xlim(cosines["layer"].min() - 0.6, cosines["layer"].max() + 0.6)
    ax.set_ylabel("cosine of B\nwith the direction")
    handles: list[Any] = [line for line in ax.lines if isinstance(line, Line2D) and line.get_marker() == "o"]
    if banded:
        handles.append(Patch(color=_BAND_COLOUR, linewidth=0, label="random vectors"))
    legend_above(ax, handles, most=8)
    return figure_of(ax)


def _map_and_strip(ax: Axes | None, shape: tuple[int, ...]) -> tuple[Axes, Axes | None]:
    """Axes for the map, and in a new figure a strip over them for the colour bar, equally thin for every size."""
    rows, columns = shape
    if ax is not None:
        return axes(ax, COLUMN, 2.0), None
    wide = width(columns) if columns > 4 else 1.5 + 0.4 * columns
    figure = NotebookFigure(figsize=(wide, 0.93 + _ROW * rows), layout="constrained")
    grid = figure.add_gridspec(2, 1, height_ratios=(0.07, _ROW * rows), hspace=0)
    return axes(figure.add_subplot(grid[1]), wide, 2.0), figure.add_subplot(grid[0])


def _colour_bar(ax: Axes, strip: Axes | None, image: AxesImage, label: str) -> None:
    place: dict[str, Any] = {"ax": ax, "location": "top", "aspect": 40, "pad": 0.03}
    if strip is not None:
        place = {"cax": strip, "orientation": "horizontal", "ticklocation": "top"}
    bar = figure_of(ax).colorbar(image, **place)
    bar.set_label(label, fontsize=8, color=INK)
    bar.ax.tick_params(labelsize=SMALL, width=0.6, length=2)
    bar.locator = MaxNLocator(5 if bar.ax.bbox.width > 250 else 3, steps=[1, 2, 5, 10])
    bar.outline.set_visible(False)


def _limits(cells: np.ndarray) -> tuple[float, float]:
    top = float(np.nanmax(np.abs(cells))) or 1.0
    return (-top if np.nanmin(cells) < 0 else 0.0), top


def _hatch(ax: Axes, shape: tuple[int, ...]) -> None:
    """The ground: what no site covers."""
    rows, columns = shape
    look: dict[str, Any] = {"facecolor": "#F6F6F6", "edgecolor": "#C9C9C9", "hatch": "//////", "linewidth": 0}
    ax.add_patch(Rectangle((-0.5, -0.5), columns, rows, zorder=0, **look))


def _write_cells(ax: Axes, image: AxesImage, cells: np.ndarray) -> None:
    """The number in each cell, while all of them fit: two digits behind the point below 10, fewer where cells crowd."""
    top = float(np.nanmax(np.abs(cells)))
    digits = (2 if top < 10 else 1 if top < 100 else 0) - (cells.shape[1] > 10)
    if np.isfinite(cells).sum() > _WRITTEN or cells.shape[1] > 16 or not 0.1 <= top < 1000 or digits < 0:
        return
    for row, column in np.argwhere(np.isfinite(cells)):
        ground = image.to_rgba(cells[row, column])
        look: dict[str, Any] = {"fontsize": TINY, "color": readable(ground[:3]), "ha": "center", "va": "center"}
        ax.text(column, row, f"{cells[row, column]:.{digits}f}", **look)


def _map_axes(ax: Axes, layers: range, modules: list[str], *, holes: bool) -> None:
    step = next(step for step in (1, 2, 5, 10, 20, 50, 100) if len(layers) / step <= 16)
    shown = [layer for layer in layers if step == 1 or layer % step == 0]
    ax.set_xticks([layer - layers[0] for layer in shown], [str(layer) for layer in shown])
    ax.set_yticks(range(len(modules)), [short(module) for module in modules])
    for row in range(1, len(modules)):
        ax.axhline(row - 0.5, color="white", linewidth=0.6, zorder=1.2)
    for column in range(1, len(layers)):
        ax.axvline(column - 0.5, color="white", linewidth=0.6, zorder=1.2)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    ax.set_xlabel("layer (hatched: no value)" if holes else "layer")
