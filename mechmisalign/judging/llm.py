"""A language model behind a server as the judge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pandas as pd

from .budget import PRICES, Budget, Estimate, Price, Spent
from .controls import CONTROLS, Control, ControlReport
from .desk import AtDesk, Desk, OnFailedControls
from .inspect_calls import InspectAsker
from .journal import Journal
from .rubrics import Rubric, resolve

JOURNAL = "judgements.jsonl"


class LLMJudge(AtDesk):
    """Has a model rate each answer by each rubric, through Inspect: any provider, or any OpenAI-compatible server.

    Scores are weighted by the probabilities of the first token where the server tells them, else read from a plain
    number. Each finished call is in the journal before its score is used, and an answer that is in the journal is not
    asked again: a run that died goes on where it was. The control answers are judged first, in every run that asks.

    Args:
        model: Inspect's name of the model, ``provider/name``. For a local OpenAI-compatible server, ``openai/NAME``
            with ``base_url``. The key is read from the provider's environment variable.
        rubrics: Names (see ``RUBRICS``), or ``Rubric`` values.
        base_url: Another server than the provider's own.
        api_key: Instead of the environment variable; kept in memory only.
        journal: JSONL file of all calls; by default one in the working directory. None keeps them in memory.
        budget: Where to stop.
        price: Dollars per million tokens; by default that of ``PRICES``, if the model is there.
        temperature: Of the judge.
        seed: For servers that take one.
        logprobs: Ask for log-probabilities; False reads plain numbers only.
        max_tokens: Longest reply where numbers are read from the text; more for models that reason first.
        max_connections: Calls in flight.
        max_retries: Of one call. Each attempt counts as a call of the budget; the clients of OpenAI's providers make
            none of their own (of other providers they may).
        timeout: Seconds of one attempt.
        controls: Control answers; by default ``CONTROLS``.
        on_failed_controls: ``raise`` refuses to judge; ``warn`` goes on.
        dry_run: Ask nothing: answers that are not in the journal are ``missing``.
        model_args: More for the provider's constructor.

    Attributes:
        controls_: What it said of the controls; None before the first run.
        spent_: Calls, tokens and dollars so far.

    Example:
        >>> judge = LLMJudge("openai/gpt-4o", budget=Budget(dollars=5))
        >>> judge
        LLMJudge('openai/gpt-4o', rubrics=['alignment', 'coherence'])
    """

    def __init__(
        self,
        model: str = "openai/gpt-4o",
        rubrics: Sequence[str | Rubric] = ("alignment", "coherence"),
        *,
        base_url: str | None = None,
        api_key: str | None = None,
        journal: str | Path | None = JOURNAL,
        budget: Budget | None = None,
        price: Price | None = None,
        temperature: float = 0.0,
        seed: int | None = 0,
        logprobs: bool = True,
        max_tokens: int = 16,
        max_connections: int = 32,
        max_retries: int = 5,
        timeout: float = 120.0,
        controls: Sequence[Control] | None = None,
        on_failed_controls: OnFailedControls = "raise",
        dry_run: bool = False,
        model_args: Mapping[str, Any] | None = None,
    ) -> None:
        self.model, self.base_url, self.dry_run = model, _public_url(base_url), dry_run
        self.rubrics = resolve(rubrics)
        if max_connections < 1:
            raise ValueError(f"max_connections is {max_connections}; at least one call must be in flight")
        limits = budget or Budget()
        price = price or PRICES.get(model)
        if limits.dollars is not None and price is None:
            raise ValueError(
                f"the price of {model!r} is not known, so a budget in dollars cannot hold: pass price=Price(…)"
            )
        self.spent_ = Spent(limits, price)
        self._asker = InspectAsker(
            model, "logprobs" if logprobs else "text", self.base_url, api_key, temperature, seed, max_tokens,
            max_connections, max_retries, timeout, dict(model_args or {}), self.spent_,
        )  # fmt: skip
        self._desk = Desk(
            self._asker, self.rubrics, Journal(journal), CONTROLS if controls is None else controls, on_failed_controls
        )

    def __call__(self, frame: pd.DataFrame) -> pd.DataFrame:
        """The answers with ``<rubric>`` (0 to 100, NaN) and ``<rubric>_status`` for each rubric.

        A call that fails for good is an ``error``, what the budget does not hold is ``missing``; a warning tells how
        many.

        Args:
            frame: Columns ``prompt, response``, optionally ``history`` (turns before the prompt).

        Raises:
            JudgeAccessError: If the model is unknown, or its key missing or refused.
            DeadJudgeError: If the controls fail.
        """
        return self._desk.recalled(frame) if self.dry_run else self._desk.judge(frame)

    def __repr__(self) -> str:
        server = "" if self.base_url is None else f", base_url={self.base_url!r}"
        return f"LLMJudge({self.model!r}, rubrics={[rubric.name for rubric in self.rubrics]}{server})"

    def estimate(self, frame: pd.DataFrame, *, seconds_per_call: float = 1.0) -> Estimate:
        """What judging the frame would take from here: nothing is asked.

        Args:
            frame: The answers.
            seconds_per_call: Of the server; ``max_connections`` calls run at once.
        """
        judgements, lengths = self._desk.estimate(frame)
        tokens_out = len(lengths) * int(self._asker.settings(self._asker.mode)["max_tokens"])
        price = self.spent_.price
        return Estimate(
            judgements, len(lengths), sum(lengths), tokens_out,
            None if price is None else price.dollars(sum(lengths), tokens_out),
            seconds_per_call * len(lengths) / self._asker.max_connections,
        )  # fmt: skip

    def check_controls(self) -> ControlReport | None:
        """Judge the controls alone, unless this object did within the hour; None if the budget does not hold them.

        Raises:
            DeadJudgeError: If they fail.
        """
        self._desk.check()
        return self._desk.report


def _public_url(url: str | None) -> str | None:
    """The URL, refused where it carries a secret: it goes into the journal."""
    if url is None:
        return None
    parts = urlsplit(url)
    if parts.username or parts.password or parts.query:
        raise ValueError(
            f"base_url of {parts.hostname} carries a user, a password or a query, which would end up in files; give "
            "the plain address, and the key as api_key= or in the environment"
        )
    return url.rstrip("/")
