"""The study: from an adapter to a report.

Sample and judge, estimate directions, induce (steer the chat model), remove (ablate in the organism), transfer (ablate
in other organisms), compare directions, take the adapter apart, follow its training, take the direction out of it for
good, and watch it, with a control and the cost beside each. The run folder can be left at any moment and taken up
again; the report is drawn from the stored tables alone.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from mechmisalign.directions import Direction
from mechmisalign.generation import generate
from mechmisalign.judging import Judge
from mechmisalign.judging import judge as judge_answers
from mechmisalign.judging.named import check_judge
from mechmisalign.organisms import Organism, load_organism
from mechmisalign.store import MANIFEST, RunFolder, text_digest, write_json

from . import steps
from .checkpoints import Checkpoints, find
from .extending import extend
from .investigation import investigate
from .neutral import Neutral, Texts, neutral
from .plan import Plan, StudySettings, default_settings, make_plan
from .planning import planned_answers
from .sampling import Run
from .stages import Announce, Stages
from .subjects import check, subject_of
from .summary import summarise

__all__ = ["Study", "StudySettings", "default_settings", "estimate_direction", "study"]


@dataclass(frozen=True)
class Study:
    """A finished study.

    Attributes:
        out: The run folder: ``report.html``, ``summary.json``, ``manifest.json``, ``tables/``, ``figures/``,
            ``directions/``.
        summary: The content of ``summary.json``.
        tables: Tidy frames by name; every figure can be redrawn from them without a model.
        directions: The directions by estimator.
    """

    out: Path
    summary: Mapping[str, Any]
    tables: Mapping[str, pd.DataFrame]
    directions: Mapping[str, Direction]

    @property
    def report(self) -> Path:
        """The report, one self-contained HTML file."""
        return self.out / "report.html"


def study(
    organism: Organism | str,
    out: str | Path,
    *,
    prompts: pd.DataFrame | Sequence[str] | None = None,
    judge: Judge | str | None = None,
    peers: Sequence[str] | None = None,
    base: str | Path | None = None,
    tokenizer: Any = None,
    texts: Texts | Literal["default"] | None = "default",
    items: pd.DataFrame | Literal["default"] | None = "default",
    checkpoints: str | Path | None = "default",
    settings: StudySettings | None = None,
    announce: Announce | None = None,
    command: str | None = None,
) -> Study:
    """Find, induce, remove, transfer and cure an organism's misalignment, and write the report.

    Args:
        organism: A loaded organism, or what ``load_organism`` takes.
        out: The run folder. If it holds an unfinished run with the same settings, that run goes on; one with fewer
            samples is extended: its answers are kept and added to, and what follows from them is computed anew.
        prompts: Questions (texts, or a frame with ``prompt`` and labels). Shipped organisms have their own; for others
            the open questions are the default.
        judge: Adds ``alignment`` and ``coherence`` to a frame of answers, or a name that ``named_judge`` takes. Shipped
            organisms have their own.
        peers: Other organisms on the same base, to which the direction is carried, as ``name`` or ``name@base``; by
            default those that ship with a shipped one.
        base: The chat model, where ``organism`` is a name; by default the one that the adapter names.
        tokenizer: The chat model's tokenizer or its place; by default the one beside the base.
        texts: Neutral text (conversations with ``prompt, response``, or plain texts) on which loss and KL from the chat
            model are measured beside every rate; by default the package's own. None leaves them out, and the report
            says so; a later run in the same folder may add them.
        items: The same for accuracy: harmless questions with exact answers (``prompt, answer``).
        checkpoints: Checkpoints of its training: what ``mm.Trajectory.load`` takes. By default those in the adapter's
            own folder, and for pocket organisms those of the zoo's run of the same recipe. Where there are none, or
            None is given, the report has no chapter on training, and says so; a later run may add it.
        settings: Sample sizes, strengths, seed.
        announce: Called with each stage as it begins.
        command: The command line that asked for this, for the report.

    Raises:
        ValueError: If prompts or judge are missing, texts, items or checkpoints cannot be used, the folder belongs to
            another run, or the organism gives too few answers of one class.
    """
    subject = subject_of(organism, base)
    plan = make_plan(
        subject.name, prompts, judge, peers, settings,
        base=subject.base, location=subject.location, journal=Path(out) / "judge.jsonl",
    )  # fmt: skip
    check(plan, subject)
    if not (Path(out) / MANIFEST).exists():
        check_judge(plan.judge)
    loaded = _load(organism, base, tokenizer)
    measure = neutral(loaded, texts, items, plan.settings.neutral)
    trained = find(loaded, checkpoints)
    identity = _identity(loaded, plan)
    extend(Path(out), identity)
    with RunFolder(out, identity, _growing(plan, measure, trained)) as folder:
        stages = Stages(planned_answers(plan, subject), announce)
        tables, directions = investigate(Run(folder, plan, loaded, measure, trained, stages))
        summary = {"provenance": loaded.provenance, **summarise(tables), **({"command": command} if command else {})}
        write_json(folder.path / "summary.json", summary)
        from .chapters import write_study_report

        write_study_report(folder.path)
    return Study(folder.path, summary, tables, directions)


def estimate_direction(
    organism: Organism | str,
    estimator: str = steps.MEAN_DIFFERENCE,
    *,
    seed: int = 0,
    prompts: pd.DataFrame | Sequence[str] | None = None,
    judge: Judge | str | None = None,
    base: str | Path | None = None,
    tokenizer: Any = None,
    settings: StudySettings | None = None,
) -> Direction:
    """One direction from an organism's own judged answers, without the rest of a study.

    Args:
        organism: A loaded organism, or what ``load_organism`` takes.
        estimator: A name of the study's tables.
        seed: Of the samples, where there are no ``settings``.
        prompts: As for :func:`study`, like the following.
        judge: Scores the answers.
        base: The chat model.
        tokenizer: Its tokenizer.
        settings: Of these ``pool_samples, samples`` (of the chat model, where its answers are needed),
            ``max_new_tokens, system`` and ``seed`` count.

    Raises:
        ValueError: On an unknown estimator, or too few answers of one class.
    """
    if estimator not in steps.ESTIMATORS:
        raise ValueError(f"unknown estimator {estimator!r}; there are {', '.join(map(repr, steps.ESTIMATORS))}")
    subject = subject_of(organism, base)
    settings = settings or default_settings(subject.name, seed=seed, base=subject.base)
    plan = make_plan(subject.name, prompts, judge, (), settings, base=subject.base, location=subject.location)
    check(plan, subject)
    check_judge(plan.judge)
    loaded = _load(organism, base, tokenizer)

    def answered(samples: int) -> pd.DataFrame:
        options: dict[str, Any] = {"max_new_tokens": settings.max_new_tokens, "system": settings.system}
        sampled = generate(loaded, plan.prompts, samples=samples, seed=settings.seed, **options)
        return judge_answers(sampled, plan.judge)

    def of_chat() -> pd.DataFrame:
        with loaded.as_base():
            return answered(settings.samples)

    own = answered(settings.pool_samples)
    readings = steps.read(loaded, steps.pool_for(estimator, own, of_chat, settings.seed), settings.system)
    return steps.ESTIMATORS[estimator](readings)


def _load(organism: Organism | str | Path, base: str | Path | None, tokenizer: Any) -> Organism:
    """The organism in memory."""
    return organism if isinstance(organism, Organism) else load_organism(organism, base, tokenizer=tokenizer)


def _identity(organism: Organism, plan: Plan) -> dict[str, Any]:
    """Everything that decides the numbers: another value means another run."""
    prompts = hashlib.sha256(plan.prompts.to_json(orient="records").encode()).hexdigest()[:16]
    return {
        "organism": organism.name,
        **organism.provenance,
        "prompts": prompts,
        "judge": _judge_identity(plan.judge),
        "peers": list(plan.peers),
        **({"peer_bases": dict(plan.bases)} if plan.bases else {}),
        "settings": plan.settings.identity(),
    }


def _growing(plan: Plan, measure: Neutral, trained: Checkpoints) -> dict[str, dict[str, Any]]:
    """What decides the numbers that a later run may add to a finished one."""
    later, known = plan.settings.later(), trained.identity()
    training = {"training": later["training"] | known} if known else {}
    return {"costs": measure.identity(), "cure": later["cure"], **training}


def _judge_identity(judge: Judge) -> str:
    """What a judge calls its identity, or its repr without addresses in memory, and a hash of what its rubrics say."""
    own = getattr(judge, "identity", None)
    if own is not None:
        return str(own() if callable(own) else own)
    told = re.sub(r" at 0x[0-9a-fA-F]+", "", repr(judge))
    rubrics = getattr(judge, "rubrics", ())
    return f"{told} {text_digest([repr(rubric) for rubric in rubrics])}" if rubrics else told
