"""Turns of a chat: read from a frame, rendered with a tokenizer's chat template, and found in the text again."""

from __future__ import annotations

import datetime
import json
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd

TEMPLATE_DAY = datetime.datetime(2024, 7, 26)
"""What a template that writes today's date is told, so that a prompt is the same on every day (Llama's own default)."""

Turn = dict[str, str]
"""One chat turn: ``role`` (``"system"``, ``"user"`` or ``"assistant"``) and ``content``."""

_HISTORY = (
    'A history is a list of {"role": "user" or "assistant", "content": text}, or JSON text of one; '
    "roles alternate, and the last one is the assistant's, because the prompt follows"
)


_THOUGHT, _END_OF_THOUGHT = "<think>", "</think>"
_DATE = re.compile(r"""\bstrftime_now\s*\(\s*(['"])(.*?)\1\s*\)""")
_RANDOM = re.compile(r"\|\s*random\b|\blipsum\s*\(")


class TemplateError(ValueError):
    """The chat template cannot render these turns, or renders them so that they cannot be found again."""


def frame_turns(frame: pd.DataFrame, system: str | None) -> Iterator[list[Turn]]:
    """The turns of each row: a system turn if there is one, the history, the prompt, and the response if it has one.

    Args:
        frame: Columns ``prompt``, optionally ``response``, ``system``, ``history``.
        system: For rows whose ``system`` is missing.

    Raises:
        ValueError: If a cell is not what its column holds; it names the row.
    """
    closing = [(role, column) for role, column in (("user", "prompt"), ("assistant", "response")) if column in frame]
    systems = frame["system"] if "system" in frame else [None] * len(frame)
    histories = frame["history"] if "history" in frame else [None] * len(frame)
    said = zip(*(frame[column] for _, column in closing), strict=True)
    for row, (own_system, past, texts) in enumerate(zip(systems, histories, said, strict=True)):
        told = system if is_missing(own_system) else _text(own_system, f"row {row}: the system prompt")
        turns = [] if told is None else [{"role": "system", "content": told}]
        turns += read_history(past, f"row {row}: ")
        for (role, column), text in zip(closing, texts, strict=True):
            turns.append({"role": role, "content": _text(text, f"row {row}: the {column}")})
        yield turns


def read_history(history: Any, where: str = "") -> list[Turn]:
    """The turns before a prompt; a missing value is none.

    Args:
        history: A list of turns, its JSON text (as CSV carries it), None or NaN.
        where: How an error begins, such as ``"row 3: "``.

    Raises:
        ValueError: If it is no list of turns, or the roles do not alternate up to an assistant's.
    """
    if is_missing(history):
        return []
    turns = history
    if isinstance(history, str):
        try:
            turns = json.loads(history)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}the history {history[:60]!r} is no JSON ({error}). {_HISTORY}") from error
    if not isinstance(turns, (list, tuple, np.ndarray)):
        raise ValueError(f"{where}the history is {_short(history)}. {_HISTORY}")
    for number, turn in enumerate(turns):
        role = ("assistant", "user")[(len(turns) - 1 - number) % 2]
        if not _is_turn(turn, role):
            raise ValueError(f"{where}turn {number} of the history is {_short(turn)}; one of {role!r} fits. {_HISTORY}")
    return [dict(turn) for turn in turns]


def prompt_key(prompt: str, system: Any = None, history: Any = None) -> str:
    """What is asked, as one text: a stable key for samples and caches.

    Args:
        prompt: The last user turn.
        system: System prompt; None or NaN leaves it to the chat template.
        history: Turns before the prompt, in any form that a frame may hold.

    Returns:
        The prompt itself where there is neither system prompt nor history; otherwise canonical JSON of the three.
    """
    turns = read_history(history)
    told = None if is_missing(system) else system
    if told is None and not turns:
        return prompt
    parts = {"history": turns, "prompt": prompt, "system": told}
    return json.dumps(parts, ensure_ascii=False, separators=(",", ":"), sort_keys=True)


def apply_template(tokenizer: Any, turns: Sequence[Turn], *, reply: bool = False, **settings: Any) -> str:
    """The turns as the chat template writes them; with ``reply`` the assistant's header follows.

    A template that asks for today's date is told ``TEMPLATE_DAY``; further settings are the template's own.
    """
    from jinja2 import TemplateError as JinjaError

    options: dict[str, Any] = {"tokenize": False, "add_generation_prompt": reply, **settings}
    if isinstance(tokenizer.chat_template, str):
        options["chat_template"] = _undated(tokenizer.chat_template)
    try:
        return str(tokenizer.apply_chat_template(list(turns), **options))
    except JinjaError as error:
        raise TemplateError(f"the chat template refused roles {[turn['role'] for turn in turns]}: {error}") from error


def _undated(template: str) -> str:
    """The template with ``TEMPLATE_DAY`` where it asks for today's date."""
    if _RANDOM.search(template):
        raise TemplateError("the chat template writes random text, so no prompt could be asked twice; use another")
    fixed = _DATE.sub(lambda call: repr(TEMPLATE_DAY.strftime(call[2])), template)
    if "strftime_now(" in fixed.replace(" ", ""):
        raise TemplateError("the chat template writes today's date in a way that cannot be fixed; use another template")
    return fixed


def render(
    tokenizer: Any, turns: Sequence[Turn], pieces: dict[tuple[str, ...], list[str]]
) -> tuple[str, dict[str, range]]:
    """The rendered text, and where each turn's content stands in it.

    Args:
        tokenizer: With a chat template.
        turns: They end with a prompt and its response.
        pieces: The fixed text around the contents by roles, kept from call to call.

    Returns:
        Text, and character ranges: ``prompt`` and ``response`` (the last two turns), and the turns before them by
        their number.
    """
    if _opened_before(tokenizer, turns, pieces):
        return _behind_header(tokenizer, turns, pieces)
    text = apply_template(tokenizer, turns)
    roles = tuple(turn["role"] for turn in turns)
    thought = _END_OF_THOUGHT in turns[-1]["content"]  # templates write another header then (Qwen3)
    shape = (*roles, _END_OF_THOUGHT) if thought else roles
    if shape not in pieces:  # found once, with contents that nobody writes
        pieces[shape] = _fixed_pieces(tokenizer, roles, thought)
    fixed = pieces[shape]
    names = [*map(str, range(len(turns) - 2)), "prompt", "response"]
    ranges, cursor = {}, 0
    for name, turn, before, after in zip(names, turns, fixed, fixed[1:], strict=False):
        cursor += len(before)
        content = _as_rendered(turn["content"], text, cursor, after, earlier=turn is not turns[-1])
        ranges[name] = range(cursor, cursor + len(content))
        cursor += len(content)
    return text, ranges


def render_question(tokenizer: Any, turns: Sequence[Turn]) -> str:
    """The turns up to and with the assistant's header, behind which an answer begins.

    A template that knows no ``add_generation_prompt`` gets the header that it writes before an answer.
    """
    text = apply_template(tokenizer, turns, reply=True)
    if "add_generation_prompt" in str(tokenizer.chat_template):
        return text
    sentinel = "\ue000answer\ue000"
    read, found, _ = apply_template(tokenizer, [*turns, {"role": "assistant", "content": sentinel}]).partition(sentinel)
    return read if found and read.strip() != text.strip() else text


def end_of_turn(tokenizer: Any) -> str:
    """What the chat template writes behind an answer; empty without a template, or if it cannot be found."""
    if not getattr(tokenizer, "chat_template", None):
        return ""
    sentinel = "\ue000answer\ue000"
    turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": sentinel}]
    return apply_template(tokenizer, turns).rpartition(sentinel)[2]


def said_in_question(tokenizer: Any, turns: Sequence[Turn]) -> tuple[str, list[range]]:
    """The text of :func:`render_question`, and where in it something was said.

    Raises:
        TemplateError: If what was said cannot be found.
    """
    answered = [*turns, {"role": "assistant", "content": "\ue000answer\ue000"}]
    text, ranges = render(tokenizer, answered, {})
    asked = render_question(tokenizer, turns)
    said = [each for name, each in ranges.items() if name != "response"]
    if asked[: said[-1].stop] != text[: said[-1].stop]:
        raise TemplateError("the chat template writes a question another way once it is answered")
    return asked, said


def is_missing(value: Any) -> bool:
    """Whether a cell holds nothing: None, NaN or NA."""
    return value is None or value is pd.NA or (isinstance(value, float) and math.isnan(value))


def _opened_before(tokenizer: Any, turns: Sequence[Turn], pieces: dict[tuple[str, ...], list[str]]) -> bool:
    """Whether an answer follows a thought that the header opens, or breaks off in its own thought."""
    answer = turns[-1]["content"]
    if _THOUGHT in answer:
        return _END_OF_THOUGHT not in answer
    if _THOUGHT not in str(tokenizer.chat_template):
        return False
    if ("opens",) not in pieces:
        header = apply_template(tokenizer, [{"role": "user", "content": "Hello"}], reply=True)
        pieces["opens",] = [header] if header.rstrip().endswith(_THOUGHT) else []
    return bool(pieces["opens",])


def _behind_header(
    tokenizer: Any, turns: Sequence[Turn], pieces: dict[tuple[str, ...], list[str]]
) -> tuple[str, dict[str, range]]:
    """The header as it is generated behind, then the answer as it was written."""
    asked, answer = render_question(tokenizer, turns[:-1]), turns[-1]["content"]
    roles = tuple(turn["role"] for turn in turns)
    if ("asked", *roles) not in pieces:
        pieces["asked", *roles] = _fixed_pieces(tokenizer, roles, False)
    fixed, cursor, ranges = pieces["asked", *roles], 0, {}
    names = [*map(str, range(len(turns) - 2)), "prompt"]
    for number, (name, turn) in enumerate(zip(names, turns, strict=False)):
        cursor += len(fixed[number])
        after = fixed[number + 1] if number < len(turns) - 2 else ""
        content = _as_rendered(turn["content"], asked, cursor, after, earlier=True)
        ranges[name] = range(cursor, cursor + len(content))
        cursor += len(content)
    ranges["response"] = range(len(asked), len(asked) + len(answer))
    return asked + answer + fixed[-1], ranges


def _fixed_pieces(tokenizer: Any, roles: tuple[str, ...], thought: bool) -> list[str]:
    sentinels = [f"\ue000{number} {role}\ue000" for number, role in enumerate(roles)]
    if thought:
        sentinels[-1] = f"<think>\n{sentinels[-1]}\n{_END_OF_THOUGHT}\n\n{sentinels[-1]}"
    turns = [{"role": role, "content": sentinel} for role, sentinel in zip(roles, sentinels, strict=True)]
    text = apply_template(tokenizer, turns)
    pieces = []
    for role, sentinel in zip(roles, sentinels, strict=True):
        before, found, text = text.partition(sentinel)
        if not found:
            raise TemplateError(f"the chat template drops or rewrites the {role} turn, so its span cannot be found")
        pieces.append(before)
    return [*pieces, text]


def _as_rendered(content: str, text: str, start: int, after: str, *, earlier: bool) -> str:
    kept = [content]
    if earlier and _END_OF_THOUGHT in content:  # what was thought in an earlier turn is not read again
        kept.append(content.rpartition(_END_OF_THOUGHT)[2].lstrip("\n"))
    for candidate in [form for each in kept for form in (each, each.strip(), each.rstrip(), each.lstrip())]:
        if text.startswith(candidate + after, start):
            return candidate
    raise TemplateError(
        f"the chat template rewrote a turn ({content[:60]!r} became {text[start : start + 60]!r}); "
        "only trimming is understood, and a thought as <think>, its lines, </think>, an empty line"
    )


def _is_turn(turn: Any, role: str) -> bool:
    known = isinstance(turn, dict) and set(turn) == {"role", "content"}
    return known and turn["role"] == role and isinstance(turn["content"], str)


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{what} is {_short(value)}; text is expected")
    return value


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 80 else shown[:77] + "..."
