"""What vectors say when they are read through the unembedding."""

from __future__ import annotations

from functools import cache
from typing import Any

import pandas as pd
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ._frames import check, check_unique
from ._style import BLUE, COLUMN, INK, PAGE, SMALL, VERMILION, axes, figure_of, house_style
from .tokens import legible

_FONT = "DejaVu Sans"
_FALLBACKS = ("Noto Sans CJK SC", "Noto Sans CJK JP", "WenQuanYi Zen Hei", "PingFang SC", "Microsoft YaHei", "SimHei")
"""Fonts for tokens in other scripts, where they are installed."""
_SIGNS = {"+": ("promoted by +", VERMILION, 0.06), "-": ("promoted by −", BLUE, 0.55)}
"""Heading, colour and left edge of each sign's half."""
_HALF = 0.43
_LINE = 0.155
_LONGEST = 17


@house_style
def readout_table(readout: pd.DataFrame, *, top: int | None = None) -> Figure:
    """The tokens that each vector promotes most, and those that its negative does, with their logits, as a table.

    A table takes the room that it needs, so it is a figure of its own. Spaces are written as ``·``, newlines as ``↵``,
    characters that no installed font knows as their code.

    Args:
        readout: Columns ``name`` (a site's B, or a direction), ``sign`` ("+" or "-"), ``rank``, ``token``, ``logit``.
        top: How many tokens of each sign, by rank; all without.

    Raises:
        ValueError: On missing columns, no rows, an unknown sign, or several tokens for one place.
    """
    check(readout, "readout_table", ["name", "sign", "rank", "token", "logit"])
    check_unique(readout, "readout_table", ["name", "sign", "rank"])
    unknown = [sign for sign in dict.fromkeys(readout["sign"]) if sign not in _SIGNS]
    if unknown:
        raise ValueError(f'readout_table knows the signs "+" and "-", got {", ".join(map(repr, unknown))}')
    ordered = readout.sort_values("rank", kind="stable")
    shown = ordered.groupby(["name", "sign"], sort=False, observed=True).head(top) if top else ordered
    names = list(dict.fromkeys(readout["name"]))
    across = min(len(names), 2)
    depth = (
        int(shown.groupby(["name", "sign"], observed=True).size().max()) + 3
    )  # two lines of heading, one between blocks
    down = -(-len(names) // across)
    ax = axes(None, PAGE if across == 2 else COLUMN, _LINE * depth * down + 0.05)
    ax.set(xlim=(0, across), ylim=(depth * down - 0.5, -0.4))
    ax.set_axis_off()
    for i, name in enumerate(names):
        _block(ax, shown[shown["name"] == name], str(name), i % across, i // across * depth)
    return figure_of(ax)


def _block(ax: Axes, rows: pd.DataFrame, name: str, left: int, top: int) -> None:
    """One vector: its name over two halves."""
    _write(ax, left + 0.02, top, _short(name, 44), weight="bold", size=8)
    for sign, (heading, colour, edge) in _SIGNS.items():
        x = left + edge
        _write(ax, x, top + 1, heading, color=colour)
        _write(ax, x + _HALF - 0.03, top + 1, "logit", ha="right", color="#666666")
        ax.plot([x - 0.04, x + _HALF - 0.03], [top + 1.5, top + 1.5], color="#999999", linewidth=0.5)
        for line, (token, logit) in enumerate(rows.loc[rows["sign"] == sign, ["token", "logit"]].to_numpy(), 2):
            _write(ax, x, top + line, _short(_drawable(legible(str(token)).replace(" ", "·")), _LONGEST))
            _write(ax, x + _HALF - 0.03, top + line, f"{logit:+.2f}".replace("-", "−"), ha="right", color="#444444")


def _write(ax: Axes, x: float, y: float, text: str, **look: Any) -> None:
    house: dict[str, Any] = {"fontfamily": [_FONT, *_fallbacks()], "size": SMALL, "color": INK, "va": "center"}
    ax.text(x, y, text, parse_math=False, **house | look)  # a token may hold dollar signs


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


@cache
def _fallbacks() -> tuple[str, ...]:
    installed = set(font_manager.fontManager.get_font_names())
    return tuple(name for name in _FALLBACKS if name in installed)


@cache
def _glyphs() -> frozenset[int]:
    """Every character that one of the fonts can draw."""
    paths = [font_manager.findfont(name) for name in (_FONT, *_fallbacks())]
    return frozenset().union(*(font_manager.get_font(path).get_charmap() for path in paths))


def _drawable(text: str) -> str:
    return "".join(c if ord(c) in _glyphs() else f"\\u{ord(c):04x}" for c in text)
