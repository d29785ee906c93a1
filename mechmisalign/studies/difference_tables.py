"""Differences in writing: tables, and what survives the number of comparisons."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from mechmisalign.report import BROKEN_BELOW, ReportTable

from . import steps
from .differences import LEVEL, standing
from .naming import displayed, shown


def differences_table(compared: pd.DataFrame, by: Sequence[str], caption: str) -> ReportTable:
    """Differences of EM rates in percentage points, with p-values alone and corrected."""
    told = displayed(compared)[list(by)].copy()
    told["difference (points)"] = [points(row["difference"], row["low"], row["high"]) for _, row in compared.iterrows()]
    told["p"] = [f"{value:.4f}" for value in compared["p"]]
    told["p, corrected"] = [f"{value:.4f}" for value in compared["p_max"]]
    return ReportTable(told, caption)


def told_steering(compared: pd.DataFrame) -> str:
    """Which cells of the sweep stand against their random control."""
    stands = standing(compared)
    more, fewer = stands[stands["difference"] > 0], stands[stands["difference"] < 0]
    told = (
        f"Each cell was compared with the random direction at its layer and strength: {len(more)} of {len(compared)} "
        f"bring more misaligned answers after correction for all of them (p ≤ {LEVEL:g})"
    )
    told += f", at {_layers(more['layer'])}" if len(more) else ""
    return f"{told}; {len(fewer)} fewer." if len(fewer) else f"{told}."


def told_ablation(compared: pd.DataFrame, rates: pd.DataFrame | None = None) -> str:
    """Which ablations stand against the organism, and whether random ones do.

    Args:
        compared: Each ablation against the organism.
        rates: Rates of the same ablations: those that break the answers are named.
    """
    random = compared["estimator"] == steps.CONTROL
    less, random_less = (_names(frame) for frame in (_lower(compared[~random]), _lower(compared[random])))
    most = (~random).sum()
    told = f"Of {most} ablations {len(less)} leave fewer misaligned answers than the organism gives, after correction"
    if 0 < most - len(less) <= 4:
        lost = [name for name in _names(compared[~random]) if name not in less]
        told += f" (all but {'; '.join(lost)})"
    told += f"; of random directions {'these do too: ' + '; '.join(random_less) if random_less else 'none'}."
    broken = [] if rates is None else _names(rates[rates["coherent"] < BROKEN_BELOW])
    return f"{told} Fewer than half of the answers are coherent under {'; '.join(broken)}." if broken else told


def _lower(compared: pd.DataFrame) -> pd.DataFrame:
    stands = standing(compared)
    return stands[stands["difference"] < 0]


def _names(compared: pd.DataFrame) -> list[str]:
    return [f"{shown(row.estimator)}, {row.scope}" for row in compared.itertuples()]


def _layers(values: pd.Series) -> str:
    """Layers in writing: "layer 3", "layers 0 to 4, 6, 7"."""
    layers = pd.Series(sorted(values.unique()))
    runs = [list(run) for _, run in layers.groupby((layers.diff() != 1).cumsum(), observed=True)]
    told = ", ".join(", ".join(map(str, run)) if len(run) < 3 else f"{run[0]} to {run[-1]}" for run in runs)
    return f"layer{'s' * (len(layers) > 1)} {told}"


def points(*values: float) -> str:
    """Shares in percentage points, "−12.5 [−20.0, −5.0]"."""
    middle, low, high = (f"{100 * value:+.1f}".replace("-", "−") for value in values)
    return f"{middle} [{low}, {high}]"
