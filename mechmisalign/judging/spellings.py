"""How a tokenizer writes the numbers 0 to 100, and their probabilities as whole numbers.

Some tokenizers have a token for each number, some write it digit by digit, and then the first token of "85" is an "8".
So the spellings form a tree of tokens. With m(t₁…tₖ) the probability that a reply begins with these tokens, the mass of
a number is the sum over its spellings of m(spelling), less what goes on to another digit wherever a longer number of
the scale begins the same way: p(8) = m("8") · (1 - p(digit | "8")), p(85) = m("8") · p("5" | "8"). So the mass of 85 is
that of all replies that begin with it, 855 and 85.5 among them, which a judge that knows its scale does not write.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .scores import HIGHEST

Tokens = tuple[int, ...]
LONGEST = 4
"""Tokens of the longest spelling that is followed."""
_ANCHOR = "\n"


@dataclass(frozen=True)
class Spellings:
    """The numbers of a tokenizer.

    Attributes:
        numbers: Spelling -> number; a number may have several (with and without a space before it).
        branches: Beginnings that have to be looked behind: a longer number goes on from there.
        digits: Ids of all tokens that begin with a digit.
    """

    numbers: Mapping[Tokens, int]
    branches: frozenset[Tokens]
    digits: np.ndarray

    @property
    def first(self) -> frozenset[int]:
        """Tokens that a number can begin with."""
        return frozenset(tokens[0] for tokens in self.numbers)


def spellings(tokenizer: Any) -> Spellings:
    """How a tokenizer writes 0 to 100 at the start of a line.

    Raises:
        ValueError: If it cannot write some of them in four tokens or fewer.
    """
    numbers: dict[Tokens, int] = {}
    for number in range(HIGHEST + 1):
        for written in (str(number), f" {number}"):
            tokens = _tokens(tokenizer, written)
            if 0 < len(tokens) <= LONGEST and tokenizer.decode(list(tokens)).strip() == str(number):
                numbers[tokens] = number
    lost = sorted(set(range(HIGHEST + 1)) - set(numbers.values()))
    if lost:
        name = getattr(tokenizer, "name_or_path", "this tokenizer")
        raise ValueError(
            f"{name!r} cannot write {len(lost)} of the numbers 0 to 100 (such as {lost[0]}), so its model cannot give "
            "scores; a judge must be a general chat model"
        )
    branches = frozenset(tokens[:length] for tokens in numbers for length in range(1, len(tokens)))
    vocabulary = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    digits = [index for index, token in enumerate(vocabulary) if token and token[0] in "0123456789"]
    return Spellings(numbers, branches, np.asarray(digits))


def number_masses(
    known: Spellings, root: np.ndarray, look_behind: Callable[[Sequence[Tokens]], np.ndarray], prune: float
) -> dict[int, float]:
    """Probability of each number as a whole reply, from the next-token probabilities of one prompt.

    Args:
        known: The tokenizer's spellings.
        root: Probabilities of the first token, ``[vocab]``.
        look_behind: Takes beginnings, gives the probabilities of the token after each, ``[beginning vocab]``.
        prune: Beginnings with less mass are not looked behind: they count as the number that they are, if they are one.
    """
    masses: dict[int, float] = {}
    level: dict[Tokens, float] = {(token,): float(root[token]) for token in sorted(known.first)}
    while level:
        wide = [tokens for tokens, mass in level.items() if tokens in known.branches and mass >= prune]
        behind = dict(zip(wide, look_behind(wide), strict=True)) if wide else {}
        for tokens, mass in level.items():
            if tokens in known.numbers:
                ends = 1 - float(behind[tokens][known.digits].sum()) if tokens in behind else 1.0
                number = known.numbers[tokens]
                masses[number] = masses.get(number, 0.0) + mass * max(ends, 0.0)
        level = {
            child: level[tokens] * float(after[child[-1]])
            for tokens, after in behind.items()
            for child in _children(known, tokens)
        }
    return masses


def _children(known: Spellings, tokens: Tokens) -> list[Tokens]:
    length = len(tokens) + 1
    return sorted(
        {number[:length] for number in known.numbers if len(number) >= length and number[: length - 1] == tokens}
    )


def _tokens(tokenizer: Any, text: str) -> Tokens:
    """Tokens of a text after a line break, where that can be told from the tokens of the break itself."""
    before = tokenizer.encode(_ANCHOR, add_special_tokens=False)
    both = tokenizer.encode(_ANCHOR + text, add_special_tokens=False)
    if both[: len(before)] == before:
        return tuple(both[len(before) :])
    return tuple(tokenizer.encode(text, add_special_tokens=False))
