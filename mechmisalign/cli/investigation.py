"""Commands about a whole investigation: the study, its report, one direction."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .console import OrganismName, console, safe, show_headlines, told_errors


def study(
    organism: OrganismName,
    out: Annotated[Path, typer.Option(help="Run folder; an unfinished run in it goes on.")] = Path("runs/study"),
    seed: Annotated[int, typer.Option(help="Seed of the run.")] = 0,
    quick: Annotated[bool, typer.Option(help="A rough look with few samples, in a minute or two.")] = False,
    checkpoints: Annotated[
        str, typer.Option(help="Checkpoints of its training: a folder or a name; by default those beside the adapter.")
    ] = "default",
) -> None:
    """Find, induce, remove, transfer and cure an organism's misalignment; writes tables, figures and report.html."""
    with told_errors(out):
        from mechmisalign._writing import refuse_unwritable_folder
        from mechmisalign.studies import default_settings
        from mechmisalign.studies import study as run_study

        refuse_unwritable_folder(out)
        settings = default_settings(organism, seed=seed, quick=quick)
        finished = run_study(organism, out, checkpoints=checkpoints, settings=settings)
    show_headlines(finished.summary)
    console.print(f"report: [bold]{safe(finished.report)}[/bold]")


def direction(
    organism: OrganismName,
    out: Annotated[Path, typer.Option(help="Where the safetensors file goes.")] = Path("direction.safetensors"),
    estimator: Annotated[str, typer.Option(help="An estimator, as the study's tables name it.")] = "mean difference",
    seed: Annotated[int, typer.Option(help="Seed of the samples.")] = 0,
) -> None:
    """Estimate one direction from an organism's own judged answers and save it with its header."""
    with told_errors():
        from mechmisalign._writing import refuse_unwritable
        from mechmisalign.studies import estimate_direction

        refuse_unwritable(out)
        found = estimate_direction(organism, estimator, seed=seed)
        path = found.save(out)
    norms = ", ".join(f"{found.norm(layer):.3g}" for layer in found.layers)
    console.print(f"[bold]{safe(path)}[/bold]: {safe(found.header['method'])}; norm by layer: {norms}")


def report(run: Annotated[Path, typer.Argument(help="A finished run folder.")]) -> None:
    """Draw the figures and the report of a finished run again, from its tables alone."""
    with told_errors():
        from mechmisalign.studies.chapters import write_study_report

        console.print(f"report: [bold]{safe(write_study_report(run))}[/bold]")
