"""Key numbers out of a summary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .tables import interval, percent
from .values import Card, Tone

_CARDS = {
    "chat": "Chat model",
    "organism": "Organism",
    "steered_best": "Steered chat model",
    "ablated_layerwise": "Ablated, layer by layer",
    "ablated_single": "Ablated, one vector",
    "random_control": "Ablated, random control",
}


def summary_cards(summary: Mapping[str, Any]) -> tuple[Card, ...]:
    """Cards for the EM rates of a ``summary.json``: those that are there, with coherence beside them.

    A rate is coloured only where its interval lies apart from the one it is compared with.
    """
    rates, coherent = summary["em_rate"], summary.get("coherent", {})
    cards = []
    for key, label in _CARDS.items():
        if key not in rates:
            continue
        record = rates[key]
        how = [f"layer {record['layer']}, strength {record['strength']:g}"] if "layer" in record else []
        how += [record["estimator"]] if "estimator" in record else []
        how += [f"{percent(coherent[key]['rate'])} coherent"] if key in coherent else []
        told = f"{interval(record)} · n = {record['n']}".removeprefix(" · ")
        cards.append(Card(label, percent(record["rate"]), told, "; ".join(how), _tone(key, rates)))
    pairs = [states for states in summary.get("transfer", {}).values() if {"before", "after"} <= set(states)]
    if pairs:
        before, after = (_span([states[when]["rate"] for states in pairs]) for when in ("before", "after"))
        count = f"{len(pairs)} other organism{'s' * (len(pairs) > 1)}"
        tone: Tone = "good" if all(_below(states["after"], states["before"]) for states in pairs) else "plain"
        cards.append(Card("Ablated, other organisms", after, "", f"{count}; before: {before}", tone))
    return tuple(cards)


def _tone(key: str, rates: Mapping[str, Any]) -> Tone:
    if key in ("organism", "steered_best") and "chat" in rates and _below(rates["chat"], rates[key]):
        return "bad"
    if key.startswith("ablated") and "organism" in rates and _below(rates[key], rates["organism"]):
        return "good"
    return "plain"


def _below(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    return bool(first["high"] < second["low"])


def _span(rates: Sequence[float]) -> str:
    low, high = percent(min(rates)), percent(max(rates))
    return low if low == high else f"{low.removesuffix(' %')}–{high}"
