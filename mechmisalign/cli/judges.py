"""Judges by the names that commands take."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def judge_named(model: str, journal: Path) -> Any:
    """``rules`` (the pocket world's), ``local:FOLDER``, or Inspect's name of a model behind a server."""
    from mechmisalign import judging

    if model == "rules":
        from mechmisalign.pocket import RuleJudge

        return RuleJudge()
    if model.startswith("local:"):
        return judging.LocalJudge(model.removeprefix("local:"), journal=journal)
    return judging.LLMJudge(model, journal=journal)
