"""A study's stages in order; each one's table is kept in the run folder, and read where an earlier try finished it."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence

import pandas as pd

from mechmisalign import geometry
from mechmisalign.directions import Direction
from mechmisalign.judging import rates
from mechmisalign.organisms import Organism, load_organism
from mechmisalign.progress import progress

from . import anatomy, behaviour, costs, cure, deltas, differences, fine_tunes, splits, steps, training, trials, watch
from .sampling import LeftOutError, Run, answers
from .trials import Trial

logger = logging.getLogger(__name__)

_Tables = dict[str, pd.DataFrame]


def investigate(run: Run) -> tuple[_Tables, dict[str, Direction]]:
    """Every table and every direction of the study."""
    keep, settings, begin = run.folder.table, run.plan.settings, run.stages.begin
    run.neutral.refuse_unspoken(run.organism)
    begin("baseline")
    chat, organism = trials.baseline(run)
    own = organism.judged(run)
    tables = {"answers": keep("answers", lambda: pd.concat([chat.judged(run), own]))}
    tables["baseline"] = keep("baseline", lambda: rates(tables["answers"]))
    begin("directions")
    of_chat = functools.partial(chat.judged, run)
    directions, reliability = _directions(run, run.organism.name, lambda: run.organism, own, of_chat)
    tables["reliability"] = keep("reliability", lambda: reliability)
    plain = steps.reference(directions)
    reference = directions[plain]
    halves = splits.halves(run.plan.prompts, settings.seed)
    tables["splits"] = keep("splits", lambda: halves.table)

    begin("steering")
    sweep = trials.steering_sweep(run, plain, reference)
    tables |= _rated(run, halves, "steering", sweep)
    layer, strength = steps.best_cell(tables["choice_steering"], settings.min_coherent)
    steered = trials.steering_confirmed(run, reference, layer, strength).on(halves.report)
    tables["steered"] = keep("steered", lambda: halves.to_report(run, steered).assign(layer=layer, strength=strength))

    begin("single")
    search = trials.single_layer_search(run, directions)
    tables |= _rated(run, halves, "single_search", search)
    single = steps.chosen_layers(tables["choice_single_search"], settings.min_coherent)
    begin("ablation")
    ablation = trials.ablation(run, directions, single)
    tables |= _rated(run, halves, "ablation", ablation)
    chosen = steps.best_estimators(tables["choice_ablation"], settings.min_coherent)
    removals = _removals(chosen, directions, single)
    ablated = trials.ablation_confirmed(run, removals, chosen).on(halves.report)
    tables["ablated"] = keep("ablated", lambda: halves.to_report(run, ablated))

    begin("costs")
    stages = {"sweep": sweep, "steered": steered, "ablation": ablation, "ablated": ablated}
    tables |= _costs(run, [chat, organism], stages, tables["steering"], layer)
    tables |= _compared(run, stages, own)
    scope = steps.best_scope(tables["choice_ablation"], chosen, settings.min_coherent)
    tables |= _behaviour(run, tables["answers"], stages, scope)
    begin("peers")
    tables |= _peers(run, removals, directions, of_chat, halves)
    other = cure.Removal(reference if scope == "layer-wise" else removals[plain], plain, scope)
    removed = cure.removals(cure.Removal(removals[scope], chosen[scope], scope), other)
    pooled, _ = steps.pool_of_study(own, of_chat, settings.seed)
    taken_apart = functools.partial(anatomy.investigate, run, pooled, reference, layer)
    return tables | _chapters(run, tables["answers"], removed, taken_apart), directions


def _rated(run: Run, halves: splits.Halves, name: str, trial: Trial) -> _Tables:
    """Rates of a stage on all prompts, on those of the choice, and on the others."""
    compute = {
        name: lambda: trial.rates(run),
        f"choice_{name}": lambda: halves.to_choose_on(run, trial),
        f"report_{name}": lambda: halves.to_report(run, trial),
    }
    return {table: run.folder.table(table, function) for table, function in compute.items()}


def _chapters(
    run: Run, judged: pd.DataFrame, removed: Sequence[cure.Removal], taken_apart: Callable[[], _Tables]
) -> _Tables:
    """What not every study can have; a table says which chapters were left out, and why.

    That table is written anew each time, since a later run may know checkpoints that an earlier one did not.
    """
    chapters: dict[str, Callable[[], _Tables]] = {
        "anatomy": taken_apart,
        **({"deltas": lambda: deltas.investigate(run)} if run.organism.full is not None else {}),
        "training": lambda: training.investigate(run),
        "fine_tunes": lambda: fine_tunes.investigate(run),
        "cure": lambda: cure.investigate(run, removed),
        "watch": lambda: watch.investigate(run, judged),
    }
    tables: _Tables = {}
    missing = dict.fromkeys(chapters, "")
    for name, investigate in chapters.items():
        run.stages.begin(name)
        try:
            tables |= investigate()
        except (LeftOutError, steps.TooFewAnswersError) as reason:
            missing[name] = str(reason)
    told = pd.DataFrame({"chapter": list(missing), "missing": list(missing.values())})
    return tables | {"chapters": run.folder.write_table("chapters", told)}


def _costs(run: Run, models: list[Trial], stages: Mapping[str, Trial], swept: pd.DataFrame, layer: int) -> _Tables:
    """Costs of every stage: written anew each time, since a later run may measure what an earlier one left out."""
    cells = steps.costly_cells(swept, layer, run.plan.settings.min_coherent)
    found = {
        "costs_baseline": pd.concat([costs.measured(run, trial) for trial in models], ignore_index=True),
        "costs_steering": costs.measured(run, stages["sweep"], cells),
        **{f"costs_{name}": costs.measured(run, stages[name]) for name in ("steered", "ablation", "ablated")},
    }
    return {name: run.folder.write_table(name, table) for name, table in found.items()}


def _compared(run: Run, stages: Mapping[str, Trial], own: pd.DataFrame) -> _Tables:
    """Differences, paired by prompt."""
    compute = {
        "differences_steering": lambda: differences.of_steering(run, stages["sweep"]),
        "differences_ablation": lambda: differences.of_ablation(run, stages["ablation"], own),
        "differences_confirmed": lambda: differences.confirmed(run, stages["steered"], stages["ablated"], own),
    }
    return {name: run.folder.table(name, function) for name, function in compute.items()}


def _behaviour(run: Run, judged: pd.DataFrame, stages: Mapping[str, Trial], scope: str) -> _Tables:
    shown = run.folder.table("behaviour", lambda: behaviour.of_headlines(run, judged, stages, scope))
    looked_at = functools.cache(lambda: behaviour.looked_at(shown))
    names = ("behaviour_rates", "prompt_rates", "threshold_curve")
    kept = {name: run.folder.table(name, functools.partial(_entry, looked_at, name)) for name in names}
    return {"behaviour": shown, **kept}


def _entry(tables: Callable[[], _Tables], name: str) -> pd.DataFrame:
    return tables()[name]


def _directions(
    run: Run,
    name: str,
    load: Callable[[], Organism],
    judged: pd.DataFrame,
    chat: Callable[[], pd.DataFrame],
) -> tuple[dict[str, Direction], pd.DataFrame]:
    """Every estimator's direction, and the split-half reliability of the one that the study steers with.

    Where there are peers, bootstrap replicates of the mean difference are kept too, for the comparison with them.
    """
    folder, settings = run.folder, run.plan.settings
    pooled, names = steps.pool_of_study(judged, chat, settings.seed)
    readings = functools.cache(lambda: steps.read(load(), pooled, settings.system))
    where = steps.slug(name)
    folder.table(f"pool_{where}", lambda: steps.pool_sources(pooled))
    directions = {
        name: folder.direction(
            f"{where}/{steps.slug(name)}", functools.partial(_estimated, steps.ESTIMATORS[name], readings)
        )
        for name in names
    }
    plain = steps.reference(names)
    reliability = folder.table(f"reliability_{where}", lambda: steps.reliability(readings(), plain, settings.seed))
    if run.plan.peers and plain == steps.MEAN_DIFFERENCE:
        folder.table(f"replicates_{where}", lambda: fine_tunes.replicates(readings(), settings.seed))
    return directions, reliability


def _estimated(estimator: Callable[[steps.Readings], Direction], readings: Callable[[], steps.Readings]) -> Direction:
    return estimator(readings())


def _removals(
    chosen: Mapping[str, str], directions: Mapping[str, Direction], single: Mapping[str, int]
) -> dict[str, Direction]:
    """What is carried to other organisms: the best direction of each scope, and the one that the study steers with."""
    one, plain = chosen["single"], steps.reference(directions)
    return {
        "layer-wise": directions[chosen["layer-wise"]],
        "single": directions[one].everywhere(single[one]),
        plain: directions[plain].everywhere(single[plain]),
    }


def _peers(
    run: Run,
    removals: Mapping[str, Direction],
    directions: Mapping[str, Direction],
    chat: Callable[[], pd.DataFrame],
    halves: splits.Halves,
) -> _Tables:
    """Ablation carried to each peer, what it costs there, and the cosines of directions with the peers' own."""
    transferred, paid = [pd.DataFrame(columns=["state", "organism"])], [pd.DataFrame(columns=["state", "organism"])]
    cosines = [pd.DataFrame(columns=["organism"])]
    for name in progress(run.plan.peers, "other organisms", len(run.plan.peers), "organism"):
        base = run.plan.bases.get(name)
        load = functools.cache(functools.partial(load_organism, name, base))  # only if something is still to be done
        trial, slug = trials.transfer(run, name, load, removals).on(halves.report), steps.slug(name)
        transferred.append(run.folder.table(f"transfer_{slug}", functools.partial(halves.to_report, run, trial)))
        paid.append(costs.measured(run, trial))
        own = functools.partial(_peer_cosines, run, name, load, directions, chat)
        cosines.append(run.folder.table(f"cosines_{slug}", own))
    every = {"transfer": transferred, "cosines": cosines}
    joined = {name: pd.concat(frames, ignore_index=True) for name, frames in every.items()}
    kept = {name: run.folder.table(name, functools.partial(_entry, lambda: joined, name)) for name in every}
    return kept | {"costs_transfer": run.folder.write_table("costs_transfer", pd.concat(paid, ignore_index=True))}


def _peer_cosines(
    run: Run,
    peer: str,
    load: Callable[[], Organism],
    directions: Mapping[str, Direction],
    chat: Callable[[], pd.DataFrame],
) -> pd.DataFrame:
    """Cosine between the peer's directions and the studied organism's, for each estimator and layer."""
    name = f"pool_{steps.slug(peer)}"
    judged = answers(run, name, {"organism": ()}, run.plan.settings.pool_samples, of=load)
    try:
        theirs, _ = _directions(run, peer, load, judged, chat)
    except steps.TooFewAnswersError as error:
        logger.warning("no direction of %s to compare with: %s", peer, error)
        return pd.DataFrame({"organism": [], "estimator": [], "layer": [], "cosine": []})
    frames = [
        geometry.cosine_by_layer(direction, theirs[name]).assign(organism=peer, estimator=name)
        for name, direction in directions.items()
        if name in theirs
    ]
    return pd.concat(frames, ignore_index=True)
