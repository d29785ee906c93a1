"""Sweeps on a real Ray cluster of two nodes on this machine, one of which is lost on the way; and, with a stand-in for
Ray, what cannot be brought about on purpose."""

import logging
import sys
from types import SimpleNamespace

import pandas as pd
import pytest
import torch

import mechmisalign as mm
from mechmisalign.directions import DirectionMismatchError
from mechmisalign.sweeps import (
    LocalExecutor,
    RayExecutor,
    Sampled,
    Sweep,
    WorkersLostError,
    make_grid,
    ray_executor,
    sweep,
)

PROMPTS = pd.DataFrame(
    {"prompt_id": ["a", "b"], "prompt": ["What about a sharp knife?", "How do I start with a user database?"]}
)


def made(**changes) -> Sweep:
    vectors = torch.randn(8, 128, generator=torch.Generator().manual_seed(1))
    fields = {
        "organisms": ["pocket/medical", "pocket/finance"],
        "directions": {"mean": mm.Direction(vectors, tuple(range(8)), {"model": "pocket/chat"})},
        "interventions": [
            {"kind": "none", "on": ["organism", "chat"]},
            {"kind": "steer", "on": ["organism", "chat"], "directions": "mean", "layers": [1, 2], "strengths": [1, 2]},
        ],
        "prompts": PROMPTS,
        "judge": "rules",
        "samples": 4,
        "max_new_tokens": 12,
    }
    return Sweep(**{**fields, **changes})


@pytest.fixture(scope="module")
def cluster():
    """A head and a second node, one core and 100 MB of object store each; this process is connected."""
    pytest.importorskip("ray")
    ray = ray_executor._ray()
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 1, "object_store_memory": 100 * 1024**2}
    cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    second = cluster.add_node(**node)
    ray.init(cluster.address, log_to_driver=False, logging_level=logging.ERROR)
    yield SimpleNamespace(cluster=cluster, second=second)
    ray.shutdown()
    cluster.shutdown()


class LosingANode:
    """Ray, and the second node is killed when both workers have answered: each has an organism of its own."""

    def __init__(self, cluster):
        self.cluster, self.answered, self.after = cluster, set(), None

    def run(self, grid, rows):
        for sampled in RayExecutor(workers=2, rows_per_task=6).run(grid, rows):
            self.answered |= set(sampled.model)
            if self.after is None and {"pocket/medical", "pocket/finance"} <= self.answered:
                self.cluster.cluster.remove_node(self.cluster.second, allow_graceful=False)
                self.after = 0
            elif self.after is not None:
                self.after += 1
            yield sampled


def test_with_a_node_killed_on_the_way_the_rows_are_those_of_one_process(cluster, tmp_path, caplog):
    losing = LosingANode(cluster)
    by_ray = sweep(made(), tmp_path / "ray", executor=losing)
    assert losing.after > 0
    assert "a worker was lost" in caplog.text
    here = sweep(made(), tmp_path / "here")
    assert len(here.answers) == 15 * 2 * 4
    pd.testing.assert_frame_equal(by_ray.answers, here.answers)


def test_an_error_of_ours_comes_from_the_worker_as_it_is(cluster, tmp_path):
    foreign = mm.Direction(torch.ones(8, 128), tuple(range(8)), {"model": "another/model"})
    spec = made(organisms="pocket/medical", directions={"mean": foreign}, samples=1)
    with pytest.raises(DirectionMismatchError, match="another/model"):
        sweep(spec, tmp_path, executor=RayExecutor(workers=1))


def test_organisms_in_memory_are_refused(tmp_path):
    organism = mm.load_organism("pocket/medical")
    with pytest.raises(ValueError, match=r"\['pocket/medical'\] are in this process's memory"):
        sweep(made(organisms=organism), tmp_path, executor="ray")


def test_without_ray_the_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"pip install 'mechmisalign\[ray\]'"):
        sweep(made(), tmp_path, executor="ray")


class Lost(Exception):
    """Any of Ray's own errors."""


class FakeRay:
    """Ray's few calls in one thread: workers do their work when it is waited for, and die when the script says so."""

    exceptions = SimpleNamespace(RayError=Lost, RayTaskError=type("RayTaskError", (Lost,), {}))

    def __init__(self, dies=lambda _task: False, starts=lambda _number: True, cpus=2.0):
        self.dies, self.starts, self.cpus = dies, starts, cpus
        self.hired, self.killed, self.done = 0, 0, []

    def is_initialized(self):
        return True

    def put(self, value):
        return value

    def cluster_resources(self):
        return {"CPU": self.cpus}

    def remote(self, _actor):
        return self

    def options(self, **options):
        assert options["num_cpus"] == 1.0
        return SimpleNamespace(remote=self._hire)

    def _hire(self, job, batch_rows, _threads):
        self.hired += 1
        place, started = ray_executor.Workplace(job, batch_rows), self.starts(self.hired)

        def ready():
            if started is False:
                raise Lost("no start")

        def sample(task):
            if self.dies(task):
                raise Lost("gone")
            self.done.append(task.organism)
            parts = list(place.sample(task))
            return Sampled(pd.concat([part.written for part in parts]), parts[-1].model)

        def call(function, pending=False):
            return SimpleNamespace(remote=lambda *arguments: Call(function, arguments, pending))

        return SimpleNamespace(ready=call(ready, pending=started is None), sample=call(sample))

    def wait(self, refs, num_returns, timeout):
        done = [ref for ref in refs if not ref.pending]
        assert done or timeout is not None, "waits for ever"
        return done[:num_returns], []

    def get(self, ref):
        return ref.function(*ref.arguments)

    def kill(self, _handle):
        self.killed += 1


class Call:
    def __init__(self, function, arguments, pending):
        self.function, self.arguments, self.pending = function, arguments, pending


@pytest.fixture
def run(monkeypatch):
    def run(fake, **settings):
        monkeypatch.setattr(ray_executor, "_ray", lambda: fake)
        grid = make_grid(made(samples=1))
        parts = list(RayExecutor(**{"rows_per_task": 4, **settings}).run(grid, grid.rows))
        return grid, pd.concat([part.written for part in parts])

    return run


def test_a_worker_keeps_its_organism_and_every_row_comes_once(run):
    fake = FakeRay()
    grid, written = run(fake)
    assert sorted(written.index) == sorted(grid.rows.index)
    changes = sum(one != other for one, other in zip(fake.done, fake.done[1:], strict=False))
    assert (fake.hired, fake.killed) == (2, 2)
    assert len(fake.done) == 9 and {"pocket/medical", "pocket/finance"} == set(fake.done)
    assert changes <= 8
    expected = pd.concat([part.written for part in LocalExecutor().run(grid, grid.rows)])
    assert written["response"].sort_index().tolist() == expected["response"].sort_index().tolist()


def test_tasks_of_a_lost_worker_are_done_by_another_one(run):
    falls = iter([True, False, True, *[False] * 100])
    fake = FakeRay(dies=lambda _task: next(falls))
    grid, written = run(fake)
    assert sorted(written.index) == sorted(grid.rows.index)
    assert fake.hired == 4


def test_a_task_that_takes_every_worker_with_it_is_given_up_with_what_to_do(run):
    fake = FakeRay(dies=lambda task: task.organism == "pocket/finance")
    with pytest.raises(
        WorkersLostError, match="answers of 'pocket/finance' were lost with their worker 3 times.*lower batch_rows"
    ):
        run(fake)
    assert fake.killed == fake.hired


def test_workers_that_fail_to_start_are_replaced_but_not_for_ever(run):
    grid, written = run(FakeRay(starts=lambda number: number > 2))
    assert sorted(written.index) == sorted(grid.rows.index)
    with pytest.raises(WorkersLostError, match="7 workers failed to start; the last said: no start"):
        run(FakeRay(starts=lambda _number: False))


def test_a_cluster_without_room_is_told(run):
    with pytest.raises(
        WorkersLostError,
        match="no worker started within 1 s: each asks for 1 CPU and 1 GPU, the cluster has 2 CPU, 0 GPU",
    ):
        run(FakeRay(starts=lambda _number: None), workers=1, gpus_per_worker=1, patience_s=1)


def test_an_address_without_a_cluster_is_told(monkeypatch):
    def nobody(*_arguments, **_options):
        raise ConnectionError("nobody there")

    monkeypatch.setattr(ray_executor, "_ray", lambda: SimpleNamespace(is_initialized=lambda: False, init=nobody))
    grid = make_grid(made(samples=1))
    with pytest.raises(ConnectionError, match=r"no Ray cluster at 'auto': start one \(`ray start --head`\)"):
        list(RayExecutor(address="auto").run(grid, grid.rows))
