"""One call through one of Inspect's providers, tried again while that can help.

Inspect's providers send the request and know which failures are worth another try (``ModelAPI.generate``,
``should_retry``). The layer above them, ``Model.generate``, keeps a transcript of every call for evaluation logs, which
takes longer than the call itself and is of no use here; so waiting and trying again are done here.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import Any

_FIRST_WAIT, _LONGEST_WAIT, _LONGEST_TOLD = 1.0, 60.0, 300.0


async def attempted(
    model: Any, prompt: str, config: Any, *, retries: int, timeout: float, again: Callable[[Exception], bool]
) -> Any:
    """The model's output, or the exception of the last attempt, whatever its class.

    Waits as long as the server asks for (five minutes at most), else 1, 2, 4 … 60 seconds, spread so that many callers
    do not come back at once.

    Args:
        model: Inspect's model.
        prompt: One user message.
        config: Inspect's settings of the call.
        retries: Attempts after the first.
        timeout: Seconds of one attempt.
        again: Told why an attempt failed, says whether another is allowed: each is a call for the budget.
    """
    for attempt in range(retries + 1):
        # gather makes a task: a context of its own, and an exception of any class as a value
        outcomes = await asyncio.gather(_once(model, prompt, config, timeout), return_exceptions=True)
        outcome: Any = outcomes[0]
        if isinstance(outcome, BaseException) and not isinstance(outcome, Exception):
            raise outcome
        if not isinstance(outcome, Exception):
            return outcome
        decision = isinstance(outcome, TimeoutError) or model.api.should_retry(outcome)
        if not decision or attempt == retries or not again(outcome):
            break
        told = getattr(decision, "retry_after", None)
        wait = min(_FIRST_WAIT * 2**attempt, _LONGEST_WAIT) if told is None else min(max(told, 0.0), _LONGEST_TOLD)
        await _pause(wait * random.uniform(1.0, 1.5))
    return outcome


async def _pause(seconds: float) -> None:
    await asyncio.sleep(seconds)


async def _once(model: Any, prompt: str, config: Any, timeout: float) -> Any:
    from inspect_ai.model import ChatMessageUser

    try:
        async with asyncio.timeout(timeout):
            result = await model.api.generate([ChatMessageUser(content=prompt)], [], "none", config)
    except TimeoutError as error:
        raise TimeoutError(f"no reply within {timeout:g} seconds") from error
    output = result[0] if isinstance(result, tuple) else result
    if isinstance(output, Exception):
        raise output
    return output
