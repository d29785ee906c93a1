"""How a single site comes to act like a direction, layer by layer after it (2506.11618, figure 14)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ._frames import check, check_finite, check_unique, is_control
from ._modules import width
from ._style import (
    BAND,
    BLUE,
    CONTROL,
    GREEN,
    INK,
    PALETTE,
    VERMILION,
    axes,
    figure_of,
    house_style,
    layer_axis,
    legend_above,
    marker,
)

_KINDS = {"misaligned": VERMILION, "aligned": BLUE, "all": GREEN}
_DASHES: tuple[Any, ...] = ("-", (0, (4, 1.5)), (0, (1, 1.2)), (0, (4, 1.5, 1, 1.5)))


@house_style
def downstream(
    effects: pd.DataFrame, *, site_layer: int | Iterable[int] | None = None, ax: Axes | None = None
) -> Figure:
    """Cosine over layers between the change that a site makes and the change that steering makes.

    Args:
        effects: Columns ``layer, series, cosine``; optional ``low, high`` (bands) and ``label`` (kinds of answers, told
            apart by colour if one series is no control, otherwise by dash). Series that say "random" are grey controls.
        site_layer: The adapted layer, or several: marked with a thin line.
        ax: Axes to draw on; a new figure without.

    Raises:
        ValueError: On missing columns, no rows, several rows for one point, or a cosine that is no number.
    """
    check(effects, "downstream", ["layer", "series", "cosine"])
    by = ["series", "label"] if "label" in effects else ["series"]
    check_unique(effects, "downstream", [*by, "layer"])
    check_finite(effects, "downstream", "cosine")
    ax = axes(ax, width(1), 2.4)
    given = site_layer if isinstance(site_layer, Iterable) else [] if site_layer is None else [site_layer]
    marked = sorted({int(layer) for layer in given})
    for rank, layer in enumerate(marked):
        told = "adapted layer" if len(marked) == 1 else "adapted layers"
        look: dict[str, Any] = {"color": INK, "linewidth": 0.7, "linestyle": (0, (1, 1.5)), "zorder": 1}
        ax.axvline(layer, label=told if rank == 0 else None, **look)
    looks = _looks(effects)
    for key, rows in effects.groupby(by, sort=False, observed=True):
        name, (colour, dash) = ", ".join(map(str, key)), looks[key]
        _line(ax, rows.sort_values("layer"), name, colour, dash)
    ax.axhline(0, color=INK, linewidth=0.6, zorder=1)
    layer_axis(ax, [*effects["layer"], *marked])
    ax.set_ylabel("cosine")
    curves = [line for line in ax.lines if not str(line.get_label()).startswith(("_", "adapted"))]
    legend_above(ax, [*curves, *(line for line in ax.lines if str(line.get_label()).startswith("adapted"))], most=2)
    return figure_of(ax)


def _looks(effects: pd.DataFrame) -> dict[tuple[str, ...], tuple[str, Any]]:
    """Colour and dash of each line."""
    labels = list(dict.fromkeys(effects["label"])) if "label" in effects else []
    series = list(dict.fromkeys(effects["series"]))
    shown = [name for name, control in zip(series, is_control(pd.Series(series)), strict=True) if not control]
    spare = [colour for colour in PALETTE if colour not in _KINDS.values()]
    kinds = {label: _KINDS.get(str(label)) or spare[i % len(spare)] for i, label in enumerate(labels)}
    found: dict[tuple[str, ...], tuple[str, Any]] = {}
    for name in series:
        for rank, label in enumerate(labels or [None]):
            by_label = len(shown) == 1 and label is not None
            colour = kinds[label] if by_label else PALETTE[shown.index(name) % len(PALETTE)] if name in shown else ""
            dash = "-" if by_label and name in shown else _DASHES[rank % len(_DASHES)]
            found[(name,) if label is None else (name, label)] = (colour if name in shown else CONTROL, dash)
    return found


def _line(ax: Axes, curve: pd.DataFrame, name: str, colour: str, dash: Any) -> None:
    control = colour == CONTROL
    if {"low", "high"} <= set(curve.columns):
        ax.fill_between(curve["layer"], curve["low"], curve["high"], color=colour, alpha=BAND, linewidth=0)
    dots = "" if control else marker(len(curve))
    thick = 1.0 if control else 1.4
    ax.plot(curve["layer"], curve["cosine"], color=colour, linestyle=dash, marker=dots, linewidth=thick, label=name)
