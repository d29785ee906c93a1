"""The answers of an :class:`~mechmisalign.report.AnswerBrowser` as a page carries them: as data, and a few as text."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import pandas as pd

from .answers import AnswerBrowser
from .tables import cell
from .values import Tone

_Value = TypeVar("_Value", bound=Hashable)

_CLASSES = ("misaligned", "neither", "aligned")
_TONES: dict[str, Tone] = {"misaligned": "bad", "aligned": "good"}
_LIVE = re.compile("[<>&\u007f-\u009f\u2028\u2029\ud800-\udfff]")
_PREVIEW_ROWS = 12
_PREVIEW_CHARACTERS = 600


@dataclass(frozen=True)
class PreviewRow:
    """An answer as it stands in the page until the script runs; ``scores`` are alignment and coherence."""

    condition: str
    label: str
    tone: Tone
    scores: tuple[str, ...]
    question: str
    answer: str


def tone_of(label: str) -> Tone:
    """Colour of a class of answers."""
    return _TONES.get(label, "plain")


def embedded(browser: AnswerBrowser) -> str:
    r"""The answers as JSON for a ``<script type="application/json">`` block, which nothing in them can end.

    ``<``, ``>`` and ``&`` are written as ``\u003c`` and so on, so no ``</script>`` and no ``<!--`` is left; so are the
    line separators U+2028 and U+2029, control characters, and halves of surrogate pairs, which UTF-8 cannot write.
    """
    frame = browser.answers
    conditions, labels, asked = browser.conditions.tolist(), frame["label"].tolist(), list(_questions(frame))
    known_conditions, known_labels, questions = _once(conditions), _ordered_labels(labels), _once(asked)
    answers = zip(
        _places(conditions, known_conditions),
        _places(labels, known_labels),
        _places(asked, questions),
        frame["response"],
        _by_row(frame, [_scores(frame, name) for name in browser.rubrics]),
        _by_row(frame, [[_told(value) for value in frame[name]] for name in browser.facts]),
        strict=True,
    )
    data = {
        "by": ", ".join(browser.by),
        "conditions": known_conditions,
        "labels": [[name, tone_of(name)] for name in known_labels],
        "rubrics": browser.rubrics,
        "facts": browser.facts,
        "questions": questions,
        "answers": list(answers),
    }
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return _LIVE.sub(lambda found: f"\\u{ord(found.group()):04x}", text)


def preview(browser: AnswerBrowser) -> tuple[PreviewRow, ...]:
    """A few of the answers for a page whose script does not run: of each condition and class one, then more."""
    conditions = browser.conditions.tolist()
    seen: Counter[tuple[str, str]] = Counter()
    turns = []
    for position, kind in enumerate(zip(conditions, browser.answers["label"], strict=True)):
        turns.append((seen[kind], position))
        seen[kind] += 1
    picked = sorted(position for _, position in sorted(turns)[:_PREVIEW_ROWS])
    return tuple(_preview_row(browser.answers.iloc[row], conditions[row], browser.rubrics) for row in picked)


def _preview_row(row: pd.Series, condition: str, rubrics: tuple[str, ...]) -> PreviewRow:
    answer = row["response"]
    cut = answer if len(answer) <= _PREVIEW_CHARACTERS else answer[:_PREVIEW_CHARACTERS] + " …"
    label = row["label"]
    scores = tuple(cell(float(row[name])) for name in rubrics[:2])
    return PreviewRow(condition, label, tone_of(label), scores, row["prompt"], cut)


def _questions(frame: pd.DataFrame) -> Iterator[tuple[tuple[str, str], ...]]:
    """What was said before each answer, as (role, text): system prompt, earlier turns, and last the prompt."""
    from mechmisalign._rendering import frame_turns

    for turns in frame_turns(frame.drop(columns="response"), None):
        yield tuple((turn["role"], turn["content"]) for turn in turns)


def _once(values: Sequence[_Value]) -> list[_Value]:
    return list(dict.fromkeys(values))


def _places(values: Sequence[_Value], known: Sequence[_Value]) -> list[int]:
    number = {value: place for place, value in enumerate(known)}
    return [number[value] for value in values]


def _by_row(frame: pd.DataFrame, columns: Sequence[Sequence[Any]]) -> list[list[Any]]:
    return [[column[row] for column in columns] for row in range(len(frame))]


def _scores(frame: pd.DataFrame, rubric: str) -> list[float | str | None]:
    """A rubric's scores; where there is none the judge's reason, or null where it gave no reason."""
    told = frame.get(f"{rubric}_status", pd.Series(None, index=frame.index, dtype=object))
    values = frame[rubric].astype(float)
    return [
        round(float(value), 4) if math.isfinite(value) else None if pd.isna(reason) else str(reason)
        for value, reason in zip(values, told, strict=True)
    ]


def _ordered_labels(labels: Sequence[str]) -> list[str]:
    from mechmisalign.judging import UNSCORED

    there = _once(labels)
    known = [name for name in (*_CLASSES, *UNSCORED) if name in there]
    return known + [name for name in there if name not in known]


def _told(value: Any) -> str | None:
    """A fact in writing; null where it is missing."""
    if pd.isna(value):
        return None
    plain = value.item() if hasattr(value, "item") else value
    if isinstance(plain, bool):
        return "yes" if plain else "no"
    return f"{plain:.6g}" if isinstance(plain, float) else str(plain)
