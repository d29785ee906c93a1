"""A sweep on many GPUs and machines with Ray (extra ``ray``).

Each worker is an actor that keeps its organism loaded. Directions and prompts go to it once, through the object store;
a task carries only numbers of rows, and sends back only what was written. The driver alone judges and writes the run
folder, so a worker can be lost at any moment: its tasks are done again by another one. A row's sample does not depend
on who draws it, so the table is that of one process.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from mechmisalign.progress import progress_bar

from .grid import Grid
from .work import Job, Sampled, Task, Workplace, make_job, make_tasks

logger = logging.getLogger(__name__)

_OBJECT_STORE_BYTES = 256 * 1024**2
"""Of a cluster that is started here: room for directions, prompts and the answers in flight."""

_IN_FLIGHT = 2
"""Tasks that a worker has been given: one that it does and one that waits, so that it never idles."""

_QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}


class WorkersLostError(ConnectionError):
    """The work could not be done: workers do not start, or die over and over."""


@dataclass(frozen=True)
class RayExecutor:
    """Workers on a Ray cluster.

    Attributes:
        address: Of a running cluster (``"auto"`` finds it on this machine); None starts one here, or uses the one that
            this process is connected to.
        workers: How many; None is as many as the cluster has room for.
        cpus_per_worker: Cores that each reserves; also its number of threads.
        gpus_per_worker: GPUs that each reserves; 0.5 puts two on one.
        rows_per_task: Answers that are sampled, sent back and stored together: what a lost worker loses.
        batch_rows: Answers in flight at once in a worker; by default as many as fit into its free memory.
        attempts: How often a task is given out before its losses are taken for its own fault.
        patience_s: How long to wait for a first worker, in seconds.
    """

    address: str | None = None
    workers: int | None = None
    cpus_per_worker: float = 1.0
    gpus_per_worker: float = 0.0
    rows_per_task: int = 512
    batch_rows: int | None = None
    attempts: int = 3
    patience_s: float = 300.0

    def run(self, grid: Grid, rows: pd.DataFrame) -> Generator[Sampled]:
        """The rows, task by task as they are finished.

        Raises:
            ImportError: If Ray is not installed.
            ValueError: If an organism is in memory, which no other process can see.
            ConnectionError: If there is no cluster at the address.
            WorkersLostError: If no worker starts, or a task is lost with its worker too often.
        """
        loaded = [source.name for source in grid.spec.organisms if source.loaded is not None]
        if loaded:
            raise ValueError(
                f"the organisms {loaded} are in this process's memory; Ray's workers load theirs by name, Hub id or "
                "folder: give the sweep one of these"
            )
        tasks = make_tasks(grid, rows, self.rows_per_task)
        if not tasks:
            return
        with _connected(self.address), progress_bar("sampling answers", len(rows), "answer") as bar:
            crew = _Crew(self, make_job(grid), tasks)
            try:
                for sampled in crew.work():
                    bar.update(len(sampled.written))
                    yield sampled
            finally:
                crew.dismiss()


class _Actor:
    """What runs in a worker's process."""

    def __init__(self, job: Job, batch_rows: int | None, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self._place = Workplace(job, batch_rows)

    def ready(self) -> None:
        """Answers once the process is there."""

    def sample(self, task: Task) -> Sampled:
        """The whole task."""
        parts = list(self._place.sample(task))
        return Sampled(pd.concat([part.written for part in parts]), parts[-1].model)


@dataclass(eq=False)
class _Worker:
    handle: Any
    organism: str | None = None
    """What it has loaded, or will have when it comes to its last task."""
    in_flight: dict[Any, Task] = field(default_factory=dict)


class _Crew:
    """The workers of one run and what each of them has to do."""

    def __init__(self, settings: RayExecutor, job: Job, tasks: Sequence[Task]) -> None:
        self._ray = _ray()
        self._settings = settings
        self._job = self._ray.put(job)
        self._pending = list(tasks)
        self._tries: Counter[int] = Counter()
        self._failed_starts = 0
        self._starting: dict[Any, _Worker] = {}
        self._ready: list[_Worker] = []
        self._wanted = min(settings.workers or self._room(), len(tasks))
        for _ in range(self._wanted):
            self._hire()

    def work(self) -> Iterator[Sampled]:
        """Give out tasks and take in answers until all are done."""
        while self._pending or any(worker.in_flight for worker in self._ready):
            self._give_out()
            doing = {ref: worker for worker in self._ready for ref in worker.in_flight}
            patience = None if doing else self._settings.patience_s
            done, _ = self._ray.wait([*doing, *self._starting], num_returns=1, timeout=patience)
            if not done:
                raise WorkersLostError(self._nobody())
            if done[0] in self._starting:
                self._welcome(done[0])
            else:
                sampled = self._taken(doing[done[0]], done[0])
                if sampled is not None:
                    yield sampled

    def dismiss(self) -> None:
        """End all workers."""
        for worker in [*self._ready, *self._starting.values()]:
            self._ray.kill(worker.handle)
        self._ready.clear()
        self._starting.clear()

    def _hire(self) -> None:
        settings = self._settings
        threads = max(1, int(settings.cpus_per_worker))
        actor = self._ray.remote(_Actor).options(
            num_cpus=settings.cpus_per_worker,
            num_gpus=settings.gpus_per_worker,
            max_restarts=0,
            scheduling_strategy="SPREAD",
            runtime_env={"env_vars": {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}},
        )
        worker = _Worker(actor.remote(self._job, settings.batch_rows, threads))
        self._starting[worker.handle.ready.remote()] = worker

    def _welcome(self, ref: Any) -> None:
        """A worker has started, or failed to."""
        worker = self._starting.pop(ref)
        try:
            self._ray.get(ref)
        except self._ray.exceptions.RayError as error:
            self._failed_starts += 1
            if self._failed_starts > self._settings.attempts * self._wanted:
                raise WorkersLostError(
                    f"{self._failed_starts} workers failed to start; the last said: {error}"
                ) from error
            self._hire()
        else:
            self._ready.append(worker)

    def _give_out(self) -> None:
        for round_ in range(1, _IN_FLIGHT + 1):  # everybody has one task before anybody has two
            for worker in self._ready:
                if self._pending and len(worker.in_flight) < round_:
                    task = self._pending.pop(self._best_for(worker))
                    worker.organism = task.organism
                    worker.in_flight[worker.handle.sample.remote(task)] = task

    def _best_for(self, worker: _Worker) -> int:
        """The place of its next task: of the organism that it has, else of one that nobody has, else the first."""
        names = [task.organism for task in self._pending]
        if worker.organism in names:
            return names.index(worker.organism)
        held = {each.organism for each in self._ready}
        return next((place for place, name in enumerate(names) if name not in held), 0)

    def _taken(self, worker: _Worker, ref: Any) -> Sampled | None:
        """A finished task's answers; None if its worker was lost, which puts its tasks back."""
        errors = self._ray.exceptions
        try:
            sampled: Sampled = self._ray.get(ref)
        except errors.RayTaskError as error:  # an error of ours: it would come again on every worker
            raise error.cause if isinstance(error.cause, Exception) else error from error
        except errors.RayError as error:
            self._lose(worker, error)
            return None
        del worker.in_flight[ref]
        return sampled

    def _lose(self, worker: _Worker, error: Exception) -> None:
        logger.warning("a worker was lost (%s); its tasks are given to others", type(error).__name__)
        self._ready.remove(worker)
        self._ray.kill(worker.handle)
        for task in worker.in_flight.values():
            key = int(task.rows.index[0])
            self._tries[key] += 1
            if self._tries[key] >= self._settings.attempts:
                raise WorkersLostError(
                    f"{len(task.rows)} answers of {task.organism!r} were lost with their worker {self._tries[key]} "
                    f"times; the last time: {error}. If memory ran out, lower batch_rows"
                ) from error
        self._pending = [*worker.in_flight.values(), *self._pending]
        self._hire()

    def _room(self) -> int:
        """How many workers the cluster can hold."""
        there, settings = self._ray.cluster_resources(), self._settings
        needs = (("CPU", settings.cpus_per_worker), ("GPU", settings.gpus_per_worker))
        return max(1, min(int(there.get(name, 0.0) / need) for name, need in needs if need > 0))

    def _nobody(self) -> str:
        settings, there = self._settings, self._ray.cluster_resources()
        have = ", ".join(f"{there.get(name, 0):g} {name}" for name in ("CPU", "GPU"))
        return (
            f"no worker started within {settings.patience_s:g} s: each asks for {settings.cpus_per_worker:g} CPU and "
            f"{settings.gpus_per_worker:g} GPU, the cluster has {have}; ask for less, or add nodes"
        )


@contextmanager
def _connected(address: str | None) -> Iterator[None]:
    """A connection to the cluster while the block runs; one that the caller had stays as it is.

    Raises:
        ConnectionError: If there is no cluster at the address.
    """
    ray = _ray()
    if ray.is_initialized():
        yield
        return
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address is None:
        ray.init("local", include_dashboard=False, object_store_memory=_OBJECT_STORE_BYTES, **quiet)
    else:
        try:
            ray.init(address, **quiet)
        except ConnectionError as error:
            raise ConnectionError(f"no Ray cluster at {address!r}: start one (`ray start --head`). {error}") from error
    try:
        yield
    finally:
        ray.shutdown()


def _ray() -> Any:
    """Ray, told to keep to itself.

    Raises:
        ImportError: If it is not installed.
    """
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    try:
        import ray
    except ImportError as error:
        raise ImportError("executor='ray' needs Ray: pip install 'mechmisalign[ray]'") from error
    return ray
