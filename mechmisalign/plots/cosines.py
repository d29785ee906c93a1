"""How directions lie to each other, and to themselves when estimated anew."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ._frames import check
from ._style import (
    BAND,
    BLUE,
    COLUMN,
    CONTROL,
    INK,
    PALETTE,
    SMALL,
    axes,
    edge_note,
    figure_of,
    house_style,
    layer_axis,
    legend_above,
    marker,
    short_names,
)

if TYPE_CHECKING:
    from mechmisalign.directions import Direction

CLOSE = 0.8
"""The cosine that directions of different organisms exceed in 2506.11618, section 3.5."""
_FEW = 6
"""Up to so many pairs are told apart by colour; of more, those of one organism."""


@house_style
def cosine_by_layer(
    directions: Mapping[str, Direction] | Sequence[Direction] | pd.DataFrame,
    *,
    focus: str | None = None,
    ax: Axes | None = None,
) -> Figure:
    """Cosines between directions over layers, with lines at 0 and at 0.8.

    Args:
        directions: Named directions, or a sequence of them (named by the adapter in their header), or the frame of
            :func:`mechmisalign.geometry.cosines`: columns ``first, second, layer, cosine``.
        focus: The pairs with this one are coloured and named, all others grey. Without it, up to six pairs are all
            coloured; of more, those with the first one.
        ax: Axes to draw on; a new figure without.

    Raises:
        ValueError: On missing columns, fewer than two directions, or a focus that is none of them.
    """
    frame = _pairs(directions)
    ax = axes(ax, COLUMN, 2.5)
    names = short_names([*frame["first"].astype(str), *frame["second"].astype(str)])
    pairs = {
        (str(a), str(b)): rows.sort_values("layer")
        for (a, b), rows in frame.groupby(["first", "second"], sort=False, observed=True)
    }
    focus = _focus(focus, names, len(pairs))
    chosen = [pair for pair in pairs if focus is None or focus in pair]
    others = [pair for pair in pairs if pair not in chosen]
    for i, pair in enumerate(others):
        told = f"{len(others)} other pairs" if i == 0 else None
        ax.plot(pairs[pair]["layer"], pairs[pair]["cosine"], color=CONTROL, linewidth=0.7, alpha=0.6, label=told)
    for i, pair in enumerate(chosen):
        partner = pair[0] if pair[1] == focus else pair[1]
        told = f"{names[pair[0]]} · {names[pair[1]]}" if focus is None else names[partner]
        dash = "-" if i < len(PALETTE) else (0, (4, 1.5))
        colour = PALETTE[i % len(PALETTE)]
        x, y = pairs[pair]["layer"], pairs[pair]["cosine"]
        ax.plot(x, y, color=colour, marker=marker(len(x)), linestyle=dash, label=told)
    _cosine_axis(ax, frame["layer"], float(frame["cosine"].min()))
    legend_above(ax, title=None if focus is None else f"{names[focus]} with")
    return figure_of(ax)


@house_style
def cosine_matrix(
    directions: Mapping[str, Direction] | Sequence[Direction] | pd.DataFrame,
    layer: int | None = None,
    *,
    ax: Axes | None = None,
) -> Figure:
    """Cosines between all directions at one layer, as a map with numbers.

    Args:
        directions: Named directions, or a sequence of them (named by the adapter in their header), or the square frame
            of :func:`mechmisalign.geometry.cosine_matrix`.
        layer: The layer; without it, the middle one of those where every direction is nonzero.
        ax: Axes to draw on; a new figure without.

    Raises:
        ValueError: If there is no direction, no common layer, or a frame that is not square.
    """
    matrix, layer = _matrix(directions, layer)
    names = list(short_names(map(str, matrix.index)).values())
    side = min(max(COLUMN, 0.38 * len(names) + 1.0), 6.9)
    ax = axes(ax, side, side * 0.84)
    ax.grid(False)
    image = ax.imshow(matrix.to_numpy(float), cmap="RdBu_r", vmin=-1, vmax=1)
    for row in range(len(names)):
        for column in range(len(names)):
            value = float(matrix.iat[row, column])
            colour = "white" if abs(value) > 0.65 else INK
            ax.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=SMALL, color=colour)
    ax.set_xticks(range(len(names)), names, rotation=35, ha="right", rotation_mode="anchor")
    ax.set_yticks(range(len(names)), names)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    told = "cosine" if layer is None else f"cosine at layer {layer}"
    bar = figure_of(ax).colorbar(image, ax=ax, fraction=0.045, pad=0.02, ticks=[-1, -0.5, 0, 0.5, 1], label=told)
    bar.ax.tick_params(labelsize=SMALL, width=0.6, length=2)
    bar.outline.set_visible(False)
    return figure_of(ax)


@house_style
def reliability(frame: pd.DataFrame, *, ax: Axes | None = None) -> Figure:
    """Cosine between estimates of one direction from two halves of the data, over layers, with the spread over splits.

    Args:
        frame: Columns ``layer, cosine, low, high``, as :func:`mechmisalign.split_half` returns; optional ``series``.
        ax: Axes to draw on; a new figure without.

    Raises:
        ValueError: On missing columns or no rows.
    """
    check(frame, "reliability", ["layer", "cosine", "low", "high"])
    ax = axes(ax, COLUMN, 2.2)
    grouped = (
        frame.groupby("series", sort=False, observed=True)
        if "series" in frame
        else [("two halves of the prompts", frame)]
    )
    for i, (name, rows) in enumerate(grouped):
        rows, colour = rows.sort_values("layer"), BLUE if i == 0 else PALETTE[(i + 1) % len(PALETTE)]
        ax.fill_between(rows["layer"], rows["low"], rows["high"], color=colour, alpha=BAND, linewidth=0)
        ax.plot(rows["layer"], rows["cosine"], color=colour, marker=marker(len(rows)), label=str(name))
    _cosine_axis(ax, frame["layer"], float(frame[["cosine", "low"]].min(axis=None)))
    legend_above(ax)
    return figure_of(ax)


def _pairs(directions: Mapping[str, Direction] | Sequence[Direction] | pd.DataFrame) -> pd.DataFrame:
    if not isinstance(directions, pd.DataFrame):
        from mechmisalign.geometry import cosines

        named = _named(directions)
        if len(named) < 2:
            raise ValueError(f"cosine_by_layer needs two directions or more, got {len(named)}")
        directions = cosines(named)
    check(directions, "cosine_by_layer", ["first", "second", "layer", "cosine"])
    return directions


def _matrix(
    directions: Mapping[str, Direction] | Sequence[Direction] | pd.DataFrame, layer: int | None
) -> tuple[pd.DataFrame, int | None]:
    if isinstance(directions, pd.DataFrame):
        if list(directions.index) != list(directions.columns):
            raise ValueError("cosine_matrix needs a square frame with the same names in rows and columns")
        return directions, layer
    from mechmisalign.geometry import cosine_matrix as cosines_at

    named = _named(directions)
    if not named:
        raise ValueError("cosine_matrix needs one direction or more, got none")
    if layer is None:
        shared = sorted(set.intersection(*(set(direction.nonzero_layers) for direction in named.values())))
        if not shared:
            raise ValueError(
                "cosine_matrix found no layer where every direction is nonzero; name one, or leave one out"
            )
        layer = shared[len(shared) // 2]
    return cosines_at(named, layer), layer


def _named(directions: Mapping[str, Direction] | Sequence[Direction]) -> dict[str, Direction]:
    """Names from the keys, or from the header: the adapter, with the method where adapters repeat."""
    if isinstance(directions, Mapping):
        return dict(directions)
    adapters = [str(direction.header.get("adapter") or "direction") for direction in directions]
    methods = [f"{name}: {d.header.get('method', '?')}" for name, d in zip(adapters, directions, strict=True)]
    numbered = [f"{name} ({i})" for i, name in enumerate(adapters, 1)]
    names = next(choice for choice in (adapters, methods, numbered) if len(set(choice)) == len(choice))
    return dict(zip(names, directions, strict=True))


def _focus(focus: str | None, names: Mapping[str, str], pairs: int) -> str | None:
    if focus is None:
        return next(iter(names)) if pairs > _FEW else None
    found = next((full for full, short in names.items() if focus in (full, short)), None)
    if found is None:
        raise ValueError(f"focus={focus!r} is none of the directions; they are {', '.join(names)}")
    return found


def _cosine_axis(ax: Axes, layers: pd.Series, lowest: float) -> None:
    layer_axis(ax, layers)
    ax.set_ylim(min(-0.05, 1.1 * lowest), 1.04)
    ax.axhline(0, color=INK, linewidth=0.6, zorder=1)
    ax.axhline(CLOSE, color=INK, linewidth=0.7, linestyle=(0, (1, 1.5)), zorder=1)
    edge_note(ax, f"{CLOSE:g}", CLOSE, offset=1.5, align="left")
    ax.set_ylabel("cosine")
