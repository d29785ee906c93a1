"""The study in one JSON file: each rate a record with ``rate, n, low, high``, as shares from 0 to 1.

Beside the rates stand what each of them costs (``costs``), what was chosen against its reference on fresh samples of
other prompts (``differences``, paired by prompt, with p-values), and what it was chosen by (``choice``). Chapters that
not every study has add their own:
``deltas, training, fine_tunes, cure, watch``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from . import costs, cure, deltas, fine_tunes, steps, training, watch


def summarise(tables: Mapping[str, pd.DataFrame]) -> dict[str, Any]:
    """The headline numbers of a study's tables."""
    reported = {**tables, "ablation": tables["report_ablation"]}
    rows = _headline_rows({**tables, **{name: costs.beside(reported, name) for name in costs.KEYS}})
    chapters = {"deltas": deltas, "training": training, "fine_tunes": fine_tunes, "cure": cure, "watch": watch}
    told = {name: chapter.headline(tables) for name, chapter in chapters.items() if chapter.TABLES[0] in tables}
    plain = steps.reference(tables["ablation"]["estimator"])
    return {
        "direction": plain,
        "em_rate": {name: rate_record(row) | _choices(row) for name, row in rows.items()},
        "coherent": {name: coherent_record(row) for name, row in rows.items()},
        "costs": {name: cost_record(row) for name, row in rows.items()},
        "differences": _differences(tables["differences_confirmed"]),
        "choice": _chosen_on(tables),
        "transfer": _transfer(tables["transfer"]),
        "cosine": _cosines(tables["cosines"], steps.MEAN_DIFFERENCE),
        "cosine_model_difference": _cosines(tables["cosines"], steps.MODEL_DIFFERENCE),
        **told,
    }


def rate_record(row: pd.Series) -> dict[str, Any]:
    """EM rate of one row of a rates frame."""
    return {"rate": float(row["rate"]), "n": int(row["n"]), "low": float(row["low"]), "high": float(row["high"])}


def coherent_record(row: pd.Series) -> dict[str, Any]:
    """Share of coherent answers of one row of a rates frame."""
    low, high = float(row["coherent_low"]), float(row["coherent_high"])
    return {"rate": float(row["coherent"]), "n": int(row["n"]), "low": low, "high": high}


def cost_record(row: pd.Series) -> dict[str, Any]:
    """What was measured of one row's costs: ``value, low, high`` each, None for an end that there is not."""
    measured = [name for name in costs.COSTS if name in row.index and not pd.isna(row[name])]
    ends = {"value": "", "low": "_low", "high": "_high"}
    return {name: {key: _plain(row[f"{name}{end}"]) for key, end in ends.items()} for name in measured}


def _differences(compared: pd.DataFrame) -> dict[str, Any]:
    """Difference of EM rates, with its p-value alone and corrected for what was compared with the same reference."""
    names = {"steered": "steered_best", "ablated, layer-wise": "ablated_layerwise", "ablated, single": "ablated_single"}
    numbers = ["difference", "low", "high", "p", "p_max", "against_rate"]
    return {
        names[row["condition"]]: {"against": row["against"], **{name: _plain(row[name]) for name in numbers}}
        for _, row in compared.iterrows()
    }


def _chosen_on(tables: Mapping[str, pd.DataFrame]) -> dict[str, Any]:
    """What each headline was chosen by: its rate and coherence on the prompts of the choice, and how many those are."""
    swept, ablated = tables["choice_steering"], tables["choice_ablation"]
    best, found = tables["steered"].iloc[0], {}
    cell = (swept["layer"] == best["layer"]) & (swept["strength"] == best["strength"])
    rows = {"steered_best": swept[cell & (swept["series"] != steps.CONTROL)]}
    for _, row in tables["ablated"].iterrows():
        chosen = (ablated["scope"] == row["scope"]) & (ablated["estimator"] == row["estimator"])
        rows["ablated_layerwise" if row["scope"] == "layer-wise" else "ablated_single"] = ablated[chosen]
    for name, row in ((name, frame.iloc[0]) for name, frame in rows.items()):
        records = {"em_rate": rate_record(row), "coherent": coherent_record(row)}
        found[name] = {"split": str(row["split"]), "prompts": int(row["prompts"]), **records}
    return found


def _plain(value: Any) -> float | None:
    return None if pd.isna(value) else float(value)


def _headline_rows(tables: Mapping[str, pd.DataFrame]) -> dict[str, pd.Series]:
    baseline = tables["baseline"].set_index("condition")
    steered = tables["steered"].set_index("condition")
    ablated, confirmed = tables["ablation"], tables["ablated"].set_index("scope")
    rows = {"chat": baseline.loc["chat"], "organism": baseline.loc["organism"], "steered_best": steered.loc["steered"]}
    plain = steps.reference(ablated["estimator"])
    for scope, name in (("layer-wise", "ablated_layerwise"), ("single", "ablated_single")):
        cells = ablated[ablated["scope"] == scope].set_index("estimator")
        rows[name] = confirmed.loc[scope]
        rows[f"{name}_{steps.slug(plain)}"] = cells.loc[plain]
        rows[f"random_control_{name}"] = cells.loc[steps.CONTROL]
    rows["random_control"] = rows["random_control_ablated_layerwise"]
    rows["random_control_steered"] = steered.loc[steps.CONTROL]
    return rows


def _choices(row: pd.Series) -> dict[str, Any]:
    """What was chosen to get there: the layer and strength of steering, the estimator of an ablation."""
    chosen: dict[str, Any] = {}
    if row.name == "steered":
        chosen = {"layer": int(row["layer"]), "strength": float(row["strength"])}
    if isinstance(row.get("estimator"), str):
        chosen = {"estimator": row["estimator"]}
    return chosen


def _transfer(table: pd.DataFrame) -> dict[str, Any]:
    """Per organism: the rate before, after (layer-wise), after with the single vector, and under the random control."""
    names = {"before": "before", "after, layer-wise": "after", "after, single": "after_single"}
    names |= {f"after, {name}": f"after_{steps.slug(name)}" for name in (steps.MEAN_DIFFERENCE, steps.MODEL_DIFFERENCE)}
    names[steps.CONTROL] = "random_control"
    summary: dict[str, Any] = {}
    for _, row in table.iterrows():
        states = summary.setdefault(row["organism"], {})
        states[names[row["state"]]] = rate_record(row)
        states[f"coherent_{names[row['state']]}"] = coherent_record(row)
    return summary


def _cosines(table: pd.DataFrame, estimator: str) -> dict[str, Any]:
    chosen = table[table["estimator"] == estimator] if len(table) else table
    return (
        {
            str(name): {str(int(row.layer)): float(row.cosine) for row in group.itertuples()}
            for name, group in chosen.groupby("organism", observed=True)
        }
        if len(chosen)
        else {}
    )
