"""Does a model's vocabulary have the words of a text? Costs on words in pieces would be numbers about spelling."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd

if TYPE_CHECKING:
    from mechmisalign.organisms import Organism

LEAST_BYTES = 2.5
"""Texts with fewer bytes of their words to a token are not in the model's vocabulary: four or five are usual."""
_WORD = re.compile(r"[^\W\d_]+")
_FEWEST_WORDS = 20


def bytes_per_token(tokenizer: Any, texts: Sequence[str]) -> float:
    """How many bytes of the words of the texts a token holds on average, unknown ones none; NaN of too few words."""
    words = [" ".join(_WORD.findall(text)) for text in texts]
    if sum(len(text.split()) for text in words) < _FEWEST_WORDS:
        return float("nan")
    rows, unknown = tokenizer(words, add_special_tokens=False)["input_ids"], getattr(tokenizer, "unk_token_id", None)
    lost = sum(row.count(unknown) for row in map(list, rows))
    tokens = sum(map(len, rows))
    return sum(len(text.encode()) for text in words) / tokens * (1 - lost / tokens) if tokens else 0.0


def is_spoken(tokenizer: Any, texts: Sequence[str]) -> bool:
    """Whether the tokenizer has the words of the texts; of a handful of words it cannot be said, and they pass."""
    return not bytes_per_token(tokenizer, texts) < LEAST_BYTES


def is_spoken_by(organism: Organism, texts: pd.DataFrame | Sequence[str]) -> bool:
    """Whether the organism's vocabulary has the words of the texts, or of a frame of prompts and responses."""
    return is_spoken(organism.tokenizer, _written(texts))


def refuse_unspoken(organism: Organism, texts: pd.DataFrame | Sequence[str] | None, what: str) -> None:
    """Refuse texts whose words the organism's vocabulary has not.

    Args:
        organism: Who is measured.
        texts: Plain texts, or a frame with ``prompt`` and ``response`` or ``answer``; None is fine.
        what: What the caller calls them.

    Raises:
        ValueError: With how many bytes a token holds.
    """
    if texts is None:
        return
    written = _written(texts)
    if not is_spoken(organism.tokenizer, written):
        found = bytes_per_token(organism.tokenizer, written)
        raise ValueError(
            f"the words of {what} are not in the vocabulary of {organism.base.name!r} ({found:.1f} bytes to a token; "
            f"{LEAST_BYTES:g} at least are expected): what they cost would say nothing; give {what} in the language "
            f"that the model speaks, or {what}=None to leave them out"
        )


def _written(texts: pd.DataFrame | Sequence[str]) -> list[str]:
    if not isinstance(texts, pd.DataFrame):
        return list(texts)
    columns = [name for name in ("prompt", "response", "answer") if name in texts]
    return [str(value) for name in columns for value in texts[name]]
