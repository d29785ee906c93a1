"""Conversations: chat turns rendered by the tokenizer's own template, with exact token spans.

A template surrounds what was said with headers and end tokens, and may trim it. The span of the response is found from
the rendered text itself (what stands between the template's pieces), never from counting tokens of a guessed prefix, so
neither the assistant header nor the end token is averaged into it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from ._rendering import TemplateError, messages, render

Span = Literal["template", "prompt", "response", "all"]


class Batch(NamedTuple):
    """Rows of similar length, right-padded.

    Attributes:
        rows: Positions of the rows in ``Conversations.frame``.
        ids: Token ids, ``[batch pos]``.
        mask: 1 on real tokens, ``[batch pos]``.
        span: True on the tokens of the asked span, ``[batch pos]``.
    """

    rows: np.ndarray
    ids: Int[Tensor, "batch pos"]
    mask: Int[Tensor, "batch pos"]
    span: Bool[Tensor, "batch pos"]

    def part(self, rows: slice) -> Batch:
        """Some of the rows."""
        return Batch(self.rows[rows], self.ids[rows], self.mask[rows], self.span[rows])


class _Encoded(NamedTuple):
    ids: list[int]
    spans: dict[str, range]


@dataclass(frozen=True, eq=False)
class Conversations:
    """Prompts and responses, rendered and tokenised once.

    Attributes:
        frame: Columns ``prompt``, ``response``, optionally ``system``, and any labels.
        tokenizer: A fast Hugging Face tokenizer with a chat template.
        system: System prompt of every row, if the frame has no ``system`` column. None leaves it to the template, which
            may add one of its own.
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
        object.__setattr__(self, "frame", self.frame.reset_index(drop=True))

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
        return str(self.tokenizer.decode([encoded.ids[i] for i in _positions(encoded, span)]))

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
        labels = self.frame.drop(columns=["prompt", "response", "system"], errors="ignore")
        rows = [row for row, _ in index]
        return pd.DataFrame(
            {"token_id": ids, "token": [text[token] for token in ids]}
            | {str(name): labels[name].to_numpy()[rows] for name in labels.columns},
            index=pd.MultiIndex.from_tuples(index, names=["conversation", "position"]),
        )

    def batches(
        self, span: Span = "response", *, token_budget: int = 2048, first: int | None = None
    ) -> Iterator[Batch]:
        """Batches of neighbours in length, each at most ``token_budget`` tokens with its padding.

        Sorting by length keeps the padding small; it is on the right, where causal attention does not see it.

        Args:
            span: Which tokens ``Batch.span`` marks.
            token_budget: Rows times longest row of a batch.
            first: Mark only the first so many tokens of the span.
        """
        if span not in get_args(Span):
            raise ValueError(f"span must be one of {get_args(Span)}, got {span!r}")
        order = np.argsort([len(row.ids) for row in self._encoded], kind="stable")[::-1]
        start = 0
        while start < len(order):
            longest = len(self._encoded[order[start]].ids)
            rows = order[start : start + max(1, token_budget // longest)]
            yield self._batch(rows, span, first)
            start += len(rows)

    def _batch(self, rows: np.ndarray, span: Span, first: int | None) -> Batch:
        encoded = [self._encoded[row] for row in rows]
        width = max(len(row.ids) for row in encoded)
        ids = np.full((len(rows), width), pad_id(self.tokenizer), dtype=np.int64)
        mask = np.zeros((len(rows), width), dtype=np.int64)
        marked = np.zeros((len(rows), width), dtype=bool)
        for i, row in enumerate(encoded):
            ids[i, : len(row.ids)] = row.ids
            mask[i, : len(row.ids)] = 1
            marked[i, _positions(row, span)[:first]] = True
        return Batch(rows, torch.from_numpy(ids), torch.from_numpy(mask), torch.from_numpy(marked))

    @cached_property
    def _encoded(self) -> list[_Encoded]:
        systems = self.frame["system"] if "system" in self.frame.columns else [self.system] * len(self.frame)
        turns = [
            {"system": system, "user": prompt, "assistant": response}
            for system, prompt, response in zip(systems, self.frame["prompt"], self.frame["response"], strict=True)
        ]
        pieces: dict[bool, list[str]] = {}
        rendered = [render(self.tokenizer, turn, pieces) for turn in turns]
        tokens = self.tokenizer([text for text, _ in rendered], add_special_tokens=False, return_offsets_mapping=True)
        encoded = [
            _encode(ids, offsets, ranges, self.max_length)
            for ids, offsets, (_, ranges) in zip(tokens["input_ids"], tokens["offset_mapping"], rendered, strict=True)
        ]
        _refuse_empty_responses(encoded, self.max_length)
        for row in encoded[:1]:
            refuse_double_bos(row.ids, self.tokenizer)
        return encoded


def render_prompts(prompts: Sequence[str], tokenizer: Any, *, system: str | None = None) -> list[list[int]]:
    """Token ids of each prompt up to and with the assistant header: where a response begins."""
    require_chat_template(tokenizer)
    texts = [
        tokenizer.apply_chat_template(
            messages({"system": system, "user": prompt}), tokenize=False, add_generation_prompt=True
        )
        for prompt in prompts
    ]
    ids: list[list[int]] = tokenizer(texts, add_special_tokens=False)["input_ids"]
    refuse_double_bos(ids[0], tokenizer)
    return ids


def template_hash(tokenizer: Any) -> str:
    """Short hash of the chat template, for headers."""
    return hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest()[:16]


def pad_id(tokenizer: Any) -> int:
    """The padding id, or the end token's where there is none (padding is masked, so any id would do)."""
    return int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0)


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

    spans = {"prompt": tokens_of(ranges["user"]), "response": tokens_of(ranges["assistant"])}
    if "system" in ranges:
        spans["system"] = tokens_of(ranges["system"])
    return _Encoded(ids[:kept], spans)


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
