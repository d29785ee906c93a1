"""Who does the work of a sweep: this process, or anything that turns tasks into rows."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import pandas as pd

from .grid import Grid
from .work import Sampled, Workplace, make_job, make_tasks


@runtime_checkable
class Executor(Protocol):
    """Samples rows of a grid, in any order and in pieces of any size."""

    def run(self, grid: Grid, rows: pd.DataFrame) -> Generator[Sampled]:
        """Each of the given rows of ``grid.rows`` once; cleans up when it is closed before the end."""


@dataclass(frozen=True)
class LocalExecutor:
    """One organism after the other in this process; all its conditions share batches.

    Attributes:
        batch_rows: Answers in flight at once; by default as many as fit into the free memory.
    """

    batch_rows: int | None = None

    def run(self, grid: Grid, rows: pd.DataFrame) -> Generator[Sampled]:
        """The rows, batch by batch."""
        place = Workplace(make_job(grid), self.batch_rows)
        for task in make_tasks(grid, rows):
            yield from place.sample(task)


def named_executor(executor: str | Executor) -> Executor:
    """An executor by name, or as it is.

    Raises:
        ValueError: On another name.
    """
    if executor == "local":
        return LocalExecutor()
    if executor == "ray":
        from .ray_executor import RayExecutor

        return RayExecutor()
    if not isinstance(executor, Executor):
        raise ValueError(
            f"executor must be 'local', 'ray' or something with a method run(grid, rows); got {executor!r}"
        )
    return executor
