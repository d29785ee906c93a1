"""A finished run as it lies on disk: what the figures and the report are drawn from, without a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from mechmisalign._reading import read_object
from mechmisalign._tables import read_parquet
from mechmisalign.directions import Direction
from mechmisalign.store import MANIFEST, RunFolderError

from . import anatomy, costs, cure, deltas, fine_tunes, steps, training, watch

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
    "splits",
    "choice_steering",
    "choice_single_search",
    "choice_ablation",
    "report_ablation",
    "chapters",
)
"""Of every study; ``chapters`` says which further ones it has, and why it has not the others."""

CHAPTERS: Mapping[str, tuple[str, ...]] = {
    "anatomy": anatomy.TABLES,
    "deltas": deltas.TABLES,
    "training": training.TABLES,
    "fine_tunes": fine_tunes.TABLES,
    "cure": cure.TABLES,
    "watch": watch.TABLES,
}
"""Tables of the chapters that a study may have to leave out."""


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
        _refuse_missing(path, [MANIFEST, "summary.json", *map(_file, TABLES)])
        left_out = read_parquet(path / _file("chapters")).set_index("chapter")["missing"]
        had = {"anatomy": ""}  # of every study that does not tell
        names = [
            name
            for chapter, own in CHAPTERS.items()
            if not left_out.get(chapter, had.get(chapter, "not known"))
            for name in own
        ]
        _refuse_missing(path, [_file(name) for name in names])
        tables = {name: read_parquet(path / _file(name)) for name in (*TABLES, *names)}
        manifest, summary = (read_object(path / name) for name in (MANIFEST, "summary.json"))
        return Records(path, manifest, summary, tables)

    @property
    def organism(self) -> str:
        """Name of the studied organism."""
        return str(self.manifest["identity"]["organism"])

    @property
    def reference(self) -> str:
        """The estimator whose direction the study steers with and sets beside the others."""
        return steps.reference(self.tables["ablation"]["estimator"])

    @property
    def settings(self) -> Mapping[str, Any]:
        """The study's settings."""
        settings: Mapping[str, Any] = self.manifest["identity"]["settings"]
        return settings

    def has(self, chapter: str) -> bool:
        """Whether the study has one of ``CHAPTERS``."""
        return CHAPTERS[chapter][0] in self.tables

    @property
    def left_out(self) -> dict[str, str]:
        """The chapters that the study has not, each with the reason."""
        told = self.tables["chapters"]
        return {row.chapter: row.missing for row in told.itertuples() if row.missing}

    def with_costs(self, name: str) -> pd.DataFrame:
        """A table of rates with the costs of its rows: length of answers, and loss, KL and accuracy if measured."""
        return costs.beside(self.tables, name)

    def directions(self, estimator: str) -> dict[str, Direction]:
        """One estimator's direction of every organism that has one, the studied one first."""
        names = [self.organism, *self.manifest["identity"]["peers"]]
        return steps.stored_directions(self.path, names, estimator)


def _file(table: str) -> str:
    return f"tables/{table}.parquet"


def _refuse_missing(path: Path, names: Sequence[str]) -> None:
    missing = [name for name in names if not (path / name).exists()]
    if missing:
        raise RunFolderError(
            f"{path} is no finished study ({', '.join(missing[:3])} missing): run `mechmisalign study` on it "
            "again, it goes on where it stopped"
        )
