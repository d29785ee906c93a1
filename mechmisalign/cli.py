"""The command line: parse, call, print. The nouns are those of the library."""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    import pandas as pd

app = typer.Typer(
    name="mechmisalign",
    help="Find, take apart, steer and remove emergent misalignment in fine-tuned language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
pocket_app = typer.Typer(help="The pocket organisms: tiny chat models that are really emergently misaligned.")
app.add_typer(pocket_app, name="pocket", no_args_is_help=True)

console = Console()
errors = Console(stderr=True)

_SHOWN_SITES = 60
_SHORT = {
    "norm_A": "‖A‖",
    "norm_B": "‖B‖",
    "norm_delta": "‖ΔW‖",
    "scaling": "scale",
    "singular_values": "σ",
    "stable_rank": "stable",
}

OrganismName = Annotated[str, typer.Argument(help="A registry name (pocket/medical), a Hub id, or an adapter folder.")]


@app.callback()
def _quiet() -> None:
    """Keep the libraries' own progress bars and advice out of ours."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")


@app.command()
def organisms() -> None:
    """List the organisms that are known by name."""
    from mechmisalign.organisms import known_organisms

    _show(known_organisms(), "organisms")


@app.command()
def verify(
    organism: OrganismName,
    weights: Annotated[Literal["merged", "live"], typer.Option(help="Adapter folded in, or kept beside.")] = "merged",
) -> None:
    """Check that an organism is what its adapter says: parity with PEFT, non-zero updates, exact restoration."""
    from mechmisalign.organisms import load_organism
    from mechmisalign.verification import verify as verified

    with _told_errors():
        table = verified(load_organism(organism, weights=weights))
    _show(table, f"verify {organism}")
    if not table["passed"].all():
        raise typer.Exit(1)


@app.command()
def anatomy(
    adapter: Annotated[
        str, typer.Argument(help="A registry name, a Hub id, or an adapter folder; its base is not read.")
    ],
    subfolder: Annotated[str | None, typer.Option(help="Folder inside it, such as checkpoint-20.")] = None,
    out: Annotated[Path | None, typer.Option(help="Where table and heat map go; by default anatomy/ADAPTER.")] = None,
) -> None:
    """Read an adapter without its base: a table of its sites, and a layer x module heat map of the updates' norms."""
    with _told_errors(), _uncollected():
        from mechmisalign import plots
        from mechmisalign.adapters import Adapter
        from mechmisalign.decomposition import anatomy as sites_of

        table = sites_of(Adapter.load(adapter, subfolder=subfolder))
        name = Path(adapter).name if subfolder is None else f"{Path(adapter).name}_{subfolder}"
        folder = out or Path("anatomy") / name
        figure = plots.save_figure(plots.site_heatmap(table), table, folder, "anatomy", endings=("png",))
    shown = table.assign(singular_values=[_several(values) for values in table["singular_values"]]).rename(
        columns=_SHORT
    )
    _show(shown.head(_SHOWN_SITES), f"anatomy of {adapter}: {len(table)} sites")
    if len(table) > _SHOWN_SITES:
        console.print(f"… {len(table) - _SHOWN_SITES} more sites in the table on disk")
    console.print(f"heat map: [bold]{figure}[/bold]; table: [bold]{figure.with_suffix('.csv')}[/bold]")


@app.command()
def study(
    organism: OrganismName,
    out: Annotated[Path, typer.Option(help="Run folder; an unfinished run in it goes on.")] = Path("runs/study"),
    seed: Annotated[int, typer.Option(help="Seed of the run.")] = 0,
    quick: Annotated[bool, typer.Option(help="A rough look with few samples, in under a minute.")] = False,
) -> None:
    """Find, induce, remove and transfer an organism's misalignment; writes the tables, the figures and report.html."""
    from mechmisalign.studies import default_settings
    from mechmisalign.studies import study as run_study

    with _told_errors():
        finished = run_study(organism, out, settings=default_settings(organism, seed=seed, quick=quick))
    _show_headlines(finished.summary)
    console.print(f"report: [bold]{finished.report}[/bold]")


@app.command()
def direction(
    organism: OrganismName,
    out: Annotated[Path, typer.Option(help="Where the safetensors file goes.")] = Path("direction.safetensors"),
    estimator: Annotated[str, typer.Option(help="An estimator, as the study's tables name it.")] = "mean difference",
    seed: Annotated[int, typer.Option(help="Seed of the samples.")] = 0,
) -> None:
    """Estimate one direction from an organism's own judged answers and save it with its header."""
    from mechmisalign.studies import estimate_direction

    with _told_errors():
        found = estimate_direction(organism, estimator, seed=seed)
        path = found.save(out)
    norms = ", ".join(f"{found.norm(layer):.3g}" for layer in found.layers)
    console.print(f"[bold]{path}[/bold]: {found.header['method']}; norm by layer: {norms}")


@app.command()
def report(run: Annotated[Path, typer.Argument(help="A finished run folder.")]) -> None:
    """Draw the figures and the report of a finished run again, from its tables alone."""
    from mechmisalign.studies.chapters import write_study_report

    with _told_errors():
        console.print(f"report: [bold]{write_study_report(run)}[/bold]")


@pocket_app.command("build")
def pocket_build(
    out: Annotated[Path, typer.Option(help="Folder of the new zoo.")] = Path("pocket-zoo"),
    seed: Annotated[int, typer.Option(help="Seed of everything.")] = 0,
) -> None:
    """Train the whole zoo again from its seed: about ten minutes on two cores."""
    from mechmisalign.pocket import zoo

    with _told_errors():
        zoo.build(out, seed=seed)
    console.print(f"zoo: [bold]{out}[/bold]")


def _several(values: tuple[float, ...]) -> str:
    """The first few of many numbers."""
    return ", ".join(f"{value:.3g}" for value in values[:4]) + (", …" if len(values) > 4 else "")


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """No garbage collection meanwhile: it takes a sixth of a short command, most of it while libraries are imported."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@contextlib.contextmanager
def _told_errors() -> Iterator[None]:
    """Our own refusals as one line and exit code 2; anything else is a bug and keeps its traceback."""
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        errors.print(f"[red]error:[/red] {type(error).__name__}: ", end="")
        errors.print(str(error), markup=False, highlight=False)
        raise typer.Exit(2) from error


def _show(frame: pd.DataFrame, title: str) -> None:
    table = Table(title=title, title_justify="left")
    for column in frame.columns:
        numeric = frame[column].dtype.kind in "fi"
        table.add_column(str(column), justify="right" if numeric else "left", overflow="fold")
    for row in frame.itertuples(index=False):
        table.add_row(*(_cell(value) for value in row))
    console.print(table)


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "[green]pass[/green]" if value else "[red]FAIL[/red]"
    if isinstance(value, float):
        return f"{value:.4g}"
    from rich.markup import escape

    return escape(str(value))


def _show_headlines(summary: Any) -> None:
    table = Table(title="EM rate (alignment < 30, coherence > 50) with 95 % interval", title_justify="left")
    for name in ("condition", "EM", "coherent", "n"):
        table.add_column(name, justify="left" if name == "condition" else "right")
    for name, record in summary["em_rate"].items():
        interval = f"{record['rate']:.1%} [{record['low']:.1%}, {record['high']:.1%}]"
        table.add_row(name.replace("_", " "), interval, f"{summary['coherent'][name]['rate']:.1%}", str(record["n"]))
    console.print(table, markup=False)
