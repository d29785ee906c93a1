"""The work of a sweep, apart from who does it: tasks, what they share, and sampling one of them."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from mechmisalign.generation import generate_rows
from mechmisalign.interventions import Intervention
from mechmisalign.organisms import Organism

from .grid import Grid, spelt
from .sources import OrganismSource
from .spec import On


@dataclass(frozen=True)
class Task:
    """Rows that are sampled in one call, so that their conditions share batches.

    Attributes:
        base: Name of the chat model. Tasks of one base and one ``on`` form a group.
        on: Whether the organism answers, or its chat model.
        organism: Name of the organism to load.
        seed: Seed of the sampling.
        rows: Rows of ``Grid.rows``.
    """

    base: str
    on: On
    organism: str
    seed: int
    rows: pd.DataFrame


@dataclass(frozen=True)
class Job:
    """What all tasks of a sweep share; it goes to each worker once.

    Attributes:
        organisms: Where to load each from.
        conditions: Names and interventions, in the order of the rows' numbers.
        prompts: The prompts.
        options: Further arguments of ``generate_rows``.
        root: Where relative paths begin.
    """

    organisms: Mapping[str, OrganismSource]
    conditions: Mapping[str, Sequence[Intervention]]
    prompts: pd.DataFrame
    options: Mapping[str, Any]
    root: Path


@dataclass(frozen=True)
class Sampled:
    """Some rows of a task, done.

    Attributes:
        written: What sampling wrote (``response, finished, tokens``), by the rows' keys.
        model: What answered: its name, and what of it must not change within a sweep.
    """

    written: pd.DataFrame
    model: Mapping[str, Mapping[str, Any]]


def make_job(grid: Grid) -> Job:
    """What all tasks of a grid share."""
    spec = grid.spec
    return Job(
        organisms={source.name: source for source in spec.organisms},
        conditions={one.name: one.interventions for one in grid.conditions},
        prompts=grid.prompts,
        options={"max_new_tokens": spec.max_new_tokens, "temperature": spec.temperature, "system": spec.system},
        root=spec.root.resolve(),
    )


def make_tasks(grid: Grid, rows: pd.DataFrame, rows_per_task: int | None = None) -> list[Task]:
    """Tasks for some of a grid's rows; those that need the same organism stand together.

    Args:
        grid: The grid.
        rows: Rows of ``grid.rows``.
        rows_per_task: At most so many rows in a task; None sets no limit.
    """
    groups = [(one.base, one.on, one.host) for one in grid.conditions]
    order = {name: number for number, name in enumerate(dict.fromkeys(host for _, _, host in groups))}
    tasks = []
    for group in sorted(dict.fromkeys(groups), key=lambda group: order[group[2]]):
        own = np.array([each == group for each in groups])
        for seed in grid.spec.seeds:
            mine = rows[own[rows["condition"]] & (rows["seed"] == seed).to_numpy()]
            step = rows_per_task or max(1, len(mine))
            tasks += [
                Task(group[0], group[1], group[2], seed, mine.iloc[start : start + step])
                for start in range(0, len(mine), step)
            ]
    return tasks


@dataclass
class Workplace:
    """Where tasks are sampled: keeps the organism of the last task in memory.

    Organisms with live weights share a base that is loaded once; each wears its own adapter for the time of a task.
    """

    job: Job
    batch_rows: int | None = None
    _at_hand: dict[Hashable, Organism] = field(default_factory=dict)

    def sample(self, task: Task) -> Iterator[Sampled]:
        """The task's rows, batch by batch.

        Raises:
            ValueError: If an intervention does not fit the organism.
        """
        used = np.unique(task.rows["condition"])
        names = np.array(list(self.job.conditions), dtype=object)
        rows = spelt(task.rows, names, self.job.prompts)
        conditions = {names[number]: self.job.conditions[names[number]] for number in used}
        with self._answering(task) as organism:
            model = {task.base if task.on == "chat" else task.organism: _mark(organism)}
            parts = generate_rows(
                organism, rows, conditions, seed=task.seed, batch_rows=self.batch_rows, **self.job.options
            )
            for part in parts:
                yield Sampled(part[[column for column in part.columns if column not in rows.columns]], model)

    @contextlib.contextmanager
    def _answering(self, task: Task) -> Iterator[Organism]:
        """Who is asked; a live organism wears its adapter even if it was loaded with it: order means nothing."""
        source = self.job.organisms[task.organism]
        if task.on == "chat":
            with self._loaded(source, task.base).as_base() as chat:
                yield chat
        elif source.weights == "live" and source.loaded is None:
            host = self._loaded(source, task.base)
            adapter = replace(source.read(self.job.root), base=host.base.name)
            with host.with_adapter(adapter) as organism:
                yield organism
        else:
            yield self._loaded(source, task.base)

    def _loaded(self, source: OrganismSource, base: str) -> Organism:
        shared = source.weights == "live" and source.loaded is None
        key = (base, source.dtype, source.device) if shared else source.name
        if key not in self._at_hand:
            self._at_hand.clear()  # before the next one is loaded: there may be no room for two
            gc.collect()
            self._at_hand[key] = source.load(self.job.root)
        return self._at_hand[key]


def _mark(organism: Organism) -> dict[str, Any]:
    """What decides a model's answers besides what a specification says."""
    told = organism.provenance
    return {key: told[key] for key in ("base_fingerprint", "adapter_digest", "dtype", "template_hash")}
