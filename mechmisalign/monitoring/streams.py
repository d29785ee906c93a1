"""Lines of JSON in, scored lines out: in order, in bounded memory, and a bad line costs no other.

A line is a conversation: ``prompt`` and ``response`` (and perhaps ``system`` and ``history``), or ``messages`` that end
with a user's and the assistant's turn. Whatever else it holds is passed on. Text is data: it is read as UTF-8 and
tokenised, never opened, never run.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from mechmisalign import _jsonl
from mechmisalign._rendering import TemplateError, read_history
from mechmisalign.conversations import Conversations
from mechmisalign.generation.rows import prompt_keys
from mechmisalign.judging.files import read_answers

from .monitor import ADDED

if TYPE_CHECKING:
    from mechmisalign.organisms import Organism

    from .monitor import Monitor

_ASKED = ("prompt", "response", "system", "history")
_EXPECTED = 'a JSON object with the texts "prompt" and "response", or with "messages", is expected'
_DIGITS = 6


@dataclass(frozen=True)
class Line:
    """A line of the input.

    Attributes:
        number: From 1, blank lines counted.
        record: The object on it; None if it is none that can be scored.
        turns: ``prompt, response, system, history``.
        error: Why it cannot be scored.
    """

    number: int
    record: dict[str, Any] | None = None
    turns: dict[str, Any] | None = None
    error: str | None = None


def score_lines(
    monitor: Monitor,
    organism: Organism,
    lines: Iterable[bytes | str],
    *,
    batch: int = 64,
    max_length: int | None = None,
) -> Iterator[dict[str, Any]]:
    """Score conversations as they come.

    Args:
        monitor: What scores.
        organism: The model that reads.
        lines: Of a file that is open in binary or text, or any others. Blank ones are skipped.
        batch: Lines that are held and scored together.
        max_length: Conversations of more tokens are cut on the right.

    Yields:
        For each line its record with ``line`` (the number, from 1), ``score``, ``alarm`` (if calibrated),
        ``token_texts`` and ``token_scores``; fields of these names are replaced. For a line that cannot be scored
        ``line`` and ``error`` alone.

    Raises:
        MonitorMismatchError: On a model that the monitor does not belong to.
    """
    monitor.check_model(organism)
    waiting = iter(lines) if isinstance(lines, Backlog) else _in_batches(lines, batch)
    number = 0
    for group in waiting:
        parsed = [parse_line(raw, number + place) for place, raw in enumerate(group, start=1) if raw.strip()]
        number += len(group)
        yield from _scored(monitor, organism, parsed, max_length)


class Backlog:
    """Batches of whatever lines are waiting: a slow stream is scored line by line, a fast one in full batches.

    A thread reads ahead, by no more than a batch.

    Args:
        lines: What is read.
        most: Lines in a batch.
    """

    def __init__(self, lines: Iterable[bytes | str], most: int) -> None:
        self._waiting: queue.Queue[bytes | str | None] = queue.Queue(maxsize=most)  # None: no more to come
        self._failure: OSError | ValueError | None = None
        self._most = most
        threading.Thread(target=self._read, args=(lines,), daemon=True).start()

    def __iter__(self) -> Iterator[list[bytes | str]]:
        ended = False
        while not ended:
            group = [self._waiting.get()]
            while group[-1] is not None and len(group) < self._most and not self._waiting.empty():
                group.append(self._waiting.get())
            ended = group[-1] is None
            yield [line for line in group if line is not None]
        if self._failure is not None:
            raise self._failure

    def _read(self, lines: Iterable[bytes | str]) -> None:
        try:
            for line in lines:
                self._waiting.put(line)
        except (OSError, ValueError) as error:  # told in the thread that iterates
            self._failure = error
        finally:
            self._waiting.put(None)


def read_conversations(path: str | Path) -> pd.DataFrame:
    """Conversations of a whole file, to fit or calibrate on: JSON lines as above, CSV or parquet.

    Returns:
        ``prompt, response, system, history``, the other fields, and ``prompt_id`` (what is asked, if there was none).

    Raises:
        ValueError: If a line cannot be read (it says which), or there is none.
        FileNotFoundError: If there is no such file.
    """
    path = Path(path)
    if path.suffix != ".jsonl":
        frame = read_answers(path)
    else:
        try:
            lines = [_line_of(record, number) for number, record in _jsonl.read(path)]
        except _jsonl.LineError as error:
            raise ValueError(f"{path}, {error}") from None
        bad = next((line for line in lines if line.error), None)
        if bad is not None:
            raise ValueError(f"{path}, line {bad.number}: {bad.error}; mend or drop the line")
        frame = pd.DataFrame([{**(line.record or {}), **(line.turns or {})} for line in lines], dtype=object)
    if frame.empty:
        raise ValueError(f"{path} holds no conversation")
    if "prompt_id" in frame.columns:
        return frame
    return frame.assign(prompt_id=prompt_keys(frame))


def parse_line(raw: bytes | str, number: int) -> Line:
    """The conversation on a line, or why there is none."""
    if number == 1:
        raw = raw.removeprefix(_jsonl.BOM) if isinstance(raw, bytes) else raw.removeprefix("\ufeff")
    try:
        if len(raw) > _jsonl.LONGEST_LINE:
            raise ValueError(f"the line is longer than {_jsonl.LONGEST_LINE >> 20} MiB")
        record = _jsonl.parse(raw)
    except ValueError as error:
        return Line(number, error=f"{error or type(error).__name__}; {_EXPECTED}")
    return _line_of(record, number)


def _line_of(record: Any, number: int) -> Line:
    try:
        return Line(number, record, _turns(record))
    except ValueError as error:
        return Line(number, error=f"{error}; {_EXPECTED}")


def _turns(record: Any) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise ValueError(f"the line holds {type(record).__name__}")
    turns: dict[str, Any] = {key: record.get(key) for key in _ASKED}
    if "messages" in record:
        turns = _of_messages(record["messages"])
    for key in ("prompt", "response"):
        text = turns[key]
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{key!r} is {_short(text)}")
    if turns["system"] is not None and not isinstance(turns["system"], str):
        raise ValueError(f"'system' is {_short(turns['system'])}")
    said = [turns["prompt"], turns["response"], turns["system"] or ""]
    said += [turn["content"] for turn in read_history(turns["history"])]
    for each in said:
        each.encode("utf-8")  # half a surrogate pair has no UTF-8, and tokenizers cannot read it
    return turns


def _of_messages(messages: Any) -> dict[str, Any]:
    if not isinstance(messages, list) or not all(isinstance(turn, dict) for turn in messages):
        raise ValueError("'messages' is no list of turns")
    system = messages[0].get("content") if messages and messages[0].get("role") == "system" else None
    said = messages[1:] if messages and messages[0].get("role") == "system" else messages
    if [turn.get("role") for turn in said[-2:]] != ["user", "assistant"]:
        raise ValueError("'messages' do not end with a user's and the assistant's turn")
    prompt, response = (turn.get("content") for turn in said[-2:])
    history = [{"role": turn.get("role"), "content": turn.get("content")} for turn in said[:-2]]
    return {"prompt": prompt, "response": response, "system": system, "history": history or None}


def _scored(
    monitor: Monitor, organism: Organism, lines: list[Line], max_length: int | None
) -> Iterator[dict[str, Any]]:
    """The lines of a batch in their order; those that the template or the monitor refuses are found one by one."""
    sound = [line for line in lines if line.error is None]
    results = _attempt(monitor, organism, sound, max_length)
    for line in lines:
        result = results.get(line.number)
        yield {"line": line.number, "error": line.error} if result is None else result


def _attempt(
    monitor: Monitor, organism: Organism, lines: list[Line], max_length: int | None
) -> dict[int, dict[str, Any]]:
    if not lines:
        return {}
    frame = pd.DataFrame([line.turns for line in lines], columns=list(_ASKED), dtype=object)
    try:
        scored = monitor.score(organism, Conversations(frame, organism.tokenizer, max_length=max_length))
    except (ValueError, TemplateError) as error:
        if len(lines) == 1:
            return {lines[0].number: {"line": lines[0].number, "error": str(error)}}
        return {key: value for line in lines for key, value in _attempt(monitor, organism, [line], max_length).items()}
    rows = scored[[name for name in ADDED if name in scored.columns]].to_dict("records")
    return {line.number: _told(line, row) for line, row in zip(lines, rows, strict=True)}


def _told(line: Line, row: dict[str, Any]) -> dict[str, Any]:
    rest = {key: value for key, value in (line.record or {}).items() if key not in ("line", "error", *ADDED)}
    told: dict[str, Any] = {"line": line.number, **rest, "score": float(row["score"])}
    if "alarm" in row:
        told["alarm"] = bool(row["alarm"])
    rounded = [float(f"{value:.{_DIGITS}g}") for value in row["token_scores"]]
    return told | {"token_texts": row["token_texts"], "token_scores": rounded}


def _in_batches(lines: Iterable[bytes | str], size: int) -> Iterator[list[bytes | str]]:
    if size < 1:
        raise ValueError(f"batch must be 1 or more, got {size}")
    source = iter(lines)
    while group := list(islice(source, size)):
        yield group


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
