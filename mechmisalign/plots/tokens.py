"""Tokens coloured by a number each: a text as heat map, in HTML."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from html import escape

from matplotlib import colormaps
from matplotlib.colors import to_hex

from ._style import readable

_MAP = "RdBu_r"
_CELL = "display:inline-block;max-width:100%;margin:1px;padding:0 3px;border-radius:3px;white-space:pre-wrap;"
_PRINTED = "-webkit-print-color-adjust:exact;print-color-adjust:exact;"
_MARKS = {"\n": "↵", "\r": "␍", "\t": "→", "\u00a0": "⍽"}
_INVISIBLE = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")


@dataclass(frozen=True)
class TokenHeatmap:
    """Tokens with a number each, coloured around zero: blue below, red above.

    Attributes:
        tokens: The tokens as text.
        values: One finite number for each.
        title: What the text is; the caption in a report.
        label: What the number is.
        limit: The number of the darkest colour; the largest magnitude without. Beyond it the colour stays.

    Raises:
        ValueError: If tokens and values differ in number, there are none, or a number is not finite.

    Example:
        >>> TokenHeatmap(("take", "bleach"), (-0.2, 1.5), label="scalar").reach
        1.5
    """

    tokens: tuple[str, ...]
    values: tuple[float, ...]
    title: str = ""
    label: str = "scalar"
    limit: float | None = None

    def __post_init__(self) -> None:
        if len(self.tokens) != len(self.values):
            raise ValueError(
                f"a token heat map needs one value for each token, got {len(self.tokens)} tokens and "
                f"{len(self.values)} values; cut both to the same span"
            )
        if not self.tokens:
            raise ValueError("a token heat map needs one token or more, got none")
        lost = next((i for i, value in enumerate(self.values) if not math.isfinite(value)), None)
        if lost is not None:
            raise ValueError(
                f"a token heat map needs finite values, got {self.values[lost]} at token {lost} "
                f"({self.tokens[lost]!r}); leave out positions without a value"
            )
        if self.limit is not None and not (math.isfinite(self.limit) and self.limit > 0):
            raise ValueError(f"limit is the magnitude of the darkest colour and above zero, got {self.limit}")

    @property
    def reach(self) -> float:
        """The magnitude of the darkest colour."""
        return self.limit or max(abs(value) for value in self.values) or 1.0

    @property
    def html(self) -> str:
        """A snippet that needs nothing else: title, tokens, scale; every word of it escaped, no script, no link."""
        title = f'<div style="margin:0 0 6px;font-weight:600">{_text(self.title)}</div>' if self.title else ""
        return f"<div>{title}{self.body}</div>"

    @property
    def body(self) -> str:
        """The snippet without its title."""
        cells = "".join(self._cell(token, value) for token, value in zip(self.tokens, self.values, strict=True))
        return f'<div style="line-height:1.75;overflow-wrap:anywhere">{cells}</div>{self._scale()}'

    def _repr_html_(self) -> str:
        return self.html

    def _cell(self, token: str, value: float) -> str:
        ground = _colour(value / self.reach)
        style = f"{_CELL}{_PRINTED}background:{ground};color:{readable(ground)}"
        told = escape(f"{self.label} {value:+.3g}", quote=True)
        return f'<span style="{style}" title="{told}">{_text(token)}</span>' + ("<br>" if "\n" in token else "")

    def _scale(self) -> str:
        stops = ",".join(_colour(i / 5) for i in range(-5, 6))
        bar = f"{_PRINTED}display:inline-block;width:120px;height:9px;margin:0 6px;border-radius:2px;"
        ends = f"{-self.reach:.3g}".replace("-", "−"), f"{self.reach:.3g}"
        return (
            f'<div style="margin-top:6px;font-size:12.5px">{_text(self.label)}&ensp;{ends[0]}'
            f'<span style="{bar}background:linear-gradient(to right,{stops})"></span>{ends[1]}</div>'
        )


def token_heatmap(
    tokens: Iterable[str],
    values: Iterable[float],
    *,
    title: str = "",
    label: str = "scalar",
    limit: float | None = None,
) -> TokenHeatmap:
    """A :class:`TokenHeatmap` of any sequences: lists, a column of a frame, an array, a tensor on the CPU.

    Raises:
        ValueError: If tokens and values differ in number, there are none, or a number is not finite.
    """
    return TokenHeatmap(tuple(map(str, tokens)), tuple(float(value) for value in values), title, label, limit)


def legible(token: str) -> str:
    """A token whose every character can be seen: ``↵`` for a newline, ``·`` for a space that no word follows.

    Characters without a look of their own (controls, marks that turn the direction of writing) become their code.
    """
    return "".join(map(_seen, token, [*token[1:], " "]))


def _seen(character: str, following: str) -> str:
    if character == " " and not following.isspace():
        return character
    if character in _MARKS:
        return _MARKS[character]
    if character.isspace():
        return "·"
    if unicodedata.category(character) in _INVISIBLE and character != "\u200d":  # joins an emoji
        return f"\\u{ord(character):04x}"
    return character


def _text(raw: str) -> str:
    return escape(legible(raw), quote=True)


def _colour(fraction: float) -> str:
    return to_hex(colormaps[_MAP](0.5 + 0.5 * max(-1.0, min(1.0, fraction))))
