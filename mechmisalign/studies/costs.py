"""What each condition of a trial costs: loss and KL on neutral text, exact answers, and the length of its answers.

The first two are measured a few conditions at a time and kept as they come, so a killed study loses one of these at
most; the length is that of the answers that were sampled anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import pandas as pd

from mechmisalign import capability
from mechmisalign.generation import Conditions, useful_workers
from mechmisalign.organisms import Organism

from .sampling import Run
from .trials import Trial

COSTS = ("loss", "kl", "accuracy", "tokens")
KEYS: Mapping[str, tuple[str, ...]] = {
    "baseline": ("condition",),
    "steering": ("condition",),
    "steered": ("condition",),
    "ablation": ("estimator", "scope"),
    "ablated": ("estimator", "scope"),
    "transfer": ("organism", "state"),
}
"""Tables of rates whose costs lie beside them, in ``costs_<name>``; and what names a row in both."""

_AT_A_TIME = 16
"""Conditions that are measured together: more share the chat model's pass, fewer are lost when a study is killed."""

_Measure = Callable[[Organism, Conditions], pd.DataFrame]


def measured(run: Run, trial: Trial, only: Sequence[str] | None = None) -> pd.DataFrame:
    """Costs of a trial's conditions, those of random controls pooled: their mean, and the widest of their intervals.

    Args:
        run: The study.
        trial: Its conditions.
        only: Those whose loss, KL and accuracy are measured; all by default.

    Returns:
        One row per row of the trial's rates: its columns, ``tokens`` and ``finished`` of its answers, and, where the
        study has texts and items for it, ``loss, kl, texts`` and ``accuracy, items``; NaN where not measured.
    """
    conditions = {name: trial.conditions[name] for name in (trial.conditions if only is None else only)}
    lengths = capability.response_length(trial.judged(run), by=trial.by, seed=run.plan.settings.seed)
    told = pd.DataFrame({"_condition": list(conditions)})
    for what, measure in _measures(run).items():
        told = told.merge(_kept(run, trial, what, conditions, measure), on="_condition", validate="1:1")
    labels = trial.grid.rename_axis("_condition").reset_index()
    pooled = _pooled(labels.merge(told, on="_condition").drop(columns="_condition"), trial.by)
    return lengths.merge(pooled, on=trial.by, how="left", validate="1:1")


def beside(tables: Mapping[str, pd.DataFrame], name: str) -> pd.DataFrame:
    """A table of rates with the costs of its rows."""
    rates, costs, keys = tables[name], tables[f"costs_{name}"], list(KEYS[name])
    columns = [column for column in costs.columns if column in keys or column not in rates.columns]
    return rates.merge(costs[columns], on=keys, how="left", validate="1:1")


def is_measured(tables: Mapping[str, pd.DataFrame]) -> dict[str, bool]:
    """Whether the study has costs on texts and on items."""
    columns = tables["costs_baseline"].columns
    return {"texts": "loss" in columns, "items": "accuracy" in columns}


def _measures(run: Run) -> dict[str, _Measure]:
    """What can be measured with what the study has, by name."""
    neutral, settings = run.neutral, run.plan.settings
    found: dict[str, _Measure] = {}
    if (texts := neutral.texts) is not None:
        found["loss"] = lambda organism, conditions: capability.text_costs(
            organism, conditions, texts, counted=neutral.counted, system=settings.system, seed=settings.seed
        )
    if (items := neutral.items) is not None:
        longest = min(settings.max_new_tokens, capability.MAX_NEW_TOKENS)
        found["accuracy"] = lambda organism, conditions: capability.task_costs(
            organism,
            conditions,
            items,
            system=settings.system,
            max_new_tokens=longest,
            seed=settings.seed,
            workers=useful_workers(organism.model),
        ).loc[:, ["condition", "accuracy", "accuracy_low", "accuracy_high", "items"]]
    return found


def _kept(run: Run, trial: Trial, what: str, conditions: Conditions, measure: _Measure) -> pd.DataFrame:
    """One measure of each condition: read where it was taken before."""
    wanted = pd.DataFrame({"condition": list(conditions)})

    def produce(missing: pd.DataFrame) -> Iterator[pd.DataFrame]:
        with trial.answering(run) as organism:
            for start in range(0, len(missing), _AT_A_TIME):
                part = missing.iloc[start : start + _AT_A_TIME]
                table = measure(organism, {name: conditions[name] for name in part["condition"]})
                yield table.set_index("condition").loc[part["condition"]].reset_index().set_axis(part.index)

    return run.folder.rows(f"{what}_{trial.name}", wanted, produce).rename(columns={"condition": "_condition"})


def _pooled(costs: pd.DataFrame, by: Sequence[str]) -> pd.DataFrame:
    how = {"_low": "min", "_high": "max"}
    columns = [column for column in costs.columns if column not in by]
    ways = {name: next((way for end, way in how.items() if name.endswith(end)), "mean") for name in columns}
    return (
        costs.groupby(list(by), sort=False, as_index=False, observed=True).agg(ways)
        if ways
        else costs.drop_duplicates()
    )
