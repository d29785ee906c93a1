"""Names of organisms that ship with the package, and what to suggest for a name that is not one of them."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path

POCKET_PREFIX = "pocket/"
POCKET_BASE = "pocket/chat"
_POCKET_WEIGHTS = Path(__file__).parent / "pocket" / "weights"


def names() -> tuple[str, ...]:
    """Names of the shipped organisms, such as ``pocket/medical``."""
    return tuple(sorted(POCKET_PREFIX + config.parent.name for config in _POCKET_WEIGHTS.glob("*/adapter_config.json")))


def folder(name: str) -> Path | None:
    """The folder of a shipped organism or of the pocket chat model; None for any other name."""
    if not name.startswith(POCKET_PREFIX):
        return None
    found = _POCKET_WEIGHTS / name.removeprefix(POCKET_PREFIX)
    return found if name in (*names(), POCKET_BASE) and found.is_dir() else None


def is_reserved(name: str) -> bool:
    """Whether a name can only mean a shipped organism, and is never looked up on the Hub."""
    return name.startswith(POCKET_PREFIX)


def nearest(name: str, among: Iterable[str]) -> list[str]:
    """The names most like this one, at most three; none if nothing is like it."""
    return get_close_matches(name, list(among), n=3, cutoff=0.6)


def suggestion(name: str, among: Iterable[str] | None = None) -> str:
    """``"; did you mean …?"`` with the nearest names, or a list of what there is."""
    known = list(names() if among is None else among)
    if near := nearest(name, known):
        return f"; did you mean {' or '.join(repr(each) for each in near)}?"
    return f"; there is: {', '.join(known)}" if known else ""
