"""What a checkpoint's files hold, by their headers: names, shapes and dtypes of the tensors, without their values."""

from __future__ import annotations

import json
import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from mechmisalign._checkpoint_files import checkpoint_files
from mechmisalign._hub import HubError, asking, is_hub_id, is_offline

from .bases import Base

logger = logging.getLogger(__name__)

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_COMPUTED_IN = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_LONGEST_HEADER = 100 * 2**20  # safetensors allows no longer one


@dataclass(frozen=True)
class Stored:
    """A tensor in a file.

    Attributes:
        dtype: What it is stored in; None if torch has no such dtype here.
        shape: Its shape.
        bytes: What it takes in the file.
    """

    dtype: torch.dtype | None
    shape: tuple[int, ...]
    bytes: int

    @property
    def numbers(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)


def stored_tensors(base: Base) -> dict[str, Stored] | None:
    """The tensors of a base's safetensors: a folder's, those in the Hub's cache, else those that the Hub tells of.

    Returns:
        By their names in the files; None where it cannot be known (no safetensors, no network, a model in memory).
    """
    if base.model is not None or not base.location:
        return None
    files = checkpoint_files(base.location, base.revision)
    if files:
        return {name: each for path in set(files.values()) for name, each in read_header(path).items() if name in files}
    if Path(base.location).exists() or not is_hub_id(base.location) or base.local_files_only or is_offline():
        return None
    return _on_the_hub(base)


def stored_dtype(tensors: Mapping[str, Stored] | None) -> torch.dtype | None:
    """The precision of most of a checkpoint's numbers, which its config may tell otherwise; None if it is not known."""
    sizes: Counter[torch.dtype] = Counter()
    for each in (tensors or {}).values():
        if each.dtype in _COMPUTED_IN:
            sizes[each.dtype] += each.numbers
    return sizes.most_common(1)[0][0] if sizes else None


def read_header(path: Path) -> dict[str, Stored]:
    """The tensors of one safetensors file: a length of eight bytes, then as many of JSON.

    Raises:
        ValueError: If that is not how the file begins.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        text = file.read(length) if length <= _LONGEST_HEADER else b""
    try:
        entries = json.loads(text)
        return {
            name: _stored(each["dtype"], each["shape"], each["data_offsets"])
            for name, each in entries.items()
            if name != "__metadata__"
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} does not begin as a safetensors file does ({error}); copy it again") from error


def _stored(dtype: str, shape: Sequence[int], offsets: Sequence[int]) -> Stored:
    return Stored(DTYPES.get(dtype), tuple(shape), offsets[1] - offsets[0])


def _on_the_hub(base: Base) -> dict[str, Stored] | None:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import NotASafetensorsRepoError, SafetensorsParsingError

    try:
        with asking(base.location, base.revision):
            told = HfApi().get_safetensors_metadata(base.location, revision=base.revision)
    except (HubError, NotASafetensorsRepoError, SafetensorsParsingError) as error:
        logger.info("the Hub does not tell what the checkpoint of %s holds: %s", base.name, error)
        return None
    return {
        name: _stored(each.dtype, each.shape, each.data_offsets)
        for file in told.files_metadata.values()
        for name, each in file.tensors.items()
    }
