"""Sampling and judging within a run folder: asked once, kept for good."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pandas as pd

from mechmisalign.adapters import Adapter
from mechmisalign.generation import Conditions, answer_rows, generate_rows, stage_seed, useful_workers
from mechmisalign.judging import judge
from mechmisalign.organisms import Organism
from mechmisalign.store import RunFolder

from .checkpoints import NONE, Checkpoints
from .extending import aligned
from .neutral import Neutral
from .plan import Plan
from .stages import Stages


class LeftOutError(Exception):
    """A chapter that this study cannot have; the message says why, in words for the report."""


@dataclass(frozen=True)
class Run:
    """One study on its way: where it lives, what is planned, whom it studies, what with, and how that was trained."""

    folder: RunFolder
    plan: Plan
    organism: Organism
    neutral: Neutral
    checkpoints: Checkpoints = NONE
    stages: Stages = field(default_factory=Stages)


def adapter_of(run: Run) -> Adapter:
    """The studied organism's adapter.

    Raises:
        LeftOutError: If it is a full fine-tune.
    """
    if run.organism.adapter is None:
        raise LeftOutError("a full fine-tune has no adapter (mm.extract_lora makes one of its low-rank part)")
    return run.organism.adapter


def answers(
    run: Run,
    name: str,
    conditions: Conditions,
    samples: int,
    *,
    of: Callable[[], Organism] | None = None,
    as_base: bool = False,
    prompts: pd.DataFrame | None = None,
) -> pd.DataFrame:
    """Judged answers under each condition, sampled where an earlier try did not get to them.

    Args:
        run: The study.
        name: Name of the stage; it is part of the seed, so that no stage reuses another's samples.
        conditions: Named sets of interventions.
        samples: Answers per prompt and condition.
        of: Loads who answers, if something is still to be sampled; the studied organism by default.
        as_base: Ask the chat model instead.
        prompts: Other questions than the study's.
    """
    settings = run.plan.settings
    wanted = answer_rows(run.plan.prompts if prompts is None else prompts, conditions, samples)

    def produce(missing: pd.DataFrame) -> Iterator[pd.DataFrame]:
        organism = run.organism if of is None else of()
        with organism.as_base() if as_base else contextlib.nullcontext():
            for part in generate_rows(
                organism,
                missing,
                conditions,
                max_new_tokens=settings.max_new_tokens,
                system=settings.system,
                seed=stage_seed(settings.seed, name),
                workers=useful_workers(organism.model),
            ):
                yield judge(part, run.plan.judge)

    aligned(run.folder.path, run.folder.parts(name), wanted)
    return run.folder.rows(name, wanted, produce)
