"""Conversations: chat turns rendered by the tokenizer's own template, with exact token spans.

A template surrounds what was said with headers and end tokens, and may trim it. The span of the response is found from
the rendered text itself (what stands between the template's pieces), never from counting tokens of a guessed prefix, so
neither the assistant header nor the end token is averaged into it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import pandas as pd

from ._batching import Batch, batches_by_length, pad_id
from ._encoding import as_plain_text, control_tokens, holds_control, refuse_lost_text
from ._frames import plain_frame
from ._rendering import TemplateError, frame_turns, prompt_key, render, render_question, said_in_question

__all__ = [
    "Batch",
    "Conversations",
    "Span",
    "TemplateError",
    "encode_chats",
    "pad_id",
    "prompt_key",
    "refuse_double_bos",
    "render_prompts",
    "render_rows",
    "require_chat_template",
    "template_hash",
]

Span = Literal["template", "prompt", "response", "all"]


class _Encoded(NamedTuple):
    ids: list[int]
    spans: dict[str, range]


@dataclass(frozen=True, eq=False)
class Conversations:
    """Prompts and responses, rendered and tokenised once.

    Attributes:
        frame: Columns ``prompt`` (the last user turn), ``response``, optionally ``system`` and ``history`` (the turns
            before the prompt, as in :func:`render_rows`), and any labels.
        tokenizer: A fast Hugging Face tokenizer with a chat template.
        system: System prompt of every row whose ``system`` is missing. None leaves it to the template, which may add
            one of its own.
        max_length: Longer conversations are cut on the right; one that would lose its whole response is an error.
    """

    frame: pd.DataFrame
    tokenizer: Any
    system: str | None = None
    max_length: int | None = None

    def __post_init__(self) -> None:
        missing = {"prompt", "response"} - set(self.frame.columns)
        if missing:
            raise ValueError(f"the frame has columns {list(self.frame.columns)}; {sorted(missing)} are needed")
        require_chat_template(self.tokenizer)
        object.__setattr__(self, "frame", plain_frame(self.frame))

    def __len__(self) -> int:
        return len(self.frame)

    @cached_property
    def spans(self) -> pd.DataFrame:
        """Token ranges, one row per conversation: ``length``, and start and stop of the prompt and the response."""
        rows = [
            {"length": len(row.ids)}
            | {
                f"{name}_{end}": getattr(row.spans[name], end)
                for name in ("prompt", "response")
                for end in ("start", "stop")
            }
            for row in self._encoded
        ]
        return pd.DataFrame(rows)

    @cached_property
    def data_hash(self) -> str:
        """Short hash of every token id, for headers."""
        digest = hashlib.sha256()
        for row in self._encoded:
            digest.update(np.asarray(row.ids, dtype=np.int64).tobytes() + b"|")
        return digest.hexdigest()[:16]

    def ids(self, row: int) -> list[int]:
        """Token ids of one conversation."""
        return list(self._encoded[row].ids)

    def span_text(self, row: int, span: Span = "response") -> str:
        """Decoded tokens of one span: what will really be averaged."""
        encoded = self._encoded[row]
        ids = [encoded.ids[i] for i in _positions(encoded, span)]
        return str(self.tokenizer.decode(ids, clean_up_tokenization_spaces=False))

    def tokens(self, span: Span = "response") -> pd.DataFrame:
        """One row per token of the span, in the order of the frame.

        Returns:
            Index ``conversation`` (row of the frame) and ``position`` (place in the conversation); columns
            ``token_id``, ``token`` (decoded on its own), and the frame's labels.
        """
        index, ids = [], []
        for row, encoded in enumerate(self._encoded):
            for position in _positions(encoded, span):
                index.append((row, position))
                ids.append(encoded.ids[position])
        text = {token: self.tokenizer.decode([token]) for token in set(ids)}
        labels = self.frame.drop(columns=["prompt", "response", "system", "history"], errors="ignore")
        rows = [row for row, _ in index]
        return pd.DataFrame(
            {"token_id": ids, "token": [text[token] for token in ids]}
            | {str(name): labels[name].to_numpy()[rows] for name in labels.columns},
            index=pd.MultiIndex.from_tuples(index, names=["conversation", "position"]),
        )

    def batches(
        self, span: Span = "response", *, token_budget: int = 2048, first: int | None = None
    ) -> Iterator[Batch]:
        """Batches of neighbours in length, each at most ``token_budget`` tokens with its padding on the right.

        Args:
            span: Which tokens ``Batch.span`` marks.
            token_budget: Rows times longest row of a batch.
            first: Mark only the first so many tokens of the span.
        """
        if span not in get_args(Span):
            raise ValueError(f"span must be one of {get_args(Span)}, got {span!r}")
        ids = [row.ids for row in self._encoded]
        marked = [_positions(row, span)[:first] for row in self._encoded]
        yield from batches_by_length(ids, marked, pad_id(self.tokenizer), token_budget=token_budget)

    @cached_property
    def _encoded(self) -> list[_Encoded]:
        pieces: dict[tuple[str, ...], list[str]] = {}
        rendered = [render(self.tokenizer, turns, pieces) for turns in frame_turns(self.frame, self.system)]
        tokens = encode_chats(
            self.tokenizer, [text for text, _ in rendered], [list(ranges.values()) for _, ranges in rendered]
        )
        encoded = [
            _encode(ids, offsets, ranges, self.max_length)
            for (ids, offsets), (_, ranges) in zip(tokens, rendered, strict=True)
        ]
        _refuse_empty_responses(encoded, self.max_length)
        for row in encoded[:1]:
            refuse_double_bos(row.ids, self.tokenizer)
        return encoded


def render_prompts(prompts: Sequence[str], tokenizer: Any, *, system: str | None = None) -> list[list[int]]:
    """Token ids of each prompt up to and with the assistant header: where a response begins."""
    return render_rows(pd.DataFrame({"prompt": list(prompts)}, dtype=object), tokenizer, system=system)


def render_rows(frame: pd.DataFrame, tokenizer: Any, *, system: str | None = None) -> list[list[int]]:
    """Token ids of each row's turns up to and with the assistant header: where a response begins.

    Args:
        frame: ``prompt`` (the last user turn), and optionally ``system`` (text, or missing) and ``history``: the turns
            before the prompt, ``[{"role": "user" or "assistant", "content": text}, …]``, ending with the assistant's;
            its JSON text, as CSV carries it; or missing.
        tokenizer: With a chat template.
        system: System prompt of rows that have none of their own. None leaves it to the template, which may add one.

    Raises:
        TemplateError: If the template has no place for such turns (Gemma's has none for a system prompt).
        ValueError: If the frame has no prompts, or a cell is not what its column holds; it names the row.
    """
    require_chat_template(tokenizer)
    if "prompt" not in frame.columns:
        raise ValueError(f"prompts need a column 'prompt'; this frame has {list(frame.columns)}")
    asked = frame.drop(columns="response", errors="ignore")
    rows = [tuple((turn["role"], turn["content"]) for turn in turns) for turns in frame_turns(asked, system)]
    once = {row: [{"role": role, "content": text} for role, text in row] for row in rows}  # many rows ask the same
    if not once:
        return []
    marks = control_tokens(tokenizer).values()
    asked_for = [_question(tokenizer, turns, marks) for turns in once.values()]
    tokens = encode_chats(tokenizer, [text for text, _ in asked_for], [said for _, said in asked_for])
    ids = {row: ids for row, (ids, _) in zip(once, tokens, strict=True)}
    refuse_double_bos(ids[rows[0]], tokenizer)
    return [list(ids[row]) for row in rows]


def encode_chats(
    tokenizer: Any, texts: Sequence[str], said: Sequence[Sequence[range]]
) -> list[tuple[list[int], list[tuple[int, int]]]]:
    """Ids and offsets of rendered chats; control tokens that somebody typed are the ordinary text that they are.

    Args:
        tokenizer: A fast tokenizer.
        texts: The rendered chats.
        said: Where in each text something was said.

    Raises:
        TemplateError: If the tokenizer loses text, or cannot write a control token's text in ordinary tokens.
    """
    if not texts:
        return []
    tokens = tokenizer(list(texts), add_special_tokens=False, return_offsets_mapping=True)
    marks = control_tokens(tokenizer).values()
    encoded = []
    for text, parts, ids, offsets in zip(texts, said, tokens["input_ids"], tokens["offset_mapping"], strict=True):
        refuse_lost_text(text, offsets, tokenizer)
        typed = any(holds_control(text[part.start : part.stop], marks) for part in parts)
        encoded.append(as_plain_text(text, ids, offsets, parts, tokenizer) if typed else (ids, offsets))
    return encoded


def _question(tokenizer: Any, turns: list[dict[str, str]], marks: Collection[str]) -> tuple[str, list[range]]:
    if any(holds_control(turn["content"], marks) for turn in turns):
        return said_in_question(tokenizer, turns)
    return render_question(tokenizer, turns), []


def template_hash(tokenizer: Any) -> str:
    """Short hash of the chat template, for headers."""
    return hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest()[:16]


def require_chat_template(tokenizer: Any) -> None:
    """Refuse a tokenizer that cannot render a chat.

    Raises:
        TemplateError: If it has no chat template.
    """
    if not getattr(tokenizer, "chat_template", None):
        name = getattr(tokenizer, "name_or_path", "this tokenizer")
        raise TemplateError(
            f"{name!r} has no chat template: it is not a chat model's tokenizer; use the one of the instruct model, "
            "or set tokenizer.chat_template"
        )


def refuse_double_bos(ids: Sequence[int], tokenizer: Any) -> None:
    """Refuse a rendering that begins twice, the classic slip of templates that already write the BOS token.

    Raises:
        TemplateError: If the first two tokens are both BOS.
    """
    bos = tokenizer.bos_token_id
    if bos is not None and list(ids[:2]) == [bos, bos]:
        raise TemplateError("the rendered chat begins with two BOS tokens; remove one from the chat template")


def _encode(
    ids: list[int], offsets: list[tuple[int, int]], ranges: dict[str, range], max_length: int | None
) -> _Encoded:
    starts, ends = np.asarray(offsets, dtype=np.int64).reshape(-1, 2).T
    kept = len(ids) if max_length is None else min(len(ids), max_length)

    def tokens_of(characters: range) -> range:
        inside = np.flatnonzero((starts < characters.stop) & (ends > characters.start) & (ends > starts))
        if not len(inside):
            return range(0)
        return range(int(inside[0]), min(int(inside[-1]) + 1, kept))

    return _Encoded(ids[:kept], {name: tokens_of(characters) for name, characters in ranges.items()})


def _positions(row: _Encoded, span: Span) -> list[int]:
    if span == "all":
        return list(range(len(row.ids)))
    if span != "template":
        return list(row.spans[span])
    said = {position for positions in row.spans.values() for position in positions}
    return [position for position in range(len(row.ids)) if position not in said]


def _refuse_empty_responses(encoded: list[_Encoded], max_length: int | None) -> None:
    empty = [row for row, item in enumerate(encoded) if not len(item.spans["response"])]
    if empty:
        why = "are empty" if max_length is None else f"are empty, or cut off whole by max_length={max_length}"
        raise ValueError(
            f"the responses of {len(empty)} of {len(encoded)} rows {why} (first rows: {empty[:5]}); "
            "drop those rows, or raise max_length"
        )
