"""A finished or unfinished fine-tune on disk: what was trained, its checkpoints, its log."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from mechmisalign._adapter_files import WEIGHTS_FILE
from mechmisalign._reading import read_object
from mechmisalign.adapters import Adapter
from mechmisalign.directions import Direction
from mechmisalign.dynamics.reading import LOG_FILE, RUN_FILE, VECTOR_FILE
from mechmisalign.interventions import Steer, UseAdapter

from .spec import TrainError

if TYPE_CHECKING:
    from mechmisalign.interventions import Intervention

COLUMNS = ("step", "loss", "response_loss", "kl", "grad_norm", "lr")

RESUMING = ("optimizer.pt", "scheduler.pt", "rng_state.pth", "scaler.pt", "trainer_state.json")
"""What a checkpoint needs to be trained on from."""

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


@dataclass(frozen=True, eq=False)
class TrainedRun:
    """A fine-tune on disk.

    The folder itself holds the end as PEFT (or, for a full fine-tune, transformers) writes it, so
    ``mm.load_organism(folder)`` and ``mm.Adapter.load(folder)`` read it; ``checkpoint-N`` the steps between.

    Attributes:
        folder: Where it lives.
        header: What was trained on what: method, base, data hash, seed, schedule, versions.
    """

    folder: Path
    header: Mapping[str, Any]

    @staticmethod
    def read(folder: str | Path) -> TrainedRun:
        """A run that was made by ``mm.train``.

        Raises:
            FileNotFoundError: If there is none in the folder.
        """
        folder = Path(folder)
        if not (folder / RUN_FILE).exists():
            raise FileNotFoundError(f"{folder} has no {RUN_FILE}, so it is no run of mm.train; give the folder of one")
        return TrainedRun(folder, read_object(folder / RUN_FILE))

    @property
    def method(self) -> str:
        """``"lora"``, ``"vector"`` or ``"full"``."""
        return str(self.header["spec"]["method"]["kind"])

    @property
    def is_finished(self) -> bool:
        """Whether the end was reached."""
        return bool(self.header.get("finished"))

    @cached_property
    def log(self) -> pd.DataFrame:
        """One row per step: ``step, loss, response_loss, kl, grad_norm, lr``, in nats per counted token.

        ``grad_norm`` is the norm of the whole gradient before it is clipped; ``kl`` is NaN without a penalty.
        """
        if not (self.folder / LOG_FILE).exists():
            return pd.DataFrame(columns=list(COLUMNS))
        return pd.read_csv(self.folder / LOG_FILE, float_precision="round_trip")

    @property
    def last_step(self) -> int:
        """The step of the end."""
        return int(self.header["steps"])

    @cached_property
    def steps(self) -> tuple[int, ...]:
        """Steps whose weights are kept, the last one included."""
        found = {int(path.name.rpartition("-")[2]) for path in checkpoints(self.folder)}
        return tuple(sorted(found | ({self.last_step} if self.is_finished else set())))

    def path(self, step: int | None = None) -> Path:
        """The folder of one step; of the end for None.

        Raises:
            TrainError: If that step was not kept.
        """
        if self.is_finished and step in (None, self.last_step):
            return self.folder
        chosen = self.steps[-1] if step is None and self.steps else step
        if chosen not in self.steps:
            raise TrainError(f"no checkpoint of step {chosen} in {self.folder}; kept are {list(self.steps)}")
        return self.folder / f"checkpoint-{chosen}"

    def adapter(self, step: int | None = None) -> Adapter:
        """The adapter at one step, by default at the end.

        Raises:
            TrainError: If the run trained no adapter, or that step was not kept.
        """
        if self.method != "lora":
            raise TrainError(f"{self.folder} trained method={self.method!r}, which has no adapter")
        return Adapter.load(self.path(step))

    def direction(self, step: int | None = None) -> Direction:
        """The steering vector at one step as a direction of one layer, already times alpha.

        Raises:
            TrainError: If the run trained no vector, or that step was not kept.
        """
        if self.method != "vector":
            raise TrainError(f"{self.folder} trained method={self.method!r}, which has no vector")
        return Direction.load(self.path(step) / VECTOR_FILE)

    def worn(self, step: int | None = None, scale: float = 1.0) -> tuple[Intervention, ...]:
        """The interventions that make the chat model the tuned one, as a condition of ``generate`` or ``sweep``.

        Args:
            step: Of the checkpoint; the end by default.
            scale: Factor of what was trained.
        """
        if self.method == "vector":
            direction = self.direction(step)
            return (Steer(direction, layers=direction.layers, strength=scale),)
        return (UseAdapter(self.adapter(step), scale),)


def log_frame(history: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """The Trainer's history as a table of steps."""
    rows = [
        {
            "step": entry["step"],
            "loss": entry["loss"],
            "response_loss": entry.get("response_loss", entry["loss"]),
            "kl": entry.get("kl", float("nan")),
            "grad_norm": entry.get("grad_norm", float("nan")),
            "lr": entry.get("learning_rate", float("nan")),
        }
        for entry in history
        if "loss" in entry
    ]
    return pd.DataFrame(rows, columns=list(COLUMNS))


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in the folder of a run, by step."""
    found = {int(match[1]): path for path in folder.glob("checkpoint-*") if (match := _CHECKPOINT.fullmatch(path.name))}
    return [found[step] for step in sorted(found)]


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder holds a checkpoint that can be trained on from: weights, and the optimiser's state."""
    weights = any((folder / name).exists() for name in (WEIGHTS_FILE, VECTOR_FILE, "config.json"))
    return weights and all((folder / name).exists() for name in ("trainer_state.json", "optimizer.pt", "scheduler.pt"))


def drop_resuming(checkpoint: Path) -> None:
    """Keep what was trained, and remove the optimiser's state and the rest that only resuming needs."""
    for name in RESUMING:
        (checkpoint / name).unlink(missing_ok=True)
