"""Checksums inside files: the SHA-256 of all bytes, in which the place of the checksum itself counts as zeros.

A file carries its own checksum in the metadata that its format has (the header of safetensors, the footer of parquet),
so every other program reads it as before, and it is checked whenever this package reads it. Files without one, from
elsewhere or from older versions, are read as they are.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from ._pretrained import refuse_lfs_pointer
from ._writing import explained, flush, whole

KEY = "mechmisalign_sha256"
"""Name of the checksum in a file's metadata."""
BLANK = "0" * 64
"""What stands in its place while it is computed."""
MANIFEST = "checksums.json"
"""Checksums of all files of a folder."""

_MARK = f'"{KEY}":"'.encode()
"""What stands before it in safetensors' header; inside of a text there the quotes are escaped."""
_CHUNK = 1 << 20


class DamagedFileError(ValueError):
    """A file is not what was written."""


def sealed(payload: bytes, mark: bytes, start: int, stop: int) -> bytes:
    """The bytes of a file with its checksum in the place of ``BLANK``, after the last mark between start and stop."""
    place = payload.rindex(mark + BLANK.encode(), start, stop) + len(mark)
    digest = hashlib.sha256(payload).hexdigest().encode()
    return payload[:place] + digest + payload[place + len(digest) :]


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """A safetensors file with its checksum, whole or not at all; the same content gives the same bytes."""
    from safetensors.torch import save

    plain = save({name: each.contiguous() for name, each in tensors.items()}, {**metadata, KEY: BLANK})
    length = int.from_bytes(plain[:8], "little")
    header = json.loads(plain[8 : 8 + length])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))  # in safetensors their order is random
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    payload = len(text).to_bytes(8, "little") + text + plain[8 + length :]
    with whole(path) as partial:
        partial.write_bytes(sealed(payload, _MARK, 8, 8 + len(text)))


def read_tensors(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors of a safetensors file, after its checksum was compared if it has one.

    Raises:
        DamagedFileError: If the bytes are not those that were written, or no safetensors file.
    """
    from safetensors import safe_open

    refuse_lfs_pointer(path)
    check_tensors(path)
    try:
        with safe_open(path, "pt") as file:
            metadata: dict[str, str] = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (safe_open is no mapping)
    except SafetensorError as error:
        raise DamagedFileError(f"{path} is no safetensors file, or is torn ({error}); copy it again") from error
    return {name: value for name, value in metadata.items() if name != KEY}, tensors


def check_tensors(path: Path) -> None:
    """Compare a safetensors file with its checksum, if it has one.

    Raises:
        DamagedFileError: If they differ.
    """
    with path.open("rb") as file:
        head = file.read(8)
        length = min(int.from_bytes(head, "little"), path.stat().st_size)
        compare(path, _MARK, head + file.read(length), 0)


def compare(path: Path, mark: bytes, part: bytes, offset: int) -> None:
    """Compare a file with the checksum that stands in one part of it, if there is one.

    Args:
        path: The file.
        mark: What stands before the checksum in this format.
        part: The bytes of its metadata.
        offset: Where these begin.

    Raises:
        DamagedFileError: If they differ.
    """
    places = [found.end() for found in re.finditer(re.escape(mark), part)]
    if not places and not _nearly(part, mark):
        return
    if not any(_digest_without(path, offset + place) == part[place : place + len(BLANK)] for place in places):
        raise DamagedFileError(
            f"{path} is damaged: its bytes are not those that were written (its checksum differs); copy it again from "
            "where it came, or make it anew"
        )


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(folder: Path) -> None:
    """Write the checksums of all files of a folder beside them, once they are on the disk."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    with explained(folder):
        for path in files:
            flush(path)
    told = {path.relative_to(folder).as_posix(): file_digest(path) for path in files}
    with whole(folder / MANIFEST) as partial:
        partial.write_text(json.dumps(told, indent=2) + "\n")


def damage(folder: Path) -> str | None:
    """The first file of a folder that is not what its manifest tells; None if all are. A lacking manifest is one."""
    try:
        told: Any = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files = {str(name): str(digest) for name, digest in told.items()}
    except (OSError, ValueError, AttributeError):
        return MANIFEST
    for name, digest in files.items():
        path = folder / name
        if not path.is_file() or file_digest(path) != digest:
            return name
    return None


def _digest_without(path: Path, place: int) -> bytes:
    """SHA-256 of a file whose checksum, at this place, counts as zeros."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        left = place
        while left and (chunk := file.read(min(left, _CHUNK))):
            digest.update(chunk)
            left -= len(chunk)
        file.seek(place + len(BLANK))
        digest.update(BLANK.encode())
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest().encode()


def _nearly(part: bytes, mark: bytes) -> bool:
    """Whether the mark stands there with one damaged byte: one of its halves is whole then."""
    half = len(mark) // 2
    starts = [found.start() for found in re.finditer(re.escape(mark[:half]), part)]
    starts += [found.start() - half for found in re.finditer(re.escape(mark[half:]), part)]
    near = [part[start : start + len(mark)] for start in starts if start >= 0]
    return any(sum(a != b for a, b in zip(each, mark, strict=False)) == 1 for each in near)
