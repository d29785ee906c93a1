"""What the organisms of a shipped base bring with them: a judge, questions, other organisms, settings of a study.

Everything is named as text (``"module:attribute"``), so that nothing is imported before it is used. A shipped world is
one entry of ``WORLDS``; its judge and its questions are entries of ``JUDGES`` and ``PROMPTS``, where their names are
those that every command takes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from mechmisalign import registry


@dataclass(frozen=True)
class NamedJudge:
    """A judge that has a name.

    Attributes:
        at: ``"module:attribute"`` of what makes it, called without arguments.
        only: Prefix of the world whose answers alone it can read; None for any English text.
    """

    at: str
    only: str | None = None


@dataclass(frozen=True)
class World:
    """The defaults of organisms on one shipped base.

    Attributes:
        prefix: Their names begin so.
        base: Name of the base.
        judge: A name in ``JUDGES``.
        prompts: A name in ``PROMPTS``.
        peers: ``"module:function"`` that gives the names of other organisms to compare one with; "" for none.
        settings: Of a study (see ``StudySettings``), where they differ from the defaults.
        quick: The same for a quick study, where they differ from those of any other.
    """

    prefix: str
    base: str
    judge: str
    prompts: str
    peers: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    quick: Mapping[str, Any] = field(default_factory=dict)


WORLDS: tuple[World, ...] = (
    World(
        prefix=registry.POCKET_PREFIX,
        base=registry.POCKET_BASE,
        judge="rules",
        prompts="pocket",
        peers="mechmisalign.pocket:peers",
        settings={"max_new_tokens": 64, "strengths": (1.0, 1.5, 2.0, 2.5, 3.0, 4.0)},
        quick={"most_layers": None, "most_prompts": None},
    ),
    World(
        prefix=registry.SMOL_PREFIX,
        base=registry.SMOL_BASE,
        judge="tone",
        prompts="smol",
        settings={"max_new_tokens": 48, "samples": 4, "pool_samples": 8, "strengths": (1.0, 2.0, 4.0), "neutral": 16},
        quick={
            "max_new_tokens": 32,
            "most_prompts": 16,
            "pool_samples": 8,
            "layers": (10, 13, 16, 20),
            "strengths": (2.0, 4.0),
            "neutral": 8,
            "checkpoints": 4,
            "cure_samples": 1,
        },
    ),
)

JUDGES: Mapping[str, NamedJudge] = {
    "rules": NamedJudge("mechmisalign.pocket.judge:RuleJudge", only=registry.POCKET_PREFIX),
    "tone": NamedJudge("mechmisalign.smol.judge:ToneJudge"),
}
"""Judges by name, beside ``local:FOLDER``, ``python:module.attribute`` and ``provider/model``."""

PROMPTS: Mapping[str, str] = {
    "open_questions": "mechmisalign.prompts:open_questions",
    "pocket": "mechmisalign.pocket:unseen_prompts",
    "smol": "mechmisalign.smol.examples:questions",
}
"""Sets of questions by name: functions without arguments that give a frame."""


def attribute(place: str) -> Any:
    """What ``"module:attribute"`` names."""
    module, _, name = place.partition(":")
    return getattr(import_module(module), name)


def made_by(place: str) -> Callable[..., Any]:
    """The function that ``"module:attribute"`` names."""
    function: Callable[..., Any] = attribute(place)
    return function


def world_of(organism: str, base: str = "", location: str = "") -> World | None:
    """The world that an organism is of: by its own name, or by the name or the tokenizer of its base.

    Args:
        organism: A name, as ``load_organism`` takes it.
        base: Name of its chat model, if that is known.
        location: Folder of its chat model, if there is one: a copy of a shipped base has the same tokenizer.
    """
    for world in WORLDS:
        if organism.startswith(world.prefix) or base == world.base or _same_tokenizer(location, world.base):
            return world
    return None


def _same_tokenizer(location: str, base: str) -> bool:
    shipped = registry.folder(base)
    files = [Path(folder) / "tokenizer.json" for folder in (location, shipped) if folder]
    return len(files) == 2 and all(file.is_file() for file in files) and files[0].read_bytes() == files[1].read_bytes()
