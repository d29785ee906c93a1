"""One thread at a time on a model: hooks, adapters put out and passes belong to all who use it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

_guard = threading.Lock()
_users: WeakKeyDictionary[Any, tuple[int, int]] = WeakKeyDictionary()
"""Model -> the thread that uses it, and how many of its blocks are open."""


@contextmanager
def in_one_thread(model: Any) -> Iterator[None]:
    """Keep a model to this thread while the block runs; blocks of one thread may be nested.

    Raises:
        RuntimeError: If another thread is using it: what one hooks, the other's passes would go through.
    """
    me = threading.get_ident()
    with _guard:
        thread, depth = _users.get(model, (me, 0))
        if depth and thread != me:
            raise RuntimeError(
                "another thread is using this organism: its interventions would act on the passes of both. Take turns "
                "(a threading.Lock around each use), or load an organism for each thread"
            )
        _users[model] = (me, depth + 1)
    try:
        yield
    finally:
        with _guard:
            thread, depth = _users[model]
            _users[model] = (thread, depth - 1)
