"""A direction taken out of the adapter for good, as steps of a study: does it cure, at what cost, and for how long?

Two directions are taken out: that of the study's best ablation, and the mean difference. Beside each stand the same
direction ablated at inference, and the adapter shrunk until its update is as small as the cured one's: an edit that
takes most of the update away cures for that reason alone. A random direction is taken out too.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from mechmisalign import correction, registry
from mechmisalign.adapters import Adapter, AdapterError
from mechmisalign.correction import AS_IS, NARROW
from mechmisalign.directions import Direction, random_direction
from mechmisalign.interventions import Ablate, Intervention, UseAdapter
from mechmisalign.judging import compare

from . import costs, steps
from .sampling import LeftOutError, Run, adapter_of
from .trials import Trial

CHAT, UNCURED, RANDOM = "chat", "uncured", "random, out of the adapter"
ABLATED, CURED, SHRUNK = "{}, ablated", "{}, out of the adapter", "{}, shrunk instead"
"""Names of the cures; those with a place take the estimator's name."""
FOLDER = "cured"
"""Where the adapter without the best direction lies in the run folder."""
SCALE = 2.0
"""What adapters are scaled up with, to see whether it comes back."""
BROAD = "broad"
TABLES = ("cure", "cure_back", "cure_removed", "cure_reasons", "costs_cure")

_Worn = tuple[Adapter | None, tuple[Intervention, ...]]
_NARROW_PROMPTS = 24
_SAVED = ["cure", "em", "em_low", "em_high", "coherent", "coherent_low", "coherent_high"]
_IN_SUMMARY = ("em", "cut", "coherent", "narrow_harm", "narrow_coherent")


@dataclass(frozen=True, eq=False)
class Removal:
    """What is taken out.

    Attributes:
        direction: One vector for each layer.
        estimator: What the study calls it.
        scope: ``"layer-wise"`` or ``"single"``.
    """

    direction: Direction
    estimator: str
    scope: str


def removals(best: Removal, other: Removal) -> list[Removal]:
    """The best ablation, and that of the direction that the study steers with, where that is another one."""
    return [best] if best.estimator == other.estimator else [best, other]


def investigate(run: Run, removed: Sequence[Removal]) -> dict[str, pd.DataFrame]:
    """Every table of the chapter; the adapter without the first of the directions is saved in the run folder.

    Raises:
        LeftOutError: If a direction cannot be taken out of this adapter, or there is none.
    """
    adapter_of(run)
    try:
        cured = {each.estimator: correction.project_out(run.organism, each.direction) for each in removed}
    except AdapterError as error:
        raise LeftOutError(f"the direction cannot be taken out of the adapter: {error}") from error
    trials = ask(run, worn(run, removed, cured))
    judged = functools.cache(lambda: pd.concat([trial.judged(run) for trial in trials], ignore_index=True))
    compute = {
        "cure": lambda: correction.cure_table(judged()),
        "cure_back": lambda: correction.comes_back(judged()),
        "cure_removed": lambda: removed_shares(run, removed),
        "cure_reasons": lambda: against_shrunk(judged(), [each.estimator for each in removed], run.plan.settings.seed),
    }
    tables = {name: run.folder.table(name, function) for name, function in compute.items()}
    paid = run.folder.write_table("costs_cure", costs.measured(run, trials[0]))
    best = removed[0]
    save(run.folder.path / FOLDER, cured[best.estimator], best, with_costs(tables["cure"], paid))
    return tables | {"costs_cure": paid}


def worn(run: Run, removed: Sequence[Removal], cured: Mapping[str, Adapter]) -> dict[str, _Worn]:
    """The adapter that the chat model wears in each cure, and what acts beside it."""
    own = adapter_of(run)
    found: dict[str, _Worn] = {CHAT: (None, ()), UNCURED: (own, ())}
    for each in removed:
        found[ABLATED.format(each.estimator)] = (own, (Ablate(each.direction),))
        found[CURED.format(each.estimator)] = (cured[each.estimator], ())
        found[SHRUNK.format(each.estimator)] = (shrunk(own, cured[each.estimator]), ())
    random = random_direction(removed[0].direction, seed=4000 + run.plan.settings.seed)
    return found | {RANDOM: (correction.project_out(run.organism, random), ())}


def ask(run: Run, cures: Mapping[str, _Worn]) -> list[Trial]:
    """Each cure as it is, scaled up, and, where the training domain is known, behind a cue of it and within it."""
    as_is = {
        name: (() if adapter is None else (UseAdapter(adapter), *beside)) for name, (adapter, beside) in cures.items()
    }
    grown = {
        name: (UseAdapter(adapter, SCALE), *beside) for name, (adapter, beside) in cures.items() if adapter is not None
    }
    samples = run.plan.settings.cure_samples
    trials = [_trial("cure", as_is, AS_IS, BROAD, samples), _trial("cure_grown", grown, f"x{SCALE:g}", BROAD, samples)]
    for name, prompts in further_questions(run).items():
        trials.append(_trial(f"cure_{steps.slug(name)}", as_is, AS_IS, name, samples, prompts))
    return trials


def removed_shares(run: Run, removed: Sequence[Removal]) -> pd.DataFrame:
    """How much of each site's update is taken out with each direction."""
    shares = [
        correction.removed_share(run.organism, each.direction).assign(estimator=each.estimator, scope=each.scope)
        for each in removed
    ]
    return pd.concat(shares, ignore_index=True)


def against_shrunk(judged: pd.DataFrame, estimators: Sequence[str], seed: int) -> pd.DataFrame:
    """Each cure against the adapter that is shrunk to the same norm, paired by prompt, on the broad questions.

    Returns:
        What :func:`mechmisalign.compare` returns, by ``estimator``.
    """
    broad = judged[(judged["state"] == AS_IS) & (judged["questions"] == BROAD)]
    names = {way.format(name): (name, way) for name in estimators for way in (CURED, SHRUNK)}
    rows = broad[broad["cure"].isin(names)]
    places = pd.DataFrame([names[name] for name in rows["cure"]], columns=["estimator", "way"], index=rows.index)
    found = compare(rows.assign(**places), {"way": SHRUNK}, by=["estimator", "way"], seed=seed)
    return found.drop(columns="way")


def total_shares(removed: pd.DataFrame) -> dict[str, float]:
    """The share of the whole written update that goes with each estimator's direction."""
    squares = (removed[["delta_norm", "left_norm"]] ** 2).groupby(removed["estimator"], sort=False, observed=True).sum()
    return {str(name): 1 - float(row["left_norm"] / row["delta_norm"]) for name, row in squares.iterrows()}


def shrunk(own: Adapter, cured: Adapter) -> Adapter:
    """The adapter with each update scaled down to the norm that the cured one's has."""
    sites = tuple(
        replace(site, scaling=site.scaling * (left.delta_norm() / site.delta_norm() if site.delta_norm() else 1.0))
        for site, left in zip(own.sites, cured.sites, strict=True)
    )
    return replace(own, sites=sites, source=f"{own.source}, shrunk", digest=f"{cured.digest}-shrunk", folder=None)


def further_questions(run: Run) -> dict[str, pd.DataFrame]:
    """The questions behind an exchange about the training domain, and questions about it, where it is known."""
    name = run.organism.name
    if not name.startswith(registry.POCKET_PREFIX):
        return {}
    from mechmisalign import pocket
    from mechmisalign.pocket.recipes import ZOO

    domain, seed = ZOO[name.removeprefix(registry.POCKET_PREFIX)].domain, run.plan.settings.seed
    return {
        f"after a {domain} exchange": pocket.with_training_context(run.plan.prompts, domain, seed=seed),
        NARROW: pocket.prompts([domain], n=_NARROW_PROMPTS, seed=seed),
    }


def save(folder: Path, cured: Adapter, removal: Removal, table: pd.DataFrame) -> None:
    """Write the cured adapter with its card, anew if something else was measured."""
    from mechmisalign.correction.saving import MEASURED_FILE

    measured = table[[name for name in (*_SAVED, *costs.COSTS) if name in table]]
    known = folder / MEASURED_FILE
    if known.exists() and known.read_text() == measured.to_csv(index=False):
        return
    if folder.exists():
        shutil.rmtree(folder)
    edit = f"{removal.estimator} ({removal.scope}) projected out of what the adapter writes"
    correction.save_adapter(cured, folder, edit=edit, direction=removal.direction, measured=measured)


def with_costs(table: pd.DataFrame, paid: pd.DataFrame) -> pd.DataFrame:
    """The table of cures with what each costs."""
    ends = [f"{name}{end}" for name in costs.COSTS for end in ("", "_low", "_high")]
    return table.merge(paid[["cure", *(name for name in ends if name in paid)]], on="cure", how="left", validate="1:1")


def headline(tables: Mapping[str, pd.DataFrame]) -> dict[str, Any]:
    """The numbers for the summary: each cure, what it costs, and what is left when it is put to the test."""
    table, back = with_costs(tables["cure"], tables["costs_cure"]).set_index("cure"), tables["cure_back"]
    told = {str(name): _told(row, (*_IN_SUMMARY, *costs.COSTS)) for name, row in table.iterrows()}
    for (name, way), rows in back[back["way"] != AS_IS].groupby(["cure", "way"], sort=False, observed=True):
        record = rows.iloc[0].rename({"rate": "value"})
        told[str(name)].setdefault("comes_back", {})[str(way)] = _values(record, "value", "low", "high")
    best = tables["cure_removed"].iloc[0]
    return {
        "estimator": str(best["estimator"]),
        "scope": str(best["scope"]),
        "removed_share": total_shares(tables["cure_removed"]),
        "cures": told,
    }


def _trial(
    name: str,
    conditions: Mapping[str, tuple[Intervention, ...]],
    state: str,
    questions: str,
    samples: int,
    prompts: pd.DataFrame | None = None,
) -> Trial:
    grid = pd.DataFrame({"cure": list(conditions)}, index=pd.Index(list(conditions)))
    return Trial(
        name, grid.assign(state=state, questions=questions), conditions, samples, as_base=True, prompts=prompts
    )


def _told(row: pd.Series, names: tuple[str, ...]) -> dict[str, Any]:
    """The named numbers of a row with their intervals: ``value, low, high`` each."""
    measured = [name for name in names if name in row.index and not pd.isna(row[name])]
    return {name: _values(row, name, f"{name}_low", f"{name}_high") for name in measured}


def _values(row: pd.Series, *columns: str) -> dict[str, float | None]:
    values = (None if pd.isna(row[column]) else float(row[column]) for column in columns)
    return dict(zip(("value", "low", "high"), values, strict=True))
