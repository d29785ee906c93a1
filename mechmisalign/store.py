"""The run folder: what a run is, what it has produced so far, and nothing half-written.

Every file is written beside its place and moved there when it is whole, so a run that is killed anywhere finds only
finished pieces when it comes back. A folder belongs to one run: another configuration is refused, not mixed in.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any

import pandas as pd

from ._checksums import DamagedFileError
from ._parts import Parts, TornPartError
from ._reading import read_object
from ._tables import read_parquet, write_parquet
from ._writing import (
    DiskFullError,
    FolderBusyError,
    NotWritableError,
    RunFolderError,
    claim,
    is_unused,
    refuse_unwritable_folder,
    release,
    whole,
)
from .directions import Direction

__all__ = [
    "MANIFEST",
    "DiskFullError",
    "FolderBusyError",
    "NotWritableError",
    "Parts",
    "RunFolder",
    "RunFolderError",
    "TornPartError",
    "environment",
    "read_manifest",
    "refuse_another",
    "stored_parts",
    "text_digest",
    "write_json",
    "write_text",
]

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
SCHEMA = 1
_PACKAGES = ("mechmisalign", "torch", "transformers", "transformer-lens", "peft", "scikit-learn", "numpy", "pandas")


class RunFolder:
    """A folder that can be left and taken up again at any moment.

    One process works in it at a time: it is taken when this object is made, and given back when the object is closed,
    collected, or its process dies.

    Args:
        path: Where the run lives; made if it is not there.
        identity: Everything that decides the results (JSON values). A folder with another identity is refused.
        growing: What may be added to by a later run, but not changed: kinds of things, each by name with what decides
            it, such as ``{"directions": {"mean": "<hash>"}}``.

    Raises:
        RunFolderError: If the folder holds another run, or files that no run of ours wrote.
        FolderBusyError: If another process is at work in it.
    """

    def __init__(
        self, path: str | Path, identity: Mapping[str, Any], growing: Mapping[str, Mapping[str, Any]] | None = None
    ) -> None:
        self.path = Path(path)
        self.identity = _as_json(identity)
        if not (self.path / MANIFEST).exists() and not is_unused(self.path):
            raise RunFolderError(f"{self.path} is not empty and holds no {MANIFEST}: choose a new folder for this run")
        refuse_unwritable_folder(self.path)
        self.path.mkdir(parents=True, exist_ok=True)
        self._giving_back = weakref.finalize(self, release, claim(self.path))
        try:
            self._take_up(_as_json(growing or {}))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let other processes have the folder."""
        self._giving_back()

    def grow(self, growing: Mapping[str, Mapping[str, Any]]) -> None:
        """Add to what the run is made of; what is there already must be the same.

        Raises:
            RunFolderError: Naming what differs.
        """
        refuse_another(self.path, self.identity, growing)
        manifest, wanted = read_manifest(self.path), _as_json(growing)
        known = manifest.get("growing", {})
        merged = {kind: {**known.get(kind, {}), **wanted.get(kind, {})} for kind in {**known, **wanted}}
        if merged != known:
            write_json(self.path / MANIFEST, {**manifest, "growing": merged})

    def table(self, name: str, compute: Callable[[], pd.DataFrame]) -> pd.DataFrame:
        """The named table: read if an earlier try finished it, otherwise (or if it is torn) computed and stored."""
        path = self.path / "tables" / f"{name}.parquet"
        stored = _stored_table(path)
        return self.write_table(name, compute()) if stored is None else stored

    def write_table(self, name: str, frame: pd.DataFrame) -> pd.DataFrame:
        """Store a table, in the place of an older one; returns it as it is read back."""
        path = self.path / "tables" / f"{name}.parquet"
        return read_parquet(write_parquet(frame.reset_index(drop=True), path))

    def direction(self, name: str, compute: Callable[[], Direction]) -> Direction:
        """The named direction: read, or (also if it is damaged) computed and stored."""
        path = self.path / "directions" / f"{name}.safetensors"
        if path.exists():
            try:
                return Direction.load(path)
            except DamagedFileError as error:
                logger.warning("%s; it is computed again", error)
        return Direction.load(compute().save(path))

    def parts(self, name: str) -> Parts:
        """The named table that grows part by part."""
        return stored_parts(self.path, name)

    def rows(
        self, name: str, wanted: pd.DataFrame, produce: Callable[[pd.DataFrame], Iterator[pd.DataFrame]]
    ) -> pd.DataFrame:
        """The wanted rows, produced in parts that are stored as they come; an earlier try's parts are not repeated.

        Args:
            name: Name of the table.
            wanted: The rows to produce, under a unique index.
            produce: Takes the missing rows, yields finished parts under the same index.
        """
        parts = self.parts(name)
        missing = wanted[~wanted.index.isin(parts.keys())]
        if len(missing):
            for part in produce(missing):
                parts.add(part)
            parts.compact()
        return parts.read().sort_index()

    def _take_up(self, growing: Mapping[str, Mapping[str, Any]]) -> None:
        manifest = self.path / MANIFEST
        if manifest.exists():
            self.grow(growing)
        else:
            told = {"schema": SCHEMA, "identity": self.identity, "environment": environment()}
            write_json(manifest, {**told, "growing": growing} if growing else told)


def stored_parts(run: str | Path, name: str) -> Parts:
    """The named table of a run folder that grows part by part, to read it without taking the folder."""
    return Parts(Path(run) / "rows" / name)


def refuse_another(
    path: Path, identity: Mapping[str, Any], growing: Mapping[str, Mapping[str, Any]] | None = None
) -> None:
    """Refuse a run folder that was made with another identity; see ``RunFolder``.

    Raises:
        RunFolderError: Naming each key that differs, with both values.
    """
    manifest, ours, wanted = read_manifest(path), _as_json(identity), _as_json(growing or {})
    theirs, known = manifest.get("identity", {}), manifest.get("growing", {})
    pairs = {key: (theirs.get(key), ours.get(key)) for key in sorted({**theirs, **ours})}
    for kind, things in wanted.items():
        old = known.get(kind, {})
        pairs |= {f"{kind}.{name}": (old[name], value) for name, value in things.items() if name in old}
    changed = [f"{key}: {old!r} there, {new!r} now" for key, (old, new) in pairs.items() if old != new]
    if changed:
        shown = "; ".join(changed[:8]) + (f"; and {len(changed) - 8} more" if len(changed) > 8 else "")
        raise RunFolderError(f"{path} holds another run ({shown}); choose another folder, or remove this one")


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a run folder.

    Raises:
        RunFolderError: If it cannot be read.
    """
    try:
        return read_object(path / MANIFEST)
    except (OSError, ValueError) as error:
        raise RunFolderError(f"{path / MANIFEST} cannot be read ({error}); is {path} a run folder?") from error


def text_digest(value: Any) -> str:
    """A short hash of a JSON value, for identities."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def environment() -> dict[str, Any]:
    """Versions and hardware, for manifests."""
    import torch

    accelerator = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "accelerator": accelerator,
        **{package: version(package) for package in _PACKAGES},
    }


def write_json(path: Path, value: Any) -> None:
    """Write JSON in one move: the file is there whole, or not at all."""
    with whole(path) as partial:
        partial.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def write_text(path: Path, text: str) -> None:
    """Write text in one move."""
    with whole(path) as partial:
        partial.write_text(text, encoding="utf-8")


def _stored_table(path: Path) -> pd.DataFrame | None:
    """A table that an earlier try finished; a torn one is set aside."""
    if not path.exists():
        return None
    try:
        return read_parquet(path)
    except DamagedFileError as error:
        aside = path.with_name(path.name + ".corrupt")
        path.replace(aside)
        logger.warning("%s; it is kept as %s and computed again", error, aside.name)
        return None


def _as_json(value: Mapping[str, Any]) -> dict[str, Any]:
    """The value as it comes back from a JSON file (tuples as lists, say)."""
    read: dict[str, Any] = json.loads(json.dumps(dict(value)))
    return read
