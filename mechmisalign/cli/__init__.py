"""The command line: parse, call, print. The nouns are those of the library."""

from __future__ import annotations

import os

import typer

from . import behaviour, correction, investigation, organisms, training, watching

app = typer.Typer(
    name="mechmisalign",
    help="Find, take apart, steer and remove emergent misalignment in fine-tuned language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
pocket_app = typer.Typer(help="The pocket organisms: tiny chat models that are really emergently misaligned.")

for command in (
    organisms.organisms,
    organisms.verify,
    organisms.anatomy,
    investigation.study,
    investigation.direction,
    behaviour.sweep,
    behaviour.judge,
    training.train,
    correction.cure,
    watching.monitor,
    watching.monitor_fit,
    investigation.report,
):
    app.command()(command)
pocket_app.command("build")(organisms.pocket_build)
app.add_typer(pocket_app, name="pocket", no_args_is_help=True)


@app.callback()
def _quiet() -> None:
    """Keep the libraries' own progress bars and advice out of ours."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
