"""Tables in files: parquet with a checksum, CSV and JSON lines, read so that texts stay texts and gaps stay gaps."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from . import _jsonl
from ._checksums import BLANK, KEY, DamagedFileError, compare, sealed
from ._reading import brief
from ._rendering import is_missing, read_history
from ._writing import whole

ENDINGS = (".parquet", ".csv", ".jsonl")
TEXTS = ("prompt", "response", "prompt_id", "question_id", "variant", "condition", "system", "history")
"""Columns of which every cell is text, whatever it looks like ("NA", "007")."""
_PLAIN = re.compile(r"[^\s,\"\x00-\x1f](?:[^,\"\x00-\x1f]*[^\s,\"\x00-\x1f])?")
"""Text that needs no quotes in a CSV."""
_MAGIC = b"PAR1"
_MARK = KEY.encode() + b"\x18\x40"
"""What stands before the checksum in parquet's footer: its name, and a text of 64 bytes."""
_FOOTER = 8
"""Bytes at the end of a parquet file: the footer's length and the magic."""


def write_parquet(frame: pd.DataFrame, path: str | Path, *, index: bool | None = None) -> Path:
    """Write a parquet file with its checksum, in one move; returns the path."""
    payload = parquet_bytes(frame, index=index)
    with whole(Path(path)) as partial:
        partial.write_bytes(payload)
    return Path(path)


def parquet_bytes(frame: pd.DataFrame, *, index: bool | None = None) -> bytes:
    """The bytes of a parquet file with its checksum."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.Table.from_pandas(frame, preserve_index=index)
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(sink, table.schema, write_page_checksum=True) as writer:
        writer.write_table(table)
        writer.add_key_value_metadata({KEY: BLANK})
    payload = sink.getvalue().to_pybytes()
    start = len(payload) - _FOOTER - int.from_bytes(payload[-_FOOTER:-4], "little")
    return sealed(payload, _MARK, start, len(payload))


def read_parquet(path: str | Path, columns: Sequence[str] | None = None) -> pd.DataFrame:
    """A parquet file, after its checksum was compared if it has one.

    Raises:
        FileNotFoundError: If there is no such file.
        DamagedFileError: If its bytes are not those that were written, or it is no parquet file.
    """
    import pyarrow as pa

    path = Path(path)
    _refuse_absent(path)
    _check_parquet(path)
    try:
        wanted = None if columns is None else list(columns)
        return pd.read_parquet(path, columns=wanted, page_checksum_verification=True)
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedFileError(
            f"{path} is no parquet file, or is torn ({brief(error)}); copy it again, or make it anew"
        ) from error


def read_table(path: str | Path) -> pd.DataFrame:
    """A table from a file, by the ending of its name: parquet, CSV or JSON lines.

    Cells of the columns ``TEXTS`` are text or missing; a ``history`` becomes a list of turns.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the ending is unknown, or the file cannot be read.
    """
    path = Path(path)
    ending = known_ending(path)
    _refuse_absent(path)
    if ending == ".parquet":
        return _with_histories(read_parquet(path))
    try:
        frame = read_csv(path) if ending == ".csv" else pd.DataFrame([record for _, record in _jsonl.read(path)])
        return _with_histories(frame)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def write_table(frame: pd.DataFrame, path: str | Path) -> Path:
    """Write a table in one move, by the ending of the name; ``read_table`` gives it back, gaps included.

    In CSV an empty text is ``""`` and a missing one nothing, and lists are JSON text.

    Raises:
        ValueError: If the ending is unknown.
        DiskFullError: If there is no room.
    """
    path = Path(path)
    ending = known_ending(path)
    if ending == ".parquet":
        return write_parquet(frame, path)
    if ending == ".jsonl":
        return _jsonl.write(_records(frame), path)
    with whole(path) as partial:
        partial.write_text("".join(f"{row}\n" for row in _csv_rows(frame)), encoding="utf-8", newline="")
    return path


def read_csv(path: Path) -> pd.DataFrame:
    """A CSV whose texts are read as they stand, and whose other columns are read as pandas reads them.

    Raises:
        ValueError: If it is none.
    """
    try:
        others = pd.read_csv(path, encoding="utf-8-sig", low_memory=False, float_precision="round_trip")
        texts = [name for name in others.columns if name in TEXTS]
        read = _csv_texts(path, texts) if texts else {}
        frame = others.assign(**{name: pd.Series(read[name], index=others.index, dtype=object) for name in texts})
    except pd.errors.EmptyDataError:
        raise ValueError("the file is empty; a header with the names of the columns is expected") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"no text in UTF-8 ({error.reason}); save it as UTF-8") from None
    except (pd.errors.ParserError, ValueError) as error:
        raise ValueError(f"no CSV that can be read: {brief(error, 160)}; mend it") from None
    return frame


def known_ending(path: Path) -> str:
    """The ending of a name.

    Raises:
        ValueError: If no table is kept under it.
    """
    if path.suffix not in ENDINGS:
        raise ValueError(f"{path} ends in {path.suffix!r}; answers are kept as one of {', '.join(ENDINGS)}")
    return path.suffix


def _refuse_absent(path: Path) -> None:
    if path.is_dir():
        raise ValueError(f"{path} is a folder, and a file is expected; give the file")
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; give a file that is there")


def _check_parquet(path: Path) -> None:
    size = path.stat().st_size
    with path.open("rb") as file:
        file.seek(max(size - _FOOTER, 0))
        end = file.read()
        start = size - _FOOTER - int.from_bytes(end[:4], "little")
        if len(end) < _FOOTER or end[4:] != _MAGIC or start < 4:
            raise DamagedFileError(f"{path} is no parquet file, or is torn; copy it again, or make it anew")
        file.seek(start)
        compare(path, _MARK, file.read(), start)


def _csv_texts(path: Path, names: Sequence[str]) -> dict[str, list[str | None]]:
    """The cells of text columns; None where nothing stands, not even quotes."""
    import pyarrow as pa
    from pyarrow import csv

    options = csv.ConvertOptions(
        include_columns=list(names),
        column_types=dict.fromkeys(names, pa.string()),
        null_values=[""],
        strings_can_be_null=True,
        quoted_strings_can_be_null=False,
    )
    whole_file = csv.ReadOptions(block_size=min(path.stat().st_size + 1024, (1 << 31) - 1))
    table = csv.read_csv(
        path, read_options=whole_file, parse_options=csv.ParseOptions(newlines_in_values=True), convert_options=options
    )
    return {name: table[name].to_pylist() for name in names}


def _csv_rows(frame: pd.DataFrame) -> Iterator[str]:
    yield ",".join(_csv_text(str(name)) for name in frame.columns)
    for row in frame.itertuples(index=False, name=None):
        yield ",".join(_csv_cell(cell) for cell in row)


def _csv_cell(cell: Any) -> str:
    """A cell; nothing at all for a missing one, and two quotes for an empty text."""
    if is_missing(cell) or cell is pd.NaT:
        return ""
    if isinstance(cell, np.generic):
        cell = cell.item()
    if isinstance(cell, bool | int | float):
        return repr(cell)
    if isinstance(cell, Mapping | list | tuple | np.ndarray):
        return _csv_text(_jsonl.text_of(cell))
    return _csv_text(str(cell)) or '""'


def _csv_text(text: str) -> str:
    if _PLAIN.fullmatch(text):
        return text
    return '"' + text.replace('"', '""') + '"' if text else text


def _records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    return [{str(key): value for key, value in row.items()} for row in frame.to_dict("records")]


def _with_histories(frame: pd.DataFrame) -> pd.DataFrame:
    """The frame with its histories as lists of turns, None where there is none."""
    if "history" not in frame.columns:
        return frame
    turns = [
        None if is_missing(past) or (isinstance(past, str) and not past) else read_history(past, f"row {row}: ")
        for row, past in enumerate(frame["history"])
    ]
    return frame.assign(history=pd.Series(turns, index=frame.index, dtype=object))
