"""Which registries of the user's are open: added in Python or on the command line, or named in the environment."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from . import reading
from .entries import Entry, RegistryError

ENVIRONMENT = "MECHMISALIGN_REGISTRY"
"""Environment variable with one or more files, separated as in PATH."""

_added: list[Path] = []


def add_registry(path: str | Path) -> tuple[str, ...]:
    """Know the organisms of a YAML file by name, for the rest of this process.

    Args:
        path: The file; its one key ``organisms`` holds a list of entries with ``name``, ``id`` or ``path``, ``base`` …

    Returns:
        The names that can now be loaded.

    Raises:
        RegistryError: If the file cannot be read, an entry is wrong, or a name is taken.

    Example:
        >>> mm.add_registry("mine.yaml")  # doctest: +SKIP
        ('my-organism',)
    """
    file = Path(path).expanduser().resolve()
    entries = reading.read(file)
    if file not in _added:
        _added.append(file)
        try:
            opened()
        except RegistryError:
            _added.remove(file)
            raise
    return tuple(entry.key for entry in entries)


@contextmanager
def using(*paths: str | Path) -> Iterator[None]:
    """The same while a block runs."""
    before = _added[:]
    try:
        for path in paths:
            add_registry(path)
        yield
    finally:
        _added[:] = before


def opened() -> tuple[Entry, ...]:
    """The user's entries, those that were added first.

    Raises:
        RegistryError: If a file cannot be read, or two give one name.
    """
    named = [Path(each).expanduser().resolve() for each in os.environ.get(ENVIRONMENT, "").split(os.pathsep) if each]
    found: dict[str, Entry] = {}
    for file in dict.fromkeys([*_added, *named]):
        for entry in reading.read(file):
            if entry.key in found:
                raise RegistryError(
                    f"{entry.key!r} stands in {found[entry.key].origin} and in {entry.origin}; rename one of them"
                )
            found[entry.key] = entry
    return tuple(found.values())
