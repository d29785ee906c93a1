"""Artifacts: safetensors files with a JSON header, and whether two headers speak of one base model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from . import registry
from ._checksums import DamagedFileError, read_tensors, write_tensors
from ._hub import artifact_file

METADATA_KEY = "mechmisalign"


def write_artifact(path: str | Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> Path:
    """Write tensors and header with a checksum, in one move: the file is there whole, or not at all; returns the path.

    Raises:
        DiskFullError: If there is no room.
        NotWritableError: If the file cannot be written there.
    """
    path = Path(path)
    write_tensors(path, tensors, {METADATA_KEY: json.dumps(dict(header))})
    return path


def read_artifact(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header and tensors of an artifact; the header of any other safetensors file is empty.

    Raises:
        DamagedFileError: If it is not what was written, or no safetensors file.
    """
    metadata, tensors = read_tensors(Path(path))
    try:
        header = json.loads(metadata.get(METADATA_KEY, "{}"))
    except (ValueError, RecursionError) as error:
        raise DamagedFileError(f"the header of {path} is no JSON ({error}); copy it again") from error
    if not isinstance(header, dict):
        raise DamagedFileError(f"the header of {path} is a {type(header).__name__}, no object; copy it again")
    return header, tensors


def load_artifact(
    path_or_hub_id: str | Path, default: str, *, revision: str | None = None, local_files_only: bool = False
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header and tensors of an artifact: of a file, or of the file ``default`` in a folder or a repository on the Hub.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no safetensors file, or the Hub does not give it.
    """
    path, source = artifact_file(path_or_hub_id, default, revision=revision, local_files_only=local_files_only)
    header, tensors = read_artifact(path)
    return header | source, tensors


def same_base(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    """Whether two headers can speak of one base: by fingerprint where both have one, else by name, else unknown.

    Copies of one model are one base by name, too (``registry.same_model``).
    """
    marks, names = ([each.get(key) for each in (first, second)] for key in ("base_fingerprint", "model"))
    if None not in marks:
        return bool(marks[0] == marks[1])
    return None in names or registry.same_model(str(names[0]), str(names[1]))


def base_name(header: Mapping[str, Any]) -> str:
    """How messages name the base of a header."""
    return f"{header.get('model')!r} ({header.get('base_fingerprint') or 'no fingerprint'})"
