"""The study's figures: tables in, PNG, PDF and CSV out, and a caption that says n and what the band is."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd

from mechmisalign import geometry, plots
from mechmisalign.report import ReportFigure

from . import steps
from .records import Records

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_BAND = "95 % intervals, resampling prompts"


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
    """Split-half cosine of the mean difference by layer."""
    table = records.tables["reliability"]
    caption = "Cosine between mean differences from two random halves of the prompts; band: 95 % of 100 splits."
    return saved(records, "reliability", plots.reliability(table), table, caption)


def layer_sweep(records: Records) -> ReportFigure:
    """EM rate of the steered chat model by layer, at each layer's best coherent strength, with the random control."""
    sweep = records.tables["steering"]
    best = best_by_layer(sweep, records.settings["min_coherent"])
    caption = (
        f"Chat model steered at one layer with the mean difference, best coherent strength of each layer "
        f"(n = {int(best['n'].min())} per point; {_BAND}). Grey: random directions of the same norm and strength. "
        "The best of several strengths is an optimistic reading; the confirmed number is in the table."
    )
    return saved(records, "steering_by_layer", plots.layer_sweep(best), best, caption)


def dose_response(records: Records) -> ReportFigure:
    """EM rate and coherence against strength at the chosen layer."""
    layer = int(records.summary["em_rate"]["steered_best"]["layer"])
    sweep = records.tables["steering"]
    table = sweep[sweep["layer"] == layer]
    caption = (
        f"Dose and response at layer {layer}: EM rate and coherence against strength, in multiples of the mean "
        "difference "
        f"(n = {int(table['n'].min())} per point; {_BAND}). Grey: a random direction of the same norm."
    )
    return saved(records, "dose_response", plots.dose_response(table), table, caption)


def ablation(records: Records) -> ReportFigure:
    """EM rate after each estimator's ablation."""
    baseline, ablated = records.tables["baseline"], records.tables["ablation"]
    before = baseline[baseline["condition"] == "organism"].assign(estimator="none", scope="none")
    table = pd.concat([before.drop(columns="condition"), ablated], ignore_index=True)
    caption = (
        f"EM rate of the organism with a direction projected out at every token (n = {int(ablated['n'].min())} per "
        "bar; "
        f"{_BAND}); coherence at the right. Layer-wise: each layer its own vector. Single: one layer's vector at every "
        "layer, the layer chosen on other samples."
    )
    return saved(records, "ablation", plots.ablation_bars(table), table, caption)


def transfer(records: Records) -> ReportFigure:
    """EM rate of the other organisms before and after."""
    table = records.tables["transfer"]
    caption = (
        f"Other organisms, before and after ablating the direction of {records.organism} "
        f"(n = {int(table['n'].min())} per bar; {_BAND})."
    )
    return saved(records, "transfer", plots.transfer_bars(table), table, caption)


def cosines(records: Records, estimator: str) -> list[ReportFigure]:
    """Cosines between the organisms' directions by layer, and the matrix at a middle layer."""
    directions = records.directions(estimator)
    frame = geometry.cosines(directions)
    lines = plots.cosine_by_layer(frame, focus=records.organism)
    middle = _middle_layer(frame)
    matrix = geometry.cosine_matrix(directions, middle)
    told = f"Cosine between the organisms' {estimator} vectors"
    name = steps.slug(estimator)
    return [
        saved(records, f"cosine_by_layer_{name}", lines, frame, f"{told}, layer by layer."),
        saved(
            records, f"cosine_matrix_{name}", plots.cosine_matrix(matrix, middle), matrix, f"{told} at layer {middle}."
        ),
    ]


def best_by_layer(sweep: pd.DataFrame, min_coherent: float) -> pd.DataFrame:
    """For each layer the strength with the highest coherent EM rate, and the control at the same strength."""
    direction = sweep[sweep["series"] == steps.MEAN_DIFFERENCE]
    ranked = direction.assign(broken=direction["coherent"] < min_coherent).sort_values(
        ["broken", "rate", "coherent"], ascending=[True, False, False], kind="stable"
    )
    best = ranked.groupby("layer").head(1).sort_values("layer").drop(columns="broken")
    control = sweep[sweep["series"] == steps.CONTROL].merge(best[["layer", "strength"]], on=["layer", "strength"])
    return pd.concat([best, control], ignore_index=True)


def _middle_layer(frame: pd.DataFrame) -> int:
    layers = sorted(frame["layer"].unique())
    return int(layers[len(layers) // 2])


def saved(records: Records, name: str, figure: Figure, table: pd.DataFrame, caption: str) -> ReportFigure:
    """The figure and its table, written beside the others."""
    return ReportFigure(plots.save_figure(figure, table, records.path / "figures", name), caption)
