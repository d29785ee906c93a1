"""Prompts by the names that commands take: a set that ships, or a file."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from mechmisalign import registry
from mechmisalign.registry.worlds import PROMPTS, made_by

from .files import read


def named_prompts(name: str | Path) -> pd.DataFrame:
    """The prompts of a name.

    Args:
        name: A set that ships (``open_questions``, ``pocket``), or a file that ``mm.prompts.read`` takes.

    Raises:
        ValueError: If it is neither.
        FileNotFoundError: If there is no such file.
    """
    if str(name) in PROMPTS and not Path(name).exists():
        frame: pd.DataFrame = made_by(PROMPTS[str(name)])()
        return frame
    if not Path(name).suffix:
        sets = ", ".join(map(repr, PROMPTS))
        raise ValueError(
            f"{str(name)!r} is no set of prompts ({sets}) and no file{registry.suggestion(str(name), PROMPTS)}"
        )
    return read(name)
