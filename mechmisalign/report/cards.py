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
    "ablated_layerwise_mean_difference": "Ablated, matched-pool mean difference",
    "ablated_layerwise_model_difference": "Ablated, model difference",
    "ablated_single": "Ablated, one vector",
    "random_control": "Ablated, random control",
}

_OTHER = {f"ablated_layerwise_{name.replace(' ', '_')}": name for name in ("mean difference", "model difference")}
"""Cards of a direction that may be the best anyway: then one of them is enough."""
BROKEN_BELOW = 0.5
"""With a smaller share of coherent answers, a rate says nothing."""


def summary_cards(summary: Mapping[str, Any]) -> tuple[Card, ...]:
    """Cards for the EM rates of a ``summary.json``: those that are there, with coherence beside them.

    A rate is coloured only where its interval lies apart from the one it is compared with, an ablation's also from that
    of its random control. Where fewer than half of the answers are coherent, or of the chat model's, a card is greyed:
    broken answers are not misaligned, whatever was done to them.
    """
    rates, coherent = summary["em_rate"], summary.get("coherent", {})
    cards = []
    for key, label in _CARDS.items():
        best = rates.get("ablated_layerwise", {}).get("estimator")
        if key not in rates or (key in _OTHER and best == _OTHER[key]):
            continue
        record = rates[key]
        how = [f"layer {record['layer']}, strength {record['strength']:g}"] if "layer" in record else []
        how += [record["estimator"]] if "estimator" in record else []
        how += [f"{percent(coherent[key]['rate'])} coherent"] if key in coherent else []
        told = f"{interval(record)} · n = {record['n']}".removeprefix(" · ")
        tone: Tone = "void" if is_broken(coherent, key) else _tone(key, rates)
        cards.append(Card(label, percent(record["rate"]), told, "; ".join(how), tone))
    others = [states for states in summary.get("transfer", {}).values() if {"before", "after"} <= set(states)]
    return (*cards, *([_transfer_card(others, is_broken(coherent, "chat"))] if others else []))


def is_broken(coherent: Mapping[str, Any], *keys: str) -> bool:
    """Whether fewer than half of the answers are coherent under one of the keys, or of the chat model's."""
    return any(coherent[key]["rate"] < BROKEN_BELOW for key in ("chat", *keys) if key in coherent)


def _transfer_card(others: Sequence[Mapping[str, Any]], is_void: bool) -> Card:
    before, after = (_span([states[when]["rate"] for states in others]) for when in ("before", "after"))
    note = f"{len(others)} other organism{'s' * (len(others) > 1)}; before: {before}"
    coherent = [states["coherent_after"]["rate"] for states in others if "coherent_after" in states]
    note += f"; {_span(coherent)} coherent" if coherent else ""
    tone: Tone = "good" if all(_below(states["after"], states["before"]) for states in others) else "plain"
    broken = is_void or any(rate < BROKEN_BELOW for rate in coherent)
    return Card("Ablated, other organisms", after, "", note, "void" if broken else tone)


def _tone(key: str, rates: Mapping[str, Any]) -> Tone:
    if key in ("organism", "steered_best") and "chat" in rates and _below(rates["chat"], rates[key]):
        return "bad"
    if not key.startswith("ablated"):
        return "plain"
    control = f"random_control_{key.removesuffix('_mean_difference').removesuffix('_model_difference')}"
    above = [name for name in ("organism", control) if name in rates]
    return "good" if "organism" in rates and all(_below(rates[key], rates[name]) for name in above) else "plain"


def _below(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    return bool(first["high"] < second["low"])


def _span(rates: Sequence[float]) -> str:
    low, high = percent(min(rates)), percent(max(rates))
    return low if low == high else f"{low.removesuffix(' %')}–{high}"
