"""A full fine-tune's weight difference to its chat model, as a step of a study."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from mechmisalign import models
from mechmisalign.deltas import weight_deltas

from .sampling import LeftOutError, Run

TABLES = ("weight_deltas",)
RANKS = (1, 8, 64)


def investigate(run: Run) -> dict[str, pd.DataFrame]:
    """The table of the chapter.

    Raises:
        LeftOutError: If the fine-tune or the chat model lives only in memory.
    """
    full, base = run.organism.full, run.organism.base
    if full is None or not full.location or not base.location:
        raise LeftOutError("the fine-tune or its chat model lives only in memory, so there are no files to compare")
    tuned, place, device = full.location, base.location, models.device_of(run.organism.model)
    return {
        "weight_deltas": run.folder.table("weight_deltas", lambda: weight_deltas(tuned, place, RANKS, device=device))
    }


def totals(table: pd.DataFrame) -> dict[str, float]:
    """Over all matrices of blocks: the share of ``‖ΔW‖²`` that each rank holds, and what it would of random ones."""
    rows = table[table["kind"] == "matrix"]
    power = rows["norm"] ** 2
    columns = [f"{name}_{rank}" for rank in RANKS for name in ("share", "random")]
    return {name: float((rows[name] * power).sum() / power.sum()) for name in columns}


def headline(tables: Mapping[str, pd.DataFrame]) -> dict[str, Any]:
    """The numbers for the summary."""
    table = tables["weight_deltas"]
    inside = table["kind"] == "matrix"
    power = table["norm"] ** 2
    return totals(table) | {
        "matrices": int(inside.sum()),
        "outside": float(power[~inside].sum() / power.sum()),
        "near_rounding": int(table["near_rounding"].sum()),
    }
