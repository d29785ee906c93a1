"""Which model is loaded for an adapter that was trained on a copy of it."""

from __future__ import annotations

import logging
from pathlib import Path

from mechmisalign import registry
from mechmisalign._checkpoint_files import cached_file, checkpoint_files
from mechmisalign.adapters import Adapter

logger = logging.getLogger(__name__)


def standing_for(adapter: Adapter) -> str:
    """The name of the base to load: the adapter's own, or the 16-bit model of which that is a copy.

    A folder is what it is. A 16-bit copy that is in the Hub's cache is taken as it is, and for a 4-bit one its 16-bit
    sister if that is in the cache; otherwise it is the maker's model (``registry.twin``), which is said aloud.
    """
    named = adapter.base
    made = None if registry.folder(named) or Path(named).expanduser().is_dir() else registry.twin(named)
    if made is None:
        return named
    revision = adapter.config.get("revision")
    if not made.four_bit and _in_cache(named, revision):
        return named
    if made.mirror is not None and _in_cache(made.mirror, None):
        _tell(adapter, made.mirror, made)
        return made.mirror
    _tell(adapter, made.name, made)
    return made.name


def open_copy(name: str) -> str:
    """What to do where a gated base cannot be had; empty for one that is not gated, or has no open copy."""
    copy = registry.open_copy(name)
    if copy is None:
        return ""
    return f"; its licence is to be accepted on its page (then log in), or pass base={copy!r}, an open copy"


def _tell(adapter: Adapter, chosen: str, made: registry.Twin) -> None:
    if made.four_bit:
        why = "that is a copy in 4 bit, and an adapter is read against 16-bit weights"
    else:
        why = f"that is a copy of it (to load the copy, pass base={adapter.base!r})"
    told = open_copy(chosen) if made.gated and chosen == made.name else ""
    logger.warning("%s names %s as its base; %s is loaded: %s%s", adapter.source, adapter.base, chosen, why, told)


def _in_cache(name: str, revision: str | None) -> bool:
    """Whether config and weights are in the Hub's cache."""
    return cached_file(name, "config.json", revision) is not None and bool(checkpoint_files(name, revision))
