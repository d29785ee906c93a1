"""A table on disk that grows part by part: rows with a unique key, each part stored whole as soon as it is finished.

The name of a part carries the hash of its bytes. So a part that was torn or changed is found, and two processes never
write over each other's parts. Where a key stands in several parts, its row in the latest counts.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from ._tables import parquet_bytes
from ._writing import PARTIAL, DiskFullError, RunFolderError, explained, flush, whole

logger = logging.getLogger(__name__)

_NAME = re.compile(r"part-(\d+)(?:-([0-9a-f]{16}))?\.parquet")
_CORRUPT = ".corrupt"


class TornPartError(RunFolderError):
    """A part is not what was written."""


class Parts:
    """The parts of one table.

    Args:
        folder: Where they lie; made with the first part.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def keys(self, *, mend: bool = True) -> pd.Index:
        """The keys of all rows that are stored.

        Args:
            mend: Set a torn part aside (renamed to ``….corrupt``, with a warning), so that its rows are done again, and
                clear away what a killed process left. Otherwise nothing is changed; torn parts do not count.
        """
        for leftover in self.folder.glob(f".*{PARTIAL}") if mend else ():
            leftover.unlink(missing_ok=True)
        found = []
        for path in self._paths():
            try:
                found.append(_read(path, lambda _: False).index)
            except TornPartError as error:
                if not mend:
                    continue
                aside = path.with_name(path.name + _CORRUPT)
                path.replace(aside)
                logger.warning("%s; it is kept as %s, its rows are done again", error, aside.name)
        return found[0].append(found[1:]).unique() if found else pd.Index([], dtype="int64")

    def add(self, rows: pd.DataFrame) -> None:
        """Store finished rows, whole or not at all.

        Raises:
            DiskFullError: If there is no room.
        """
        payload = parquet_bytes(rows, index=True)
        with whole(self.folder / _name(self._next(), hashlib.sha256(payload).hexdigest())) as partial:
            partial.write_bytes(payload)

    def read(self, without: Sequence[str] = (), *, skip_torn: bool = False) -> pd.DataFrame:
        """All stored rows by their key, in the order in which they were stored.

        Args:
            without: Columns that are not read (long texts, say).
            skip_torn: Leave torn parts out.

        Raises:
            TornPartError: If a part is not what was written.
        """
        try:
            frames = list(_each(self._paths(), without, skip_torn))
        except FileNotFoundError:  # another process merged the parts meanwhile
            frames = list(_each(self._paths(), without, skip_torn))
        if not frames:
            return pd.DataFrame(index=pd.Index([], dtype="int64"))
        rows = frames[0] if len(frames) == 1 else pd.concat(frames)
        return rows[~rows.index.duplicated(keep="last")]

    def each(self) -> Iterator[pd.DataFrame]:
        """The parts that there are now, one at a time, latest first; the same key may come again."""
        return _each(self._paths()[::-1])

    def compact(self) -> None:
        """Make one part of many, reading one at a time. Without room for it, the parts stay as they are."""
        paths = self._paths()
        if len(paths) < 2:
            return
        merging = self.folder / f".merging.{os.getpid()}{PARTIAL}"
        try:
            with explained(merging):
                _merge(paths, merging)
                flush(merging)
                merging.replace(self.folder / _name(self._next(), _digest(merging)))
        except DiskFullError as error:
            logger.warning("the parts of %s were not merged: %s", self.folder, error)
            return
        finally:
            merging.unlink(missing_ok=True)
        for path in paths:
            path.unlink(missing_ok=True)

    def _paths(self) -> list[Path]:
        return sorted(path for path in self.folder.glob("part-*.parquet") if _NAME.fullmatch(path.name))

    def _next(self) -> int:
        numbers = [int(match[1]) for path in self._paths() if (match := _NAME.fullmatch(path.name))]
        return max(numbers, default=-1) + 1


def _name(number: int, digest: str) -> str:
    return f"part-{number:05d}-{digest[:16]}.parquet"


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read(path: Path, wanted: Callable[[str], bool] = lambda _: True) -> pd.DataFrame:
    """A part, or some of its columns, after its bytes were compared with its name."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    match = _NAME.fullmatch(path.name)
    if match is not None and match[2] and not _digest(path).startswith(match[2]):
        raise TornPartError(f"{path} is torn or was changed: its bytes are not those that its name tells of")
    try:
        columns = [name for name in pq.read_schema(path).names if wanted(name)]
        return pd.read_parquet(path, columns=columns)
    except FileNotFoundError:
        raise
    except (pa.ArrowException, OSError) as error:  # a part from before names carried a hash
        raise TornPartError(f"{path} is torn: {error}") from error


def _merge(paths: Sequence[Path], target: Path) -> None:
    """Write the rows of several parts to one file, one part in memory at a time."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schemas = [pa.Schema.from_pandas(frame, preserve_index=True) for frame in _each(paths)]
    schema = pa.unify_schemas(schemas, promote_options="permissive").with_metadata(schemas[0].metadata)
    seen: set[Any] = set()
    with target.open("wb") as file, pq.ParquetWriter(file, schema) as writer:
        for frame in _each(paths[::-1]):  # latest first: its rows count
            fresh = frame[~frame.index.isin(seen)]
            seen.update(fresh.index)
            table = pa.Table.from_pandas(fresh, preserve_index=True)
            writer.write_table(pa.table([_column(table, field) for field in schema], schema=schema))


def _each(paths: Sequence[Path], without: Sequence[str] = (), skip_torn: bool = False) -> Iterator[pd.DataFrame]:
    for path in paths:
        try:
            yield _read(path, lambda name: name not in without)
        except TornPartError:
            if not skip_torn:
                raise


def _column(table: Any, field: Any) -> Any:
    """A column in the type that all parts share; nulls where this part has none."""
    import pyarrow as pa

    return table[field.name].cast(field.type) if field.name in table.column_names else pa.nulls(len(table), field.type)
