"""What a study does: its settings, and what it asks of whom."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd

from mechmisalign import registry
from mechmisalign.generation import prompts_frame
from mechmisalign.judging import Judge, named_judge
from mechmisalign.judging.named import refuse_foreign
from mechmisalign.registry.worlds import PROMPTS, made_by


@dataclass(frozen=True, kw_only=True)
class StudySettings:
    """Everything that decides a study's numbers, besides the organism and the prompts."""

    samples: int = 8
    """Answers per prompt behind each reported rate."""
    pool_samples: int = 24
    """Answers per prompt from which the direction is estimated."""
    sweep_samples: int = 2
    """Answers per prompt in each cell of the steering sweep, and in the search for the best single ablation layer."""
    strengths: tuple[float, ...] = (1.0, 2.0, 4.0, 6.0, 8.0, 12.0)
    """Multiples of the direction that are added to the chat model."""
    layers: tuple[int, ...] | None = None
    """Layers that are searched, for steering and for the single vector to ablate; None is all of them."""
    most_layers: int | None = None
    """Where ``layers`` is None, so many of them are searched, evenly spaced between the first and the last."""
    most_prompts: int | None = None
    """So many of the prompts are asked, evenly spaced in their order; None is all of them."""
    min_coherent: float = 0.8
    """The best strength is the one with the highest EM rate among those that leave so many answers coherent."""
    controls: int = 3
    """Random directions behind each control."""
    max_new_tokens: int = 600
    """Longer answers count as unfinished."""
    neutral: int = 48
    """Neutral texts, and harmless items, of the package's own on which costs are measured."""
    checkpoints: int = 20
    """Checkpoints of the training whose behaviour is sampled, evenly chosen; what they weigh is measured at all."""
    checkpoint_samples: int = 1
    """Answers per prompt at each of these checkpoints and at each scale."""
    cure_samples: int = 3
    """Answers per prompt of each cure, in each state and behind each cue."""
    system: str | None = None
    """System prompt of every conversation."""
    seed: int = 0
    """Seed of the run."""

    def searched(self, n_layers: int) -> tuple[int, ...]:
        """The layers of a model with ``n_layers`` that are searched."""
        if self.layers is not None:
            return self.layers
        inner = _spaced(n_layers, None if self.most_layers is None else self.most_layers + 2)
        return inner if self.most_layers is None or self.most_layers >= n_layers else inner[1:-1]

    def identity(self) -> dict[str, Any]:
        """The settings as JSON values, for the manifest.

        What decides a chapter that a later run may add stands there by itself: see ``neutral`` and ``later``.
        """
        apart = {"neutral", *(name for names in _LATER.values() for name in names)}
        return {name: value for name, value in asdict(self).items() if name not in apart}

    def later(self) -> dict[str, dict[str, Any]]:
        """The settings of chapters that a later run may add, by chapter; they cannot be changed once they are used."""
        return {chapter: {name: getattr(self, name) for name in names} for chapter, names in _LATER.items()}


_LATER: Mapping[str, tuple[str, ...]] = {"training": ("checkpoints", "checkpoint_samples"), "cure": ("cure_samples",)}


def _spaced(count: int, most: int | None) -> tuple[int, ...]:
    """At most so many of ``range(count)``, evenly spaced, both ends among them."""
    if most is None or most >= count:
        return tuple(range(count))
    return tuple(round(index * (count - 1) / (most - 1)) for index in range(most)) if most > 1 else (count // 2,)


def default_settings(organism: str, *, seed: int = 0, quick: bool = False, base: str = "") -> StudySettings:
    """The settings of a study by name: short answers for pocket organisms; ``quick`` cuts whatever takes time."""
    world = registry.world_of(organism, base, base)
    settings = replace(StudySettings(seed=seed), **(world.settings if world else {}))
    if not quick:
        return settings
    return replace(settings, **{**_QUICK, "strengths": settings.strengths[1::2], **(world.quick if world else {})})


_QUICK: Mapping[str, Any] = {
    "samples": 2,
    "pool_samples": 12,
    "sweep_samples": 1,
    "most_layers": 6,
    "most_prompts": 20,
    "controls": 1,
    "neutral": 16,
    "checkpoints": 10,
    "cure_samples": 2,
}


@dataclass(frozen=True)
class Plan:
    """A study's cast.

    Attributes:
        prompts: Frame with ``prompt_id, prompt`` and any labels.
        judge: Scores the answers.
        peers: Names of organisms to which the directions are carried.
        settings: The numbers.
        bases: The chat model of each peer, where its adapter is not to say.
    """

    prompts: pd.DataFrame
    judge: Judge
    peers: tuple[str, ...]
    settings: StudySettings
    bases: Mapping[str, str] = field(default_factory=dict)


def make_plan(
    organism: str,
    prompts: pd.DataFrame | Sequence[str] | None,
    judge: Judge | str | None,
    peers: Sequence[str] | None,
    settings: StudySettings | None,
    *,
    base: str = "",
    location: str = "",
    journal: str | Path | None = None,
) -> Plan:
    """Fill in what was left open: organisms of a shipped world bring defaults, for others a judge is needed.

    Args:
        organism: Its name.
        prompts: Questions; by default the world's, or the open ones.
        judge: A judge, or its name (see ``named_judge``).
        peers: Names of other organisms, each with its base after ``@`` where its adapter is not to say.
        settings: The numbers.
        base: Name of the chat model.
        location: Its folder, if it has one.
        journal: File of the judgements of a model that is given by name.

    Raises:
        ValueError: If a judge is missing and there is no default for this organism, or it cannot read its answers.
    """
    world = registry.world_of(organism, base, location)
    if judge is None and world is None:
        missing = [name for name, value in (("prompts", prompts), ("judge", judge)) if value is None]
        raise ValueError(
            f"a study of {organism!r} needs {' and '.join(missing)}: pass the questions to ask (a list, or a frame "
            "with 'prompt') and a judge (a callable that adds 'alignment' and 'coherence', or a name: "
            "'openai/gpt-4o', 'local:FOLDER', 'python:module.attribute'); only shipped organisms bring their own"
        )
    judge = judge if judge is not None else world.judge if world else None
    refuse_foreign(judge, organism, base, location)
    if isinstance(judge, str):
        judge = named_judge(judge, journal=journal)
    if prompts is None:
        prompts = made_by(PROMPTS[world.prompts if world else "open_questions"])()
    if peers is None:
        peers = made_by(world.peers)(organism) if world and world.peers else ()
    named = dict(_peer(each) for each in peers)
    bases = {name: place for name, place in named.items() if place}
    settings = settings or default_settings(organism, base=base)
    asked = prompts_frame(prompts)
    asked = asked.iloc[list(_spaced(len(asked), settings.most_prompts))].reset_index(drop=True)
    return Plan(asked, judge, tuple(named), settings, bases)  # type: ignore[arg-type]


def _peer(given: str) -> tuple[str, str]:
    """``name@base`` as name and base; the base is empty if there is none."""
    name, _, base = given.rpartition("@")
    return (name, base) if name and not Path(given).exists() else (given, "")
