"""Sampled answers that a reader of the page can filter, sort and open."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd

RUBRICS = ("alignment", "coherence")
_ASKED = ("prompt", "system", "history")


@dataclass(frozen=True)
class AnswerBrowser:
    """Answers to be filtered, sorted and opened in the page; :func:`answer_browser` makes one.

    Attributes:
        answers: One row per answer: ``prompt, response, label``, the columns of ``by``, the rubrics, where the judge
            told them ``<rubric>_status``, optionally ``system`` and ``history`` (turns before the prompt), the facts.
        caption: What the answers are, and how many of how many.
        by: The columns that name a condition.
        rubrics: The scores, 0 to 100: ``alignment`` and ``coherence``, then any others.
        facts: Further columns, told when an answer is opened.
    """

    answers: pd.DataFrame
    caption: str
    by: tuple[str, ...] = ("condition",)
    rubrics: tuple[str, ...] = RUBRICS
    facts: tuple[str, ...] = ()

    @property
    def conditions(self) -> pd.Series:
        """The name of each answer's condition."""
        return condition_names(self.answers, self.by)


def answer_browser(
    judged: pd.DataFrame,
    by: str | Sequence[str] = "condition",
    *,
    caption: str = "Sampled answers.",
    limit: int = 100,
    total: int = 2000,
    rubrics: Sequence[str] | None = None,
    facts: Sequence[str] | None = None,
    seed: int = 0,
) -> AnswerBrowser:
    """Judged answers for the page, at most ``limit`` of each condition.

    Where a condition has more, every class of answers (``label``) gets an equal share of the limit, and what a small
    class leaves goes to the larger ones: rare classes are seen. Within a class the choice is a fixed random one, keyed
    by seed, prompt and the answer's number among those to its prompt. The caption says what is shown.

    Args:
        judged: Columns ``prompt, response, alignment, coherence`` and those of ``by``; optionally ``label`` (otherwise
            that of :func:`mechmisalign.judging.label`), ``system, history``, further rubrics, and anything else.
        by: What names a condition.
        caption: What the answers are.
        limit: Answers per condition.
        total: Answers in all: with many conditions each has fewer, one at least. An answer of 600 tokens is about 3 kB.
        rubrics: Further scores; by default every column that has a ``<column>_status`` beside it.
        facts: What else is told of an opened answer; by default every other column of text, numbers or truth values.
        seed: Another seed shows other answers.

    Raises:
        ValueError: If there is no answer, a column is missing, a prompt or response is no text, or a limit is below 1.
    """
    from mechmisalign.judging import label

    columns = (by,) if isinstance(by, str) else tuple(by)
    _refuse(judged, [*columns, "prompt", "response", *RUBRICS, *(rubrics or ()), *(facts or ())], limit, total)
    frame = judged.reset_index(drop=True)
    classes = frame["label"] if "label" in frame.columns else label(frame)
    frame = frame.assign(label=pd.Series([str(name) for name in classes], dtype=object))
    scores = (*RUBRICS, *(name for name in _rubrics(frame, rubrics) if name not in RUBRICS))
    told = tuple(facts) if facts is not None else _facts(frame, {*columns, *scores})
    conditions = condition_names(frame, columns)
    each = max(1, min(limit, total // len(set(conditions))))
    shown = frame.loc[_picked(frame, conditions, each, seed)].reset_index(drop=True)
    rule = _rule(len(shown), len(frame), each, ", ".join(columns))
    return AnswerBrowser(shown, f"{caption} {rule}".strip(), columns, scores, told)


def condition_names(frame: pd.DataFrame, by: Sequence[str]) -> pd.Series:
    """Each row's condition in writing: the value itself, or "layer 2, strength 4" where several columns name it."""
    parts = [[_written(value) for value in frame[column]] for column in by]
    if len(by) > 1:
        parts = [[f"{column} {value}" for value in part] for column, part in zip(by, parts, strict=True)]
    return pd.Series([", ".join(row) for row in zip(*parts, strict=True)], index=frame.index, dtype=object)


def equal_shares(sizes: Mapping[str, int], limit: int) -> dict[str, int]:
    """How many of each class to show: an equal share, or the whole class where it is smaller; the rarest come first."""
    shares, left = {}, limit
    for place, (name, size) in enumerate(sorted(sizes.items(), key=lambda item: (item[1], item[0]))):
        shares[name] = min(size, -(-left // (len(sizes) - place)))
        left -= shares[name]
    return shares


def _refuse(judged: pd.DataFrame, needed: Sequence[str], limit: int, total: int) -> None:
    missing = [column for column in dict.fromkeys(needed) if column not in judged.columns]
    if missing:
        raise ValueError(
            f"an answer browser needs the columns {missing}; these answers have {list(judged.columns)}. "
            "Give what judge() returns, and name the condition's columns with by"
        )
    for column in ("prompt", "response"):
        lost = next((value for value in judged[column] if not isinstance(value, str)), "")
        if lost != "":
            raise ValueError(f"the column {column!r} holds {lost!r}; an answer browser needs text in every row")
    if judged.empty:
        raise ValueError("an answer browser needs one answer or more, got none; leave it out of the section")
    if limit < 1 or total < 1:
        raise ValueError(f"limit and total must be at least 1, got limit={limit} and total={total}")


def _rubrics(frame: pd.DataFrame, named: Sequence[str] | None) -> list[str]:
    if named is not None:
        return list(named)
    stems = [str(column).removesuffix("_status") for column in frame.columns if str(column).endswith("_status")]
    return [stem for stem in stems if stem in frame.columns and pd.api.types.is_numeric_dtype(frame[stem])]


def _facts(frame: pd.DataFrame, shown: set[str]) -> tuple[str, ...]:
    spoken_for = shown | {f"{name}_status" for name in shown} | {"label", "response", *_ASKED}
    rest = [str(column) for column in frame.columns if column not in spoken_for]
    return tuple(column for column in rest if frame[column].map(pd.api.types.is_scalar).all())


def _picked(frame: pd.DataFrame, conditions: pd.Series, limit: int, seed: int) -> list[int]:
    """Positions of the answers to show, in the frame's order."""
    asked: Counter[tuple[str, str]] = Counter()
    drawn: dict[str, dict[str, list[tuple[int, int]]]] = {}  # condition -> class -> (draw, position)
    for position, key in enumerate(zip(conditions, frame["prompt"], frame["label"], strict=True)):
        condition, prompt, name = key
        draw = _draw(seed, prompt, asked[condition, prompt])
        asked[condition, prompt] += 1
        drawn.setdefault(condition, {}).setdefault(name, []).append((draw, position))
    return sorted(
        position
        for classes in drawn.values()
        for name, share in equal_shares({name: len(rows) for name, rows in classes.items()}, limit).items()
        for _, position in sorted(classes[name])[:share]
    )


def _draw(seed: int, prompt: str, number: int) -> int:
    key = hashlib.blake2b(repr((seed, prompt, number)).encode(), digest_size=7).digest()
    return int.from_bytes(key, "big")


def _rule(shown: int, there: int, each: int, by: str) -> str:
    if shown == there:
        return f"All {there:,} answers are here."
    return (
        f"Here are {shown:,} of {there:,} answers: at most {each:,} of each {by}, as equal numbers of each class as "
        "there are, so that rare classes are seen; how many there are of a class here says nothing about its rate."
    )


def _written(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
