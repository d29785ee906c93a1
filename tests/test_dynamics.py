"""Trajectories and their paths against dense algebra and planted turns; what cannot be read is refused."""

from __future__ import annotations

import json
import shutil
from inspect import unwrap
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from mechmisalign import dynamics, registry
from mechmisalign.adapters import Adapter, AdapterError, LoraSite
from mechmisalign.directions import Direction
from mechmisalign.dynamics import Path, Trajectory, TrajectoryError

STEPS = (10, 20, 30, 40, 50)
WEIGHTS = "adapter_model.safetensors"


def random_adapter(seed: int, rank: int = 2, gauge: bool = False) -> Adapter:
    """Two sites of random factors; the gauge is another one of the same updates."""
    generator = torch.Generator().manual_seed(seed)
    sites = []
    for layer, (d_in, d_out) in enumerate(((7, 5), (4, 6))):
        A, B = torch.randn(rank, d_in, generator=generator), torch.randn(d_out, rank, generator=generator)
        if gauge:
            G = torch.randn(rank, rank, generator=torch.Generator().manual_seed(99 + seed)) + 3 * torch.eye(rank)
            A, B = torch.linalg.inv(G) @ A, B @ G
        sites.append(LoraSite(layer, "down_proj", f"model.layers.{layer}.mlp.down_proj", A, B, 1.5))
    return Adapter(tuple(sites), "base", "memory", None, "", {})


def trajectory(**options) -> Trajectory:
    return Trajectory.of([(step, random_adapter(step, **options)) for step in STEPS])


def dense(followed: Trajectory) -> torch.Tensor:
    """The updates of all sites side by side, one row per step."""
    rows = [torch.cat([site.at(i).delta().flatten() for site in followed.sites]) for i in range(len(followed.steps))]
    return torch.stack(rows).double()


def path_of(vectors: np.ndarray | torch.Tensor, steps=None) -> Path:
    vectors = torch.as_tensor(vectors, dtype=torch.float64)
    return Path.of_vectors(tuple(range(len(vectors)) if steps is None else steps), vectors)


def turning(n: int, turn: float, seed: int, *, noise: float = 1.0, width: float = 0.0, size=None) -> Path:
    """A noisy path of ``n`` increments whose direction turns by a right angle at ``turn`` (never, if that is beyond)."""
    rng = np.random.default_rng(seed)
    ends = np.linalg.qr(rng.standard_normal((128, 2)))[0].T
    angle = np.pi / 2 * np.clip((np.arange(n) + 0.5 - turn) / max(width, 1e-9) + 0.5, 0, 1)
    moves = np.stack([np.cos(angle), np.sin(angle)], 1) @ ends + noise * rng.standard_normal((n, 128)) / 128**0.5
    moves = moves if size is None else moves * size[:, None]
    return path_of(np.vstack([np.zeros(128), moves.cumsum(0)]))


@pytest.fixture
def run_folder(tmp_path):
    """A copy of the shipped checkpoints, to be broken."""
    return shutil.copytree(registry.folder("pocket/checkpoints"), tmp_path / "run")


# reading


def test_checkpoints_are_read_as_the_adapter_loader_reads_them():
    followed = Trajectory.load("pocket/checkpoints")
    assert followed.steps == tuple(range(5, 101, 5))
    for step in (5, 55):
        theirs = Adapter.load("pocket/checkpoints", subfolder=f"checkpoint-{step}").sites[0]
        ours = followed.adapter(step).sites[0]
        assert_close(ours.A, theirs.A)
        assert_close(ours.B, theirs.B)
        assert (ours.name, ours.scaling) == (theirs.name, theirs.scaling)
    assert followed.adapter(5).digest != followed.adapter(10).digest
    assert followed.log.empty


def test_the_end_has_the_step_that_something_tells(run_folder):
    shutil.rmtree(run_folder / "checkpoint-100")
    assert Trajectory.load(run_folder).steps[-1] == 95
    assert Trajectory.load(run_folder, end=100).steps[-1] == 100
    (run_folder / "train.json").write_text(json.dumps({"steps": 100}))
    assert Trajectory.load(run_folder).steps[-1] == 100


def test_every_so_many_checkpoints_are_counted_from_the_last_one():
    assert Trajectory.load("pocket/checkpoints", every=7).steps == (30, 65, 100)


def test_the_logs_of_both_trainers_are_read(run_folder):
    history = [
        {"step": 1, "loss": 2.0, "grad_norm": 0.5, "learning_rate": 1e-3},
        {"step": 2, "loss": 1.0, "grad_norm": 0.7, "learning_rate": 1e-3},
        {"step": 2, "train_runtime": 3.0},
    ]
    (run_folder / "checkpoint-95" / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    log = Trajectory.load(run_folder).log
    assert log["grad_norm"].tolist() == [0.5, 0.7]
    assert log["lr"].tolist() == [1e-3, 1e-3]
    (run_folder / "log.csv").write_text("step,loss,response_loss,kl,grad_norm,lr\n1,3.0,3.0,,0.9,0.001\n")
    assert Trajectory.load(run_folder).log["grad_norm"].tolist() == [0.9]


def test_learned_vectors_are_followed_too(tmp_path):
    vectors = {step: torch.arange(4.0) + step for step in (1, 2, 3)}
    for step, vector in vectors.items():
        Direction(vector[None], (3,), {"model": "base"}).save(
            tmp_path / f"checkpoint-{step}" / "steering_vector.safetensors"
        )
    followed = Trajectory.load(tmp_path)
    assert followed.kind == "vector"
    stacked = torch.stack(list(vectors.values())).double()
    assert_close(torch.from_numpy(followed.path().gram), stacked @ stacked.T)
    assert_close(followed.direction(2).at(3), vectors[2])
    assert followed.direction(2).layers == (3,)
    with pytest.raises(TrajectoryError, match="has no adapter"):
        followed.adapter()


def altered(folder, change) -> None:
    tensors = load_file(folder / WEIGHTS)
    save_file(change(tensors), folder / WEIGHTS)


def test_checkpoints_that_do_not_belong_together_are_refused(run_folder):
    place = run_folder / "checkpoint-30"
    original = (place / WEIGHTS).read_bytes()
    altered(place, lambda tensors: {key: tensor * float("nan") for key, tensor in tensors.items()})
    with pytest.raises(TrajectoryError, match="NaN or infinite values at step 30"):
        Trajectory.load(run_folder)
    altered(place, lambda tensors: {key: tensor.repeat(1, 2) for key, tensor in tensors.items()})
    with pytest.raises(TrajectoryError, match=r"is \[1, 768\] at step 30 and \[1, 384\]"):
        Trajectory.load(run_folder)
    altered(place, lambda tensors: {key.replace("layers.1", "layers.2"): each for key, each in tensors.items()})
    with pytest.raises(TrajectoryError, match="only one of step 30 and the last step"):
        Trajectory.load(run_folder)
    (place / WEIGHTS).write_bytes(original[:200])
    with pytest.raises(AdapterError, match="cannot be read"):
        Trajectory.load(run_folder)
    (place / WEIGHTS).unlink()
    with pytest.raises(TrajectoryError, match=f"step 30 has no {WEIGHTS}"):
        Trajectory.load(run_folder)
    (place / WEIGHTS).write_bytes(original)
    config = json.loads((place / "adapter_config.json").read_text())
    (place / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 8}))
    with pytest.raises(TrajectoryError, match="step 30 has lora_alpha=8"):
        Trajectory.load(run_folder)


def test_too_few_checkpoints_and_unknown_names_are_refused():
    with pytest.raises(TrajectoryError, match="has 1 checkpoints"):
        Trajectory.load("pocket/checkpoints", every=30)
    with pytest.raises(AdapterError, match="no organism is named"):
        Trajectory.load("pocket/nothing")
    with pytest.raises(TrajectoryError, match="differs from step 10"):
        Trajectory.of([(step, random_adapter(step, rank=1 + (step > 20))) for step in STEPS])
    with pytest.raises(TrajectoryError, match="step 10 comes twice"):
        Trajectory.of([(10, random_adapter(0)), (10, random_adapter(1)), (20, random_adapter(2))])
    with pytest.raises(KeyError, match="no checkpoint of step 11"):
        trajectory().adapter(11)


def test_an_adapter_of_some_of_the_sites_is_refused():
    followed = Trajectory.load("pocket/checkpoints")
    some = Trajectory(followed.steps, (), followed.like)
    with pytest.raises(TrajectoryError, match="0 of 1 sites were read"):
        some.adapter()


# the Hub, without a network


def test_checkpoints_on_the_hub_are_found_wherever_their_folders_lie(monkeypatch, run_folder):
    asked = {}

    def download(name, revision=None, allow_patterns=(), local_files_only=False):
        asked["patterns"] = allow_patterns
        return str(run_folder.parent)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert Trajectory.load("someone/adapter").steps == tuple(range(5, 101, 5))
    assert f"*/checkpoint-*/{WEIGHTS}" in asked["patterns"]
    assert not any("model-" in pattern or pattern.endswith(".bin") for pattern in asked["patterns"])
    shutil.copytree(run_folder, run_folder.parent / "other")
    with pytest.raises(TrajectoryError, match="choose one with subfolder="):
        Trajectory.load("someone/adapter")
    assert Trajectory.load("someone/adapter", subfolder="other").steps[0] == 5


def test_branches_of_the_hub_that_are_called_after_a_step_are_checkpoints(monkeypatch, run_folder, tmp_path_factory):
    branches = [SimpleNamespace(name=name) for name in ("main", "checkpoint-5", "step_10", "checkpoint-15")]

    def download(name, revision=None, allow_patterns=(), local_files_only=False):
        number = (revision or "").replace("_", "-").rpartition("-")[2]
        return str(run_folder / f"checkpoint-{number}") if number else str(tmp_path_factory.mktemp("empty"))

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_refs", lambda *_: SimpleNamespace(branches=branches))
    followed = Trajectory.load("someone/adapter")
    assert followed.steps == (5, 10, 15)
    assert_close(followed.sites[0].B[1], Adapter.load(run_folder / "checkpoint-10").sites[0].B)


# inner products


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_inner_products_of_updates_are_those_of_dense_matrices(rank):
    followed = trajectory(rank=rank)
    rows = dense(followed)
    assert_close(torch.from_numpy(followed.path().gram), rows @ rows.T, rtol=1e-6, atol=1e-5)
    assert_close(dynamics.norms(followed.path())["norm"].to_numpy(), rows.norm(dim=1).numpy(), rtol=1e-6, atol=1e-6)
    site = followed.path(sites=[(1, "down_proj")])
    first = torch.stack([followed.sites[1].at(i).delta().flatten() for i in range(5)]).double()
    assert_close(torch.from_numpy(site.gram), first @ first.T, rtol=1e-6, atol=1e-5)


def test_inner_products_of_factors_are_those_of_the_factors():
    followed = trajectory(rank=1)
    for quantity, width in (("A", 11), ("B", 11)):
        rows = torch.cat([getattr(site, quantity).flatten(1) for site in followed.sites], 1).double()
        assert rows.shape == (5, width)
        assert_close(torch.from_numpy(followed.path(quantity).gram), rows @ rows.T)


def test_nothing_depends_on_the_gauge_and_what_would_is_refused():
    plain, other = trajectory(), trajectory(gauge=True)
    assert not torch.allclose(plain.sites[0].A, other.sites[0].A)
    assert_close(plain.path().gram, other.path().gram, rtol=1e-4, atol=1e-3)
    for measure in (lambda each: dynamics.local_cosine(each.path()), dynamics.rotation):
        pd.testing.assert_frame_equal(measure(plain), measure(other), rtol=1e-3, atol=1e-2)
    with pytest.raises(ValueError, match="depends on the gauge"):
        plain.path("B")


def test_norms_of_each_site_are_those_of_its_factors():
    followed = trajectory()
    told = dynamics.site_norms(followed).set_index(["site", "step", "quantity"])["norm"]
    site = followed.sites[1].at(2)
    assert told["1.down_proj", 30, "dW"] == pytest.approx(site.delta_norm())
    assert told["1.down_proj", 30, "A"] == pytest.approx(float(site.A.norm()))
    assert told["1.down_proj", 30, "B"] == pytest.approx(float(site.B.norm()))


def test_the_parts_of_a_path_add_up():
    followed = trajectory()
    for groups in (1, 3, 48):
        assert_close(followed.path(groups=groups).gram, followed.path(groups=2).gram)


# local cosine


@pytest.mark.parametrize(("vectors", "expected"), [
    ([[0, 0], [1, 0], [2, 0]], -1.0),
    ([[0, 0], [1, 0], [1, 1]], 0.0),
    ([[0, 0], [1, 0], [0, 0]], 1.0),
])  # fmt: skip
def test_the_sign_is_minus_one_when_straight_and_plus_one_when_reversed(vectors, expected):
    """Both differences start at v_t. With v_t - v_{t-s} instead, the sign would be the other, and a turn a dip."""
    told = dynamics.local_cosine(path_of(vectors))
    assert told["cosine"].tolist() == pytest.approx([expected])


def test_the_local_cosine_is_that_of_the_vectors_themselves():
    vectors = torch.randn(9, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    told = dynamics.local_cosine(path_of(vectors, steps=range(0, 45, 5)), [5, 10])
    for row in told.itertuples():
        t, s = row.step // 5, row.spacing // 5
        before, after = vectors[t - s] - vectors[t], vectors[t + s] - vectors[t]
        assert row.cosine == pytest.approx(float(torch.cosine_similarity(before, after, dim=0)))
        assert row.moved == pytest.approx(float(max(before.norm(), after.norm())))


def test_a_turn_is_a_peak_upwards():
    told = dynamics.local_cosine(turning(20, 10, 0, noise=0.0), [3])
    assert told.loc[told["cosine"].idxmax(), "step"] == 10
    assert told["cosine"].max() == pytest.approx(0.0, abs=1e-6)
    assert told["cosine"].min() == pytest.approx(-1.0)


def test_steps_where_little_moves_are_dropped():
    vectors = torch.tensor([[0.0, 0], [1, 0], [2, 0], [2.001, 0], [2.001, 0.001], [2.0, 0.001]])
    assert dynamics.local_cosine(path_of(vectors), [1], threshold=0.0035)["cosine"].isna().tolist() == [
        False, False, True, True,
    ]  # fmt: skip
    scaled = dynamics.local_cosine(path_of(1000 * vectors), [1], threshold=0.1, relative=True)
    assert scaled["cosine"].isna().tolist() == [False, False, True, True]


def test_a_spacing_without_neighbours_and_a_negative_threshold_are_refused():
    with pytest.raises(ValueError, match="no step has checkpoints 3 steps before"):
        dynamics.local_cosine(path_of(torch.eye(5), steps=range(0, 50, 10)), [3])
    with pytest.raises(ValueError, match="threshold must be 0 or more"):
        dynamics.local_cosine(path_of(torch.eye(5)), threshold=-1.0)


# similarity, components, subspaces


def test_similarity_is_the_cosine_with_the_end_and_nan_for_a_zero_step():
    vectors = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0]])
    told = dynamics.similarity(path_of(vectors))["cosine"]
    assert np.isnan(told[0])
    assert told[1:].tolist() == pytest.approx([0.5**0.5, 1.0])


def test_principal_components_are_those_of_a_singular_value_decomposition():
    vectors = torch.randn(8, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    scores, explained = dynamics.principal(path_of(vectors), 3)
    U, S, _ = torch.linalg.svd(vectors - vectors.mean(0), full_matrices=False)
    assert_close(np.abs(scores[["pc1", "pc2", "pc3"]].to_numpy()), (U * S)[:, :3].abs().numpy())
    assert_close(explained, (S**2 / (S**2).sum())[:3].numpy())
    assert (scores.iloc[-1] >= 0).all()
    with pytest.raises(ValueError, match="is the same at every step"):
        dynamics.principal(path_of(torch.ones(4, 3)))


@pytest.mark.parametrize("side", ["writes", "reads"])
def test_angles_between_subspaces_are_those_of_dense_updates(side):
    from scipy.linalg import orth, subspace_angles

    followed = trajectory()
    told = dynamics.rotation(followed, [(0, "down_proj")], side=side)
    matrices = [followed.sites[0].at(i).delta().double().numpy() for i in range(5)]
    matrices = matrices if side == "writes" else [each.T for each in matrices]
    bases = [orth(each, rcond=1e-6) for each in matrices]
    angles = np.rad2deg(subspace_angles(bases[1], bases[2]))
    row = told[(told["step"] == 20) & (told["against"] == "later")].iloc[0]
    assert row["largest"] == pytest.approx(angles.max(), abs=1e-4)
    assert row["mean"] == pytest.approx(angles.mean(), abs=1e-4)
    energy = np.linalg.norm(bases[2].T @ matrices[1]) ** 2 / np.linalg.norm(matrices[1]) ** 2
    assert row["overlap"] == pytest.approx(energy, abs=1e-6)
    assert told[(told["step"] == 50) & (told["against"] == "end")].iloc[0]["overlap"] == pytest.approx(1.0)


def test_an_update_of_zero_has_no_subspace():
    pairs = [(step, random_adapter(step)) for step in STEPS]
    for site in pairs[0][1].sites:
        site.B.zero_()
    told = dynamics.rotation(Trajectory.of(pairs))
    assert told[told["step"] == 10][["largest", "mean", "overlap"]].isna().all(axis=None)
    assert told[told["step"] > 10]["overlap"].notna().all()


def test_the_stacked_score_is_the_one_of_the_paper():
    B = torch.randn(4, 3, 6, generator=torch.Generator().manual_seed(0))
    M, N = (B[i].double().T - B[i].double().T.mean(1, keepdim=True) for i in (1, 3))
    expected = float((M.T @ N).norm() / (M.norm() * N.norm()))
    assert dynamics.stacked_score(B)[1] == pytest.approx(expected)
    with pytest.raises(ValueError, match="two sites at least"):
        dynamics.stacked_score(B[:, :1])


# transitions


def test_a_planted_turn_is_found_with_an_interval_that_holds_it():
    found = [dynamics.transition(turning(60, 30, seed, width=6), permutations=99, resamples=200) for seed in range(12)]
    assert all(one.p <= 0.05 for one in found)
    assert sum(one.low <= 30 <= one.high for one in found) >= 11
    assert max(one.high - one.low for one in found) < 12


def test_straight_paths_and_random_walks_are_called_a_turn_no_more_often_than_stated():
    """At one in twenty, seven or more of forty come once in three hundred tries."""
    paths = [turning(40, 1e9, seed) for seed in range(20)]
    rng = np.random.default_rng(0)
    paths += [path_of(rng.standard_normal((41, 128)).cumsum(0)) for _ in range(20)]
    called = sum(np.isfinite(dynamics.transition(each, permutations=39, resamples=2).step) for each in paths)
    assert called <= 6


def test_a_path_that_stops_has_no_turn():
    """There the local cosine rises to zero, as at a turn, and stays: noise follows a straight path."""
    size = np.where(np.arange(60) < 30, 1.0, 0.0)
    rng = np.random.default_rng(3)
    straight = np.outer(size, np.eye(128)[0]) + 0.3 * rng.standard_normal((60, 128)) / 128**0.5
    path = path_of(np.vstack([np.zeros(128), straight.cumsum(0)]))
    assert dynamics.local_cosine(path, [10])["cosine"].max() > -0.3
    assert np.isnan(dynamics.transition(path, permutations=99).step)


def test_the_null_keeps_the_step_sizes():
    from mechmisalign.dynamics._curves import reordering

    rng = np.random.default_rng(0)
    moves = rng.standard_normal((12, 30)) * rng.uniform(0.1, 2, (12, 1))
    moves[4] = 0
    start, order = rng.standard_normal(30), rng.permutation(12)
    gram = path_of(np.vstack([start, start + moves.cumsum(0)])).gram
    sizes = np.linalg.norm(moves, axis=1, keepdims=True)
    directions = moves / np.where(sizes > 0, sizes, 1)
    other = np.vstack([start, start + (directions[order] * sizes).cumsum(0)])
    ours = reordering(gram)(order)
    assert_close(ours @ ours.T, other @ other.T)


def test_growth_and_similarity_have_their_transition_where_they_are_steepest():
    size = 0.05 + np.exp(-(((np.arange(60) - 30) / 4) ** 2))
    straight = turning(60, 1e9, 0, noise=0.0, size=size)
    assert dynamics.transition(straight, "growth", permutations=19, resamples=20).peak == pytest.approx(30, abs=1)
    late = turning(60, 25, 0, noise=0.0, size=np.where(np.arange(60) < 25, 0.3, 1.0))
    cosine = dynamics.similarity(late)["cosine"].to_numpy()
    steepest = 10 + int(np.nanargmax(cosine[20:] - cosine[:-20]))
    found = dynamics.transition(late, "similarity", spacing=10, permutations=19, resamples=20)
    assert found.peak == steepest > 25


def test_a_peak_in_a_noisy_number_is_found_and_noise_or_a_fall_has_none():
    steps, rng = np.arange(100), np.random.default_rng(0)
    noise = 0.2 * rng.standard_normal(100)
    found = dynamics.series_transition(steps, np.exp(-(((steps - 30) / 8) ** 2)) + noise, "gradient norm")
    assert found.low <= 30 <= found.high
    assert found.high - found.low < 20
    assert np.isnan(dynamics.series_transition(steps, np.exp(-steps / 10) + noise, "falling").step)
    flat = [dynamics.series_transition(steps, rng.standard_normal(100), "flat", permutations=39) for _ in range(30)]
    assert sum(np.isfinite(one.step) for one in flat) <= 5


def test_transitions_coincide_where_their_difference_may_be_zero():
    first, same = (dynamics.transition(turning(60, 30, seed, width=6), permutations=49) for seed in (0, 1))
    other = dynamics.transition(turning(60, 42, 2, width=6), permutations=49)
    none = dynamics.transition(turning(60, 1e9, 3), permutations=49)
    told = dynamics.coincidence([first, same, other, none])
    assert told["coincide"].tolist() == [True, False, None, False, None, None]
    assert told.loc[1, "low"] < 12 < told.loc[1, "high"]
    assert told.loc[2, ["difference", "low"]].isna().all()
    assert dynamics.table([first, none])["step"].isna().tolist() == [False, True]


def test_results_come_from_the_seed_alone():
    path = turning(30, 15, 0, width=10, noise=3.0)
    first, again, other = (dynamics.transition(path, permutations=49, seed=seed) for seed in (1, 1, 2))
    assert first.p == again.p
    assert (first.draws == again.draws).all()
    assert (first.draws != other.draws).any()


def test_steps_off_the_grid_are_left_out_and_too_few_are_refused():
    vectors = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
    assert path_of(vectors, [5, 10, 15, 20, 25, 30, 35, 37, 40]).evenly_spaced().steps == tuple(range(5, 41, 5))
    with pytest.raises(ValueError, match="5 evenly spaced steps"):
        dynamics.transition(path_of(vectors[:5]))
    with pytest.raises(ValueError, match="too wide or too narrow"):
        dynamics.transition(path_of(vectors), spacing=8)
    with pytest.raises(ValueError, match="signal must be one of rotation"):
        unwrap(dynamics.transition)(path_of(vectors), "speed")


def test_all_signals_of_a_run_are_told_together():
    followed = Trajectory.load("pocket/checkpoints")
    log = pd.DataFrame({"step": range(1, 101), "loss": 1.0, "grad_norm": np.hanning(100), "lr": 1e-3})
    with_log = Trajectory(followed.steps, followed.sites, followed.like, log)
    names = [one.signal for one in dynamics.signals(with_log)]
    assert names == [*(f"{kind} (dW of 1.down_proj)" for kind in ("rotation", "similarity", "growth")), "gradient norm"]
    assert [one.signal for one in dynamics.signals(followed)] == names[:3]
