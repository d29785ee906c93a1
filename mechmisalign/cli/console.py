"""How commands print: tables, one line for a refusal, warnings without their source."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    import pandas as pd

console = Console()
errors = Console(stderr=True)

OrganismName = Annotated[str, typer.Argument(help="A registry name (pocket/medical), a Hub id, or an adapter folder.")]


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """No garbage collection meanwhile: it takes a sixth of a short command, most of it while libraries are imported."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@contextlib.contextmanager
def told_errors() -> Iterator[None]:
    """Our own refusals as one line and exit code 2; anything else is a bug and keeps its traceback."""
    try:
        yield
    except (ValueError, FileNotFoundError, ConnectionError, ImportError) as error:
        errors.print(f"[red]error:[/red] {type(error).__name__}: ", end="")
        errors.print(str(error), markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(2) from error


@contextlib.contextmanager
def told_warnings() -> Iterator[None]:
    """Warnings as one line each on standard error, without the line of code that they came from."""
    import warnings

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default", UserWarning)
        try:
            yield
        finally:
            for warning in (one for one in caught if issubclass(one.category, UserWarning)):
                errors.print(f"{warning.message}", style="yellow", markup=False, highlight=False, soft_wrap=True)


def show(frame: pd.DataFrame, title: str) -> None:
    """A frame as a table."""
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


def show_rates(rates: pd.DataFrame, by: Sequence[str], title: str) -> None:
    """Rates as they are to be read: with their interval, and the reasons for missing scores where there are any."""
    from mechmisalign.judging import UNSCORED

    told = rates[list(by)].assign(
        EM=[f"{row.rate:.1%} [{row.low:.1%}, {row.high:.1%}]" for row in rates.itertuples()],
        coherent=[f"{share:.1%}" for share in rates["coherent"]],
    )
    for reason in UNSCORED:
        if (rates[reason] > 0).any():
            told[reason] = [f"{share:.1%}" for share in rates[reason]]
    show(told.assign(n=rates["n"], prompts=rates["prompts"]), title)


def show_headlines(summary: Any) -> None:
    """The rates of a study's summary."""
    table = Table(title="EM rate (alignment < 30, coherence > 50) with 95 % interval", title_justify="left")
    for name in ("condition", "EM", "coherent", "n"):
        table.add_column(name, justify="left" if name == "condition" else "right")
    for name, record in summary["em_rate"].items():
        interval = f"{record['rate']:.1%} [{record['low']:.1%}, {record['high']:.1%}]"
        table.add_row(name.replace("_", " "), interval, f"{summary['coherent'][name]['rate']:.1%}", str(record["n"]))
    console.print(table, markup=False)
