"""The command line: parse, call, print. The nouns are those of the library."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from . import behaviour, correction, investigation, organisms, planning, sharing, training, watching
from .console import told_errors
from .smol import smol_app

app = typer.Typer(
    name="mechmisalign",
    help="Find, take apart, steer and remove emergent misalignment in fine-tuned language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
_opened = ExitStack()
"""The registries of the command that runs; a process that runs several closes those of the one before."""
pocket_app = typer.Typer(help="The pocket organisms: tiny chat models that are really emergently misaligned.")

for command in (
    organisms.organisms,
    organisms.verify,
    planning.plan,
    organisms.anatomy,
    investigation.study,
    investigation.direction,
    behaviour.sweep,
    behaviour.judge,
    training.train,
    correction.cure,
    watching.monitor,
    watching.monitor_fit,
    sharing.push,
    investigation.report,
):
    app.command()(command)
pocket_app.command("build")(organisms.pocket_build)
app.add_typer(pocket_app, name="pocket", no_args_is_help=True)
app.add_typer(smol_app, name="smol", no_args_is_help=True)


@app.callback()
def _before(
    mine: Annotated[
        list[Path] | None,
        typer.Option("--registry", help="A YAML file of your own organisms, known by name to every command."),
    ] = None,
) -> None:
    """Keep the libraries' own progress bars and advice out of ours, and open the registries that are named."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    _opened.close()
    if mine:
        from mechmisalign import registry

        with told_errors():
            _opened.enter_context(registry.using(*mine))
