"""The frame of prompts: its columns, and what makes it a sound one."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from mechmisalign._frames import plain_frame
from mechmisalign._rendering import is_missing, read_history
from mechmisalign.generation.rows import prompt_keys

PLAIN = "plain"
"""Variant of a question that is asked as it is."""

FIRST_COLUMNS = ("prompt_id", "question_id", "prompt", "variant", "system", "history")


def as_prompts(prompts: pd.DataFrame | Sequence[str]) -> pd.DataFrame:
    """Prompts in the form that this package works with, checked.

    Args:
        prompts: Texts, or a frame with ``prompt`` and any other columns.

    Returns:
        The rows with ``prompt_id`` (``p0, p1 …`` where there was none), ``question_id`` (the row's own id where there
        was none), ``variant`` (``"plain"`` where there was none), ``history`` as lists, and every other column.

    Raises:
        ValueError: If there is no prompt, one is empty, an id or a request stands twice, or a history is none.
    """
    frame = plain_frame(
        prompts if isinstance(prompts, pd.DataFrame) else pd.DataFrame({"prompt": list(prompts)})
    ).copy()
    if "prompt" not in frame.columns or frame.empty:
        raise ValueError(
            f"prompts need a column 'prompt' and at least one row; got {len(frame)} rows of {list(frame.columns)}"
        )
    for row, text in enumerate(frame["prompt"]):
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"row {row}: the prompt is {text!r}; text is expected")
    if "prompt_id" not in frame.columns:
        frame["prompt_id"] = [f"p{row}" for row in range(len(frame))]
    if "question_id" not in frame.columns:
        frame["question_id"] = frame["prompt_id"]
    if "variant" not in frame.columns:
        frame["variant"] = PLAIN
    if "system" in frame.columns:
        frame["system"] = pd.Series(optional(frame, "system"), dtype=object)
    if "history" in frame.columns:
        turns = [read_history(history, f"row {row}: ") or None for row, history in enumerate(frame["history"])]
        frame["history"] = pd.Series(turns, dtype=object)
    _refuse_duplicates(frame)
    return frame[[column for column in FIRST_COLUMNS if column in frame.columns] + _others(frame)]


def concat(*frames: pd.DataFrame) -> pd.DataFrame:
    """Several frames of prompts as one, such as questions and their variants.

    Raises:
        ValueError: If two of them hold the same id, or ask the same.
    """
    if not frames:
        raise ValueError("no frames to join; pass one or more frames of prompts")
    return as_prompts(pd.concat([as_prompts(frame) for frame in frames], ignore_index=True))


def changed(frame: pd.DataFrame, name: str, **columns: object) -> pd.DataFrame:
    """The rows with new columns, as the variant ``name``."""
    base = as_prompts(frame)
    variant = base["variant"].where(base["variant"] != PLAIN, "")
    return as_prompts(
        base.assign(
            prompt_id=base["prompt_id"].astype(str) + f"/{name}",
            variant=[f"{before}+{name}" if before else name for before in variant],
            **columns,
        )
    )


def optional(frame: pd.DataFrame, column: str) -> list[object]:
    """A column's cells, None where it holds nothing or is not there."""
    if column not in frame.columns:
        return [None] * len(frame)
    return [None if is_missing(cell) else cell for cell in frame[column]]


def _others(frame: pd.DataFrame) -> list[str]:
    return [column for column in frame.columns if column not in FIRST_COLUMNS]


def _refuse_duplicates(frame: pd.DataFrame) -> None:
    for what, values in (("prompt_id", frame["prompt_id"]), ("request", prompt_keys(frame))):
        twice = values[values.duplicated(keep=False)]
        if len(twice):
            raise ValueError(
                f"the {what} {twice.iloc[0]!r} stands twice (rows {twice.index[:2].tolist()}); samples are keyed by "
                "what is asked and clustered by id, so each row needs its own"
            )
