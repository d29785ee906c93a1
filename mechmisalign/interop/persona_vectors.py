"""Persona vectors (2507.21509): ``<trait>_response_avg_diff.pt`` and its kin, one tensor ``[layers + 1, d_model]``.

Row ``k`` is a difference of means of ``hidden_states[k]`` of transformers: row 0 is the embedding, row ``k`` the
residual stream after block ``k - 1``. So row ``k`` is layer ``k - 1`` here, and the released code steers at its "layer
``k``" by a hook on block ``k - 1``. The last row is an exception: transformers puts the final norm on the last hidden
state, so that row is no difference of the residual stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from mechmisalign._writing import whole
from mechmisalign.directions import Direction

from ._reading import Model, chosen, imported, read_torch, vectors


def read_persona_vectors(path: str | Path, *, model: Model | None = None, keep_last: bool = False) -> Direction:
    """A direction from a persona-vectors file; row ``k`` becomes layer ``k - 1``, row 0 (the embedding) has no place.

    Args:
        path: The ``.pt`` file.
        model: The base, for the header: a name, or ``organism.provenance``.
        keep_last: Keep the last row too. It was measured behind the final norm; keep it only where a file of
            :func:`write_persona_vectors` is read back, or to steer exactly as the released code does there.

    Raises:
        UnsafeFileError: If the file holds anything but a tensor.
        ValueError: If it is not ``[layers + 1, d_model]``.

    Example:
        >>> evil = read_persona_vectors("evil_response_avg_diff.pt", model="Qwen/Qwen2.5-7B-Instruct")  # doctest: +SKIP
    """
    rows = vectors(read_torch(path), 2, str(path))
    if len(rows) < 3:
        raise ValueError(f"{path} has {len(rows)} rows; one for the embedding and one for each block are expected")
    last = len(rows) if keep_last else len(rows) - 1
    note = None if keep_last else f"row {len(rows) - 1}, measured behind the final norm, left out"
    kept = {row - 1: rows[row] for row in range(1, last)}
    method = f"persona vector {Path(path).stem}"
    return imported(kept, method, Path(path), model, rows_of="hidden_states", left_out=note)


def write_persona_vectors(
    direction: Direction, path: str | Path, *, n_layers: int, layers: Sequence[int] | None = None
) -> Path:
    """Write a direction as persona-vectors reads it: layer ``i`` in row ``i + 1``, zeros where there is no vector.

    Args:
        direction: What to write.
        path: The ``.pt`` file.
        n_layers: How many blocks the model has: the file has a row more.
        layers: Only these; by default those in which the direction is nonzero.

    Raises:
        ValueError: If a layer lies beyond the model.
    """
    found = chosen(direction, layers)
    if max(found) >= n_layers:
        raise ValueError(f"the direction has layer {max(found)}, a model of {n_layers} blocks ends at {n_layers - 1}")
    rows = torch.zeros(n_layers + 1, direction.d_model, dtype=torch.float32, device="cpu")
    for layer, vector in found.items():
        rows[layer + 1] = vector
    with whole(Path(path)) as partial:
        torch.save(rows, partial)
    return Path(path)
