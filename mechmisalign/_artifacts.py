"""Artifacts: safetensors files with a JSON header, and whether two headers speak of one base model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from . import registry
from ._hub import artifact_file

METADATA_KEY = "mechmisalign"


def write_artifact(path: str | Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> Path:
    """Write tensors and header in one move: the file is there whole, or not at all; returns the path."""
    from safetensors.torch import save_file

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(whole, partial, metadata={METADATA_KEY: json.dumps(dict(header))})
    partial.replace(path)
    return path


def read_artifact(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header and tensors of an artifact; the header of any other safetensors file is empty."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        header: dict[str, Any] = json.loads((file.metadata() or {}).get(METADATA_KEY, "{}"))
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (safe_open is no mapping)
    return header, tensors


def load_artifact(
    path_or_hub_id: str | Path, default: str, *, revision: str | None = None, local_files_only: bool = False
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header and tensors of an artifact: of a file, or of the file ``default`` in a folder or a repository on the Hub.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no safetensors file, or the Hub does not give it.
    """
    from safetensors import SafetensorError

    path, source = artifact_file(path_or_hub_id, default, revision=revision, local_files_only=local_files_only)
    try:
        header, tensors = read_artifact(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file ({error}); give one that this package wrote") from error
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
