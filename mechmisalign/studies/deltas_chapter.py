"""The report's chapter on what a full fine-tune changed in the weights."""

from __future__ import annotations

from mechmisalign import plots
from mechmisalign.report import ReportFigure, ReportTable, Section, percent

from . import deltas
from .figures import saved
from .records import Records


def changed(records: Records) -> Section:
    """How large the difference is in each module, and how much of it is low-rank."""
    told = records.summary["deltas"]
    shares = "; ".join(
        f"rank {rank}: {percent(told[f'share_{rank}'])} (random: {percent(told[f'random_{rank}'])})"
        for rank in deltas.RANKS
    )
    noise = (
        f" In {told['near_rounding']} tensors the difference is near the rounding of their precision."
        if told["near_rounding"]
        else ""
    )
    return Section(
        title="Taken apart: the weight difference",
        lead=(
            "This organism is a full fine-tune: it has no adapter, and chapters on an adapter's sites are left out. "
            f"Its difference to the chat model, over {told['matrices']} matrices of blocks, has this share of its "
            f"squared norm in the largest singular values of each matrix: {shares}. Norms, biases and embeddings hold "
            f"{percent(told['outside'])} of the whole squared difference.{noise} mm.extract_lora makes an adapter of "
            "the low-rank part, which can be studied like any other."
        ),
        figures=(shares_figure(records),),
        tables=(by_module(records),),
    )


def shares_figure(records: Records) -> ReportFigure:
    """Share per rank by layer and module."""
    table = records.tables["weight_deltas"]
    caption = (
        "Share of ‖ΔW‖² in the largest singular values, by layer and module; dashed: a matrix of independent random "
        "numbers of that shape."
    )
    return saved(records, "weight_deltas", plots.delta_shares(table), table, caption)


def by_module(records: Records) -> ReportTable:
    """Norms and shares over the layers, a row for each module."""
    table = records.tables["weight_deltas"]
    rows = table[table["kind"] == "matrix"]
    names = ["relative_norm", "stable_rank", *(f"share_{rank}" for rank in deltas.RANKS)]
    means = rows.groupby("module", sort=False, observed=True)[names].mean().reset_index()
    for name in names:
        means[name] = [f"{value:.3g}" if name in names[:2] else percent(value) for value in means[name]]
    renamed = {"relative_norm": "‖ΔW‖ / ‖W‖", "stable_rank": "stable rank"}
    renamed |= {f"share_{rank}": f"rank {rank}" for rank in deltas.RANKS}
    return ReportTable(means.rename(columns=renamed), "Means over layers, by module.")
