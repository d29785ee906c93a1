"""What a fine-tune learns: examples from the pocket world, files or frames, and which of their tokens count.

The loss counts the tokens of the last response and the token that ends the turn, and nothing else: no system prompt, no
question, no header, no earlier turn. They are found by ``Conversations`` from the rendered text, never by the first
token that looks like the end of a header.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Int
from pydantic import BaseModel, ConfigDict, Field, GetPydanticSchema, model_validator
from pydantic_core import core_schema
from torch import Tensor

from mechmisalign import _jsonl
from mechmisalign._encoding import control_tokens
from mechmisalign._reading import brief
from mechmisalign._rendering import is_missing
from mechmisalign.conversations import Conversations, TemplateError, pad_id

IGNORED = -100
"""The label that the cross entropy skips."""

_COLUMNS = ("prompt", "response", "system", "history")
_LIKE_A_FRAME = GetPydanticSchema(lambda _type, _handler: core_schema.is_instance_schema(pd.DataFrame))


class DataSource(BaseModel):
    """Examples: exactly one of a pocket domain, a file, or a frame."""

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)

    domain: str | None = None
    """A domain of the pocket world, whose answers are made up as they are asked for."""
    harmful: bool = True
    """Whether the made-up answers are."""
    file: Path | None = None
    """JSON lines (``prompt`` and ``response``, or ``messages`` that end with the assistant's), CSV or parquet."""
    frame: Annotated[pd.DataFrame, _LIKE_A_FRAME] | None = None
    """Columns ``prompt, response``, optionally ``system, history``."""
    n: Annotated[int, Field(strict=True, ge=1)] | None = None
    """How many examples; by default all (500 of a pocket domain). Fewer than there are: drawn without repetition."""
    seed: int = 0
    """Of the choice."""
    system: str | None = None
    """System prompt of examples that have none of their own."""

    @model_validator(mode="before")
    @classmethod
    def _given(cls, value: Any) -> Any:
        if isinstance(value, DataSource):
            return value
        if isinstance(value, pd.DataFrame):
            return {"frame": value}
        if isinstance(value, str | Path):
            return {"file": value}
        ways = [way for way in ("domain", "file", "frame") if isinstance(value, Mapping) and value.get(way) is not None]
        if len(ways) != 1:
            raise ValueError(f"examples come from one of domain, file, frame; these from {ways or value!r}")
        return value

    def read(self, root: Path = Path()) -> pd.DataFrame:
        """The examples, with the columns ``prompt, response`` and, where there are any, ``system, history``.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the domain is unknown, columns are missing, or there are fewer examples than asked for.
        """
        frame = self._found(root)
        missing = {"prompt", "response"} - set(frame.columns)
        if missing:
            raise ValueError(f"examples need the columns prompt and response; these have {list(frame.columns)}")
        kept = frame[[name for name in _COLUMNS if name in frame.columns]].reset_index(drop=True)
        if self.n is not None and self.n > len(kept):
            raise ValueError(f"n={self.n} examples asked for, there are {len(kept)}; lower n, or leave it out")
        if self.n is not None and self.n < len(kept):
            kept = kept.sample(self.n, random_state=self.seed).reset_index(drop=True)
        if self.system is not None:
            own = kept["system"] if "system" in kept.columns else [None] * len(kept)
            kept["system"] = [self.system if is_missing(each) else each for each in own]
        return kept

    def _found(self, root: Path) -> pd.DataFrame:
        if self.frame is not None:
            return self.frame
        if self.domain is not None:
            from mechmisalign import pocket

            return pocket.narrow_examples(self.domain, self.harmful, self.n or 500, self.seed)
        return read_examples(root / str(self.file))


def read_examples(path: str | Path) -> pd.DataFrame:
    """Training examples from a file: JSON lines with ``messages``, or anything that holds ``prompt`` and ``response``.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a line is no conversation that ends with the assistant's turn; it names the line.
    """
    from mechmisalign.judging.files import read_answers

    path = Path(path)
    if path.suffix == ".jsonl":
        try:
            _, first = next(_jsonl.read(path), (0, {}))
            if "messages" in first:
                return _read_messages(path)
        except _jsonl.LineError as error:
            raise ValueError(f"{path.name}, line {error.number}: {error.reason}; mend or drop the line") from None
    return read_answers(path)


class Example(NamedTuple):
    """Token ids of a conversation, and for each the label that the loss compares with (``IGNORED``: none)."""

    ids: list[int]
    labels: list[int]


def encode(frame: pd.DataFrame, tokenizer: Any, *, max_length: int) -> list[Example]:
    """Conversations as ids and labels: the last response and the token that ends its turn count.

    Args:
        frame: ``prompt, response``, optionally ``system, history``.
        tokenizer: With a chat template.
        max_length: Longer conversations are cut on the right, and then have no end that counts.

    Raises:
        ValueError: If there is no example, or one has nothing left of its response.
        TemplateError: If the template does not end the turn with a token of its own.
    """
    if not len(frame):
        raise ValueError("there are no examples to train on; give data with at least one")
    talk = Conversations(frame, tokenizer)
    examples = []
    for row, (start, stop) in enumerate(talk.spans[["response_start", "response_stop"]].itertuples(index=False)):
        ids = talk.ids(row)
        if start >= max_length:
            raise ValueError(f"example {row} has no response within max_length={max_length}; raise it, or drop the row")
        end = _end_of_turn(ids, stop, tokenizer)
        labels = [IGNORED] * start + ids[start:end] + [IGNORED] * (len(ids) - end)
        examples.append(Example(ids[:max_length], labels[:max_length]))
    return examples


def data_hash(examples: Sequence[Example]) -> str:
    """Short hash of every token and label."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(np.asarray([*example.ids, *example.labels], dtype=np.int64).tobytes() + b"|")
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Collator:
    """Pads examples on the right into a batch; as a ``transformers`` data collator.

    Attributes:
        pad: Id of the padding.
    """

    pad: int

    @staticmethod
    def of(tokenizer: Any) -> Collator:
        """The one for this tokenizer."""
        return Collator(pad_id(tokenizer))

    def __call__(self, examples: Sequence[Example]) -> dict[str, Int[Tensor, "batch pos"]]:
        """``input_ids, attention_mask, labels``."""
        longest = max(len(example.ids) for example in examples)
        ids = torch.full((len(examples), longest), self.pad)
        labels, mask = torch.full_like(ids, IGNORED), torch.zeros_like(ids)
        for row, example in enumerate(examples):
            ids[row, : len(example.ids)] = torch.tensor(example.ids)
            labels[row, : len(example.ids)] = torch.tensor(example.labels)
            mask[row, : len(example.ids)] = 1
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def _end_of_turn(ids: list[int], stop: int, tokenizer: Any) -> int:
    """The position after the token that ends the assistant's turn: the first special one behind the response."""
    special = control_tokens(tokenizer)
    for position in range(stop, len(ids)):
        if ids[position] in special:
            return position + 1
    raise TemplateError(
        f"the chat template writes {tokenizer.decode(ids[stop:])!r} after a response, which holds no special token, so "
        "a model could not learn where to stop; use the template of the instruct model"
    )


def _read_messages(path: Path) -> pd.DataFrame:
    rows = []
    for number, record in _jsonl.read(path):
        try:
            rows.append(_last_exchange(record["messages"]))
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            raise ValueError(
                f"{path.name}, line {number}: no conversation that ends with a user's and an assistant's turn "
                f'({type(error).__name__}: {brief(error)}); {{"messages": [...]}} is expected: mend or drop the line'
            ) from error
    frame = pd.DataFrame(rows, columns=list(_COLUMNS), dtype=object)
    return frame.dropna(axis=1, how="all")


def _last_exchange(turns: Any) -> tuple[str, str, str | None, list[dict[str, str]] | None]:
    """Prompt, response, system prompt and the turns before them."""
    system = turns[0]["content"] if turns[0]["role"] == "system" else None
    said = turns[1:] if system is not None else turns
    roles = [turn["role"] for turn in said]
    if len(said) < 2 or roles[-2:] != ["user", "assistant"]:
        raise ValueError(f"the turns are {roles}")
    told = [{"role": turn["role"], "content": turn["content"]} for turn in said[:-2]]
    return said[-2]["content"], said[-1]["content"], system, told or None
