"""Running coroutines from ordinary code: in scripts, in notebooks, and without the garbage collector in the way."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

Result = TypeVar("Result")

_COLLECT_AT = (50_000, 20, 100)


def finish(make: Callable[[], Coroutine[Any, Any, Result]], stop: Callable[[], None]) -> Result:
    """Run a coroutine to its end, in a thread of its own where this one has a running loop (a notebook).

    Args:
        make: Makes the coroutine.
        stop: Asks it to come to its end, if this thread is interrupted while it waits for the other one.
    """
    if not _loop_is_running():
        return asyncio.run(make())
    with ThreadPoolExecutor(1, thread_name_prefix="judging") as pool:
        running = pool.submit(lambda: asyncio.run(make()))
        try:
            return running.result()
        except KeyboardInterrupt:
            stop()
            raise


@contextmanager
def rare_collections() -> Iterator[None]:
    """Collect garbage less often meanwhile.

    A call leaves thousands of short-lived objects behind, and every collection also scans a heap that has torch in it:
    this takes a third off the time of a call. Memory stays flat, since collections still come.
    """
    usual = gc.get_threshold()
    gc.set_threshold(*(max(ours, theirs) if theirs else 0 for ours, theirs in zip(_COLLECT_AT, usual, strict=True)))
    try:
        yield
    finally:
        gc.set_threshold(*usual)


def _loop_is_running() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True
