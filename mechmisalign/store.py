"""The run folder: what a run is, what it has produced so far, and nothing half-written.

Every file is written beside its place and moved there when it is whole, so a run that is killed anywhere finds only
finished pieces when it comes back. A folder belongs to one run: another configuration is refused, not mixed in.
"""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd

from .directions import Direction

MANIFEST = "manifest.json"
SCHEMA = 1
_PACKAGES = ("mechmisalign", "torch", "transformers", "transformer-lens", "peft", "scikit-learn", "numpy", "pandas")


class RunFolderError(ValueError):
    """The folder belongs to another run, or holds something that is no run."""


class RunFolder:
    """A folder that can be left and taken up again at any moment.

    Args:
        path: Where the run lives; made if it is not there.
        identity: Everything that decides the results (JSON values). A folder with another identity is refused.

    Raises:
        RunFolderError: If the folder holds another run, or files that no run of ours wrote.
    """

    def __init__(self, path: str | Path, identity: Mapping[str, Any]) -> None:
        self.path = Path(path)
        self.identity = json.loads(json.dumps(dict(identity)))
        manifest = self.path / MANIFEST
        if manifest.exists():
            self._refuse_another_run(json.loads(manifest.read_text()))
        elif self.path.exists() and any(self.path.iterdir()):
            raise RunFolderError(f"{self.path} is not empty and holds no {MANIFEST}: choose a new folder for this run")
        else:
            write_json(manifest, {"schema": SCHEMA, "identity": self.identity, "environment": environment()})

    def table(self, name: str, compute: Callable[[], pd.DataFrame]) -> pd.DataFrame:
        """The named table: read if an earlier try finished it, otherwise computed and stored."""
        path = self.path / "tables" / f"{name}.parquet"
        if not path.exists():
            frame = compute().reset_index(drop=True)
            with _whole(path) as partial:
                frame.to_parquet(partial)
        return pd.read_parquet(path)

    def direction(self, name: str, compute: Callable[[], Direction]) -> Direction:
        """The named direction: read, or computed and stored."""
        path = self.path / "directions" / f"{name}.safetensors"
        return Direction.load(path) if path.exists() else Direction.load(compute().save(path))

    def rows(
        self, name: str, wanted: pd.DataFrame, produce: Callable[[pd.DataFrame], Iterator[pd.DataFrame]]
    ) -> pd.DataFrame:
        """The wanted rows, produced in parts that are stored as they come; an earlier try's parts are not repeated.

        Args:
            name: Name of the table.
            wanted: The rows to produce, under a unique index.
            produce: Takes the missing rows, yields finished parts under the same index.
        """
        folder = self.path / "rows" / name
        done = [pd.read_parquet(part) for part in sorted(folder.glob("part-*.parquet"))]
        finished = {index for part in done for index in part.index}
        missing = wanted[~wanted.index.isin(finished)]
        if len(missing):
            for part in produce(missing):
                with _whole(folder / f"part-{len(done):05d}.parquet") as partial:
                    part.to_parquet(partial)
                done.append(part)
        return pd.concat(done).sort_index()

    def _refuse_another_run(self, manifest: Mapping[str, Any]) -> None:
        theirs = manifest.get("identity", {})
        keys = [key for key in {**theirs, **self.identity} if theirs.get(key) != self.identity.get(key)]
        if keys:
            told = "; ".join(
                f"{key}: {theirs.get(key)!r} there, {self.identity.get(key)!r} now" for key in sorted(keys)
            )
            raise RunFolderError(f"{self.path} holds another run ({told}); choose another folder, or remove this one")


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
    with _whole(path) as partial:
        partial.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write text in one move."""
    with _whole(path) as partial:
        partial.write_text(text, encoding="utf-8")


@contextmanager
def _whole(path: Path) -> Iterator[Path]:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
