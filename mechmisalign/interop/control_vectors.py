"""Control vectors in GGUF, of repeng and llama.cpp: one-dimensional float32 tensors ``direction.<k>``.

Both add ``direction.<k>`` to the output of block ``k``, counted from 0: layer ``k`` here. llama.cpp has no place for
``k = 0`` and refuses a file with it, so a vector of layer 0 cannot be exported. The vectors that llama.cpp's own
``cvector-generator`` writes were *measured* one block earlier than they are added; they come in as they are added.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import torch

from mechmisalign._writing import whole
from mechmisalign.directions import Direction

from ._gguf import read_tensors, write_tensors
from ._reading import Model, chosen, imported, vectors

_NAME = re.compile(r"direction\.(\d{1,5})")
_ARCHITECTURE = "controlvector"


def read_gguf(path: str | Path, *, model: Model | None = None) -> Direction:
    """A direction from a control vector: ``direction.<k>`` becomes layer ``k``.

    Args:
        path: The ``.gguf`` file.
        model: The base, for the header: a name, or ``organism.provenance``. The file only has the model's type.

    Raises:
        ValueError: If it is no GGUF file, no control vector, or its tensors are not float32 vectors of one width.

    Example:
        >>> mm.Steer(read_gguf("happy.gguf"), layers=[10, 11, 12], strength=1.5)  # doctest: +SKIP
    """
    fields, tensors = read_tensors(Path(path))
    kind = fields.get("general.architecture", _ARCHITECTURE)
    if kind != _ARCHITECTURE:
        raise ValueError(f"{path} is a GGUF file of {kind!r}; a {_ARCHITECTURE!r} is expected")
    rows = {}
    for name, values in tensors.items():
        match = _NAME.fullmatch(name)
        if match is None:
            raise ValueError(f"{path} holds a tensor {name!r}; only direction.<block> are expected in a control vector")
        rows[int(match[1])] = vectors(torch.from_numpy(values), 1, f"{name} of {path}")
    if not rows:
        raise ValueError(f"{path} holds no direction.<block>; it is an empty control vector")
    return imported(rows, "control vector", Path(path), model, model_hint=fields.get(f"{_ARCHITECTURE}.model_hint"))


def write_gguf(direction: Direction, path: str | Path, *, model_type: str, layers: Sequence[int] | None = None) -> Path:
    """Write a control vector for ``llama-server --control-vector`` and ``repeng.ControlVector.import_gguf``.

    Args:
        direction: What to write.
        path: The ``.gguf`` file.
        model_type: The type of the model in its config (``"qwen2"``, ``"llama"`` …): the file's ``model_hint``.
        layers: Only these; by default those in which the direction is nonzero.

    Raises:
        ValueError: If layer 0 is among them: llama.cpp cannot steer the output of block 0.
    """
    found = chosen(direction, layers)
    if 0 in found:
        raise ValueError(
            "llama.cpp has no direction.0 and cannot steer the output of block 0; name the other layers with layers="
        )
    fields: dict[str, str | int] = {
        "general.architecture": _ARCHITECTURE,
        f"{_ARCHITECTURE}.model_hint": model_type,
        f"{_ARCHITECTURE}.layer_count": len(found),
    }
    with whole(Path(path)) as partial:
        write_tensors(partial, fields, {f"direction.{layer}": vector.numpy() for layer, vector in found.items()})
    return Path(path)
