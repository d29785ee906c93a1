"""The words that several commands share, each with one meaning."""

from __future__ import annotations

from typing import Annotated

import typer

JudgeName = Annotated[
    str | None,
    typer.Option(
        "--judge", help="openai/gpt-4o or another provider/model, local:FOLDER, python:module.attribute, or rules."
    ),
]
OldModel = Annotated[str | None, typer.Option("--model", hidden=True)]
"""What ``--judge`` was called once."""


def refuse_model(model: str | None) -> None:
    """Say the new name of an option that was renamed.

    Raises:
        ValueError: If it was given.
    """
    if model is not None:
        raise ValueError(f"--model is --judge now: give --judge {model}")
