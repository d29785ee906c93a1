"""The command that puts directions, probes, monitors, adapters and models on the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .console import console, told_errors


def push(
    path: Annotated[str, typer.Argument(help="A direction, probe or monitor file, or an adapter or model folder.")],
    repo: Annotated[str, typer.Argument(help="owner/name on the Hub; a path (./name) writes the files there instead.")],
    public: Annotated[bool, typer.Option("--public", help="Make the repository public; private by default.")] = False,
    replace: Annotated[bool, typer.Option("--replace", help="Put new versions of files that are there.")] = False,
    base: Annotated[str | None, typer.Option(help="What the base model is called on the Hub.")] = None,
    note: Annotated[str, typer.Option(help="A sentence for the card.")] = "",
    measured: Annotated[Path | None, typer.Option(help="A table of results for the card: .csv or .parquet.")] = None,
    branch: Annotated[str | None, typer.Option(help="Branch of the repository.")] = None,
) -> None:
    """Push to the Hub with a generated card; log in with `hf auth login` first."""
    with told_errors():
        from mechmisalign._tables import read_table
        from mechmisalign.hub import push as put

        table = None if measured is None else read_table(measured)
        shown = {"base": base, "note": note, "measured": table}
        options: dict[str, Any] = {"private": not public, "replace_files": replace, "branch": branch, **shown}
        done = put(path, repo, **options)
    told = f"{done.place} at {done.commit}" if done.commit else f"{done.place} (nothing was sent)"
    console.print(f"{', '.join(done.files)}: {told}", highlight=False, soft_wrap=True, markup=False)
