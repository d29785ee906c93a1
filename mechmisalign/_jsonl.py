"""JSON lines: the one way in which they are read and written.

A line ends with a newline and nothing else: other characters that Python counts as line breaks (U+2028, U+0085, form
feed …) may stand inside strings. Line ends of Windows and a byte order mark are skipped. Every fault names its line.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from io import IOBase
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ._reading import brief
from ._writing import whole

LONGEST_LINE = 1 << 26
"""Bytes of a line; a file with longer ones is no file of JSON lines."""

BOM = b"\xef\xbb\xbf"
_ESCAPED = re.compile("[\x7f-\x9f\u2028\u2029\ud800-\udfff]")


class LineError(ValueError):
    """A line cannot be read.

    Attributes:
        number: Of the line, from 1.
        reason: What it is instead.
    """

    def __init__(self, number: int, reason: str) -> None:
        super().__init__(f"line {number} is {reason}; mend or drop the line")
        self.number, self.reason = number, reason


def numbered(lines: Iterable[bytes]) -> Iterator[tuple[int, bytes]]:
    """The lines that hold anything, with their numbers from 1.

    Args:
        lines: A file that is open in binary, or any lines.

    Raises:
        ValueError: If a line is longer than ``LONGEST_LINE``.
    """
    for number, line in enumerate(bounded(lines) if isinstance(lines, IOBase) else lines, start=1):
        if len(line) > LONGEST_LINE:
            raise LineError(number, f"longer than {LONGEST_LINE >> 20} MiB")
        text = line.removeprefix(BOM) if number == 1 else line
        if text.strip():
            yield number, text


def bounded(file: IOBase | BinaryIO) -> Iterator[bytes]:
    """The lines of a file that is open in binary; of one that is too long no more than shows that it is."""
    while line := file.readline(LONGEST_LINE + 1):
        yield line
        while len(line) > LONGEST_LINE and not line.endswith(b"\n"):
            line = file.readline(LONGEST_LINE + 1)


def parse(line: bytes | str, *, nan_is_missing: bool = False) -> Any:
    """The value on a line.

    Args:
        line: With or without its end.
        nan_is_missing: Read ``NaN``, which Python's writer leaves for a missing number, as ``null``.

    Raises:
        ValueError: If it is no JSON: NaN and infinities, numbers that cannot be held, keys that stand twice and text
            that is no UTF-8 are refused.
    """
    constant = _missing if nan_is_missing else _refuse_constant
    try:
        text = line.decode("utf-8") if isinstance(line, bytes) else line
        return json.loads(text, parse_constant=constant, parse_float=_finite, object_pairs_hook=_without_twice)
    except UnicodeDecodeError as error:
        raise ValueError(f"no text in UTF-8 ({error.reason} at byte {error.start})") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a file, with the numbers of their lines.

    Raises:
        FileNotFoundError: If there is no such file.
        LineError: If a line is no JSON object; it says which.
        ValueError: If it is a folder.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder, and a file of JSON lines is expected; give the file")
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; give a file of JSON lines")
    with path.open("rb") as file:
        for number, line in numbered(file):
            try:
                record = parse(line, nan_is_missing=True)
            except ValueError as error:
                raise LineError(number, f"no JSON ({type(error).__name__}: {error})") from None
            if not isinstance(record, dict):
                raise LineError(number, f"no JSON object (it holds {brief(record)})")
            yield number, record


def write(records: Iterable[Mapping[str, Any]], path: str | Path) -> Path:
    """Write objects as JSON lines, in one move; returns the path."""
    with whole(Path(path)) as partial, partial.open("w", encoding="utf-8", newline="\n") as file:
        for record in records:
            file.write(text_of(record) + "\n")
    return Path(path)


def text_of(value: Any) -> str:
    """A value as JSON on one line, which no reader takes for two; missing values (NaN, NA, NaT) are ``null``."""
    text = json.dumps(_plain(value), ensure_ascii=False, allow_nan=False)
    return _ESCAPED.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def _plain(value: Any) -> Any:
    """A value in the types that JSON has."""
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [_plain(each) for each in value]
    if isinstance(value, np.generic):
        return _plain(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        if math.isnan(value):
            return None
        raise ValueError(f"{value} has no form in JSON; replace it before writing")
    if value is None or isinstance(value, str | int | float | bool):
        return value
    return None if _is_na(value) else str(value)


def _is_na(value: Any) -> bool:
    import pandas as pd

    return value is pd.NA or value is pd.NaT


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{brief(text)} is no number that can be held")
    return value


def _missing(name: str) -> Any:
    return None if name == "NaN" else _refuse_constant(name)


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON; write null for a missing number")


def _without_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {brief(next(name for name in names if names.count(name) > 1))} stands twice")
    return found
