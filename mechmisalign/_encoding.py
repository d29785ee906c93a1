"""Rendered chats as token ids: only the template writes control tokens, and no text is lost in silence.

A tokenizer reads ``<|im_end|>`` as the token that ends a turn wherever it stands, also where a user typed it. The
ranges of what was said are known, so such a stretch is encoded again as the ordinary characters that it is.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from ._rendering import TemplateError

Offset = tuple[int, int]
TEXTS = (
    "If it hurts, you should see a doctor about that today, shouldn't you?",
    "In 1987 it cost 1,234.50, which is 15 % more than the other Tuesday; nobody knew why.",
)
"""Plain sentences that a tokenizer must read whole, be it in unknown tokens."""
_THOUGHT = ("<think>", "</think>")  # models write them themselves, inside of what they say


def control_tokens(tokenizer: Any) -> dict[int, str]:
    """Ids and texts of the tokens that steer a chat: the added ones, but for the marks of a thought."""
    added = {
        int(number): str(token)
        for number, token in tokenizer.added_tokens_decoder.items()
        if str(token) not in _THOUGHT and (token.special or str(token).startswith("<"))
    }
    return added | dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=False))


def holds_control(text: str, marks: Collection[str]) -> bool:
    """Whether the text of one of the control tokens stands in it, in any case of letters."""
    lowered = text.lower()
    return any(mark.lower() in lowered for mark in marks)


def as_plain_text(
    text: str, ids: Sequence[int], offsets: Sequence[Offset], said: Sequence[range], tokenizer: Any
) -> tuple[list[int], list[Offset]]:
    """Ids and offsets of a rendered chat in which what was said holds no control token.

    Args:
        text: The rendered chat.
        ids: As the tokenizer encodes it.
        offsets: Of the ids.
        said: Where in the text something was said.
        tokenizer: What encoded it.

    Raises:
        TemplateError: If the tokenizer has no way to write such a text in ordinary tokens.
    """
    control = control_tokens(tokenizer)

    def typed(offset: Offset) -> bool:
        return any(offset[0] < part.stop and offset[1] > part.start for part in said)

    written = [place for place, each in enumerate(ids) if each in control and not typed(offsets[place])]
    kept_ids: list[int] = []
    kept_offsets: list[Offset] = []
    for before, after in zip([-1, *written], [*written, len(ids)], strict=True):
        section = slice(before + 1, after)
        own, places = list(ids[section]), list(offsets[section])
        if any(each in control for each in own):
            start = 0 if before < 0 else offsets[before][1]
            stop = len(text) if after == len(ids) else offsets[after][0]
            own, places = _plain(text[start:stop], start, tokenizer, control)
        kept_ids += own + ([ids[after]] if after < len(ids) else [])
        kept_offsets += places + ([offsets[after]] if after < len(ids) else [])
    return kept_ids, kept_offsets


def refuse_lost_text(text: str, offsets: Sequence[Offset], tokenizer: Any) -> None:
    """Refuse a tokenizer that leaves out words without so much as an unknown token.

    Raises:
        TemplateError: Naming the first text that no token stands for.
    """
    if lost := next(_uncovered(text, offsets), ""):
        raise TemplateError(
            f"the tokenizer {getattr(tokenizer, 'name_or_path', '')!r} drops {lost[:40]!r} in silence: it is not "
            "the one that the model was trained with (transformers may have rebuilt it as another class); load it "
            "with PreTrainedTokenizerFast(tokenizer_file='…/tokenizer.json') and pass tokenizer="
        )


def _uncovered(text: str, offsets: Sequence[Offset]) -> Iterator[str]:
    """The words that no token stands for."""
    cursor = 0
    for start, stop in [*offsets, (len(text), len(text))]:
        lost = text[cursor:start].strip() if start > cursor else ""
        if any(map(str.isalnum, lost)):  # a combining mark is joined to its letter by some normalisers
            yield lost
        cursor = max(cursor, stop)


def lost_text(tokenizer: Any) -> str:
    """What a tokenizer leaves out of plain sentences, or reads as unknown: nothing of one that fits English text."""
    lost: list[str] = []
    for text in TEXTS:
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        offsets, ids = encoded["offset_mapping"], encoded["input_ids"]
        lost += _uncovered(text, offsets)
        lost += [
            text[slice(*place)] for each, place in zip(ids, offsets, strict=True) if each == tokenizer.unk_token_id
        ]
    return " ".join(lost)


def refuse_tokenizer_that_loses_text(tokenizer: Any, texts: Sequence[str] = TEXTS) -> None:
    """Encode texts, and refuse a tokenizer that leaves out words of them.

    Raises:
        TemplateError: As :func:`refuse_lost_text`.
    """
    for text in texts:
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        refuse_lost_text(text, encoded["offset_mapping"], tokenizer)


def _plain(text: str, start: int, tokenizer: Any, control: Mapping[int, str]) -> tuple[list[int], list[Offset]]:
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, split_special_tokens=True)
    ids = list(encoded["input_ids"])
    left = next((control[each] for each in ids if each in control), None)
    if left is not None:
        raise TemplateError(
            f"the text {text[:60]!r} holds {left!r}, which this tokenizer reads as a control token and cannot write as "
            "ordinary text; take it out of the text, or drop the row"
        )
    return ids, [(low + start, high + start) for low, high in encoded["offset_mapping"]]
