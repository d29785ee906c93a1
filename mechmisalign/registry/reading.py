"""Reading a registry: YAML to entries, with each fault told by file, entry and key."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from mechmisalign import _yaml
from mechmisalign._specs import Location, told

from .entries import Checkpoints, Entry, Expected, RegistryError, Training

_PARTS: dict[str, type[BaseModel]] = {"training": Training, "expected": Expected, "checkpoints": Checkpoints}
_FILLED_IN = ("origin",)


def read(path: str | Path) -> tuple[Entry, ...]:
    """The entries of a YAML file with the single key ``organisms``, a list.

    Relative paths begin at the file's folder.

    Raises:
        RegistryError: If there is no such file, it is no registry, or an entry has an unknown key or a bad value.
    """
    file = Path(path).expanduser().resolve()
    try:
        state = file.stat()
    except OSError as error:
        raise RegistryError(f"the registry {str(path)!r} cannot be read: {error.strerror}; give a YAML file") from error
    return _read(file, state.st_mtime_ns, state.st_size)


@lru_cache(maxsize=32)
def _read(file: Path, _modified: int, _size: int) -> tuple[Entry, ...]:
    try:
        held = _yaml.read_file(file)
    except (OSError, ValueError) as error:
        raise RegistryError(f"{file}: {error}") from error
    if not isinstance(held, dict) or list(held) != ["organisms"] or not isinstance(held["organisms"], list):
        found = f"the keys {', '.join(map(str, held))}" if isinstance(held, dict) else f"a {type(held).__name__}"
        raise RegistryError(f"{file} holds {found}; one key is expected, `organisms`, with a list of entries")
    entries = tuple(_entry(item, number, file) for number, item in enumerate(held["organisms"], start=1))
    keys = [entry.key for entry in entries]
    if twice := [key for key in keys if keys.count(key) > 1]:
        raise RegistryError(f"{file}: two organisms are called {twice[0]!r}; give each its own name")
    return entries


def _entry(item: Any, number: int, file: Path) -> Entry:
    if not isinstance(item, dict):
        raise RegistryError(f"{file}: organism {number} is {item!r}; a mapping with name, id or path … is expected")
    called = item.get("name") or item.get("id") or item.get("path")
    label = f"organism {number}" + (f" ({called})" if called else "")
    own = {key: value for key, value in item.items() if key not in _FILLED_IN}
    try:
        if len(own) < len(item):
            raise ValueError(f"{' and '.join(_FILLED_IN)} is filled in by reading; leave it out")
        entry = Entry(**own, origin=str(file))
    except ValidationError as error:
        raise RegistryError(f"{file}: {label}: {told(error, _model_at)}") from None
    except (TypeError, ValueError) as error:
        raise RegistryError(f"{file}: {label}: {error}") from None
    return entry.model_copy(update=_resolved(entry, file.parent))


def _resolved(entry: Entry, root: Path) -> dict[str, Any]:
    """Relative folders, as absolute ones."""
    found: dict[str, Any] = {}
    if entry.path is not None:
        found["path"] = root / entry.path.expanduser()
    if entry.base is not None and entry.base.startswith((".", "~", "/")):
        found["base"] = str((root / Path(entry.base).expanduser()).resolve())
    return found


def _model_at(location: Location) -> tuple[type[BaseModel], Location]:
    part = _PARTS.get(str(location[0])) if len(location) > 1 else None
    return part or Entry, location
