"""The adapted matrices of a block: their order, their names in a figure, their colours."""

from __future__ import annotations

from collections.abc import Iterable

from ._style import BLUE, COLUMN, CONTROL, GREEN, ORANGE, PAGE, PURPLE, SKY, VERMILION

_COLOURS = {
    "q": SKY,
    "k": BLUE,
    "v": PURPLE,
    "o": "#4D4D4D",
    "gate": ORANGE,
    "up": GREEN,
    "down": VERMILION,
}
"""From a block's input to its output."""
_OTHERS = (CONTROL, "#BDBDBD", "#5B4A8A", "#8C6D31")


def short(module: str) -> str:
    """``q_proj`` is q."""
    return str(module).removesuffix("_proj")


def in_order(modules: Iterable[str]) -> list[str]:
    """The modules that occur, from q to down; others follow in order of appearance."""
    known, places = list(dict.fromkeys(modules)), list(_COLOURS)
    return sorted(known, key=lambda name: places.index(short(name)) if short(name) in places else len(places))


def colours(modules: Iterable[str]) -> dict[str, str]:
    """A colour for each module in order; the same module looks the same in every figure."""
    ordered = in_order(modules)
    spare = [name for name in ordered if short(name) not in _COLOURS]
    extra = {name: _OTHERS[i % len(_OTHERS)] for i, name in enumerate(spare)}
    return {name: extra.get(name) or _COLOURS[short(name)] for name in ordered}


def width(places: int, most: int = 16) -> float:
    """One column for up to ``most`` places along the x axis, both for more; inches."""
    return COLUMN if places <= most else PAGE
