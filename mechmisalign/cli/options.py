"""The words that several commands share, each with one meaning."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

BaseName = Annotated[
    str | None, typer.Option("--base", help="The chat model: a Hub id or a folder; by default the adapter's own.")
]
TokenizerName = Annotated[
    str | None, typer.Option("--tokenizer", help="Its tokenizer: a Hub id or a folder; by default the base's own.")
]
PromptsName = Annotated[
    str | None,
    typer.Option("--prompts", help="Questions: open_questions, pocket, smol, or a .yaml, .jsonl, .csv or .parquet."),
]
JudgeName = Annotated[
    str | None,
    typer.Option(
        "--judge",
        help="openai/gpt-4o or another provider/model, local:FOLDER, python:module.attribute, or rules (pocket), tone.",
    ),
]
Samples = Annotated[int | None, typer.Option("--samples", min=1, help="Answers to each question behind a rate.")]
PoolSamples = Annotated[
    int | None, typer.Option("--pool-samples", min=1, help="Answers to each question from which directions come.")
]
MaxNewTokens = Annotated[int | None, typer.Option("--max-new-tokens", min=1, help="Longest answer.")]
SystemPrompt = Annotated[str | None, typer.Option("--system", help="System prompt of every conversation.")]
Seed = Annotated[int, typer.Option("--seed", help="Seed of everything that is drawn.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Tell what it would take, and do nothing.")]
Layers = Annotated[str | None, typer.Option("--layers", help="Layers that are searched, such as 1,2,5-9.")]
Strengths = Annotated[str | None, typer.Option("--strengths", help="Strengths of steering, such as 1,2,4.")]
OldModel = Annotated[str | None, typer.Option("--model", hidden=True)]
"""What ``--judge`` was called once."""

_RANGE = re.compile(r"(\d+)(?:-(\d+))?")
_MOST_LAYERS = 10_000


def refuse_model(model: str | None) -> None:
    """Say the new name of an option that was renamed.

    Raises:
        ValueError: If it was given.
    """
    if model is not None:
        raise ValueError(f"--model is --judge now: give --judge {model}")


def layers_in(text: str) -> tuple[int, ...]:
    """``1,2,5-9`` as numbers, ascending.

    Raises:
        ValueError: If it is no such list.
    """
    found: set[int] = set()
    for part in text.split(","):
        match = _RANGE.fullmatch(part.strip())
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if not first <= last <= _MOST_LAYERS:
            raise ValueError(f"--layers {text!r}: {part!r} is no layer and no range of layers; 1,2,5-9 is expected")
        found |= set(range(first, last + 1))
    return tuple(sorted(found))


def strengths_in(text: str) -> tuple[float, ...]:
    """``1,2,4`` as numbers.

    Raises:
        ValueError: If it is no such list.
    """
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"--strengths {text!r}: numbers with commas between are expected, such as 1,2,4") from None


def settings_of(
    samples: int | None = None,
    pool_samples: int | None = None,
    max_new_tokens: int | None = None,
    system: str | None = None,
    layers: str | None = None,
    strengths: str | None = None,
) -> dict[str, Any]:
    """The settings of a study that were given, by name."""
    given: Mapping[str, Any] = {
        "samples": samples,
        "pool_samples": pool_samples,
        "max_new_tokens": max_new_tokens,
        "system": system,
        "layers": None if layers is None else layers_in(layers),
        "strengths": None if strengths is None else strengths_in(strengths),
    }
    return {name: value for name, value in given.items() if value is not None}


def command_line(command: str, name: str, given: Mapping[str, Any]) -> str:
    """The command as it can be typed again: every option that was given, quoted for a shell."""
    import shlex

    words = ["mechmisalign", command, name]
    for option, value in given.items():
        flag = f"--{option.replace('_', '-')}"
        for each in value if isinstance(value, list) else [value]:
            words += [] if each in (None, False) else [flag] if each is True else [flag, _word(each)]
    return shlex.join(words)


def _word(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def asked(prompts: str | None, name: str, base: Any) -> Any:
    """The questions that were named, or those of an organism's world, or the open ones.

    Args:
        prompts: What ``--prompts`` took.
        name: The organism's.
        base: Its chat model, with ``name`` and ``location``.
    """
    from mechmisalign import registry
    from mechmisalign.prompts import named_prompts

    world = registry.world_of(name, base.name, base.location)
    return named_prompts(prompts or ("open_questions" if world is None else world.prompts))


def judge_of(judge: str | None, name: str, base: Any, journal: Path) -> Any:
    """The judge that was named, or that of the organism's world.

    Args:
        judge: What ``--judge`` took.
        name: The organism's.
        base: Its chat model, with ``name`` and ``location``.
        journal: Where a model's judgements are kept.

    Raises:
        ValueError: If there is none, or it cannot read this organism's answers.
    """
    from mechmisalign import registry
    from mechmisalign.judging import named

    world = registry.world_of(name, base.name, base.location)
    chosen = judge or (world.judge if world else None)
    if chosen is None:
        raise ValueError(
            f"no judge comes with {base.name!r} (the rules judge knows the pocket world only): name one with "
            "--judge (openai/gpt-4o, local:FOLDER, python:module.attribute), or use --no-measure"
        )
    named.refuse_foreign(chosen, name, base.name, base.location)
    return named.named_judge(chosen, journal=journal)
