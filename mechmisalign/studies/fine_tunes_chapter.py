"""The report's chapter on many fine-tunes: how their updates and their directions lie to each other."""

from __future__ import annotations

import pandas as pd

from mechmisalign import plots
from mechmisalign.report import ReportFigure, ReportTable, Section, percent

from . import fine_tunes
from .figures import saved
from .records import Records

_LEVEL = 0.05
_DRAWN_PEERS = 8
"""More fine-tunes than this make too many pairs to draw the organism's own among them."""


def compared(records: Records) -> Section:
    """Updates and directions against chance: the same, overlapping, one or several?"""
    figures = [cosines_figure(records), overlaps_figure(records), *spectrum_figures(records)]
    return Section(
        title="Many fine-tunes: one direction, or several?",
        lead=f"{_told_updates(records)}\n\n{_told_directions(records)}",
        figures=tuple(figure for figure in figures if figure is not None),
        tables=tuple(table for table in (dimensions_table(records),) if table is not None),
    )


def cosines_figure(records: Records) -> ReportFigure:
    """Cosines of whole updates, pair by pair."""
    table = records.tables["update_cosines"]
    caption = (
        "Cosine between whole updates (sites that one of them lacks count as zero); white: within what updates with "
        "the same singular values that are turned at random give."
    )
    return saved(records, "update_cosines", plots.pair_matrix(table, "whole", label="cosine"), table, caption)


def overlaps_figure(records: Records) -> ReportFigure | None:
    """Overlap of what is written and read, of the organism with each of the others."""
    table = records.tables["update_overlaps"]
    own = table[(table["first"] == records.organism) | (table["second"] == records.organism)].head(
        2 * fine_tunes.MOST_SITES * _DRAWN_PEERS
    )
    if own.empty:
        return None
    caption = (
        "How much of the smaller space of what updates write (columns of ΔW) and read (rows) lies in the other's, at "
        "the organism's largest sites; grey: random spaces of that size."
    )
    return saved(records, "update_overlaps", plots.overlap_against_null(own), table, caption)


def spectrum_figures(records: Records) -> list[ReportFigure]:
    """Shares of the axes at one layer, and the effective rank over layers; none without a second direction."""
    values, summary = records.tables["direction_spectrum"], records.tables["direction_dimensions"]
    if summary.empty:
        return []
    layer = _layer(records)
    chosen = values[values["layer"] == layer]
    members = int(summary["members"].iloc[0])
    axes = (
        f"Shares of the principal axes of {members} organisms' matched-pool mean differences (each at length 1) at "
        f"layer {layer}; "
        "blue: what one and the same direction would show, each with its own estimation noise "
        f"({fine_tunes.REPLICATES} resamples of prompts)."
    )
    ranks = (
        f"Effective number of directions among {members} organisms', layer by layer: 1 is one direction, "
        f"{members} are as many as organisms."
    )
    return [
        saved(records, "direction_spectrum", plots.spectrum(chosen), values, axes),
        saved(records, "direction_rank", plots.effective_rank(summary), summary, ranks),
    ]


def dimensions_table(records: Records) -> ReportTable | None:
    """How many dimensions are enough at each layer; None without a second direction."""
    summary = records.tables["direction_dimensions"]
    if summary.empty:
        return None
    told = summary[["layer"]].astype(int).copy()
    told["first axis"] = [percent(value) for value in summary["first_share"]]
    for column, name in (("effective_rank", "effective number"), ("noise", "of one direction")):
        told[name] = [
            f"{row[column]:.3f}" if column in row else f"{row[f'{column}_low']:.3f} to {row[f'{column}_high']:.3f}"
            for _, row in summary.iterrows()
        ]
    if "model_first_share" in summary:
        told["model differences"] = [percent(value) for value in summary["model_first_share"]]
    told["p, one"] = [f"{value:.3f}" for value in summary["p_one"]]
    told["enough"] = summary["dimensions"].astype(int)
    caption = (
        "The matched-pool mean differences layer by layer: share of the first axis, effective number of directions "
        "beside what one "
        "direction with noise gives; first axis of the model differences; p that one direction is enough for the mean "
        "differences, and the fewest that are."
    )
    return ReportTable(told, caption)


def _told_updates(records: Records) -> str:
    table = records.tables["update_cosines"]
    control = fine_tunes.HARMLESS
    own = table[(table["first"] == records.organism) | (table["second"] == records.organism)]
    peers = own[(own["first"] != control) & (own["second"] != control)]
    reach = max(float(peers["whole_high"].max()), -float(peers["whole_low"].min()))
    told = (
        f"The update of {records.organism} has a cosine of {_span(peers['whole'])} with those of "
        f"{len(peers)} other fine-tune{'s' * (len(peers) > 1)} (random updates: up to {reach:.2f} either way)"
    )
    harmless = own[(own["first"] == control) | (own["second"] == control)]
    if len(harmless):
        told += f", and {_signed(harmless['whole'].iloc[0])} with one on harmless answers, the control"
    first = records.tables["update_spectrum"].set_index("k").loc[1]
    told += (
        f". Together they have a first axis that holds {percent(first['share'])} of them, the control left out (random "
        f"updates: up to {percent(first['random_high'])})"
    )
    return (
        f"{told}. Fine-tunes that began with the same random A share it whatever they learned, so what they read can "
        "overlap for that reason alone; B begins at zero."
    )


def _told_directions(records: Records) -> str:
    summary = records.tables["direction_dimensions"]
    if summary.empty:
        return "Fewer than two organisms have a matched-pool mean difference, so directions could not be compared."
    row = summary.set_index("layer").loc[_layer(records)]
    told = (
        f"At layer {_layer(records)} the first axis of {int(row['members'])} matched-pool mean differences holds "
        f"{percent(row['first_share'])} of them. The effective number of directions is {row['effective_rank']:.3f}; "
        f"random directions would give {row['random_low']:.3f} to {row['random_high']:.3f}, one and the same direction "
        f"with estimation noise {row['noise_low']:.3f} to {row['noise_high']:.3f}"
    )
    p, shared = (
        float(row["p_one_everywhere"]),
        "share most of one direction, but they " if row["first_share"] > 0.5 else "",
    )
    found = (
        f"That there is one direction is not refuted (p = {p:.2f}, all layers at once)."
        if p > _LEVEL
        else f"So they {shared}are not one: estimation noise does not explain what is left (p = {p:.2f}, all layers at "
        "once)."
    )
    return f"{told}. {found}{_told_before(records)}"


def _told_before(records: Records) -> str:
    """What the directions share where the organism's own adapter has not acted yet: what the answers say."""
    summary, first = records.tables["direction_dimensions"], int(records.tables["sites"]["layer"].min())
    before = summary[summary["layer"] < first]
    if before.empty:
        return ""
    row = before.iloc[-1]
    return (
        f" Already at layer {int(row['layer'])}, before this organism's adapter acts, the first axis holds "
        f"{percent(row['first_share'])}: answers of one kind have words in common, and that alone makes mean "
        "differences alike. The model differences compare two models over the same answers, so words cancel: their "
        "column in the table is the better guide."
    )


def _layer(records: Records) -> int:
    """Where steering worked best, but not before the adapter acts; or the compared layer that is nearest."""
    first = int(records.tables["sites"]["layer"].min())
    wanted = max(int(records.summary["em_rate"]["steered_best"]["layer"]), first)
    layers = records.tables["direction_dimensions"]["layer"].astype(int)
    return int(min(layers, key=lambda layer: abs(layer - wanted)))


def _span(values: pd.Series) -> str:
    low, high = float(values.min()), float(values.max())
    return _signed(low) if f"{low:.2f}" == f"{high:.2f}" else f"{_signed(low)} to {_signed(high)}"


def _signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", "−")
