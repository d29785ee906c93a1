"""Conversations read at the one token before the response: where everything asked is known and nothing is said yet."""

from __future__ import annotations

from collections.abc import Iterator

from ._batching import Batch, batches_by_length, pad_id
from .conversations import Conversations, Span


class _BeforeResponse(Conversations):
    """Their batches mark the token before the response, whatever span is asked for."""

    def batches(
        self,
        span: Span = "response",  # noqa: ARG002
        *,
        token_budget: int = 2048,
        first: int | None = None,  # noqa: ARG002
    ) -> Iterator[Batch]:
        starts = [int(start) for start in self.spans["response_start"]]
        ids = [self.ids(row)[:start] for row, start in enumerate(starts)]
        marked: list[list[int]] = [[start - 1] for start in starts]
        yield from batches_by_length(ids, marked, pad_id(self.tokenizer), token_budget=token_budget)


def before_response(conversations: Conversations) -> Conversations:
    """The conversations, to be read at the last token before each response (``prompt_last``).

    It belongs to the assistant's header in most templates; what follows it is not read, as it cannot matter.
    """
    return _BeforeResponse(conversations.frame, conversations.tokenizer, conversations.system, conversations.max_length)
