"""Do two judges say the same?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ._style import COLUMN, INK, SMALL, as_percent, axes, figure_of, house_style, readable

if TYPE_CHECKING:
    from mechmisalign.judging.kappa import Agreement


@house_style
def agreement(result: Agreement, *, ax: Axes | None = None) -> Figure:
    """How often two judges put an answer into the same class: counts, shaded by the share of the first judge's row.

    Args:
        result: What :func:`mechmisalign.agreement` returns.
        ax: Axes to draw on; a new figure without.

    Raises:
        ValueError: If there is no answer in it.
    """
    table = result.confusion
    counts = table.to_numpy(float)
    if not counts.sum():
        raise ValueError("agreement got a table without answers; check the filter before this call")
    rows, columns = counts.shape
    ax = axes(ax, max(COLUMN, 1.3 + 0.55 * columns), 1.4 + 0.33 * rows)
    ax.grid(False)
    whole = counts.sum(1, keepdims=True)
    shares = np.divide(counts, whole, out=np.zeros_like(counts), where=whole > 0)
    image = ax.imshow(shares, "Blues", vmin=0, vmax=1, aspect="auto")
    for row, column in np.ndindex(rows, columns):
        colour = readable(image.to_rgba(shares[row, column])[:3]) if counts[row, column] else "#B0B0B0"
        look: dict[str, Any] = {"fontsize": SMALL, "color": colour, "ha": "center", "va": "center"}
        ax.text(column, row, f"{counts[row, column]:.0f}", **look)
    ax.set_xticks(range(columns), [str(name) for name in table.columns])
    ax.set_yticks(range(rows), [str(name) for name in table.index])
    if columns > 4:
        ax.tick_params(axis="x", rotation=35)
        for text in ax.get_xticklabels():
            text.set(ha="right", rotation_mode="anchor")
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    ax.set_ylabel(str(table.index.name or "first judge"))
    ax.set_xlabel(str(table.columns.name or "second judge"))
    ax.set_title(_told(result), fontsize=SMALL, color=INK, loc="left")
    return figure_of(ax)


def _told(result: Agreement) -> str:
    kappa = f"weighted κ {result.kappa:.2f} [{result.low:.2f}, {result.high:.2f}]"
    lost = f", {as_percent(result.unscored)} unscored" if result.unscored else ""
    return f"{kappa}\nSpearman {result.spearman:.2f}, n = {result.n}{lost}"
