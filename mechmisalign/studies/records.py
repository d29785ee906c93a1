"""A finished run as it lies on disk: what the figures and the report are drawn from, without a model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from mechmisalign.directions import Direction
from mechmisalign.store import MANIFEST, RunFolderError

from . import costs, steps

TABLES = (
    "answers",
    "baseline",
    "reliability",
    "steering",
    "steered",
    "single_search",
    "ablation",
    "ablated",
    "transfer",
    "cosines",
    *(f"costs_{name}" for name in costs.KEYS),
    "differences_steering",
    "differences_ablation",
    "differences_confirmed",
    "behaviour",
    "behaviour_rates",
    "prompt_rates",
    "threshold_curve",
    "sites",
    "contributions",
    "downstream",
    "readout",
    "scalar_tokens",
    "adapter_scaling",
    "site_effects",
)


@dataclass(frozen=True)
class Records:
    """Everything that a study left behind.

    Attributes:
        path: The run folder.
        manifest: Identity of the run and the environment it ran in.
        summary: The headline numbers.
        tables: Tidy frames by name.
    """

    path: Path
    manifest: Mapping[str, Any]
    summary: Mapping[str, Any]
    tables: Mapping[str, pd.DataFrame]

    @staticmethod
    def load(path: str | Path) -> Records:
        """Read a finished run.

        Raises:
            RunFolderError: If something is missing, with what is.
        """
        path = Path(path)
        files = [path / MANIFEST, path / "summary.json", *(path / "tables" / f"{name}.parquet" for name in TABLES)]
        missing = [str(file.relative_to(path)) for file in files if not file.exists()]
        if missing:
            raise RunFolderError(
                f"{path} is no finished study ({', '.join(missing[:3])} missing): run `mechmisalign study` on it "
                "again, it goes on where it stopped"
            )
        tables = {name: pd.read_parquet(path / "tables" / f"{name}.parquet") for name in TABLES}
        manifest, summary = (json.loads(file.read_text()) for file in files[:2])
        return Records(path, manifest, summary, tables)

    @property
    def organism(self) -> str:
        """Name of the studied organism."""
        return str(self.manifest["identity"]["organism"])

    @property
    def settings(self) -> Mapping[str, Any]:
        """The study's settings."""
        settings: Mapping[str, Any] = self.manifest["identity"]["settings"]
        return settings

    def with_costs(self, name: str) -> pd.DataFrame:
        """A table of rates with the costs of its rows: length of answers, and loss, KL and accuracy if measured."""
        return costs.beside(self.tables, name)

    def directions(self, estimator: str) -> dict[str, Direction]:
        """One estimator's direction of every organism that has one, the studied one first."""
        names = [self.organism, *self.manifest["identity"]["peers"]]
        paths = {
            name: self.path / "directions" / steps.slug(name) / f"{steps.slug(estimator)}.safetensors" for name in names
        }
        return {name: Direction.load(path) for name, path in paths.items() if path.exists()}
