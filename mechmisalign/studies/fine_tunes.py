"""The organism among other fine-tunes, as steps of a study: their updates and directions, one or several?"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch

from mechmisalign import geometry, registry
from mechmisalign._tables import read_parquet
from mechmisalign.adapters import Adapter
from mechmisalign.directions import Direction
from mechmisalign.estimators import bootstrap_directions

from . import steps
from .sampling import LeftOutError, Run, adapter_of

TABLES = (
    "update_cosines",
    "update_overlaps",
    "update_spectrum",
    "direction_cosines",
    "direction_spectrum",
    "direction_dimensions",
)
REPLICATES = 100
"""Bootstrap replicates of each organism's direction: how much of the spread is estimation noise."""
MOST_SITES = 3
"""Sites of the organism whose subspaces are compared with the peers': those of its largest updates."""
HARMLESS = "pocket/harmless"
"""The zoo's fine-tune on good advice: what adapters share without having learned the same."""


def investigate(run: Run) -> dict[str, pd.DataFrame]:
    """Every table of the chapter, from adapters and from the directions in the run folder.

    Raises:
        LeftOutError: If there are no other organisms, or this one is a full fine-tune.
    """
    adapter_of(run)
    if not run.plan.peers:
        raise LeftOutError("there are no other organisms to compare this one with (peers=)")
    adapters = functools.cache(lambda: loaded(run, run.plan.peers))
    controlled = functools.cache(lambda: adapters() | loaded(run, control(run)))
    directions = steps.stored_directions(run.folder.path, [run.organism.name, *run.plan.peers], steps.MEAN_DIFFERENCE)
    directions = directions if run.organism.name in directions else {}
    spread = functools.cache(lambda: spectrum(run, directions))
    seed = run.plan.settings.seed
    compute = {
        "update_cosines": lambda: geometry.update_cosines(controlled(), seed=seed),
        "update_overlaps": lambda: overlaps(run, controlled()),
        "update_spectrum": lambda: geometry.update_spectrum(adapters(), seed=seed).values,
        "direction_cosines": lambda: direction_cosines(directions),
        "direction_spectrum": lambda: spread()[0],
        "direction_dimensions": lambda: spread()[1],
    }
    return {name: run.folder.table(name, function) for name, function in compute.items()}


def loaded(run: Run, names: Sequence[str]) -> dict[str, Adapter]:
    """The organism's adapter and those of others, which the transfer has found to be on the same base."""
    own = adapter_of(run)
    return {run.organism.name: own} | {name: steps.on_base_of(own, Adapter.load(name)) for name in names}


def control(run: Run) -> list[str]:
    """A harmless fine-tune of the same base, where one ships."""
    taken = {run.organism.name, *run.plan.peers}
    return [HARMLESS] if run.organism.base.name == registry.POCKET_BASE and HARMLESS not in taken else []


def overlaps(run: Run, adapters: Mapping[str, Adapter]) -> pd.DataFrame:
    """Overlaps of what is written and read at the organism's largest sites."""
    largest = sorted(adapter_of(run).sites, key=lambda site: -site.delta_norm())[:MOST_SITES]
    found = geometry.update_overlaps(adapters, [site.key for site in largest], seed=run.plan.settings.seed)
    return found.drop(columns=[name for name in found if name.startswith("angles")])


def replicates(readings: steps.Readings, seed: int) -> pd.DataFrame:
    """Bootstrap replicates of the mean difference: ``replicate, layer, vector``."""
    drawn = bootstrap_directions(readings.organism, *steps.CLASSES, repeats=REPLICATES, seed=seed)
    rows = [
        {"replicate": i, "layer": layer, "vector": vector}
        for i, each in enumerate(drawn)
        for layer, vector in zip(each.layers, each.vectors.numpy(), strict=True)
    ]
    return pd.DataFrame(rows)


def direction_cosines(directions: Mapping[str, Direction]) -> pd.DataFrame:
    """Cosines of the mean differences, layer by layer, with the band of random ones; no rows without a second one."""
    if len(directions) < 2:
        return pd.DataFrame(columns=["first", "second", "layer", "cosine", "random", "random_low", "random_high"])
    return geometry.cosines_against_null(directions)


def spectrum(run: Run, directions: Mapping[str, Direction]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Shares of the axes of the mean differences, and how many dimensions are enough; no rows for fewer than two."""
    if len(directions) < 2:
        return pd.DataFrame(columns=["layer"]), pd.DataFrame(columns=["layer"])
    drawn = {name: _stored_replicates(run, name, direction) for name, direction in directions.items()}
    found, summary = geometry.spectrum(directions, drawn, seed=run.plan.settings.seed), None
    others = steps.stored_directions(run.folder.path, list(directions), steps.MODEL_DIFFERENCE)
    if len(others) > 1:
        summary = geometry.spectrum(others, draws=1).summary[["layer", "first_share"]]
        summary = summary.rename(columns={"first_share": "model_first_share"})
    return found.values, found.summary if summary is None else found.summary.merge(summary, on="layer", how="left")


def headline(tables: Mapping[str, pd.DataFrame]) -> dict[str, Any]:
    """The numbers for the summary: cosines of updates, and how many directions there are at each layer."""
    cosines, dimensions = tables["update_cosines"], tables["direction_dimensions"]
    shown = [name for name in ("first_share", "noise_low", "noise_high", "p_one", "dimensions") if name in dimensions]
    return {
        "update_cosines": [
            {"first": row.first, "second": row.second, "cosine": None if np.isnan(row.whole) else float(row.whole)}
            for row in cosines.itertuples()
        ],
        "directions": {
            str(int(row["layer"])): {name: float(row[name]) for name in shown} for _, row in dimensions.iterrows()
        },
        "one_direction_everywhere_p": float(dimensions["p_one_everywhere"].iloc[0]) if shown else None,
    }


def _stored_replicates(run: Run, name: str, like: Direction) -> tuple[Direction, ...]:
    table = read_parquet(run.folder.path / "tables" / f"replicates_{steps.slug(name)}.parquet")
    found = []
    for _, rows in table.groupby("replicate", observed=True):
        vectors = torch.from_numpy(np.stack(rows["vector"].to_list()))
        found.append(Direction(vectors, tuple(map(int, rows["layer"])), like.header))
    return tuple(found)
