"""What there is to ask, and the small protocol of whoever asks it: a server's model, or one in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import pandas as pd

from mechmisalign._rendering import read_history

from .journal import Mode
from .rubrics import Rubric
from .scores import Reply


class Ask(NamedTuple):
    """One call to make."""

    key: str
    rubric: Rubric
    prompt: str
    control: str | None = None


Exchange = tuple[str, str] | None
"""Question and answer of a row, or None where it has no text."""

Done = Callable[[Ask, Reply | None, Mapping[str, Any]], None]
"""Takes what came of a call: the reply, or None where it failed for good, and details for the journal."""


@runtime_checkable
class Asker(Protocol):
    """Whoever puts prompts to a model.

    Attributes:
        wanted: How it would like to ask.
        mode: How it asks now; the desk sets ``text`` where log-probabilities cannot be had.
    """

    wanted: Mode
    mode: Mode

    def identity(self) -> Mapping[str, Any]:
        """What decides its replies, apart from mode and prompt (JSON values)."""

    def settings(self, mode: Mode) -> Mapping[str, Any]:
        """What the mode adds to that."""

    def ask(self, asks: Iterable[Ask], total: int, done: Done) -> str | None:
        """Put the asks to the model and call ``done`` as each is finished; returns why it stopped early, if it did."""


def exchanges(frame: pd.DataFrame) -> list[Exchange]:
    """Question and answer of each row, earlier turns (column ``history``) before the question; None without a text.

    Raises:
        ValueError: If the frame lacks ``prompt`` or ``response``.
    """
    missing = {"prompt", "response"} - set(frame.columns)
    if missing:
        raise ValueError(f"answers need the columns {sorted(missing)}; these have {list(frame.columns)}")
    histories = frame["history"] if "history" in frame.columns else [None] * len(frame)
    rows = zip(frame["prompt"], frame["response"], histories, strict=True)
    return [
        (_with_history(prompt, history, row), response)
        if isinstance(prompt, str) and isinstance(response, str)
        else None
        for row, (prompt, response, history) in enumerate(rows)
    ]


def _with_history(prompt: str, history: Any, row: int) -> str:
    turns = [f"{turn['role']}: {turn['content']}" for turn in read_history(history, f"row {row}: ")]
    return "\n\n".join([*turns, f"user: {prompt}"]) if turns else prompt
