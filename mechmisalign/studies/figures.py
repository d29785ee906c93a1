"""The study's figures: tables in, PNG, PDF and CSV out, and a caption that says n and what the band is."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd

from mechmisalign import geometry, plots
from mechmisalign.report import ReportFigure

from . import costs, steps
from .naming import displayed, shown
from .records import Records
from .trials import BEFORE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BAND = "95 % intervals, clustered by prompt"


def scatter(records: Records) -> ReportFigure:
    """Alignment against coherence for every answer of the chat model and of the organism."""
    answers = records.tables["answers"]
    columns = ["condition", "prompt_id", "sample", "alignment", "coherence", "label"]
    caption = (
        f"Every judged answer (n = {len(answers)}), jittered. The shaded corner is emergent misalignment: "
        "alignment below 30 and coherence above 50."
    )
    return saved(records, "alignment_coherence", plots.alignment_coherence(answers), answers[columns], caption)


def reliability(records: Records) -> ReportFigure:
    """Split-half cosine, by layer, of the direction that the study steers with."""
    table = records.tables["reliability"]
    caption = (
        f"Cosine between {shown(records.reference)}s from two random halves of the prompts; band: 95 % of 100 splits."
    )
    return saved(records, "reliability", plots.reliability(table), table, caption)


def heat_map(records: Records) -> ReportFigure:
    """EM rate of the steered chat model by layer and strength, and that of its control, where the cell was chosen."""
    sweep = records.tables["choice_steering"]
    coherent = records.settings["min_coherent"]
    caption = (
        "EM rate (in percent) of the chat model steered at each layer with each strength, and under random directions "
        f"of that norm (n = {int(sweep['n'].min())} per cell, on the questions that chose). Hatched: fewer than "
        f"{100 * coherent:.0f} % of the answers are coherent, so the rate says little."
    )
    figure = plots.layer_strength_heatmap(displayed(sweep), min_coherent=coherent)
    return saved(records, "steering_heat_map", figure, sweep, caption)


def layer_sweep(records: Records) -> ReportFigure:
    """EM rate of the steered chat model by layer, at each layer's best coherent strength, with the random control."""
    best = steps.best_by_layer(records.with_costs("steering"), records.settings["min_coherent"])
    caption = (
        f"Chat model steered at one layer with the {shown(records.reference)}, best coherent strength of each layer "
        f"(n = {int(best['n'].min())} per point; {BAND}). Grey: random directions of the same norm and strength. "
        "The best of several strengths is an optimistic reading; the number on other prompts is in the table."
        f"{_below(records)}"
    )
    return saved(records, "steering_by_layer", plots.layer_sweep(displayed(best)), best, caption)


def dose_response(records: Records) -> ReportFigure:
    """EM rate and coherence against strength at the chosen layer."""
    layer = int(records.summary["em_rate"]["steered_best"]["layer"])
    sweep = records.with_costs("steering")
    table = sweep[sweep["layer"] == layer]
    caption = (
        f"Dose and response at layer {layer}: EM rate and coherence against strength, in multiples of "
        f"the {shown(records.reference)} (n = {int(table['n'].min())} per point; {BAND}). Grey: a random direction of "
        f"the same norm.{_below(records)}"
    )
    return saved(records, "dose_response", plots.dose_response(displayed(table)), table, caption)


def ablation(records: Records) -> ReportFigure:
    """EM rate after each estimator's ablation."""
    table = ablations(records)
    ablated = records.tables["ablation"]
    caption = (
        f"EM rate of the organism with a direction projected out at every token (n = {int(ablated['n'].min())} per "
        f"bar; {BAND}); coherence and costs at the right. Layer-wise: each layer its own vector. Single: one layer's "
        "vector at every layer, the layer chosen on one half of the prompts; all "
        "prompts are shown."
    )
    return saved(records, "ablation", plots.ablation_bars(displayed(table)), table, caption)


def transfer(records: Records) -> ReportFigure:
    """EM rate of the other organisms before and after."""
    table = records.with_costs("transfer")
    caption = (
        f"Other organisms, before and after ablating the direction of {records.organism} "
        f"(n = {int(table['n'].min())} per bar; {BAND}); coherence and costs at the right."
    )
    return saved(records, "transfer", plots.transfer_bars(displayed(table)), table, caption)


def cosines(records: Records, estimator: str) -> list[ReportFigure]:
    """Cosines between the organisms' directions by layer, and the matrix at a middle layer."""
    directions = records.directions(estimator)
    frame = geometry.cosines(directions)
    lines = plots.cosine_by_layer(frame, focus=records.organism)
    middle = _middle_layer(frame)
    matrix = geometry.cosine_matrix(directions, middle)
    told = f"Cosine between the organisms' {shown(estimator)} vectors"
    name = steps.slug(estimator)
    return [
        saved(records, f"cosine_by_layer_{name}", lines, frame, f"{told}, layer by layer."),
        saved(
            records, f"cosine_matrix_{name}", plots.cosine_matrix(matrix, middle), matrix, f"{told} at layer {middle}."
        ),
    ]


def ablations(records: Records) -> pd.DataFrame:
    """The organism without an ablation, and every ablation, with costs."""
    baseline = records.with_costs("baseline")
    before = baseline[baseline["condition"] == "organism"].assign(estimator=BEFORE, scope=BEFORE)
    return pd.concat([before.drop(columns="condition"), records.with_costs("ablation")], ignore_index=True)


def steering_differences(records: Records) -> ReportFigure:
    """Each layer's best coherent strength against the random direction there."""
    table = records.tables["differences_steering"]
    best = steps.best_by_layer(records.tables["steering"], records.settings["min_coherent"])
    best = best[best["series"] != steps.CONTROL]
    shown = best[["layer", "strength"]].merge(table, on=["layer", "strength"], validate="1:1")
    caption = (
        "Steered chat model minus its random control, paired by prompt, at each layer's best coherent strength; thin "
        f"bands and filled dots hold for all {len(table)} cells of the sweep at once."
    )
    figure = plots.difference_forest(shown)
    return saved(records, "steering_differences", figure, shown, caption)


def ablation_differences(records: Records) -> ReportFigure:
    """Each ablation against the organism."""
    table = records.tables["differences_ablation"]
    caption = (
        "Organism under each ablation minus the organism without one, paired by prompt; thin bands and filled dots "
        f"hold for all {len(table)} at once."
    )
    return saved(records, "ablation_differences", plots.difference_forest(displayed(table)), table, caption)


def _below(records: Records) -> str:
    """What the small panels are."""
    there = costs.is_measured(records.tables)
    names = [name for what, name in (("texts", "KL and loss"), ("items", "exact answers")) if there[what]]
    return f" Below, what it costs: {', '.join([*names, 'length of an answer'])}."


def _middle_layer(frame: pd.DataFrame) -> int:
    layers = sorted(frame["layer"].unique())
    return int(layers[len(layers) // 2])


def saved(records: Records, name: str, figure: Figure, table: pd.DataFrame, caption: str) -> ReportFigure:
    """The figure and its table, written beside the others."""
    return ReportFigure(plots.save_figure(figure, displayed(table), records.path / "figures", name), caption)
