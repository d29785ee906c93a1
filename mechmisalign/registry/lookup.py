"""From a name to its entry, and to what is loaded for it."""

from __future__ import annotations

import logging
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

from mechmisalign import registry

from . import reading
from .entries import Entry, RegistryError
from .opened import opened
from .pocket import pocket_entries
from .smol import smol_entries

logger = logging.getLogger(__name__)

_WARNED = {
    "empty": "this repository was found without weights.",
    "private": "this repository was found to be private.",
}
_SHIPPED = "shipped"
_FILES = "organisms"


class Place(NamedTuple):
    """What a name stands for.

    Attributes:
        name: Hub id, folder, or pocket name.
        subfolder: Folder inside it.
        revision: Commit, branch or tag.
        base: The chat model that a user's entry names; None leaves it to the adapter.
        weights: How a user's entry wants it loaded.
        entry: The entry, if there is one.
    """

    name: str
    subfolder: str | None
    revision: str | None
    base: str | None = None
    weights: str | None = None
    entry: Entry | None = None


def all_entries() -> tuple[Entry, ...]:
    """All that is known: the user's, the pocket and smol organisms, the published ones.

    Raises:
        RegistryError: If a user's registry cannot be read, or takes a name that is shipped.
    """
    shipped = {entry.key: entry for entry in (*pocket_entries(), *smol_entries(), *_published())}
    own = opened()
    for entry in own:
        if entry.name is not None and entry.name in shipped:
            raise RegistryError(
                f"{entry.origin}: the name {entry.name!r} is taken by a shipped entry "
                f"({shipped[entry.name].place or 'no weights'}); choose another"
            )
    return (*own, *(entry for key, entry in shipped.items() if key not in {each.key for each in own}))


def find(name: str) -> Entry | None:
    """The entry of a name, or of an id or folder: the only one with it, or the one that is shipped.

    Raises:
        RegistryError: If a user's registry cannot be read.
    """
    known = all_entries()
    for entry in known:
        if entry.key == name:
            return entry
    same = [entry for entry in known if entry.place == name]
    shipped = [entry for entry in same if entry.origin.startswith(_SHIPPED)]
    return same[0] if len(same) == 1 else next(iter(shipped), None)


def place(name: str | Path, subfolder: str | None = None, revision: str | None = None, *, aloud: bool = False) -> Place:
    """What to read for a name; anything that is not in a registry stands for itself, as does a folder that exists.

    Args:
        name: A registry name, a Hub id or a folder.
        subfolder: Instead of the entry's own.
        revision: Instead of the entry's own.
        aloud: Warn where a folder hides a name, and where no weights were found in a repository.

    Raises:
        RegistryError: If the name is that of an organism of which no weights were published.
    """
    asked = str(name)
    plain = Place(asked, subfolder, revision)
    entry = _named(asked)
    if entry is None:
        return plain
    if Path(asked).is_dir() and entry.name == asked:
        if aloud:
            logger.warning("%r is a folder here and a name in %s; the folder is read", asked, entry.origin)
        return plain
    if entry.place is None:
        raise RegistryError(f"no weights of {asked!r} are published: {entry.note or 'none were found on the Hub'}")
    if aloud and entry.weights_seen in _WARNED:
        logger.warning("%s (%s): %s %s", asked, entry.place, _WARNED[entry.weights_seen], entry.note)
    return Place(
        entry.place,
        subfolder if subfolder is not None else entry.subfolder,
        revision if revision is not None else entry.revision,
        None if entry.origin.startswith(_SHIPPED) else entry.base,
        entry.weights,
        entry,
    )


def _named(asked: str) -> Entry | None:
    """The entry that a loading is to follow; shipped entries need not be read for a pocket name or a path."""
    if registry.is_reserved(asked):
        return None
    if asked.startswith((".", "/", "~")):
        held = str(Path(asked).expanduser().resolve())
        return next((entry for entry in opened() if entry.name is None and entry.place == held), None)
    return find(asked) if asked else None


@cache
def _published() -> tuple[Entry, ...]:
    """The published organisms; read once."""
    found: list[Entry] = []
    for file in sorted((files(__package__) / "data").iterdir(), key=lambda each: each.name):
        if file.name.startswith(_FILES):
            own = reading.read(str(file))
            found += [entry.model_copy(update={"origin": f"{_SHIPPED} {file.name}"}) for entry in own]
    return tuple(found)
