import numpy as np
import pandas as pd
import pytest
import torch
from scipy.linalg import subspace_angles

from mechmisalign import geometry
from mechmisalign.directions import Direction, DirectionMismatchError, ZeroDirectionError


def made(rows) -> Direction:
    vectors = torch.tensor(rows)
    return Direction(vectors, tuple(range(len(vectors))), {"model": "m"})


def test_cosines_ignore_length_and_leave_out_zero_layers():
    first, second = made([[0.0, 0.0], [2.0, 0.0], [1.0, 1.0]]), made([[1.0, 0.0], [-3.0, 0.0], [5.0, 0.0]])
    frame = geometry.cosine_by_layer(first, second)
    assert frame["layer"].tolist() == [1, 2]
    assert frame["cosine"].tolist() == pytest.approx([-1.0, 0.5**0.5])


def test_each_pair_stands_once():
    frame = geometry.cosines({name: made([[1.0, float(i)]]) for i, name in enumerate("abc")})
    assert list(zip(frame["first"], frame["second"], strict=True)) == [("a", "b"), ("a", "c"), ("b", "c")]


def test_the_matrix_is_symmetric_with_ones():
    matrix = geometry.cosine_matrix({"a": made([[1.0, 2.0]]), "b": made([[2.0, 1.0]])}, 0)
    assert matrix.loc["a", "b"] == matrix.loc["b", "a"] == pytest.approx(0.8)
    assert matrix.loc["a", "a"] == pytest.approx(1)


def test_the_matrix_refuses_a_zero_direction():
    with pytest.raises(ZeroDirectionError):
        geometry.cosine_matrix({"a": made([[0.0, 0.0]])}, 0)


def sampled(means, *, spread, samples=40, replicates=100, seed=0):
    """Directions as means of noisy samples around the given vectors, with bootstrap replicates."""
    rng = np.random.default_rng(seed)
    directions, drawn = {}, {}
    for name, mean in means.items():
        rows = torch.from_numpy(mean + spread * rng.standard_normal((samples, len(mean)))).float()
        directions[name] = made([rows.mean(0).tolist()])
        picks = rng.integers(samples, size=(replicates, samples))
        drawn[name] = [made([rows[pick].mean(0).tolist()]) for pick in picks]
    return directions, drawn


def unit_rows(n, d, seed=0):
    rows = np.random.default_rng(seed).standard_normal((n, d))
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_the_expected_cosine_of_random_vectors_and_its_band_are_those_of_random_vectors():
    rng = np.random.default_rng(0)
    for rank in (1, 3):
        rows = rng.standard_normal((20_000, 24))
        found = np.linalg.norm(rows[:, :rank], axis=1) / np.linalg.norm(rows, axis=1)
        mean, low, high = geometry.random_cosine(24, rank)
        assert mean == pytest.approx(found.mean(), rel=0.02)
        assert ((found < low) | (found > high)).mean() == pytest.approx(0.05, abs=0.008)
    with pytest.raises(ValueError, match="rank from 1 to 23"):
        geometry.random_cosine(24, 24)


def test_cosines_stand_beside_both_nulls_and_shuffles_with_a_common_part_raise_theirs():
    rows = unit_rows(3, 40)
    directions = {name: made([(rows[0] + 0.3 * rows[i]).tolist()]) for name, i in (("a", 1), ("b", 2))}
    rng = np.random.default_rng(1)
    shuffled = {"a": [], "b": []}
    for _ in range(99):
        common = rng.standard_normal(40)
        for name in shuffled:
            shuffled[name].append(made([(common + rng.standard_normal(40)).tolist()]))
    (row,) = geometry.cosines_against_null(directions, shuffled).to_dict("records")
    assert row["cosine"] > row["random_high"]
    assert row["shuffled_low"] > 0.1
    assert row["p"] == pytest.approx(0.02)
    with pytest.raises(ValueError, match="equally many"):
        geometry.cosines_against_null(directions, {"a": shuffled["a"], "b": shuffled["b"][:3]})


def test_sets_of_directions_overlap_as_scipy_says():
    a, b = unit_rows(3, 12, 1), unit_rows(2, 12, 2)
    sets = {"a": [made([row.tolist()]) for row in a], "b": [made([(3 * row).tolist()]) for row in b]}
    (row,) = geometry.direction_overlaps(sets, draws=50).to_dict("records")
    expected = np.sort(subspace_angles(a.T, b.T))
    assert row["angles"] == pytest.approx(np.degrees(expected).tolist(), abs=1e-3)
    assert row["overlap"] == pytest.approx((np.cos(expected) ** 2).mean(), abs=1e-6)
    assert row["expected"] == pytest.approx(3 / 12)
    angles = geometry.principal_angles(torch.from_numpy(a).float(), torch.from_numpy(b).float())
    assert angles.tolist() == pytest.approx(np.degrees(expected).tolist(), abs=1e-3)
    with pytest.raises(ValueError, match="holds no direction"):
        geometry.direction_overlaps({"a": sets["a"], "b": []})


def test_a_planted_shared_axis_is_found_and_the_parts_are_orthogonal_and_add_up():
    rows = unit_rows(6, 64)
    directions = {str(i): made([(2 * rows[0] + rows[i]).tolist()]) for i in range(1, 6)}
    parts = geometry.shared_and_specific(directions)
    assert abs(float(parts.shared.unit(0).double() @ torch.from_numpy(rows[0]))) > 0.97
    for name, direction in directions.items():
        axis, rest = parts.shared.unit(0), parts.specific[name].at(0)
        assert float(axis @ rest) == pytest.approx(0, abs=1e-5)
        assert torch.allclose(rest + (direction.at(0) @ axis) * axis, direction.at(0), atol=1e-5)
        told = parts.shares.set_index("name").loc[name]
        assert told["share"] == pytest.approx(float(direction.unit(0) @ axis) ** 2, abs=1e-5)
    assert (parts.shares["held_out"] > 0.5).all()


def test_random_directions_share_nothing_along_the_axis_of_the_others():
    parts = [
        geometry.shared_and_specific({str(i): made([row.tolist()]) for i, row in enumerate(unit_rows(5, 64, seed))})
        for seed in range(40)
    ]
    shares = pd.concat([each.shares for each in parts])
    assert shares["share"].mean() > 0.2
    assert shares["held_out"].mean() == pytest.approx(shares["expected"].iloc[0], rel=0.35)


def test_one_direction_with_noise_is_not_read_as_several():
    refuted = []
    for seed in range(30):
        mean = unit_rows(1, 32, seed)[0]
        directions, replicates = sampled(dict.fromkeys("abcde", mean), spread=0.8, replicates=60, seed=seed)
        (row,) = geometry.spectrum(directions, replicates, draws=20).summary.to_dict("records")
        refuted.append(row["p_one"] <= 0.05)
    assert row["effective_rank"] > 1.2  # as if there were more than one
    assert np.mean(refuted) <= 0.12


@pytest.mark.parametrize("dimensions", [2, 3])
def test_planted_further_directions_are_counted(dimensions):
    axes = np.linalg.qr(np.random.default_rng(0).standard_normal((32, 3)))[0].T
    weights = np.random.default_rng(1).standard_normal((6, dimensions - 1))
    means = {str(i): axes[0] + w @ axes[1:dimensions] for i, w in enumerate(weights)}
    found = geometry.spectrum(*sampled(means, spread=0.4), draws=50)
    assert found.summary["dimensions"].tolist() == [dimensions]
    assert found.summary["p_one"].iloc[0] < 0.02
    assert found.values["share"].sum() == pytest.approx(1)
    high = found.values["noise_high"]
    assert found.values["share"][1] > high[1]


def test_random_directions_have_the_spectrum_of_random_directions():
    inside = []
    for seed in range(100, 160):
        directions = {str(i): made([row.tolist()]) for i, row in enumerate(unit_rows(4, 24, seed))}
        (row,) = geometry.spectrum(directions, draws=300).summary.to_dict("records")
        inside.append(row["random_low"] <= row["effective_rank"] <= row["random_high"])
    assert 0.85 <= np.mean(inside) < 1
    assert "p_one" not in row


def test_a_spectrum_refuses_replicates_that_do_not_fit_and_directions_of_two_models():
    directions, replicates = sampled({"a": np.ones(8), "b": np.ones(8)}, spread=1.0)
    with pytest.raises(ValueError, match="equally many replicates"):
        geometry.spectrum(directions, {"a": replicates["a"]})
    other = Direction(torch.ones(1, 8), (0,), {"model": "other"})
    with pytest.raises(DirectionMismatchError):
        geometry.spectrum({"a": directions["a"], "b": other})


def test_members_of_a_cone_have_the_norm_and_the_place_that_their_kind_says():
    rows = unit_rows(3, 30)
    directions = {str(i): made([(2 * row).tolist(), (4 * row).tolist()]) for i, row in enumerate(rows)}
    members = geometry.cone_members(directions, k=2, draws=5)
    assert list(members) == list(geometry.CONE_KINDS)
    axes = np.linalg.svd(rows, full_matrices=False)[2][:2]
    for layer, norm in ((0, 2.0), (1, 4.0)):
        found = {kind: np.stack([each.at(layer).double().numpy() for each in group]) for kind, group in members.items()}
        for kind in ("cone", "axis", "inside", "inside, rest random", "outside"):
            assert np.linalg.norm(found[kind], axis=1) == pytest.approx(norm, abs=1e-5)
        mixes = np.linalg.lstsq(rows.T, found["cone"].T, rcond=None)[0]
        assert (mixes > -1e-5).all()
        assert np.abs(found["outside"] @ axes.T).max() < 1e-5
        assert np.linalg.norm(found["inside"] @ axes.T, axis=1) == pytest.approx(norm, abs=1e-5)
        shared = found["inside, shared part"]
        for kind in ("inside", "inside, rest random"):
            assert (found[kind] * shared).sum(1) == pytest.approx((shared**2).sum(1), abs=1e-4)
        assert len(found["axis"]) == 3
        assert np.abs(found["axis"][1] + found["axis"][2]).max() < 1e-5
    with pytest.raises(ValueError, match="k=4"):
        geometry.cone_members(directions, k=4)
