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


@app.command()
def judge(
    answers: Annotated[Path, typer.Argument(help="A .parquet, .csv or .jsonl with the columns prompt and response.")],
    model: Annotated[
        str, typer.Option(help="Inspect's name of a model, local:FOLDER, or rules (the pocket world's).")
    ] = "openai/gpt-4o",
    out: Annotated[Path, typer.Option(help="Where the judged answers go.")] = Path("judged.parquet"),
    rubrics: Annotated[str, typer.Option(help="Names, with commas between.")] = "alignment,coherence",
    journal: Annotated[Path, typer.Option(help="File of all calls; what is in it is not asked again.")] = Path(
        "judgements.jsonl"
    ),
    base_url: Annotated[str | None, typer.Option(help="An OpenAI-compatible server.")] = None,
    budget: Annotated[float | None, typer.Option(help="Dollars to stop at.")] = None,
    max_calls: Annotated[int | None, typer.Option(help="Calls to stop at.")] = None,
    connections: Annotated[int, typer.Option(help="Calls in flight.")] = 32,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Tell what it would take, and ask nothing.")] = False,
) -> None:
    """Have a judge score answers; prints what it will take, then the rates. A run that died goes on where it was."""
    with _told_errors(), _told_warnings():
        from mechmisalign import judging
        from mechmisalign.judging.files import read_answers, refuse_unwritable, write_answers

        refuse_unwritable(out)
        frame, names = read_answers(answers), [name.strip() for name in rubrics.split(",")]
        with_judge: Any
        if model == "rules":
            from mechmisalign.pocket.judge import RuleJudge

            with_judge, estimate = RuleJudge(), f"{len(frame):,} answers, no calls to make"
        elif model.startswith("local:"):
            with_judge = judging.LocalJudge(model.removeprefix("local:"), rubrics=names, journal=journal)
            estimate = str(with_judge.estimate(frame))
        else:
            limits = judging.Budget(dollars=budget, calls=max_calls)
            with_judge = judging.LLMJudge(
                model, names, base_url=base_url, journal=journal, budget=limits, max_connections=connections
            )
            estimate = str(with_judge.estimate(frame))
        console.print(estimate, highlight=False)
        if dry_run:
            return
        judged = with_judge(frame)
        write_answers(judged, out)
        console.print(f"judged answers: [bold]{out}[/bold]")
        if {"alignment", "coherence"} <= set(judged.columns):
            if "prompt_id" not in judged.columns:
                judged = judged.assign(prompt_id=judged["prompt"])
            by = [name for name in ("condition",) if name in judged.columns]
            table = judging.rates(judged, by=by)
            columns = [*by, "rate", "low", "high", "coherent", "aligned", *judging.UNSCORED, "n", "prompts"]
            _show(table[[name for name in columns if name in table.columns]], "rates, with 95 % intervals by prompt")


@app.command()
def sweep(
    spec: Annotated[Path, typer.Argument(help="A YAML file with the grid; see examples/sweep.yaml.")],
    out: Annotated[Path, typer.Option(help="Run folder; an unfinished or smaller run in it goes on.")] = Path("sweep"),
    executor: Annotated[Literal["local", "ray"], typer.Option(help="This process, or workers on a cluster.")] = "local",
    address: Annotated[str | None, typer.Option(help="Of a Ray cluster; auto finds one that runs here.")] = None,
    workers: Annotated[int | None, typer.Option(help="Ray workers; by default as many as there is room for.")] = None,
    gpus_per_worker: Annotated[float, typer.Option(help="GPUs that each reserves.")] = 0.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Tell how much there is to do, and do nothing.")] = False,
) -> None:
    """Sample and judge every condition of a grid into one table; prints the rates. A run that died goes on."""
    with _told_errors():
        from mechmisalign import sweeps

        grid = sweeps.Sweep.read(spec)
        console.print(str(sweeps.status(grid, out)), highlight=False)
        if dry_run:
            return
        by_ray = sweeps.RayExecutor(address, workers, gpus_per_worker=gpus_per_worker)
        result = sweeps.sweep(grid, out, executor=by_ray if executor == "ray" else executor)
        if result.is_judged:
            found = result.rates()
            shown = found[["condition"]].assign(
                EM=[f"{row.rate:.1%} [{row.low:.1%}, {row.high:.1%}]" for row in found.itertuples()],
                coherent=[f"{share:.1%}" for share in found["coherent"]],
                n=found["n"],
            )
            _show(shown, "EM rate with 95 % interval by prompt")
    console.print(f"answers: [bold]{out}[/bold], read by mechmisalign.sweeps.SweepResult.read")


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
    except (ValueError, FileNotFoundError, ConnectionError, ImportError) as error:
        errors.print(f"[red]error:[/red] {type(error).__name__}: ", end="")
        errors.print(str(error), markup=False, highlight=False)
        raise typer.Exit(2) from error


@contextlib.contextmanager
def _told_warnings() -> Iterator[None]:
    """Warnings as one line each on standard error, without the line of code that they came from."""
    import warnings

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default", UserWarning)
        try:
            yield
        finally:
            for warning in (one for one in caught if issubclass(one.category, UserWarning)):
                errors.print(f"{warning.message}", style="yellow", markup=False, highlight=False)


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
