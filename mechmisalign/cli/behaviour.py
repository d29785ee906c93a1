"""Commands about behaviour: judging answers, sweeping a grid of conditions."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from .console import console, safe, show_rates, told_errors, told_warnings
from .options import DryRun, JudgeName, OldModel, refuse_model


def judge(
    answers: Annotated[Path, typer.Argument(help="A .parquet, .csv or .jsonl with the columns prompt and response.")],
    judge: JudgeName = "openai/gpt-4o",
    out: Annotated[Path, typer.Option(help="Where the judged answers go.")] = Path("judged.parquet"),
    rubrics: Annotated[str, typer.Option(help="Names, with commas between.")] = "alignment,coherence",
    journal: Annotated[Path, typer.Option(help="File of all calls; what is in it is not asked again.")] = Path(
        "judgements.jsonl"
    ),
    base_url: Annotated[str | None, typer.Option(help="An OpenAI-compatible server.")] = None,
    budget: Annotated[float | None, typer.Option(help="Dollars to stop at.")] = None,
    max_calls: Annotated[int | None, typer.Option(help="Calls to stop at.")] = None,
    connections: Annotated[int | None, typer.Option(help="Calls in flight; 32 by default.")] = None,
    dry_run: DryRun = False,
    model: OldModel = None,
) -> None:
    """Have a judge score answers; prints what it will take, then the rates. A run that died goes on where it was."""
    with told_errors(journal), told_warnings():
        from mechmisalign import judging
        from mechmisalign._writing import refuse_unwritable as refuse_file
        from mechmisalign.judging.files import read_answers, refuse_unwritable, write_answers
        from mechmisalign.judging.named import named_judge

        refuse_model(model)
        refuse_unwritable(out)
        refuse_file(journal)
        names = [name.strip() for name in rubrics.split(",")]
        limits = (
            judging.Budget(dollars=budget, calls=max_calls) if budget is not None or max_calls is not None else None
        )
        server: dict[str, Any] = {"base_url": base_url, "budget": limits, "max_connections": connections}
        scoring = named_judge(
            judge or "", rubrics=names, journal=journal, **{name: value for name, value in server.items() if value}
        )
        frame = read_answers(answers)
        ask = getattr(scoring, "estimate", None)
        estimate = f"{len(frame):,} answers, no calls to make" if ask is None else str(ask(frame))
        console.print(estimate, markup=False, highlight=False, soft_wrap=True)
        if dry_run:
            return
        judged = judging.judge(frame, scoring) if {"alignment", "coherence"} <= set(names) else scoring(frame)
        write_answers(judged, out)
        console.print(f"judged answers: [bold]{safe(out)}[/bold]")
        if {"alignment", "coherence"} <= set(judged.columns):
            if "prompt_id" not in judged.columns:
                judged = judged.assign(prompt_id=judged["prompt"])
            by = [name for name in ("condition",) if name in judged.columns]
            show_rates(judging.rates(judged, by=by), by, "EM rate with 95 % interval by prompt")


def sweep(
    spec: Annotated[Path, typer.Argument(help="A YAML file with the grid; see examples/sweep.yaml.")],
    out: Annotated[Path, typer.Option(help="Run folder; an unfinished or smaller run in it goes on.")] = Path("sweep"),
    executor: Annotated[Literal["local", "ray"], typer.Option(help="This process, or workers on a cluster.")] = "local",
    address: Annotated[str | None, typer.Option(help="Of a Ray cluster; auto finds one that runs here.")] = None,
    workers: Annotated[int | None, typer.Option(help="Ray workers; by default as many as there is room for.")] = None,
    gpus_per_worker: Annotated[float, typer.Option(help="GPUs that each reserves.")] = 0.0,
    dry_run: DryRun = False,
) -> None:
    """Sample and judge every condition of a grid into one table; prints the rates. A run that died goes on."""
    with told_errors(out):
        from mechmisalign import sweeps
        from mechmisalign._writing import refuse_unwritable_folder

        refuse_unwritable_folder(out)
        grid = sweeps.Sweep.read(spec)
        console.print(str(sweeps.status(grid, out)), markup=False, highlight=False, soft_wrap=True)
        if dry_run:
            return
        by_ray = sweeps.RayExecutor(address, workers, gpus_per_worker=gpus_per_worker)
        result = sweeps.sweep(grid, out, executor=by_ray if executor == "ray" else executor)
        if result.is_judged:
            show_rates(result.rates(), ["condition"], "EM rate with 95 % interval by prompt")
    console.print(f"answers: [bold]{safe(out)}[/bold], read by mechmisalign.sweeps.SweepResult.read")
