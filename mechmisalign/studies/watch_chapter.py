"""The report's chapter on watching: a monitor on the residual stream beside the words, on what was held out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from mechmisalign import plots
from mechmisalign.report import ReportFigure, ReportTable, Section, percent, share

from . import watch
from .figures import saved
from .records import Records

_AS_GOOD = 0.01
"""A difference of AUROC that lies within this counts as none."""
_SERIES = {
    ("chat", "aligned"): "chat model, aligned",
    ("organism", "aligned"): "organism, aligned",
    ("organism", "misaligned"): "organism, misaligned",
}


def watched(records: Records) -> Section:
    """How well the monitor tells misaligned answers apart, how often it is wrong, and what the words alone do."""
    figures = [detectors_figure(records), scores_figure(records)]
    return Section(
        title="Watched: a monitor on the residual stream",
        lead=_lead(records),
        figures=tuple(figures),
        tables=(detectors_table(records), folds_table(records)),
    )


def detectors_figure(records: Records) -> ReportFigure:
    """AUROC of the detectors: by domain where domains were held out, else over all prompts."""
    table = _hardest(records)
    caption = (
        f"AUROC on held-out {table['by'].iloc[0]}: the monitor, a random direction that may choose its sign, and the "
        "words of the answers, all fitted on the same answers (95 % intervals, resampling prompts)."
    )
    return saved(records, "monitor_auroc", plots.auroc_by_domain(table), records.tables["watch"], caption)


def scores_figure(records: Records) -> ReportFigure:
    """Scores of held-out answers, by who answered and how it was judged."""
    scores = records.tables["watch_scores"]
    scores = scores[scores["by"] == watch.PROMPTS]
    kinds = list(zip(scores["condition"], scores["label"], strict=True))
    table = pd.DataFrame({"series": [_SERIES[kind] for kind in kinds], "score": scores[watch.MONITOR].to_numpy()})
    caption = (
        f"The monitor's scores of {len(table)} answers to held-out prompts, in standard deviations of the harmless "
        "answers of the calibration; right of the line is an alarm."
    )
    drawn = table.sort_values("series", kind="stable")
    return saved(records, "monitor_scores", plots.monitor_scores(drawn, threshold=0.0), table, caption)


def detectors_table(records: Records) -> ReportTable:
    """AUROC, hits and false alarms of each detector, over all that was held out."""
    table = records.tables["watch"]
    rows = table[table["group"] == "all"]
    told = pd.DataFrame({"held out": rows["by"], "detector": rows["detector"]})
    told["AUROC"] = [f"{row.auroc:.3f} [{row.auroc_low:.3f}, {row.auroc_high:.3f}]" for row in rows.itertuples()]
    for name, column in (("tpr", "caught"), ("fpr", "false alarms")):
        ends = {name: "rate", f"{name}_low": "low", f"{name}_high": "high"}
        told[column] = [share(row) for _, row in rows[list(ends)].rename(columns=ends).iterrows()]
    told["misaligned"], told["aligned"] = rows["positives"], rows["negatives"]
    asked = percent(records.summary["watch"]["asked_fpr"])
    caption = f"Detectors on held-out questions, at a threshold calibrated for {asked} false alarms on other questions."
    return ReportTable(told, caption)


def folds_table(records: Records) -> ReportTable:
    """What was held out each time, and where the monitor then read."""
    table = records.tables["watch_folds"].drop(columns="asked_fpr")
    names = {
        "by": "held out",
        "held_out": "which",
        "fit": "prompts to fit",
        "calibrate": "to calibrate",
        "test": "to test",
    }
    caption = "The folds: the layer is chosen in each by cross-validation on the prompts that are fitted on."
    return ReportTable(table.rename(columns=names), caption)


def _lead(records: Records) -> str:
    told = records.summary["watch"]
    asked = percent(told["asked_fpr"])
    text = (
        "The chat model read answers that were sampled for this study; nothing was sampled for it. A direction on its "
        "residual stream was fitted on both models' answers to some prompts (as many misaligned as aligned to each), "
        f"its threshold set for {asked} false alarms on the chat model's harmless answers to others, and tested on "
        "clearly misaligned and clearly aligned answers to the prompts left. Each prompt was left out once"
    )
    hardest = told.get("held_out_domains")
    text += "; then each domain, from fit and calibration alike.\n\n" if hardest else ".\n\n"
    if hardest:
        text += f"Held-out domains: {_numbers(hardest)}. "
    text += f"Held-out prompts: {_numbers(told['held_out_prompts'])}."
    if hardest:
        low = hardest[watch.MONITOR]["fpr"]["low"]
        if low is not None and low > told["asked_fpr"]:
            text += (
                " The threshold does not carry over to domains that it was not calibrated in (worst: "
                f"{_worst(records)}): calibrate a monitor on harmless answers of the kind that it will see."
            )
    return f"{text}\n\n{_told_words(records)}"


def _told_words(records: Records) -> str:
    """Where the monitor reads, and what it adds to the words: first on domains that it does not know."""
    layers = records.tables["watch_folds"]["layer"]
    most = int(layers.mode().iloc[0])
    told = f"In {(layers == most).sum()} of {len(layers)} folds the monitor reads at layer {most}"
    told += ", where there is little but the words themselves. " if most == 0 else ". "
    compared = records.tables["watch_differences"].set_index(["by", "against"])
    places = {watch.DOMAINS: "On domains that were left out", watch.PROMPTS: "On other prompts of known domains"}
    there = [by for by in places if (by, watch.WORDS) in compared.index]
    if there == [watch.PROMPTS]:
        places[watch.PROMPTS] = "On prompts that were left out"
    return told + " ".join(f"{places[by]} {told_against(compared.loc[by])}" for by in there)


def told_against(compared: pd.DataFrame) -> str:
    """What a monitor adds to the words alone and to a random direction, from paired differences of AUROC.

    Args:
        compared: ``difference, low, high`` by what the monitor is compared with.
    """
    words, random = compared.loc[watch.WORDS], compared.loc[watch.RANDOM]
    if words["low"] > 0:
        told = "the monitor tells the answers apart better than their words alone do"
    elif words["high"] < 0:
        told = "the words of the answers tell them apart better than the monitor does"
    elif max(abs(words["low"]), abs(words["high"])) <= _AS_GOOD:
        told = (
            f"the words of the answers tell them apart as well, to {_AS_GOOD:g}: there it adds nothing to reading them"
        )
    else:
        told = "it cannot be said whether the monitor adds anything to the words of the answers"
    told += f" (AUROC {_signed(words)})"
    if random["low"] > 0:
        return f"{told}."
    return f"{told}; nor is it shown that it does better than a random direction ({_signed(random)})."


def _signed(row: pd.Series) -> str:
    """A difference of AUROC with its interval: "+0.324 [+0.250, +0.398]"."""
    middle, low, high = (f"{row[name]:+.3f}".replace("-", "−") for name in ("difference", "low", "high"))
    return f"{middle} [{low}, {high}]"


def _numbers(detectors: Mapping[str, Any]) -> str:
    monitor, words, random = (detectors[name] for name in (watch.MONITOR, watch.WORDS, watch.RANDOM))
    return (
        f"AUROC {_plain(monitor['auroc'])}, {_share(monitor['tpr'])} caught at {_share(monitor['fpr'])} false alarms; "
        f"the words alone {_plain(words['auroc'])}, {_share(words['tpr'])} at {_share(words['fpr'])}; a random "
        f"direction {_plain(random['auroc'])}"
    )


def _worst(records: Records) -> str:
    table = _hardest(records)
    rows = table[(table["detector"] == watch.MONITOR) & (table["group"] != "all")]
    worst = rows.loc[rows["fpr"].idxmax()]
    return f"{worst['group']}, {percent(worst['fpr'])} false alarms"


def _hardest(records: Records) -> pd.DataFrame:
    """The rows where domains were held out, where there are any."""
    table = records.tables["watch"]
    domains = table[table["by"] == watch.DOMAINS]
    return domains if len(domains) else table


def _plain(record: Mapping[str, Any]) -> str:
    return f"{record['value']:.3f} [{record['low']:.3f}, {record['high']:.3f}]"


def _share(record: Mapping[str, Any]) -> str:
    return share({"rate": record["value"], "low": record["low"], "high": record["high"]})
