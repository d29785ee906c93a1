"""The study: from an adapter to a report.

Sample and judge, estimate directions, induce (steer the chat model), remove (ablate in the organism), transfer (ablate
in other organisms), compare directions, take the adapter apart, with a control beside each. The run folder can be left
at any moment and taken up again; the report is drawn from the stored tables alone.
"""

from __future__ import annotations

import functools
import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from mechmisalign import geometry
from mechmisalign.directions import Direction
from mechmisalign.estimators import split_half
from mechmisalign.generation import generate
from mechmisalign.judging import Judge, rates
from mechmisalign.judging import judge as judge_answers
from mechmisalign.organisms import Organism, load_organism
from mechmisalign.progress import progress
from mechmisalign.store import RunFolder, write_json

from . import anatomy, steps
from .plan import Plan, StudySettings, default_settings, make_plan
from .sampling import Run, answers
from .summary import summarise

logger = logging.getLogger(__name__)

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
    judge: Judge | None = None,
    peers: Sequence[str] | None = None,
    settings: StudySettings | None = None,
) -> Study:
    """Find, induce, remove and transfer an organism's misalignment, and write the report.

    Args:
        organism: A loaded organism, or what ``load_organism`` takes.
        out: The run folder. If it holds an unfinished run with the same settings, that run goes on.
        prompts: Questions (texts, or a frame with ``prompt`` and labels). Pocket organisms have their own.
        judge: Adds ``alignment`` and ``coherence`` to a frame of answers. Pocket organisms have their own.
        peers: Other organisms on the same base, to which the direction is carried; by default the pocket zoo's.
        settings: Sample sizes, strengths, seed.

    Raises:
        ValueError: If prompts or judge are missing, the folder belongs to another run, or the organism gives too few
            answers of one class.
    """
    loaded = load_organism(organism) if isinstance(organism, str) else organism
    plan = make_plan(loaded.name, prompts, judge, peers, settings)
    run = Run(RunFolder(out, _identity(loaded, plan)), plan, loaded)
    tables, directions = _investigate(run)
    summary = summarise(tables)
    write_json(run.folder.path / "summary.json", summary)
    from .chapters import write_study_report

    write_study_report(run.folder.path)
    return Study(run.folder.path, summary, tables, directions)


def estimate_direction(organism: Organism | str, estimator: str = steps.MEAN_DIFFERENCE, *, seed: int = 0) -> Direction:
    """One direction from an organism's own judged answers to its own questions, without the rest of a study.

    Raises:
        ValueError: On an unknown estimator, or too few answers of one class.
    """
    if estimator not in steps.ESTIMATORS:
        raise ValueError(f"unknown estimator {estimator!r}; there are {', '.join(map(repr, steps.ESTIMATORS))}")
    loaded = load_organism(organism) if isinstance(organism, str) else organism
    plan = make_plan(loaded.name, None, None, (), default_settings(loaded.name, seed=seed))
    settings = plan.settings
    sampled = generate(
        loaded, plan.prompts, samples=settings.pool_samples, max_new_tokens=settings.max_new_tokens, seed=seed
    )
    readings = steps.read(loaded, steps.pool(judge_answers(sampled, plan.judge), seed), settings.system)
    return steps.ESTIMATORS[estimator](readings)


def _investigate(run: Run) -> tuple[dict[str, pd.DataFrame], dict[str, Direction]]:
    settings, folder, organism = run.plan.settings, run.folder, run.organism
    chat = answers(run, "chat", {"chat": ()}, settings.samples, as_base=True)
    own = answers(run, "organism", {"organism": ()}, settings.pool_samples)
    tables = {"answers": folder.table("answers", lambda: pd.concat([chat, own]))}
    tables["baseline"] = folder.table("baseline", lambda: rates(tables["answers"]))

    directions, reliability = _directions(run, organism, own)
    tables["reliability"] = folder.table("reliability", lambda: reliability)
    reference = directions[steps.MEAN_DIFFERENCE]
    tables["steering"] = folder.table("steering", lambda: steps.steering_sweep(run, reference))
    layer, strength = steps.best_cell(tables["steering"], settings.min_coherent)
    tables["steered"] = folder.table(
        "steered",
        lambda: steps.steering_confirmed(run, reference, layer, strength).assign(layer=layer, strength=strength),
    )
    tables["single_search"] = folder.table("single_search", lambda: steps.single_layer_search(run, directions))
    single = steps.chosen_layers(tables["single_search"], settings.min_coherent)
    tables["ablation"] = folder.table("ablation", lambda: steps.ablation(run, directions, single))
    chosen = {
        scope: steps.best_estimator(tables["ablation"], scope, settings.min_coherent)
        for scope in ("layer-wise", "single")
    }
    removals = _removals(chosen, directions, single)
    tables["ablated"] = folder.table("ablated", lambda: steps.ablation_confirmed(run, removals, chosen))
    transfer, cosines = _peers(run, removals, directions)
    tables["transfer"] = folder.table("transfer", lambda: transfer)
    tables["cosines"] = folder.table("cosines", lambda: cosines)
    tables |= anatomy.investigate(run, own, reference, layer)
    return tables, directions


def _directions(run: Run, organism: Organism, judged: pd.DataFrame) -> tuple[dict[str, Direction], pd.DataFrame]:
    """Every estimator's direction, and the split-half reliability of the mean difference."""
    folder, settings = run.folder, run.plan.settings
    readings = functools.cache(lambda: steps.read(organism, steps.pool(judged, settings.seed), settings.system))
    where = steps.slug(organism.name)
    directions = {
        name: folder.direction(f"{where}/{steps.slug(name)}", functools.partial(_estimated, estimator, readings))
        for name, estimator in steps.ESTIMATORS.items()
    }
    reliability = folder.table(
        f"reliability_{where}", lambda: split_half(readings().organism, *steps.CLASSES, seed=settings.seed)
    )
    return directions, reliability


def _estimated(estimator: Callable[[steps.Readings], Direction], readings: Callable[[], steps.Readings]) -> Direction:
    return estimator(readings())


def _removals(
    chosen: Mapping[str, str], directions: Mapping[str, Direction], single: Mapping[str, int]
) -> dict[str, Direction]:
    """The directions that are carried to other organisms: the best of each scope, and the paper's mean difference."""
    one = chosen["single"]
    return {
        "layer-wise": directions[chosen["layer-wise"]],
        "single": directions[one].everywhere(single[one]),
        steps.MEAN_DIFFERENCE: directions[steps.MEAN_DIFFERENCE].everywhere(single[steps.MEAN_DIFFERENCE]),
    }


def _peers(
    run: Run, removals: Mapping[str, Direction], directions: Mapping[str, Direction]
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Ablation carried to each peer, and the cosines of the peers' own directions with the studied organism's."""
    transferred, cosines = [pd.DataFrame(columns=["state", "organism"])], [pd.DataFrame(columns=["organism"])]
    for name in progress(run.plan.peers, "other organisms", len(run.plan.peers), "organism"):
        load = functools.cache(functools.partial(load_organism, name))  # only if something is still to be done
        slug = steps.slug(name)
        after = functools.partial(_on_peer, load, steps.transfer, run, removals)
        own = functools.partial(_on_peer, load, _peer_cosines, run, directions)
        transferred.append(run.folder.table(f"transfer_{slug}", after))
        cosines.append(run.folder.table(f"cosines_{slug}", own))
    return pd.concat(transferred, ignore_index=True), pd.concat(cosines, ignore_index=True)


def _on_peer(
    load: Callable[[], Organism],
    step: Callable[[Run, Organism, Mapping[str, Direction]], pd.DataFrame],
    run: Run,
    directions: Mapping[str, Direction],
) -> pd.DataFrame:
    return step(run, load(), directions)


def _peer_cosines(run: Run, peer: Organism, directions: Mapping[str, Direction]) -> pd.DataFrame:
    """Cosine between the peer's directions and the studied organism's, for each estimator and layer."""
    judged = answers(run, f"pool_{steps.slug(peer.name)}", {"organism": ()}, run.plan.settings.pool_samples, of=peer)
    try:
        theirs, _ = _directions(run, peer, judged)
    except steps.TooFewAnswersError as error:
        logger.warning("no direction of %s to compare with: %s", peer.name, error)
        return pd.DataFrame({"organism": [], "estimator": [], "layer": [], "cosine": []})
    frames = [
        geometry.cosine_by_layer(direction, theirs[name]).assign(organism=peer.name, estimator=name)
        for name, direction in directions.items()
    ]
    return pd.concat(frames, ignore_index=True)


def _identity(organism: Organism, plan: Plan) -> dict[str, Any]:
    """Everything that decides the numbers: another value means another run."""
    prompts = hashlib.sha256(plan.prompts.to_json(orient="records").encode()).hexdigest()[:16]
    return {
        "organism": organism.name,
        **organism.provenance,
        "prompts": prompts,
        "judge": repr(plan.judge),
        "peers": list(plan.peers),
        "settings": plan.settings.identity(),
    }
