"""Commands about a whole investigation: the study, its report, one direction."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .console import OrganismName, console, errors, safe, show, show_headlines, told_errors
from .options import (
    BaseName,
    DryRun,
    JudgeName,
    Layers,
    MaxNewTokens,
    PoolSamples,
    PromptsName,
    Samples,
    Seed,
    Strengths,
    SystemPrompt,
    TokenizerName,
    command_line,
    settings_of,
)

if TYPE_CHECKING:
    from mechmisalign.studies import StudySettings
    from mechmisalign.studies.stages import Stage

_NONE = "none"
"""Said of peers or checkpoints, to go without."""
_ASIDE = ("out", "seed")
"""Options that stand in every command line, given or not."""


def study(
    organism: OrganismName,
    out: Annotated[Path, typer.Option(help="Run folder; an unfinished or smaller run in it goes on.")] = Path(
        "runs/study"
    ),
    base: BaseName = None,
    tokenizer: TokenizerName = None,
    prompts: PromptsName = None,
    judge: JudgeName = None,
    samples: Samples = None,
    pool_samples: PoolSamples = None,
    peers: Annotated[
        list[str] | None,
        typer.Option(help="Another organism, NAME or NAME@BASE; may be given more than once. none: without."),
    ] = None,
    layers: Layers = None,
    strengths: Strengths = None,
    max_new_tokens: MaxNewTokens = None,
    system: SystemPrompt = None,
    checkpoints: Annotated[
        str,
        typer.Option(
            help="Checkpoints of its training: a folder or a name; by default those beside the adapter. none: without."
        ),
    ] = "default",
    seed: Seed = 0,
    quick: Annotated[bool, typer.Option("--quick", help="A rough look: few samples, prompts and layers.")] = False,
    dry_run: DryRun = False,
) -> None:
    """Find, induce, remove, transfer and cure an organism's misalignment; writes tables, figures and report.html."""
    given = dict(locals())
    with told_errors(out):
        from mechmisalign._writing import refuse_unwritable_folder
        from mechmisalign.prompts import named_prompts
        from mechmisalign.studies import study as run_study
        from mechmisalign.studies.planning import study_plan

        command = command_line("study", organism, _changed(study, given))
        changes = settings_of(samples, pool_samples, max_new_tokens, system, layers, strengths)
        cast: dict[str, Any] = {
            "prompts": None if prompts is None else named_prompts(prompts),
            "judge": judge,
            "peers": () if peers == [_NONE] else peers,
            "base": base,
            "settings": _settings(organism, base, seed, quick, changes),
        }
        if dry_run:
            planned = study_plan(organism, out, **cast)
            show(planned.stages, f"study of {organism}: at most")
            console.print(str(planned), markup=False, highlight=False, soft_wrap=True)
            return
        refuse_unwritable_folder(out)
        trained = None if checkpoints == _NONE else checkpoints
        finished = run_study(
            organism, out, tokenizer=tokenizer, checkpoints=trained, announce=_announce, command=command, **cast
        )
    show_headlines(finished.summary)
    console.print(f"report: [bold]{safe(finished.report)}[/bold]")


def direction(
    organism: OrganismName,
    out: Annotated[Path, typer.Option(help="Where the safetensors file goes.")] = Path("direction.safetensors"),
    estimator: Annotated[str, typer.Option(help="An estimator, as the study's tables name it.")] = "mean difference",
    base: BaseName = None,
    tokenizer: TokenizerName = None,
    prompts: PromptsName = None,
    judge: JudgeName = None,
    samples: Samples = None,
    pool_samples: PoolSamples = None,
    max_new_tokens: MaxNewTokens = None,
    system: SystemPrompt = None,
    seed: Seed = 0,
) -> None:
    """Estimate one direction from an organism's own judged answers and save it with its header."""
    with told_errors():
        from mechmisalign._writing import refuse_unwritable
        from mechmisalign.prompts import named_prompts
        from mechmisalign.studies import estimate_direction

        refuse_unwritable(out)
        changes = settings_of(samples, pool_samples, max_new_tokens, system)
        found = estimate_direction(
            organism,
            estimator,
            prompts=None if prompts is None else named_prompts(prompts),
            judge=judge,
            base=base,
            tokenizer=tokenizer,
            settings=_settings(organism, base, seed, False, changes),
        )
        path = found.save(out)
    norms = ", ".join(f"{found.norm(layer):.3g}" for layer in found.layers)
    console.print(f"[bold]{safe(path)}[/bold]: {safe(found.header['method'])}; norm by layer: {norms}")


def report(run: Annotated[Path, typer.Argument(help="A finished run folder.")]) -> None:
    """Draw the figures and the report of a finished run again, from its tables alone."""
    with told_errors():
        from mechmisalign.studies.chapters import write_study_report

        console.print(f"report: [bold]{safe(write_study_report(run))}[/bold]")


def _settings(organism: str, base: str | None, seed: int, quick: bool, changes: dict[str, Any]) -> StudySettings:
    """The defaults of this organism, with what was given."""
    from mechmisalign.studies import default_settings
    from mechmisalign.studies.subjects import subject_of

    subject = subject_of(organism, base)
    return replace(default_settings(subject.name, seed=seed, quick=quick, base=subject.base), **changes)


def _changed(command: Callable[..., None], given: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a call that are not as they are by default, with those that stand in every one."""
    defaults = {name: parameter.default for name, parameter in inspect.signature(command).parameters.items()}
    options = {name: value for name, value in given.items() if name not in ("organism", "dry_run")}
    return {name: value for name, value in options.items() if name in _ASIDE or value not in (None, [], defaults[name])}


def _announce(stage: Stage) -> None:
    left = "" if stage.left is None else f", about {_duration(stage.left)} left"
    errors.print(f"\\[{stage.number}/{stage.total}] {stage.name}{left}", highlight=False)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
