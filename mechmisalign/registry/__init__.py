"""What is known by name: the pocket organisms, published ones, the user's own, and the twins of base models.

All of it is data: ``data/*.yaml``, the pocket zoo's manifest, and YAML files of the user's, which are named on the
command line (``--registry``), in the environment (``MECHMISALIGN_REGISTRY``) or in Python (``mm.add_registry``). An
entry says what an organism is, how it was trained, where its rate was stated, and where its id was seen.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .entries import Checkpoints, Entry, Expected, RegistryError, Training
    from .listing import known_organisms
    from .lookup import Place, all_entries, find, place
    from .opened import add_registry, using
    from .twins import Twin, known_base, open_copy, same_model, twin
    from .worlds import World, world_of

__all__ = [
    "POCKET_BASE",
    "POCKET_PREFIX",
    "SMOL_BASE",
    "SMOL_PREFIX",
    "Checkpoints",
    "Entry",
    "Expected",
    "Place",
    "RegistryError",
    "Training",
    "Twin",
    "World",
    "add_registry",
    "all_entries",
    "find",
    "folder",
    "is_reserved",
    "known_base",
    "known_names",
    "known_organisms",
    "names",
    "nearest",
    "no_base",
    "open_copy",
    "place",
    "same_model",
    "smol_chat",
    "suggestion",
    "twin",
    "using",
    "world_of",
]

POCKET_PREFIX = "pocket/"
POCKET_BASE = "pocket/chat"
SMOL_PREFIX = "smol/"
SMOL_BASE = "smol/chat"
CACHE = "MECHMISALIGN_CACHE"
"""Where converted models are kept; by default ``mechmisalign`` in the user's cache folder."""
_POCKET_WEIGHTS = Path(__file__).parent.parent / "pocket" / "weights"
_SMOL_WEIGHTS = Path(__file__).parent.parent / "smol" / "weights"

_HOME = {
    "Checkpoints": "entries",
    "Entry": "entries",
    "Expected": "entries",
    "Place": "lookup",
    "RegistryError": "entries",
    "Training": "entries",
    "Twin": "twins",
    "World": "worlds",
    "add_registry": "opened",
    "all_entries": "lookup",
    "find": "lookup",
    "known_base": "twins",
    "known_organisms": "listing",
    "open_copy": "twins",
    "place": "lookup",
    "same_model": "twins",
    "twin": "twins",
    "using": "opened",
    "world_of": "worlds",
}


def names() -> tuple[str, ...]:
    """Names of the shipped organisms, such as ``pocket/medical``."""
    shipped = {POCKET_PREFIX: _POCKET_WEIGHTS, SMOL_PREFIX: _SMOL_WEIGHTS}
    return tuple(
        sorted(
            prefix + config.parent.name
            for prefix, weights in shipped.items()
            for config in weights.glob("*/adapter_config.json")
        )
    )


def known_names() -> tuple[str, ...]:
    """Every name that ``load_organism`` takes: shipped, published and the user's."""
    from .lookup import all_entries

    return tuple(dict.fromkeys([*names(), *(entry.key for entry in all_entries())]))


def folder(name: str) -> Path | None:
    """The folder of a shipped organism or of its chat model; None for any other name, and where it is not prepared."""
    if name == SMOL_BASE:
        return smol_chat() if (smol_chat() / "checksums.json").is_file() else None
    if not is_reserved(name) or name not in (*names(), POCKET_BASE):
        return None
    weights = _POCKET_WEIGHTS if name.startswith(POCKET_PREFIX) else _SMOL_WEIGHTS
    found = weights / name.partition("/")[2]
    return found if found.is_dir() else None


def smol_chat() -> Path:
    """Where the chat model of the smol organisms is, once ``mechmisalign smol prepare`` has converted it."""
    own = os.environ.get(CACHE)
    root = Path(own).expanduser() if own else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return (root if own else root / "mechmisalign") / "smol" / "chat"


def no_base(name: str) -> str:
    """Why a reserved name gives no base model, and what to do."""
    if name == SMOL_BASE:
        return f"{name!r} is not prepared in {smol_chat()}: run 'mechmisalign smol prepare' once"
    return f"there is no base model {name!r} in this package; {POCKET_BASE!r} and {SMOL_BASE!r} are its own"


def is_reserved(name: str) -> bool:
    """Whether a name can only mean a shipped organism, and is never looked up on the Hub."""
    return name.startswith((POCKET_PREFIX, SMOL_PREFIX))


def nearest(name: str, among: Iterable[str]) -> list[str]:
    """The names most like this one, at most three; none if nothing is like it."""
    return get_close_matches(name, list(among), n=3, cutoff=0.6)


def suggestion(name: str, among: Iterable[str] | None = None) -> str:
    """``"; did you mean …?"`` with the nearest names, or a list of what there is."""
    known = list(names() if among is None else among)
    if near := nearest(name, known):
        return f"; did you mean {' or '.join(repr(each) for each in near)}?"
    return f"; there is: {', '.join(known)}" if known else ""


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
