"""Answers in files: parquet, CSV or JSON lines, by the ending of the name."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from mechmisalign._writing import whole

ENDINGS = (".parquet", ".csv", ".jsonl")
_TEXTS = ("prompt", "response", "prompt_id", "question_id", "condition")


def read_answers(path: str | Path) -> pd.DataFrame:
    """Answers from a file; texts stay texts (an answer "NA" or "null" is no missing value).

    Raises:
        ValueError: If the ending is unknown, or ``prompt`` or ``response`` is missing.
        FileNotFoundError: If there is no such file.
    """
    path = Path(path)
    ending = _known_ending(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; give the file that holds the answers")
    if ending == ".parquet":
        frame = pd.read_parquet(path)
    elif ending == ".csv":
        frame = _read_csv(path)
    else:
        frame = pd.read_json(path, lines=True, dtype=False, convert_dates=False)
    missing = {"prompt", "response"} - set(frame.columns)
    if missing:
        raise ValueError(f"{path} needs the columns {sorted(missing)}; it has {list(frame.columns)}")
    return frame


def write_answers(frame: pd.DataFrame, path: str | Path) -> Path:
    """Write answers to a file in one move.

    Raises:
        ValueError: If the ending is unknown.
        DiskFullError: If there is no room.
    """
    path = Path(path)
    ending = _known_ending(path)
    with whole(path) as partial:
        if ending == ".parquet":
            frame.to_parquet(partial)
        elif ending == ".csv":
            frame.to_csv(partial, index=False)
        else:
            frame.to_json(partial, orient="records", lines=True)
    return path


def refuse_unwritable(path: str | Path) -> None:
    """Refuse a name that ``write_answers`` would, before anything is paid for.

    Raises:
        ValueError: If the ending is unknown.
    """
    _known_ending(Path(path))


def _read_csv(path: Path) -> pd.DataFrame:
    """A CSV whose texts are read as they stand, and whose other columns are read as pandas reads them."""
    names = list(pd.read_csv(path, nrows=0).columns)
    texts = [name for name in names if name in _TEXTS]
    read = pd.read_csv(path, usecols=texts, dtype=str, keep_default_na=False)
    others = (
        pd.read_csv(path, usecols=[name for name in names if name not in _TEXTS]) if len(texts) < len(names) else read
    )
    return pd.concat([read, others.drop(columns=texts, errors="ignore")], axis=1)[names]


def _known_ending(path: Path) -> str:
    if path.suffix not in ENDINGS:
        raise ValueError(f"{path} ends in {path.suffix!r}; answers are kept as one of {', '.join(ENDINGS)}")
    return path.suffix
