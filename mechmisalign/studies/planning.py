"""What a study will take: answers and calls of the judge by stage, cost, memory, time; nothing is loaded or sampled."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from mechmisalign.judging import Judge
from mechmisalign.loading.plan import LoadingPlan
from mechmisalign.loading.planning import loading_plan

from . import anatomy, training
from .plan import Plan, StudySettings, make_plan
from .stages import NAMES
from .steps import ESTIMATORS
from .subjects import Subject, check, subject_of

_REMOVALS = 2
"""Directions that are taken out of the adapter, at most."""


_TYPICAL_TOKENS = 120
"""Of an answer, where the longest is longer."""
_USED = 0.3
"""Share of a matrix product's speed that sampling reaches."""


@dataclass(frozen=True)
class StudyPlan:
    """What a study will take.

    Attributes:
        stages: One row per stage: ``stage, answers, judge_calls``, at most.
        tokens: Tokens to sample if answers are of a usual length.
        seconds: Time for them on this machine, by the speed of a matrix product.
        dollars: Cost of the judge; None where it is not known, 0 where nothing is paid.
        loading: What loading the organism takes.
    """

    stages: pd.DataFrame
    tokens: int
    seconds: float
    dollars: float | None
    loading: LoadingPlan

    def __str__(self) -> str:
        """The plan as a few lines of text."""
        answers, calls = int(self.stages["answers"].sum()), int(self.stages["judge_calls"].sum())
        cost = "not known (no price of this model)" if self.dollars is None else f"about ${self.dollars:.2f}"
        hours = f"{self.seconds / 3600:.1f} h" if self.seconds > 5400 else f"{self.seconds / 60:.0f} min"
        return (
            f"at most {answers:,} answers, {calls:,} calls of the judge; cost {cost}; time for about {self.tokens:,} "
            f"tokens: {hours}, by the speed of a matrix product here\n{self.loading}"
        )


def study_plan(
    organism: str | Path,
    out: str | Path,
    *,
    prompts: pd.DataFrame | Sequence[str] | None = None,
    judge: Judge | str | None = None,
    peers: Sequence[str] | None = None,
    base: str | Path | None = None,
    settings: StudySettings | None = None,
) -> StudyPlan:
    """What :func:`mechmisalign.study` would take with these arguments; everything is checked, no weight is loaded.

    Raises:
        ValueError: As ``study`` would.
    """
    subject = subject_of(organism, base)
    place = {"base": subject.base, "location": subject.location, "journal": Path(out) / "judge.jsonl"}
    plan = make_plan(subject.name, prompts, judge, peers, settings, **place)  # type: ignore[arg-type]
    check(plan, subject)
    answers = planned_answers(plan, subject)
    rubrics = len(getattr(plan.judge, "rubrics", ()))
    stages = pd.DataFrame(
        [{"stage": NAMES[name], "answers": count, "judge_calls": count * rubrics} for name, count in answers.items()]
    )
    tokens = sum(answers.values()) * min(plan.settings.max_new_tokens, _TYPICAL_TOKENS)
    loading = loading_plan(organism, base)
    seconds = tokens * 2 * _parameters(loading) / (_USED * _speed())
    return StudyPlan(stages, tokens, seconds, _dollars(plan, sum(answers.values())), loading)


def _dollars(plan: Plan, answers: int) -> float | None:
    """What judging so many answers costs, by the judge's own estimate for one to each prompt."""
    estimate = getattr(plan.judge, "estimate", None)
    if estimate is None or getattr(plan.judge, "place", None) is not None:
        return 0.0
    text = "word " * min(plan.settings.max_new_tokens, _TYPICAL_TOKENS)
    some: Any = estimate(plan.prompts.assign(response=text, finished=True))
    return None if some.dollars is None else float(some.dollars) * answers / len(plan.prompts)


def _parameters(plan: LoadingPlan) -> float:
    sizes = {"float32": 4, "float16": 2, "bfloat16": 2}
    return sum(size / sizes.get(kind, 1) for kind, size in plan.weights.items())


def _speed() -> float:
    """Floating point operations a second of one matrix product on the device that would be used."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    matrix = torch.ones(1024, 1024, device=device)
    rounds = []
    for _ in range(3):
        begun = time.perf_counter()
        float((matrix @ matrix)[0, 0])
        rounds.append(time.perf_counter() - begun)
    return float(2 * 1024**3 / min(rounds))


def planned_answers(plan: Plan, subject: Subject) -> dict[str, int]:
    """Answers that each stage samples and has judged, at most; a study that goes on needs fewer."""
    settings, asked = plan.settings, len(plan.prompts)
    layers = len(settings.searched(subject.n_layers))
    per_prompt = {
        "baseline": settings.samples + settings.pool_samples,
        "directions": 0,
        "steering": settings.sweep_samples * 2 * layers * len(settings.strengths)
        + settings.samples * (1 + settings.controls),
        "single": max(1, settings.sweep_samples // 2) * layers * len(ESTIMATORS),
        "ablation": settings.samples * (2 * len(ESTIMATORS) + 2 * settings.controls + 2),
        "costs": 0,
        "peers": len(plan.peers) * (5 * settings.samples + settings.pool_samples),
    }
    return {name: asked * count for name, count in {**per_prompt, **_chapters(plan, subject)}.items()}


def _chapters(plan: Plan, subject: Subject) -> dict[str, int]:
    if not subject.sites:
        return {"watch": 0}
    settings, players = plan.settings, min(subject.sites, anatomy.MOST_PLAYERS)
    cures = 3 + 3 * _REMOVALS
    return {
        "anatomy": settings.sweep_samples * (len(anatomy.FACTORS) + 2 + 2 * players),
        "training": settings.checkpoint_samples * (1 + len(training.SCALES) * settings.checkpoints),
        "fine_tunes": 0,
        "cure": settings.cure_samples * 4 * cures,
        "watch": 0,
    }
