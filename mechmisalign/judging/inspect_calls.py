"""The seam to Inspect: many calls to one model at once, each to its own end.

The providers and their clients are Inspect's (``inspect_ai.model.get_model``). What is added: a fixed number of workers
that pull prompts from an iterator, so memory does not grow with the run; failures as values, so that one lost call
loses no other; the budget; and no key in any text.
"""

from __future__ import annotations

import asyncio
import os
import re
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from mechmisalign.progress import progress_bar

from .asking import Ask, Done
from .attempts import attempted
from .budget import Budget, Spent, rough_tokens
from .journal import Mode
from .redaction import SHORTEST, redacted, secrets, without
from .running import finish, rare_collections
from .scores import Reply

TOP = 20
"""Log-probabilities asked for; more than any known server gives."""
_OF_THE_CLIENT = frozenset(("max_retries", "timeout", "client_timeout", "http_client", "stream", "streaming"))
"""Arguments of a provider that say how calls travel, not what is asked."""
_REASON = 300
_FATAL_FIRST, _FATAL_ALWAYS = (401, 403, 404), (401,)
_RETRIES_FIRST = 2
"""Of the first call of all: a server that is not there is told in seconds, not minutes."""
_OWN_RETRIES = ("openai/", "openai-api/")
"""Providers whose client tries again by itself, unseen by the budget, unless it is told not to."""
_NO_SUCH_SETTING = (400, 422)


class JudgeAccessError(ValueError):
    """The judge's model cannot be reached with this name and key; trying again would not help."""


@dataclass(eq=False)
class InspectAsker:
    """Asks one model through Inspect.

    Attributes:
        model: Inspect's name of it, ``provider/model``.
        wanted: Whether log-probabilities are asked for.
        base_url: Of an OpenAI-compatible server, or None for the provider's own.
        api_key: None takes it from the provider's environment variable.
        temperature: Of the replies.
        seed: For servers that take one.
        max_tokens: Longest reply in text mode.
        max_connections: Calls in flight.
        max_retries: Of one call.
        timeout: Seconds of one attempt.
        model_args: More for the provider's constructor.
        spent: The account that every call is written to.
    """

    model: str
    wanted: Mode
    base_url: str | None
    api_key: str | None = field(repr=False)
    temperature: float
    seed: int | None
    max_tokens: int
    max_connections: int
    max_retries: int
    timeout: float
    model_args: Mapping[str, Any]
    spent: Spent

    def __post_init__(self) -> None:
        self.mode: Mode = self.wanted
        self._reached = False
        self._stop = threading.Event()

    def identity(self) -> Mapping[str, Any]:
        """Model, server and sampling: the same name at another server can be another model, so the server counts."""
        return {
            "model": self.model,
            "base_url": self.base_url or _url_in_environment(self.model),
            "temperature": self.temperature,
            "seed": self.seed,
            "model_args": {name: repr(self.model_args[name]) for name in sorted(set(self.model_args) - _OF_THE_CLIENT)},
        }

    def settings(self, mode: Mode) -> Mapping[str, Any]:
        """Tokens and log-probabilities."""
        if mode == "text":
            return {"max_tokens": self.max_tokens}
        return {"max_tokens": 1, "logprobs": True, "top_logprobs": TOP}

    def ask(self, asks: Iterable[Ask], total: int, done: Done) -> str | None:
        """Make the calls; see ``asking.Asker``.

        Raises:
            JudgeAccessError: If the model is unknown, or the key is missing or refused.
        """
        self._stop.clear()
        with rare_collections():
            return finish(lambda: self._ask_all(iter(asks), total, done), stop=self._stop.set)

    async def _ask_all(self, asks: Iterator[Ask], total: int, done: Done) -> str | None:
        run = _Run(asks, done, secrets(self.api_key), patience=max(20, 2 * self.max_connections))
        model = await self._model()
        async with model:
            with progress_bar("judging", total, "call") as bar:
                workers = [self._work(model, run, bar) for _ in range(min(self.max_connections, max(total, 1)))]
                results = await asyncio.gather(*workers, return_exceptions=True)
        for result in results:
            if result is not None:
                raise result
        return run.stopped

    async def _work(self, model: Any, run: _Run, bar: Any) -> None:
        try:
            while run.stopped is None and not self._stop.is_set() and (ask := next(run.asks, None)) is not None:
                reply, details = await self._call(model, ask.prompt, self.mode, run)
                if reply is None and not details:
                    return  # refused by the budget: nothing was sent
                run.done(ask, reply, details)
                run.count(reply, details)
                bar.update()
        except BaseException as error:  # the journal cannot be written, or no call can work: no worker goes on
            run.stopped = run.stopped or str(error)
            raise

    async def _call(self, model: Any, prompt: str, mode: Mode, run: _Run) -> tuple[Reply | None, dict[str, Any]]:
        """One call: its reply or None, and details; in text mode again where there are no log-probabilities."""
        reserved = (rough_tokens(prompt), int(self.settings(mode)["max_tokens"]))
        if not self.spent.begin(*reserved):
            run.stopped = _over(self.spent.budget)
            return None, {}
        retries = self.max_retries if self._reached else min(self.max_retries, _RETRIES_FIRST)
        open_ = True  # something is set aside for the attempt that runs

        def again(failure: Exception) -> bool:
            nonlocal open_
            self.spent.settle(reserved, _used_by(failure, reserved))
            open_ = self.spent.begin(*reserved)
            run.stopped = run.stopped if open_ else _over(self.spent.budget)
            return open_

        output = await attempted(model, prompt, self._config(mode), retries=retries, timeout=self.timeout, again=again)
        if isinstance(output, Exception):
            if open_:
                self.spent.settle(reserved, _used_by(output, reserved))
            return await self._failed(output, model, prompt, mode, run)
        used = _usage(output) or reserved
        self.spent.settle(reserved, used)
        details = {"model": self.model, "base_url": self.base_url, "tokens_in": used[0], "tokens_out": used[1]}
        problem, reply = _reply(output)
        if problem is not None:
            return None, details | {"reason": redacted(problem, self.api_key)[:_REASON]}
        self._reached = True
        if mode == "logprobs" and reply.top is None:
            return await self._call(model, prompt, "text", run)
        return _clean(reply, run.secrets), details

    async def _failed(
        self, error: Exception, model: Any, prompt: str, mode: Mode, run: _Run
    ) -> tuple[Reply | None, dict[str, Any]]:
        status = getattr(error, "status_code", None)
        if mode == "logprobs" and status in _NO_SUCH_SETTING:  # some models refuse to be asked for them
            return await self._call(model, prompt, "text", run)
        reason = redacted(f"{type(error).__name__}: {error}", self.api_key)[:_REASON]
        if status in (_FATAL_ALWAYS if self._reached else _FATAL_FIRST):
            run.stopped = reason
            raise JudgeAccessError(
                f"{self.model!r} cannot be used as a judge: {reason}. Check the model's name and the API key; "
                "what was judged before is in the journal"
            )
        return None, {"model": self.model, "base_url": self.base_url, "reason": reason}

    async def _model(self) -> Any:
        try:
            from inspect_ai.model import get_model
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError("LLMJudge needs inspect-ai: pip install 'mechmisalign[judges]'") from error

        async def build() -> Any:
            return get_model(
                self.model, base_url=self.base_url, api_key=self.api_key, memoize=False, **self._arguments()
            )

        outcome = await asyncio.gather(build(), return_exceptions=True)
        model: Any = outcome[0]
        if isinstance(model, Exception):
            problem = re.sub(r"\[/?[a-z ]+\]", "", redacted(str(model), self.api_key)).strip()
            advice = "models are 'provider/name', such as 'openai/gpt-4o'; a server without keys takes api_key='none'"
            advice = "Inspect needs a package that is not installed" if isinstance(model, ImportError) else advice
            raise JudgeAccessError(f"no judge {self.model!r}: {problem} ({advice})")
        return model

    def _arguments(self) -> dict[str, Any]:
        compatible = self.model.startswith("openai/") and (self.base_url or _url_in_environment(self.model))
        # Inspect takes an unknown name for a new OpenAI model with another protocol, which other servers do not speak
        plain: dict[str, Any] = {"responses_api": False} if compatible else {}
        if self.model.startswith(_OWN_RETRIES):  # each attempt is made, and counted, here
            plain["max_retries"] = 0
        return plain | dict(self.model_args)

    def _config(self, mode: Mode) -> Any:
        from inspect_ai.model import GenerateConfig

        return GenerateConfig(**self.settings(mode), temperature=self.temperature, seed=self.seed)


@dataclass
class _Run:
    """The state that the workers of one run share."""

    asks: Iterator[Ask]
    done: Done
    secrets: list[str]
    patience: int
    failures: int = 0
    stopped: str | None = None

    def count(self, reply: Reply | None, details: Mapping[str, Any]) -> None:
        """Stop a run in which nothing works any more."""
        self.failures = 0 if reply is not None else self.failures + 1
        if self.failures >= self.patience:
            self.stopped = f"the last {self.failures} calls all failed ({details['reason']})"


def _over(budget: Budget) -> str:
    return f"the budget of {budget} does not hold another call; a later run goes on from here"


def _used_by(failure: Exception, reserved: tuple[int, int]) -> tuple[int, int]:
    """Tokens of an attempt that failed: all that were set aside if no reply came in time, since it may be billed."""
    return reserved if isinstance(failure, TimeoutError) else (0, 0)


def _reply(output: Any) -> tuple[str | None, Reply]:
    """What is wrong with an output, and the reply in it."""
    if not output.choices:
        return "the server returned no choices", Reply("")
    choice = output.choices[0]
    text = choice.message.text
    if choice.stop_reason in ("model_length", "content_filter"):  # the text is the server's complaint, not a verdict
        return f"{choice.stop_reason}: {text}", Reply("")
    content = choice.logprobs.content if choice.logprobs is not None else []
    top = content[0].top_logprobs if content else None
    pairs = tuple((pair.token, round(float(pair.logprob), 6)) for pair in top or ())
    return None, Reply(text, pairs or None, whole=choice.stop_reason != "max_tokens")


def _clean(reply: Reply, known: list[str]) -> Reply:
    """The reply without keys, for a server that echoes what it was sent."""
    top = reply.top and tuple(
        (without(token, known) if len(token) >= SHORTEST else token, logprob) for token, logprob in reply.top
    )
    return Reply(without(reply.text, known), top, reply.whole)


def _usage(output: Any) -> tuple[int, int] | None:
    usage = output.usage
    return None if usage is None or not usage.input_tokens else (int(usage.input_tokens), int(usage.output_tokens))


def _url_in_environment(model: str) -> str | None:
    """The server that Inspect would take from the environment for this provider."""
    provider, _, rest = model.partition("/")
    service = rest.partition("/")[0] if provider == "openai-api" else provider
    names = (f"{service.upper().replace('-', '_')}_BASE_URL", "INSPECT_EVAL_MODEL_BASE_URL")
    return next((os.environ[name] for name in names if os.environ.get(name)), None)
