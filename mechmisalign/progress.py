"""The one progress bar: appears only when a loop has taken two seconds, on standard error, gone when it is done."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

Item = TypeVar("Item")


def progress(items: Iterable[Item], description: str, total: int | None = None, unit: str = "batch") -> Iterable[Item]:
    """``items``, with a bar after two seconds."""
    from tqdm.auto import tqdm

    bar: Iterable[Item] = tqdm(items, desc=description, total=total, unit=unit, delay=2, leave=False)
    return bar


def progress_bar(description: str, total: int, unit: str) -> Any:
    """A bar to be moved by hand with ``update``; use it as a context manager."""
    from tqdm.auto import tqdm

    return tqdm(desc=description, total=total, unit=unit, delay=2, leave=False)
