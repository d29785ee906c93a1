"""Answers in files: parquet, CSV or JSON lines, by the ending of the name."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from mechmisalign import _writing
from mechmisalign._tables import ENDINGS, known_ending, read_table, write_table

__all__ = ["ENDINGS", "read_answers", "refuse_unwritable", "write_answers"]


def read_answers(path: str | Path) -> pd.DataFrame:
    """Answers from a file; texts stay texts (an answer "NA" or "null" is no missing value), and gaps stay gaps.

    In CSV a cell in which nothing stands is missing, and ``""`` is an empty text.

    Raises:
        ValueError: If the ending is unknown, the file cannot be read, or ``prompt`` or ``response`` is missing.
        FileNotFoundError: If there is no such file.
    """
    frame = read_table(path)
    missing = {"prompt", "response"} - set(frame.columns)
    if missing:
        raise ValueError(f"{path} needs the columns {sorted(missing)}; it has {list(frame.columns)}")
    return frame


def write_answers(frame: pd.DataFrame, path: str | Path) -> Path:
    """Write answers to a file in one move; ``read_answers`` gives them back, missing ones as missing.

    Raises:
        ValueError: If the ending is unknown.
        DiskFullError: If there is no room.
    """
    return write_table(frame, path)


def refuse_unwritable(path: str | Path) -> None:
    """Refuse a name that ``write_answers`` would, before anything is paid for.

    Raises:
        ValueError: If the ending is unknown, or no file can be written there.
    """
    known_ending(Path(path))
    _writing.refuse_unwritable(path)
