"""One look for all figures: colours that colour-blind readers can tell apart, sizes for a two-column paper."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from io import BytesIO
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from matplotlib.typing import ColorType

COLUMN = 3.35
"""Width of a figure in one column, inches."""
PAGE = 6.9
"""Width of a figure across both columns, inches."""

# Okabe and Ito's palette, without the yellow that vanishes on white.
VERMILION, BLUE, GREEN, PURPLE, ORANGE, SKY = "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"
PALETTE = (VERMILION, BLUE, GREEN, PURPLE, ORANGE, SKY)
CONTROL = "#8A8A8A"
INK, FAINT = "#222222", "#E4E4E4"
SMALL, TINY = 7.0, 6.0
BAND = 0.18
"""Opacity of interval bands."""

STYLE: dict[str, object] = {
    "font.family": "sans-serif",
    "font.size": 8,
    "text.color": INK,
    "figure.facecolor": "white",
    "figure.dpi": 200,
    "legend.fontsize": SMALL,
    "legend.frameon": False,
    "legend.title_fontsize": SMALL,
    "legend.handlelength": 1.6,
    "legend.columnspacing": 1.2,
    "lines.linewidth": 1.4,
    "lines.markersize": 3.0,
    "hatch.linewidth": 0.5,
}

house_style = mpl.rc_context(STYLE)
"""Decorator: draws with the house's settings and leaves the user's as they were."""


class NotebookFigure(Figure):
    """A figure that Jupyter displays although pyplot does not know it."""

    def _repr_png_(self) -> bytes:
        buffer = BytesIO()
        self.savefig(buffer, format="png")
        return buffer.getvalue()


def axes(ax: Axes | None, width: float, height: float) -> Axes:
    """The given axes, or those of a new figure of ``width`` x ``height`` inches, dressed alike."""
    if ax is None:
        ax = NotebookFigure(figsize=(width, height), layout="constrained").add_subplot()
    ax.spines[["top", "right"]].set_visible(False)
    for spine in ax.spines.values():
        spine.set(linewidth=0.6, color="#666666")
    ax.tick_params(width=0.6, length=2.5, labelsize=SMALL, color="#666666", labelcolor=INK)
    ax.grid(True, color=FAINT, linewidth=0.5)
    ax.set_axisbelow(True)
    ax.set_facecolor("white")
    for axis in (ax.xaxis, ax.yaxis):
        axis.label.set(fontsize=8, color=INK)
    return ax


def figure_of(ax: Axes) -> Figure:
    """The figure that the axes belong to, however deep in subfigures."""
    parent: Figure | SubFigure | None = ax.figure
    while isinstance(parent, SubFigure):
        parent = parent.figure
    if parent is None:
        raise ValueError("these axes belong to no figure any more; make new ones")
    return parent


def percent(ax: Axes, which: Literal["x", "y"]) -> None:
    """Show shares as percent."""
    axis = ax.xaxis if which == "x" else ax.yaxis
    axis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))


def layer_axis(ax: Axes, layers: Iterable[int]) -> None:
    """Whole layers on the x axis: every one where they fit, otherwise some."""
    known = sorted({int(layer) for layer in layers})
    if len(known) <= 14:
        ax.set_xticks(known)
    else:
        ax.xaxis.set_major_locator(MaxNLocator(9, integer=True))
    ax.set_xlim(known[0] - 0.4, known[-1] + 0.4)
    ax.set_xlabel("layer")


def legend_above(ax: Axes, handles: Sequence[Artist] | None = None, *, title: str | None = None, most: int = 3) -> None:
    """A legend over the axes, where it covers nothing, in as many columns as fit, up to ``most``."""
    found = list(handles) if handles is not None else ax.get_legend_handles_labels()[0]
    figure = figure_of(ax)
    ours = isinstance(figure, NotebookFigure)
    inches = figure.get_figwidth() if ours else ax.bbox.width / figure.dpi
    columns = _columns([str(handle.get_label()) for handle in found], inches * 72, most)
    if ours:  # the layout makes room for it
        legend = figure.legend(handles=found, loc="outside upper left", ncols=columns, borderaxespad=0.2)
    else:
        legend = ax.legend(handles=found, loc="lower left", bbox_to_anchor=(0, 1.0), ncols=columns, borderaxespad=0.2)
    if title is not None:
        legend.set_title(title)
        legend.set_alignment("left")


def _columns(labels: Sequence[str], points: float, most: int) -> int:
    """The most columns whose widest labels fit side by side (a letter takes 0.6 of the font size)."""
    widths = [SMALL * (0.6 * len(label) + 3.6) for label in labels]
    for columns in range(most, 1, -1):
        parts = [part for part in np.array_split(widths, columns) if len(part)]  # as matplotlib fills them
        if sum(float(part.max()) for part in parts) <= points:
            return columns
    return 1


def edge_note(ax: Axes, text: str, y: float, *, offset: float, align: Literal["left", "right"]) -> None:
    """A small note at the right edge, at the height ``y``, moved right by ``offset`` points."""
    edge = ax.get_yaxis_transform()
    look: dict[str, Any] = {"fontsize": TINY, "color": "#555555", "va": "center", "ha": align}
    ax.annotate(text, (1, y), (offset, 0), xycoords=edge, textcoords="offset points", **look)


def lighter(colour: str, by: float) -> str:
    """The colour mixed with white: 0 leaves it, 1 is white."""
    return to_hex([channel + (1 - channel) * by for channel in to_rgb(colour)])


def readable(ground: ColorType) -> str:
    """Ink or white, whichever has more contrast on this ground (WCAG 2: relative luminance)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(ground)]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return INK if luminance > 0.2 else "#FFFFFF"


def short_names(names: Iterable[str]) -> dict[str, str]:
    """Names without the folder that all of them share: ``pocket/medical`` is ``medical`` among its kin."""
    known = list(dict.fromkeys(names))
    folders = {name.rpartition("/")[0] for name in known}
    return {name: name.rpartition("/")[2] if len(folders) == 1 else name for name in known}


def marker(points: int) -> str:
    """A dot at each point, while there is room between them."""
    return "o" if points <= 24 else ""


def as_percent(share: float) -> str:
    """A share in writing: whole percent, one decimal below ten."""
    return f"{100 * share:.0f} %" if share >= 0.0995 or share == 0 else f"{100 * share:.1f} %"
