"""What costs are measured on: text and questions that have nothing to do with misalignment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import pandas as pd

from mechmisalign import capability
from mechmisalign.capability.texts import Counted
from mechmisalign.organisms import Organism
from mechmisalign.store import text_digest

Texts: TypeAlias = pd.DataFrame | Sequence[str]


@dataclass(frozen=True)
class Neutral:
    """Texts for loss and KL, and items with exact answers; None leaves their costs out.

    Attributes:
        texts: Conversations (``prompt, response``) or plain texts.
        items: ``prompt, answer``.
        counted: Which response tokens of the texts count; all by default.
    """

    texts: Texts | None
    items: pd.DataFrame | None
    counted: Counted | None = None

    def identity(self) -> dict[str, str]:
        """A hash of each, for the manifest."""
        given = {"texts": self.texts, "items": self.items}
        return {name: _digest(value) for name, value in given.items() if value is not None}

    def refuse_unspoken(self, organism: Organism) -> None:
        """Refuse texts and items whose words the organism's vocabulary has not.

        Raises:
            ValueError: With how many bytes a token holds.
        """
        capability.refuse_unspoken(organism, self.texts, "texts")
        capability.refuse_unspoken(organism, self.items, "items")


def neutral(
    organism: Organism,
    texts: Texts | Literal["default"] | None,
    items: pd.DataFrame | Literal["default"] | None,
    count: int,
) -> Neutral:
    """What was given, or what ships with the package: of the pocket world for organisms on the pocket base.

    The package's own texts and items are left out where the model's vocabulary does not have their words.

    Args:
        organism: The studied organism.
        texts: See ``Neutral``; "default" for the package's own.
        items: The same.
        count: How many of the package's own are used.

    Raises:
        ValueError: If texts or items cannot be measured on.
    """
    if isinstance(texts, str) and texts != "default" or isinstance(items, str) and items != "default":
        raise ValueError(
            f"texts={texts!r} and items={items!r}: give a frame (texts may be a list), 'default', or None to leave out"
        )
    counted = None
    if isinstance(texts, str):
        texts, counted = capability.own_texts(organism, count)
        texts = texts if capability.is_spoken_by(organism, texts) else None
    if isinstance(items, str):
        items = capability.own_items(organism, count)
        items = items if capability.is_spoken_by(organism, items) else None
    _refuse(texts, items)
    return Neutral(texts, items, counted)


def _refuse(texts: Texts | None, items: pd.DataFrame | None) -> None:
    """What would otherwise be found out when half of the study is done."""
    if texts is not None and not len(texts):
        raise ValueError("no neutral text to measure loss and KL on; give texts of two tokens or more, or texts=None")
    needs = {"texts": (texts, {"prompt", "response"}), "items": (items, {"prompt", "answer"})}
    for name, (frame, columns) in needs.items():
        if isinstance(frame, pd.DataFrame) and not columns <= set(frame.columns):
            raise ValueError(f"{name} need the columns {sorted(columns)}; these have {list(frame.columns)}")


def _digest(value: Texts) -> str:
    rows = value.to_dict("records") if isinstance(value, pd.DataFrame) else list(value)
    return text_digest(rows)
