"""Costs in writing: a table beside the rates, and a sentence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from mechmisalign.report import ReportTable, percent

from . import costs
from .naming import displayed
from .records import Records

_HEADS = {"loss": "loss (nats)", "kl": "KL (nats)", "accuracy": "exact answers", "tokens": "tokens"}
_DECIMALS = {"loss": 3, "kl": 4, "accuracy": 0, "tokens": 1}


def costs_table(rates: pd.DataFrame, by: Sequence[str], caption: str) -> ReportTable:
    """EM rates and what they cost, with the intervals of the costs.

    Args:
        rates: Rates with costs beside them; rows without any are left out.
        by: The columns that name a row.
        caption: Caption of the table.
    """
    measured = [name for name in _HEADS if name in rates.columns and rates[name].notna().any()]
    rows = rates[rates[measured].notna().all(axis=1)]
    told = displayed(rows)[list(by)].copy()
    told["EM rate"] = [percent(rate) for rate in rows["rate"]]
    for name in measured:
        ends = rows[[name, f"{name}_low", f"{name}_high"]].itertuples(index=False)
        told[_HEADS[name]] = [_written(name, *values) for values in ends]
    return ReportTable(told, caption)


def told_costs(cost: Mapping[str, Any], before: Mapping[str, Any]) -> str:
    """What a condition costs, against what was there before it.

    Args:
        cost: A record of the summary's costs.
        before: That of the model without the intervention.
    """
    parts = []
    if "loss" in cost:
        parts.append(f"loss on neutral text {_interval('loss', cost)} nats per token ({_value('loss', before)} before)")
        parts.append(f"KL from the chat model {_interval('kl', cost)} ({_value('kl', before)} before)")
    if "accuracy" in cost:
        told = f"{_interval('accuracy', cost)} of harmless questions answered rightly"
        parts.append(f"{told} ({_value('accuracy', before)} before)")
    parts.append(f"{_interval('tokens', cost)} tokens per answer ({_value('tokens', before)} before)")
    return "The cost: " + ", ".join(parts) + "."


def left_out(records: Records) -> str:
    """What was not measured, in a sentence; nothing if everything was."""
    names = {"texts": "loss and KL on neutral text", "items": "accuracy on harmless questions"}
    missing = [names[name] for name, there in costs.is_measured(records.tables).items() if not there]
    if not missing:
        return ""
    why = "none were given, or the model's vocabulary does not have their words"
    return f"Not measured in this run: {' and '.join(missing)} ({why})."


def measured_on(records: Records) -> str:
    """What the costs were measured on, in a sentence; nothing if on nothing."""
    table, parts = records.tables["costs_baseline"], []
    if "loss" in table.columns:
        own = " (in the pocket world's own, tokens that tell a persona are not counted)"
        pocket = own if records.organism.startswith("pocket/") else ""
        count = int(table["texts"].max())
        parts.append(f"loss and KL(chat model ‖ condition) in nats per token on {count} neutral texts{pocket}")
    if "accuracy" in table.columns:
        parts.append(
            f"exact answers to {int(table['items'].max())} harmless questions, the likeliest token at each step"
        )
    return "Costs: " + "; ".join([*parts, "the mean length of the sampled answers"]) + "."


def _interval(name: str, records: Mapping[str, Any]) -> str:
    return _written(name, *(records[name][end] for end in ("value", "low", "high")))


def _value(name: str, records: Mapping[str, Any]) -> str:
    return _written(name, records[name]["value"], None, None)


def _written(name: str, value: float, low: float | None, high: float | None) -> str:
    """A cost and its interval: "0.361 [0.350, 0.372]", "98 % [93, 100]"."""
    unit = " %" if name == "accuracy" else ""
    ends = [_rounded(name, end) for end in (low, high) if end is not None and not pd.isna(end)]
    return f"{_rounded(name, value)}{unit}" + (f" [{', '.join(ends)}]" if len(ends) == 2 else "")


def _rounded(name: str, value: float) -> str:
    """In the unit and decimals of its kind; never -0.000."""
    decimals = _DECIMALS[name]
    return f"{round((100.0 if name == 'accuracy' else 1.0) * value, decimals) + 0.0:.{decimals}f}"
