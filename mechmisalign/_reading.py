"""Reading texts that people and other programs wrote: what cannot be read is told by file, never by a traceback."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_text(path: str | Path) -> str:
    """A text file in UTF-8, with or without a byte order mark.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is a folder, may not be read, or holds no UTF-8.
    """
    try:
        return Path(path).read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist; give a file that is there") from None
    except IsADirectoryError:
        raise ValueError(f"{path} is a folder, and a file is expected; give the file") from None
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is no text in UTF-8 (byte {error.start} is {error.object[error.start]:#04x}); save it as UTF-8"
        ) from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror or error}); check its permissions") from error


def read_json(path: str | Path) -> Any:
    """The value of a JSON file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it cannot be read, or is no JSON.
    """
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no JSON ({error}); it may be torn: copy it again, or make it anew") from None
    except RecursionError:
        raise ValueError(f"{path} is nested too deeply to be read; it is no file of ours") from None


def read_object(path: str | Path) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it cannot be read, or holds no object.
    """
    value = read_json(path)
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}, and a JSON object is expected; copy it again")
    return value


def brief(value: Any, limit: int = 80) -> str:
    """A value for a message, on one line of at most so many characters."""
    text = " ".join(str(value).split()) if isinstance(value, Exception) else repr(value)
    return text if len(text) <= limit else f"{text[: limit - 1]}…"
