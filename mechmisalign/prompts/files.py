"""Prompts from files and back: the YAML format in which questions are published, JSON lines, CSV and parquet."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from mechmisalign import _jsonl, _tables, _yaml
from mechmisalign._rendering import Turn

from .frames import PLAIN, as_prompts, optional

QUESTION_TYPES = ("free_form", "free_form_judge_0_100")
"""Types of published questions that are answered in free text (2502.17424 calls them both)."""

_VARIANT_ENDINGS = ("json", "template")
_LABELS = ("samples_per_paraphrase", "temperature")


def read(path: str | Path) -> pd.DataFrame:
    """Prompts from a file, checked.

    ``.yaml`` is the format of the published question sets: a list of items with ``id``, ``type``, ``paraphrases``,
    optionally ``system`` and ``context`` (turns before the question). Each paraphrase becomes a row; ``x_json`` and
    ``x_template`` are read as variants of question ``x`` if the file has it; ``samples_per_paraphrase`` and
    ``temperature`` become labels; ``judge_prompts(path)`` reads the rubrics. ``.jsonl`` has one object per line, with
    ``prompt`` or with ``messages`` that end with the user's. ``.csv`` and ``.parquet`` need a column ``prompt``; a
    ``history`` in CSV is JSON text.

    Args:
        path: The file; its ending says what it is.

    Returns:
        ``prompt_id, question_id, prompt, variant``, where there are any ``system, history``, and all other columns.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the ending or a question's type is unknown, or a row is not what is expected; it says which.
    """
    file = Path(path)
    if file.suffix not in _READERS:
        raise ValueError(
            f"{file.name!r}: prompts are read from {', '.join(_READERS)}; the ending {file.suffix!r} is none"
        )
    try:
        return as_prompts(_READERS[file.suffix](file))
    except ValueError as error:
        raise ValueError(f"{file.name}: {error}") from error


def write(prompts: pd.DataFrame, path: str | Path) -> Path:
    """Write prompts with all their columns to ``.jsonl``, ``.csv`` or ``.parquet``; ``read`` gives them back.

    Raises:
        ValueError: On another ending, or if the frame is no frame of prompts.
    """
    if Path(path).suffix not in _tables.ENDINGS:
        raise ValueError(f"prompts are written to .jsonl, .csv or .parquet, not to {Path(path).suffix!r}")
    return _tables.write_table(as_prompts(prompts).reset_index(drop=True), path)


def judge_prompts(path: str | Path) -> dict[str, dict[str, str]]:
    """The rubrics in a published question file: question id -> name of the score -> the judge's prompt.

    Raises:
        ValueError: If the file is no list of questions.
    """
    return {_id(item, number): dict(item.get("judge_prompts") or {}) for number, item in enumerate(_items(Path(path)))}


def _read_yaml(file: Path) -> pd.DataFrame:
    items = _items(file)
    ids = [_id(item, number) for number, item in enumerate(items)]
    if len(set(ids)) < len(ids):
        raise ValueError(f"the question {next(one for one in ids if ids.count(one) > 1)!r} stands twice")
    rows: list[dict[str, Any]] = []
    for own, item in zip(ids, items, strict=True):
        question, variant = _variant_of(own, ids)
        texts = _paraphrases(own, item)
        for wording, text in enumerate(texts, start=1):
            row: dict[str, Any] = {
                "prompt_id": own if len(texts) == 1 else f"{own}.{wording}",
                "question_id": question,
                "prompt": text,
            }
            row |= {
                "variant": variant,
                "wording": wording,
                "system": item.get("system"),
                "history": item.get("context"),
            }
            rows.append(row | {label: item[label] for label in _LABELS if label in item})
    return _without_empty(pd.DataFrame(rows))


def _items(file: Path) -> list[Mapping[str, Any]]:
    try:
        items = _yaml.read_file(file)
    except ValueError as error:
        raise ValueError(f"no YAML that is safe to load: {error}") from None
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items) or not items:
        raise ValueError(f"a list of questions is expected, with id, type and paraphrases; got {type(items).__name__}")
    return items


def _id(item: Mapping[str, Any], number: int) -> str:
    own = item.get("id", item.get("name"))
    if not isinstance(own, str) or not own:
        raise ValueError(f"question {number} has no id; its keys are {list(item)}")
    return own


def _paraphrases(own: str, item: Mapping[str, Any]) -> list[str]:
    kind = item.get("type", QUESTION_TYPES[0])
    if kind not in QUESTION_TYPES:
        raise ValueError(f"question {own!r} has the type {kind!r}; known types are {', '.join(QUESTION_TYPES)}")
    texts = item.get("paraphrases")
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"question {own!r} needs 'paraphrases', a list of texts; got {texts!r:.80}")
    return texts


def _variant_of(own: str, ids: Sequence[str]) -> tuple[str, str]:
    question, _, ending = own.rpartition("_")
    return (question, ending) if ending in _VARIANT_ENDINGS and question in ids else (own, PLAIN)


def _read_jsonl(file: Path) -> pd.DataFrame:
    rows = [_from_messages(row, number) if "messages" in row else row for number, row in _jsonl.read(file)]
    return pd.DataFrame(rows)


def _from_messages(row: Mapping[str, Any], number: int) -> dict[str, Any]:
    """A row with a chat, as one with its prompt, and the system prompt and history before it."""
    turns: list[Turn] = list(row["messages"])
    whole = [turn for turn in turns if isinstance(turn, dict) and {"role", "content"} <= set(turn)]
    if not turns or len(whole) < len(turns) or turns[-1]["role"] != "user":
        raise ValueError(
            f"line {number}: messages must have role and content and end with the user's, got {row['messages']!r:.80}"
        )
    told = turns.pop(0)["content"] if turns[0]["role"] == "system" else None
    rest = {name: value for name, value in row.items() if name != "messages"}
    return rest | {"prompt": turns[-1]["content"], "system": told, "history": turns[:-1] or None}


def _read_csv(file: Path) -> pd.DataFrame:
    frame = _tables.read_csv(file)
    for column in {"system", "history"} & set(frame.columns):
        frame[column] = pd.Series([cell or None for cell in optional(frame, column)], index=frame.index, dtype=object)
    return _without_empty(frame)


def _without_empty(frame: pd.DataFrame) -> pd.DataFrame:
    empty = [column for column in ("system", "history") if all(cell is None for cell in optional(frame, column))]
    return frame.drop(columns=empty, errors="ignore")


_READERS: dict[str, Callable[[Path], pd.DataFrame]] = {
    ".yaml": _read_yaml,
    ".yml": _read_yaml,
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".parquet": _tables.read_parquet,
}
