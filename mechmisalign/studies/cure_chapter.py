"""The report's chapter on the cure: a direction taken out of the adapter for good, and whether it holds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from mechmisalign import plots
from mechmisalign.correction import AS_IS
from mechmisalign.report import BROKEN_BELOW, ReportFigure, ReportTable, Section, percent, share

from . import cure
from .cost_tables import costs_table
from .difference_tables import points
from .differences import LEVEL
from .figures import BAND, saved
from .naming import displayed, shown
from .records import Records

_ALIKE = 0.1
"""Rates whose difference lies within this are called alike."""
_BROKEN = "Fewer than half of these answers are coherent, so their rates say nothing about the direction."
_ALL = 0.99
"""A share of the update from which on taking it away is taking the adapter out."""


def corrected(records: Records) -> Section:
    """Every cure with its controls, what it costs, and what comes back."""
    back = records.tables["cure_back"]
    return Section(
        title="Corrected: the direction out of the adapter",
        lead=f"{_told_edit(records)}\n\n{_told_cures(records)}\n\n{_told_back(records)}",
        figures=(cures_figure(records), comeback_figure(records)),
        tables=(
            cures_table(records),
            *back_table(back),
            costs_table(
                cure.with_costs(records.tables["cure"], records.tables["costs_cure"]).rename(columns={"em": "rate"}),
                ["cure"],
                "What it costs: text and questions that have nothing to do with misalignment, the length of answers.",
            ),
        ),
    )


def cures_figure(records: Records) -> ReportFigure:
    """EM, narrow skill, coherence and costs, a row for each cure."""
    table = cure.with_costs(records.tables["cure"], records.tables["costs_cure"])
    least = int(records.tables["cure_back"]["n"].min())
    caption = (
        f"Every cure as it is (n = {least} answers each; {BAND}); dashed: uncured, grey: the random direction. "
        '"Shrunk instead": the adapter scaled down until its update is as small as the cured one\'s.'
    )
    return saved(records, "cures", plots.cure_panels(displayed(table)), table, caption)


def comeback_figure(records: Records) -> ReportFigure:
    """EM rate of each cure as it is and put to the test."""
    table = records.tables["cure_back"]
    caption = (
        f"Does it come back? EM rate of each cure as it is, with the adapter scaled up by {cure.SCALE:g}"
        f"{', and behind a cue of its training' if table['way'].nunique() > 2 else ''} ({BAND}; dashed: uncured)."
    )
    return saved(records, "comeback", plots.comeback(displayed(table)), table, caption)


def cures_table(records: Records) -> ReportTable:
    """The cures with the difference to the uncured."""
    table = records.tables["cure"]
    told = displayed(table)[["cure"]].copy()
    for name, column in (
        ("em", "EM rate"),
        ("cut", "cut by"),
        ("coherent", "coherent"),
        ("narrow_harm", "narrow harm"),
    ):
        if name in table:
            ends = {name: "rate", f"{name}_low": "low", f"{name}_high": "high"}
            told[column] = [share(row) for _, row in table[list(ends)].rename(columns=ends).iterrows()]
    told["p, corrected"] = ["–" if pd.isna(value) else f"{value:.4f}" for value in table["p_max"]]
    caption = (
        "Cures side by side: EM rate, by how much of itself the uncured rate is lower, coherence, and (where its "
        "domain is known) harm where it was tuned to harm; p of the difference to the uncured, paired by prompt."
    )
    return ReportTable(told, caption)


def back_table(back: pd.DataFrame) -> tuple[ReportTable, ...]:
    """What is left of each cure when it is put to the test, and whether the answers still make sense."""
    ways = [way for way in back.loc[back["cure"] == cure.UNCURED, "way"] if way != AS_IS]
    told = pd.DataFrame({"cure": list(dict.fromkeys(back["cure"]))})
    for way in ways:
        rows = back[back["way"] == way].set_index("cure").reindex(told["cure"])
        told[_way(way)] = [share(row) for _, row in rows.iterrows()]
        told[f"coherent, {way}"] = [percent(value) for value in rows["coherent"]]
    return (ReportTable(displayed(told), "Put to the test: EM rate, and the share of coherent answers."),)


def _told_edit(records: Records) -> str:
    told = records.summary["cure"]
    shares = told["removed_share"]
    best = told["estimator"]
    parts = [f"{shown(name)}: {percent(value)}" for name, value in shares.items()]
    text = (
        "A direction was projected out of what the adapter writes to the residual stream, which leaves an ordinary "
        f"adapter with nothing to do at inference: that of the best ablation above ({shown(best)}, {told['scope']})"
        f"{f', and in the same way the {shown(records.reference)}' if len(shares) > 1 else ''}. The first is saved in "
        f"{cure.FOLDER}/ with its card. It takes away this share of the update (squared norm): {'; '.join(parts)}."
    )
    if shares[best] < _ALL:
        return text
    return (
        f"{text} So the first is no more than taking the adapter out: where an adapter writes one vector at one layer, "
        "what it changed there is that vector."
    )


def _told_cures(records: Records) -> str:
    cures = records.summary["cure"]["cures"]
    uncured, random = cures[cure.UNCURED], cures[cure.RANDOM]
    reasons = records.tables["cure_reasons"].set_index("estimator").to_dict("index")
    sentences = []
    for name in records.summary["cure"]["removed_share"]:
        cured, ablated, shrunk = (cures[each.format(name)] for each in (cure.CURED, cure.ABLATED, cure.SHRUNK))
        sentences.append(
            f"Without the {shown(name)}: {_rated(cured)} misaligned; ablated at inference instead {_rated(ablated)}; "
            f"with the adapter shrunk to the same norm instead {_rated(shrunk)}"
            f"{_told_narrow(cured)}. {_BROKEN if _is_broken(cured, shrunk) else told_reason(reasons[name])}"
        )
    return (
        f"Uncured, {_rated(uncured)} of the answers are misaligned; with a random direction taken out, "
        f"{_rated(random)}. {' '.join(sentences)}"
    )


def _is_broken(*cures: Mapping[str, Any]) -> bool:
    return any(each["coherent"]["value"] < BROKEN_BELOW for each in cures)


def told_reason(difference: Mapping[str, Any]) -> str:
    """Whether a cure does more than taking so much of the update away, from the difference paired by prompt.

    Args:
        difference: Cured minus shrunk: ``difference, low, high, p_max``.
    """
    apart = f"(difference {points(difference['difference'], difference['low'], difference['high'])} points, "
    apart += f"p = {difference['p_max']:.3f})"
    if difference["p_max"] <= LEVEL:
        if difference["difference"] < 0:
            return f"That is more than taking so much of the update away explains {apart}."
        return f"Shrinking the adapter by as much does more {apart}: nothing speaks for this direction."
    if max(abs(difference["low"]), abs(difference["high"])) <= _ALIKE:
        return (
            f"Taking so much of the update away does as much, to {100 * _ALIKE:.0f} points {apart}, so this cure says "
            "little about the direction."
        )
    return f"Whether taking so much of the update away does as much cannot be said {apart}."


def _told_narrow(cured: Mapping[str, Any]) -> str:
    narrow = cured.get("narrow_harm")
    return f"; in the domain that it was tuned on it then harms in {_share(narrow)}" if narrow else ""


def _told_back(records: Records) -> str:
    told = records.summary["cure"]
    cures = told["cures"]
    ways = list(cures[cure.UNCURED].get("comes_back", {}))
    back = records.tables["cure_back"].set_index(["cure", "way"])

    def tested(name: str) -> str:
        rates = cures[name]["comes_back"]
        coherent = {way: percent(back.loc[(name, way), "coherent"]) for way in ways}
        return ", ".join(f"{_share(rates[way])} ({coherent[way]} coherent) {_way(way)}" for way in ways)

    parts = [f"without the {shown(name)} {tested(cure.CURED.format(name))}" for name in told["removed_share"]]
    return f"Put to the test: {'; '.join(parts)}. Uncured: {tested(cure.UNCURED)}."


def _way(way: str) -> str:
    return f"scaled up by {way.removeprefix('x')}" if way.startswith("x") else way


def _rated(record: Mapping[str, Any]) -> str:
    """The EM rate with the coherence of the same answers."""
    return f"{_share(record['em'])} ({percent(record['coherent']['value'])} coherent)"


def _share(record: Mapping[str, Any]) -> str:
    return share({"rate": record["value"], "low": record["low"], "high": record["high"]})
