"""How fine-tunes lie to each other: matrices, principal angles and overlaps against chance."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from ._frames import check, check_unique
from ._style import (
    BLUE,
    COLUMN,
    CONTROL,
    PAGE,
    PALETTE,
    SMALL,
    TINY,
    VERMILION,
    NotebookFigure,
    axes,
    figure_of,
    house_style,
    legend_above,
    readable,
    short_names,
)

_CHANCE = "95 % of random ones"
_SPACES = {"write": "what is written", "read": "what is read"}
_NULL = "#D5D5D5"


@house_style
def pair_matrix(
    pairs: pd.DataFrame, value: str = "cosine", *, label: str | None = None, ax: Axes | None = None
) -> Figure:
    """All pairs as a map with numbers, clustered so that likes stand together; what chance gives is left white.

    Args:
        pairs: Columns ``first, second`` and the value, each pair once (select one layer, site or space); optional
            ``random_low, random_high`` (or ``<value>_low, <value>_high``): a value between is written in grey on white.
        value: A cosine, or a share from 0 to 1 such as an overlap.
        label: What the value is called; its column's name without.
        ax: Axes to draw on; a new figure without.

    Raises:
        ValueError: On missing columns, no rows, or several rows for one pair.
    """
    check(pairs, "pair_matrix", ["first", "second", value])
    square, chance = _clustered(pairs, value)
    side = min(max(COLUMN, 0.4 * len(square) + 1.4), PAGE)
    ax = axes(ax, side, side * 0.8)
    ax.grid(False)
    signed = bool((square < 0).any(axis=None)) or value == "cosine"
    norm = Normalize(-1 if signed else 0, 1)
    image = ax.imshow(square.mask(chance).to_numpy(float), cmap="RdBu_r" if signed else "Blues", norm=norm)
    for (i, j), found in np.ndenumerate(square.to_numpy(float)):
        ground = "white" if chance.iat[i, j] or np.isnan(found) else image.cmap(norm(found))
        colour = CONTROL if chance.iat[i, j] else readable(ground)
        ax.text(j, i, _written(found), ha="center", va="center", fontsize=SMALL, color=colour)
    names = list(short_names(map(str, square.index)).values())
    ax.set_xticks(range(len(names)), names, rotation=35, ha="right", rotation_mode="anchor")
    ax.set_yticks(range(len(names)), names)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    if chance.any(axis=None):
        ax.set_title(f"white: within {_CHANCE}", fontsize=TINY, loc="left", color="#555555", pad=3)
    ticks = [-1, -0.5, 0, 0.5, 1] if signed else [0, 0.5, 1]
    bar = figure_of(ax).colorbar(image, ax=ax, fraction=0.045, pad=0.02, ticks=ticks, label=label or value)
    bar.ax.tick_params(labelsize=SMALL, width=0.6, length=2)
    bar.outline.set_visible(False)
    return figure_of(ax)


@house_style
def principal_angles(overlaps: pd.DataFrame) -> Figure:
    """Principal angles of each pair, smallest first, a panel for each space; random subspaces in grey.

    Args:
        overlaps: Rows of one site or layer: ``first, second, angles, angles_low, angles_high``, optional ``space``, as
            :func:`mechmisalign.geometry.update_overlaps` gives them.

    Raises:
        ValueError: On missing columns, no rows, or several rows for one pair and space.
    """
    check(overlaps, "principal_angles", ["first", "second", "angles", "angles_low", "angles_high"])
    by = ["space"] if "space" in overlaps else []
    check_unique(overlaps, "principal_angles", [*by, "first", "second"])
    panels = list(overlaps.groupby("space", sort=False, observed=True)) if by else [(None, overlaps)]
    figure = NotebookFigure(figsize=(COLUMN * (1.0 if len(panels) == 1 else 1.7), 2.6), layout="constrained")
    names = short_names([*overlaps["first"].astype(str), *overlaps["second"].astype(str)])
    colours = {pair: i for i, pair in enumerate(dict.fromkeys(zip(overlaps["first"], overlaps["second"], strict=True)))}
    grid = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    handles: dict[str, Line2D] = {}
    for ax, (space, rows) in zip(grid, panels, strict=True):
        axes(ax, COLUMN, 2.6)
        most = max(len(angles) for angles in rows["angles"])
        for row in rows.to_dict("records"):
            place = colours[row["first"], row["second"]]
            shift = (place - (len(colours) - 1) / 2) * 0.7 / len(colours)
            x = np.arange(1, len(row["angles"]) + 1) + shift
            dot = "osD"[place // len(PALETTE) % 3]
            ax.vlines(x, row["angles_low"], row["angles_high"], color=_NULL, linewidth=2.2, zorder=1)
            look = {"color": PALETTE[place % len(PALETTE)], "marker": dot, "linewidth": 0.7, "markersize": 3.4}
            told = f"{names[str(row['first'])]} · {names[str(row['second'])]}"
            (handles[told],) = ax.plot(x, row["angles"], label=told, **look)
        ax.set(xlabel="principal angle, smallest first", ylim=(-3, 93), yticks=[0, 30, 60, 90])
        ax.set_xlim(0.4, most + 0.6)
        ax.set_xticks(range(1, most + 1))
        if space is not None:
            ax.set_title(_SPACES.get(str(space), str(space)), fontsize=SMALL, loc="left")
    grid[0].set_ylabel("degrees")
    null = Line2D([], [], color=_NULL, linewidth=2.2, label=_CHANCE)
    legend_above(grid[0], [*handles.values(), null], most=4)
    return figure


@house_style
def overlap_against_null(overlaps: pd.DataFrame, value: str = "overlap", *, ax: Axes | None = None) -> Figure:
    """Overlap of each pair as a dot, with the band of random subspaces behind it; a colour for each space.

    Args:
        overlaps: ``first, second``, the value and its band, optional ``space``, and ``layer`` or ``module`` (named
            where there are several), as :func:`mechmisalign.geometry.update_overlaps` gives them.
        value: ``"overlap"``, ``"weighted"``, or ``"cosine"`` for a frame of cosines with their band.
        ax: Axes to draw on; a new figure without.

    Raises:
        ValueError: On missing columns, no rows, or several rows for one pair, site and space.
    """
    ends = _ends(overlaps, value)
    check(overlaps, "overlap_against_null", ["first", "second", value, *ends])
    names = short_names([*overlaps["first"].astype(str), *overlaps["second"].astype(str)])
    told = overlaps["first"].astype(str).map(names) + " · " + overlaps["second"].astype(str).map(names)
    for column in ("layer", "module"):
        if column in overlaps and overlaps[column].nunique() > 1:
            told = told + ", " + overlaps[column].astype(str)
    frame = overlaps.assign(row=told, space=overlaps.get("space", pd.Series("", index=overlaps.index)))
    check_unique(frame, "overlap_against_null", ["row", "space"])
    rows, spaces = list(dict.fromkeys(frame["row"])), list(dict.fromkeys(frame["space"]))
    ax = axes(ax, COLUMN, 0.85 + len(rows) * (0.09 + 0.1 * len(spaces)))
    apart = 0.7 / len(spaces)
    for rank, space in enumerate(spaces):
        part, colour = frame[frame["space"] == space], (VERMILION, BLUE)[rank % 2]
        places = np.array([rows.index(row) for row in part["row"]]) + (rank - (len(spaces) - 1) / 2) * apart
        ax.hlines(places, part[ends[0]], part[ends[1]], color=_NULL, linewidth=3.2, zorder=1)
        label = _SPACES.get(str(space), str(space)) or value
        ax.plot(part[value], places, "oD"[rank % 2], color=colour, markersize=3.6, label=label, zorder=3)
    ax.set_yticks(range(len(rows)), rows, fontsize=SMALL)
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.grid(False, axis="y")
    ax.set_xlabel("weighted overlap" if value == "weighted" else value)
    ax.set_xlim(min(-0.02, 1.1 * float(frame[[value, ends[0]]].min(axis=None))), 1.03)
    handles = [*ax.get_legend_handles_labels()[0], Patch(color=_NULL, label=_CHANCE)]
    legend_above(ax, handles)
    return figure_of(ax)


def _clustered(pairs: pd.DataFrame, value: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The square of values in cluster order, and which of them chance gives as well."""
    from mechmisalign.geometry import as_matrix, cluster_order

    low, high = _ends(pairs, value)

    square = as_matrix(pairs, value)
    order = cluster_order(square)
    chance = pd.DataFrame(False, index=order, columns=order)
    for row in pairs.to_dict("records"):
        inside = row.get(low, np.inf) <= row[value] <= row.get(high, -np.inf)
        chance.loc[row["first"], row["second"]] = chance.loc[row["second"], row["first"]] = inside
    return square.loc[order, order], chance


def _ends(frame: pd.DataFrame, value: str) -> list[str]:
    """The columns of the band that belongs to a value."""
    own = [f"{value}_low", f"{value}_high"]
    return own if set(own) <= set(frame.columns) else ["random_low", "random_high"]


def _written(value: float) -> str:
    return "–" if np.isnan(value) else f"{round(value, 2) + 0.0:.2f}"  # never -0.00
