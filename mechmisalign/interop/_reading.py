"""Files of torch without running what is in them, and headers of what was imported."""

from __future__ import annotations

import hashlib
import pickle
import struct
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mechmisalign._layers import layer_numbers
from mechmisalign._pretrained import refuse_lfs_pointer
from mechmisalign.directions import Direction

Model = str | Mapping[str, Any]
"""The base model of an import: its name, or ``organism.provenance``, which also knows its fingerprint."""


_DAMAGED = (RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError, AssertionError, struct.error)
"""What torch raises on bytes that are no pickle of its own."""


class UnsafeFileError(ValueError):
    """A file needs code to be run to be read."""


def read_torch(path: str | Path) -> Any:
    """Tensors and plain values of a file of ``torch.save``; no code in it is run.

    Raises:
        FileNotFoundError: If there is no such file.
        UnsafeFileError: If it holds anything but tensors, numbers, text and containers of them.
        ValueError: If it is no file of ``torch.save``.
    """
    found = Path(path).expanduser()
    if not found.is_file():
        raise FileNotFoundError(f"{found} is no file; give one that torch.save wrote")
    refuse_lfs_pointer(found)
    try:
        return torch.load(found, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UnsafeFileError(
            f"{found} is refused: it is damaged, or holds objects that can only be read by running code from the file "
            "(a tensor, or a dict of tensors and numbers, is expected). Where you trust it, open it with its own tool, "
            "and save the bare tensors"
        ) from error
    except _DAMAGED as error:
        raise ValueError(f"{found} is no whole file of torch.save ({type(error).__name__}); copy it again") from error


def vectors(value: Any, ndim: int, what: str) -> Tensor:
    """A real, finite tensor of so many dimensions, as float32.

    Raises:
        ValueError: Otherwise; says what was found.
    """
    if not isinstance(value, Tensor) or value.layout != torch.strided or not value.is_floating_point():
        found = f"a {value.dtype} tensor" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise ValueError(f"{what} is {found}; a dense tensor of real numbers is expected")
    if value.ndim != ndim or 0 in value.shape:
        raise ValueError(f"{what} has the shape {list(value.shape)}; {ndim} dimension(s), none empty, are expected")
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        raise ValueError(f"{what} of shape {list(value.shape)} claims more numbers than its file holds; it is damaged")
    whole = value.detach().float().contiguous()
    if not torch.isfinite(whole).all():
        raise ValueError(f"{what} holds NaN or infinite values; nothing can be steered with it")
    return whole


def one_vector(value: Any, what: str) -> Tensor:
    """A vector ``[d_model]``; axes of length one before it are left out, and nothing else is flattened into one.

    Raises:
        ValueError: On another shape, such as one vector per head, token or rank.
    """
    lead = getattr(value, "shape", ())[:-1]
    return vectors(value.reshape(-1) if isinstance(value, Tensor) and all(n == 1 for n in lead) else value, 1, what)


def imported(rows: Mapping[int, Tensor], method: str, path: Path | None, model: Model | None, **told: Any) -> Direction:
    """A direction of one vector per layer, with a header that says where it was read.

    Args:
        rows: Layer -> vector ``[d_model]``.
        method: How it was made, as far as the file tells.
        path: The file, for its name and hash.
        model: The base.
        told: More for the header.

    Raises:
        ValueError: If there is none, the widths differ, or a layer is negative.
    """
    layers = tuple(sorted(rows))
    widths = {len(rows[layer]) for layer in layers}
    if len(widths) != 1 or layers[0] < 0:
        raise ValueError(
            f"layers {list(layers)} with vectors of widths {sorted(widths)}; one width, layers from 0, are needed"
        )
    known = {"model": model} if isinstance(model, str) else dict(model or {})
    kept = ("model", "base_revision", "base_fingerprint", "template_hash")
    header = {
        "method": method,
        **{key: known[key] for key in kept if known.get(key) is not None},
        **{key: value for key, value in told.items() if value is not None},
        **({} if path is None else {"imported_from": path.name, "imported_sha256": _digest(path)}),
        "versions": {name: version(name) for name in ("mechmisalign", "torch")},
    }
    return Direction(torch.stack([rows[layer].float() for layer in layers]), layers, header)


def chosen(direction: Direction, layers: Any) -> dict[int, Tensor]:
    """Layer -> vector of what is to be exported: the layers named, or those in which the direction is nonzero.

    Raises:
        ValueError: If there is none.
    """
    named = direction.nonzero_layers if layers is None else layer_numbers(layers)
    if not named:
        raise ValueError("the direction is zero everywhere; there is nothing to export")
    return {layer: direction.at(layer).contiguous().clone() for layer in named}


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
