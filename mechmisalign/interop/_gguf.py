"""As much of GGUF (versions 2 and 3, little endian) as a control vector needs: fields, and float32 tensors.

Layout: ``GGUF``, version, number of tensors, number of fields; the fields (key, type, value); of each tensor name,
dimensions, type and offset; padding to the alignment; the data. Every length is checked against the file before
anything is allocated.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mechmisalign._pretrained import refuse_lfs_pointer

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_FLOAT32 = 0
_ALIGNMENT = 32
_LARGEST = 1 << 30
"""Bytes: a control vector of the largest models has some megabytes."""

_STRING, _ARRAY, _UINT32 = 8, 9, 4
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


class _Cursor:
    """Where reading is in the bytes of a file."""

    def __init__(self, data: bytes, path: Path) -> None:
        self.data, self.path, self.place = data, path, 0

    def take(self, size: int) -> bytes:
        if size < 0 or self.place + size > len(self.data):
            raise ValueError(f"{self.path} ends in the middle of something; it is no whole GGUF file, copy it again")
        self.place += size
        return self.data[self.place - size : self.place]

    def number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0]

    def text(self) -> str:
        return self.take(self.number("Q")).decode("utf-8", errors="replace")

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY and depth < 4:
            inner, count = self.number("I"), self.number("Q")
            if inner in _NUMBERS:
                size = struct.calcsize(f"<{_NUMBERS[inner]}")
                return list(struct.unpack(f"<{count}{_NUMBERS[inner]}", self.take(size * count)))
            self.data[self.place : self.place + count] or self.take(count)  # each has at least one byte
            return [self.value(inner, depth + 1) for _ in range(count)]
        if kind not in _NUMBERS:
            raise ValueError(f"{self.path} has a field of type {kind}, which GGUF does not know; it is damaged")
        return self.number(_NUMBERS[kind])


def read_tensors(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Fields and tensors (float32, row-major) of a GGUF file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no such file, is damaged, or holds tensors of another type.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is no file; give a .gguf file")
    if path.stat().st_size > _LARGEST:
        raise ValueError(f"{path} has {path.stat().st_size} bytes; that is a model, not a control vector")
    refuse_lfs_pointer(path)
    cursor = _Cursor(path.read_bytes(), path)
    if cursor.data[:4] != MAGIC:
        raise ValueError(f"{path} does not begin with GGUF; give a .gguf file")
    cursor.take(4)
    version = cursor.number("I")
    if version not in _VERSIONS:
        raise ValueError(f"{path} is GGUF of version {version}; little-endian {_VERSIONS} are read")
    n_tensors, n_fields = cursor.number("Q"), cursor.number("Q")
    fields = {}
    for _ in range(n_fields):
        key = cursor.text()
        fields[key] = cursor.value(cursor.number("I"))
    told = [_told(cursor) for _ in range(n_tensors)]
    alignment = int(fields.get("general.alignment", _ALIGNMENT))
    if alignment < 1:
        raise ValueError(f"{path} has the alignment {alignment}; it is damaged")
    start = -(-cursor.place // alignment) * alignment
    return fields, {name: _values(cursor, name, shape, kind, start + offset) for name, shape, kind, offset in told}


def _told(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    name, ndim = cursor.text(), cursor.number("I")
    if ndim > 4:
        raise ValueError(f"{name!r} of {cursor.path} has {ndim} dimensions; at most 4 are expected, it is damaged")
    shape = tuple(cursor.number("Q") for _ in range(ndim))[::-1]  # GGUF names the fastest first
    return name, shape, cursor.number("I"), cursor.number("Q")


def _values(cursor: _Cursor, name: str, shape: tuple[int, ...], kind: int, place: int) -> np.ndarray:
    if kind != _FLOAT32:
        raise ValueError(f"{name!r} of {cursor.path} is of GGML type {kind}; float32 (0) is expected")
    cursor.place = place
    return np.frombuffer(cursor.take(4 * math.prod(shape)), dtype="<f4").reshape(shape).astype(np.float32)


def write_tensors(path: Path, fields: Mapping[str, str | int], tensors: Mapping[str, np.ndarray]) -> None:
    """Write a GGUF file (version 3) of text and whole-number fields and float32 tensors."""
    head = [MAGIC, struct.pack("<IQQ", 3, len(tensors), len(fields))]
    for key, value in fields.items():
        told = (
            struct.pack("<I", _STRING) + _text(value) if isinstance(value, str) else struct.pack("<II", _UINT32, value)
        )
        head.append(_text(key) + told)
    data = b""
    for name, values in tensors.items():
        stored = np.ascontiguousarray(values, dtype="<f4")
        shape = b"".join(struct.pack("<Q", size) for size in stored.shape[::-1])
        head.append(_text(name) + struct.pack("<I", stored.ndim) + shape + struct.pack("<IQ", _FLOAT32, len(data)))
        data += _padded(stored.tobytes())
    path.write_bytes(_padded(b"".join(head)) + data)


def _text(value: str) -> bytes:
    told = value.encode("utf-8")
    return struct.pack("<Q", len(told)) + told


def _padded(data: bytes) -> bytes:
    return data + b"\0" * (-len(data) % _ALIGNMENT)
