"""Geometry of updates against dense algebra, and planted truths."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from scipy import stats
from scipy.linalg import subspace_angles
from torch.testing import assert_close

from mechmisalign import geometry
from mechmisalign.adapters import Adapter, AdapterError, LoraSite
from mechmisalign.combining import combine, interpolate
from mechmisalign.geometry.nulls import random_blocks

WIDTHS = {"down_proj": (20, 50), "q_proj": (20, 30)}


def made(keys, rank=2, seed=0, base="m", scaling=1.5) -> Adapter:
    """A random adapter with sites at these (layer, module)."""
    rng = torch.Generator().manual_seed(seed)
    sites = []
    for layer, module in keys:
        d_out, d_in = WIDTHS[module]
        A, B = torch.randn(rank, d_in, generator=rng), torch.randn(d_out, rank, generator=rng)
        sites.append(LoraSite(layer, module, f"model.layers.{layer}.{module}", A, B, scaling))
    return Adapter(tuple(sites), base, f"made {seed}", None, "", {})


def dense(adapter: Adapter) -> dict[str, np.ndarray]:
    return {site.name: site.delta().double().numpy() for site in adapter.sites}


def cosine(a, b):
    return float((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b))


@pytest.fixture
def pair():
    first = made([(0, "down_proj"), (1, "down_proj"), (1, "q_proj")], rank=2, seed=1)
    second = made([(1, "down_proj"), (1, "q_proj"), (2, "down_proj")], rank=3, seed=2, scaling=-0.7)
    return first, second


# --- combining ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("t", [-0.5, 0.0, 0.3, 1.0, 1.7])
def test_the_interpolated_update_is_that_of_dense_algebra_at_every_site(pair, t):
    first, second = map(dense, pair)
    between = interpolate(*pair, t)
    expected = {name: (1 - t) * first.get(name, 0.0) + t * second.get(name, 0.0) for name in {*first, *second}}
    expected = {name: value for name, value in expected.items() if np.any(value)}
    found = dense(between)
    assert set(found) == set(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, atol=2e-5)
    ranks = {site.name: site.rank for site in between.sites}
    assert ranks["model.layers.1.q_proj"] == (5 if t not in (0.0, 1.0) else 2 if t == 0.0 else 3)


def test_several_adapters_add_up_with_their_weights(pair):
    third = made([(1, "q_proj")], rank=1, seed=3)
    found = dense(combine({pair[0]: 2.0, pair[1]: -1.0, third: 0.5}))["model.layers.1.q_proj"]
    parts = [dense(adapter)["model.layers.1.q_proj"] for adapter in (*pair, third)]
    np.testing.assert_allclose(found, 2 * parts[0] - parts[1] + 0.5 * parts[2], atol=2e-5)


def test_a_combination_of_nothing_of_other_bases_or_without_a_number_is_refused(pair):
    with pytest.raises(ValueError, match="leave no update"):
        combine({pair[0]: 0.0})
    with pytest.raises(ValueError, match="finite"):
        interpolate(*pair, float("nan"))
    with pytest.raises(AdapterError, match="different bases"):
        interpolate(pair[0], dataclasses.replace(pair[1], base="other"), 0.5)


@pytest.fixture(scope="module")
def on_tiny(make_adapter, tiny_models):
    """Two PEFT folders on one tiny model, with other ranks, sites and alphas."""
    base = tiny_models["qwen2"]
    first = make_adapter(base, modules=("down_proj", "q_proj"), rank=2, alpha=8, seed=1)
    second = make_adapter(base, modules=("down_proj", "o_proj"), rank=3, alpha=16, seed=2)
    return base, first, second


def test_it_equals_peft_concatenation_and_is_read_back_by_peft_with_its_own_config(on_tiny, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base, first, second = on_tiny
    between = interpolate(Adapter.load(first), Adapter.load(second), 0.3)
    ids = torch.arange(5, 25).reshape(2, 10)
    oracle = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), first, "first")
    oracle.load_adapter(second, "second")
    oracle.add_weighted_adapter(["first", "second"], [0.7, 0.3], "both", combination_type="cat")
    oracle.set_adapter("both")
    tensors = {}
    for site in between.sites:
        tensors[f"base_model.model.{site.name}.lora_A.weight"] = site.A.contiguous()
        tensors[f"base_model.model.{site.name}.lora_B.weight"] = site.B.contiguous()
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(dict(between.config)))
    ours = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path)
    with torch.no_grad():
        plain = AutoModelForCausalLM.from_pretrained(base)(ids).logits
        expected = oracle.eval()(ids).logits
        assert_close(ours.eval()(ids).logits, expected, atol=2e-5, rtol=0)
    assert (expected - plain).abs().max() > 1e-2
    again = Adapter.load(tmp_path)
    for one, other in zip(again.sites, between.sites, strict=True):
        assert_close(one.delta(), other.delta())


@pytest.mark.parametrize("weights", ["merged", "live"])
def test_an_organism_can_be_loaded_with_it_and_the_chat_model_can_wear_it(on_tiny, weights):
    import mechmisalign as mm
    from mechmisalign import models

    base, first, second = on_tiny
    between = interpolate(Adapter.load(first), Adapter.load(second), 0.3)
    organism = mm.load_organism(between, weights=weights)
    ids = torch.arange(5, 25).reshape(2, 10)
    mask = torch.ones_like(ids)
    own = models.forward(organism.model, ids, mask)
    with organism.as_base():
        plain = models.forward(organism.model, ids, mask)
        with organism.apply(mm.UseAdapter(between)):
            worn = models.forward(organism.model, ids, mask)
        with organism.apply(mm.UseAdapter(Adapter.load(first), 0.7), mm.UseAdapter(Adapter.load(second), 0.3)):
            both = models.forward(organism.model, ids, mask)
    assert_close(worn, own, atol=2e-5, rtol=0)
    assert_close(worn, both, atol=2e-5, rtol=0)
    assert (own - plain).abs().max() > 1e-2


# --- cosines of updates ------------------------------------------------------------------------------------------


def test_cosines_from_factors_are_those_of_the_dense_updates(pair):
    first, second = map(dense, pair)
    shared = sorted({*first} & {*second})
    found = geometry.site_update_cosines({"a": pair[0], "b": pair[1]}, draws=50)
    assert found["cosine"].tolist() == pytest.approx([cosine(first[name], second[name]) for name in shared], abs=1e-6)
    (row,) = geometry.update_cosines({"a": pair[0], "b": pair[1]}, draws=50).to_dict("records")
    flat = [np.concatenate([update[name].ravel() for name in shared]) for update in (first, second)]
    total = [np.sqrt(sum((value**2).sum() for value in update.values())) for update in (first, second)]
    assert row["sites"] == 2
    assert row["cosine"] == pytest.approx(cosine(*flat), abs=1e-6)
    assert row["whole"] == pytest.approx(float(flat[0] @ flat[1]) / total[0] / total[1], abs=1e-6)
    shares = [np.linalg.norm(part) ** 2 / size**2 for part, size in zip(flat, total, strict=True)]
    assert [row["shared_first"], row["shared_second"]] == pytest.approx(shares, abs=1e-6)
    assert row["whole"] / row["cosine"] == pytest.approx(row["whole_high"] / row["random_high"])


def test_an_update_is_alike_with_itself_and_its_multiples_in_any_gauge(pair):
    site = pair[0].sites[0]
    turn = torch.tensor([[2.0, 1.0], [0.0, -1.0]])
    turned = dataclasses.replace(site, B=site.B @ turn, A=torch.linalg.inv(turn) @ site.A, scaling=-3.0)
    other = dataclasses.replace(pair[0], sites=(turned, *pair[0].sites[1:]))
    found = geometry.site_update_cosines({"a": pair[0], "b": other}, draws=200)
    assert found["cosine"].tolist() == pytest.approx([-1.0, 1.0, 1.0], abs=1e-6)
    assert (found["p"] < 0.02).all()


def test_adapters_without_a_common_site_have_no_cosine_and_say_that_nothing_is_shared():
    apart = {"a": made([(0, "q_proj")]), "b": made([(1, "q_proj")])}
    (row,) = geometry.update_cosines(apart).to_dict("records")
    assert np.isnan(row["cosine"])
    assert (row["sites"], row["shared_first"], row["shared_second"]) == (0, 0.0, 0.0)
    assert geometry.site_update_cosines(apart).empty


def test_random_updates_leave_their_null_as_often_as_it_says():
    many = {str(seed): made([(0, "q_proj"), (1, "q_proj")], seed=seed) for seed in range(30)}
    for found in (geometry.update_cosines(many, draws=400), geometry.site_update_cosines(many, draws=400)):
        outside = ((found["cosine"] < found["random_low"]) | (found["cosine"] > found["random_high"])).mean()
        assert 0.02 < outside < 0.09
        assert 0.02 < (found["p"] < 0.05).mean() < 0.09


def test_updates_of_different_bases_or_of_one_adapter_alone_are_refused(pair):
    with pytest.raises(AdapterError, match="different bases"):
        geometry.update_cosines({"a": pair[0], "b": dataclasses.replace(pair[1], base="other")})
    with pytest.raises(ValueError, match="two or more"):
        geometry.update_overlaps({"a": pair[0]})


def test_a_pair_frame_becomes_a_square_and_likes_stand_together():
    updates = {name: made([(0, "q_proj")], seed=seed) for name, seed in (("a", 1), ("x", 2), ("b", 1), ("y", 2))}
    square = geometry.as_matrix(geometry.update_cosines(updates, draws=20))
    assert square.loc["a", "b"] == square.loc["b", "a"] == pytest.approx(1)
    order = geometry.cluster_order(square)
    assert {frozenset(order[:2]), frozenset(order[2:])} == {frozenset("ab"), frozenset("xy")}
    with pytest.raises(ValueError, match="several rows"):
        geometry.as_matrix(geometry.update_overlaps(updates, draws=20), "overlap")


# --- subspaces ---------------------------------------------------------------------------------------------------


def test_principal_angles_and_overlaps_are_those_of_scipy(pair):
    first, second = map(dense, pair)
    found = geometry.update_overlaps({"a": pair[0], "b": pair[1]}, draws=20)
    assert found[["layer", "module", "space"]].drop_duplicates().shape == (4, 3)
    for row in found.to_dict("records"):
        a, b = (update[f"model.layers.{row['layer']}.{row['module']}"] for update in (first, second))
        bases = [np.linalg.svd(each if row["space"] == "write" else each.T)[0] for each in (a, b)]
        expected = np.sort(subspace_angles(bases[0][:, :2], bases[1][:, :3]))
        assert row["angles"] == pytest.approx(np.degrees(expected).tolist(), abs=1e-3)
        assert row["overlap"] == pytest.approx((np.cos(expected) ** 2).mean(), abs=1e-5)
        grams = [each @ each.T if row["space"] == "write" else each.T @ each for each in (a, b)]
        assert row["weighted"] == pytest.approx(cosine(*grams), abs=1e-5)
        assert (row["rank_first"], row["rank_second"]) == (2, 3)


@pytest.mark.parametrize(("width", "k", "m"), [(40, 3, 2), (40, 1, 1), (9, 6, 5)])
def test_random_blocks_are_blocks_of_random_orthogonal_matrices(width, k, m):
    found = random_blocks(width, k, m, draws=4000, rng=np.random.default_rng(0))
    whole = stats.ortho_group(width).rvs(4000, random_state=1)[:, :k, :m]
    assert (found**2).sum((1, 2)).mean() == pytest.approx(k * m / width, rel=0.05)
    for statistic in (lambda x: (x**2).sum((1, 2)), lambda x: x[:, 0, 0], lambda x: np.linalg.svd(x)[1][:, 0]):
        assert stats.ks_2samp(statistic(found), statistic(whole)).pvalue > 0.001


def test_random_subspaces_overlap_as_expected_and_pass_the_test_at_its_rate():
    many = {str(seed): made([(0, "q_proj"), (1, "q_proj")], rank=3, seed=seed) for seed in range(24)}
    found = geometry.update_overlaps(many, draws=400)
    for value, expected, p in (("overlap", "expected", "p"), ("weighted", "weighted_expected", "weighted_p")):
        assert found[value].mean() == pytest.approx(found[expected].mean(), rel=0.05)
        assert 0.02 < (found[p] < 0.05).mean() < 0.09


def test_a_planted_common_column_is_found_and_only_where_it_was_planted(pair):
    B = pair[0].site(1, "q_proj").B[:, :1]
    planted = tuple(
        dataclasses.replace(site, B=torch.cat([B, site.B[:, 1:]], 1)) if site.key == (1, "q_proj") else site
        for site in pair[1].sites
    )
    other = dataclasses.replace(pair[1], sites=planted)
    found = geometry.update_overlaps({"a": pair[0], "b": other}, [(1, "q_proj")]).set_index("space")
    assert found.loc["write", "angles"][0] == pytest.approx(0, abs=0.05)
    assert found.loc["write", "p"] < 0.01
    assert found.loc["read", "p"] > 0.01


# --- base weights ------------------------------------------------------------------------------------------------


def test_shares_of_an_update_in_the_bases_top_subspace_are_those_of_dense_algebra(pair):
    W = {site.name + ".weight": torch.randn(site.d_out, site.d_in) for site in pair[0].sites}
    found = geometry.base_overlap(pair[0], W, top=4, draws=50)
    for (layer, module), rows in found.groupby(["layer", "module"]):
        name = f"model.layers.{layer}.{module}"
        w, update = W[name + ".weight"].double().numpy(), dense(pair[0])[name]
        U, S, Vh = np.linalg.svd(w)
        size = np.linalg.norm(update)
        told = rows.set_index("measure")["value"]
        assert told["write"] == pytest.approx(np.linalg.norm(U[:, :4].T @ update) ** 2 / size**2, abs=1e-6)
        assert told["read"] == pytest.approx(np.linalg.norm(update @ Vh[:4].T) ** 2 / size**2, abs=1e-6)
        assert told["cosine"] == pytest.approx(cosine(update, w), abs=1e-6)
        assert rows["base_share"].iloc[0] == pytest.approx((S[:4] ** 2).sum() / (S**2).sum())


def test_an_update_inside_of_the_top_subspace_is_told_from_a_random_one():
    (site,) = made([(0, "q_proj")], rank=2).sites
    W = torch.randn(20, 30, generator=torch.Generator().manual_seed(3))
    U, _, Vh = torch.linalg.svd(W)
    inside = Adapter((dataclasses.replace(site, B=U[:, :2].clone(), A=Vh[20:22].clone()),), "m", "s", None, "", {})
    found = geometry.base_overlap(inside, {site.name: W}, top=4).set_index("measure")
    assert found.loc["write", "value"] == pytest.approx(1)
    assert found.loc["write", "p"] < 0.01
    assert found.loc["read", "value"] == pytest.approx(0, abs=1e-10)
    p = [
        geometry.base_overlap(made([(0, "q_proj")], seed=seed), {site.name: W}, top=4, draws=200, seed=seed)["p"]
        for seed in range(60)
    ]
    assert 0.01 < (np.concatenate(p) < 0.05).mean() < 0.1


def test_base_weights_of_other_shapes_or_missing_are_refused(pair):
    with pytest.raises(KeyError, match="state_dict"):
        geometry.base_overlap(pair[0], {})
    name = pair[0].sites[0].name
    with pytest.raises(ValueError, match=r"is \[50, 20\] in the base"):
        geometry.base_overlap(pair[0], {name: torch.zeros(50, 20)}, sites=[(0, "down_proj")])
    with pytest.raises(ValueError, match="top=20"):
        geometry.base_overlap(pair[0], {name: torch.zeros(20, 50)}, top=20, sites=[(0, "down_proj")])


# --- shared and specific -----------------------------------------------------------------------------------------


def test_updates_are_taken_apart_into_orthogonal_parts_that_add_up():
    common = made([(0, "q_proj"), (1, "q_proj")], rank=1, seed=9)
    own = [made([(0, "q_proj"), (1, "q_proj")], rank=1, seed=seed) for seed in range(4)]
    members = {str(i): combine({common: 2.0, each: 1.0}) for i, each in enumerate(own)}
    parts = geometry.shared_and_specific_updates(members)
    axis = parts.shared
    lengths = {name: np.sqrt(sum(site.delta_norm() ** 2 for site in each.sites)) for name, each in members.items()}
    for name, member in members.items():
        rest, whole = dense(parts.specific[name]), dense(member)
        along = sum((whole[site] * dense(axis)[site]).sum() for site in whole)
        size = sum((dense(axis)[site] ** 2).sum() for site in whole)
        assert sum((rest[site] * dense(axis)[site]).sum() for site in rest) == pytest.approx(0, abs=1e-2)
        for site in whole:
            np.testing.assert_allclose(rest[site], whole[site] - along / size * dense(axis)[site], atol=1e-4)
        told = parts.shares.set_index("name").loc[name]
        assert told["share"] == pytest.approx(along**2 / size / lengths[name] ** 2, abs=1e-4)
    assert (parts.shares["held_out"] > 0.4).all()
    apart = geometry.shared_and_specific_updates({str(i): each for i, each in enumerate(own)}).shares
    assert (apart["held_out"] < 0.05).all()


def test_the_spectrum_of_updates_tells_one_from_several():
    common = made([(0, "q_proj"), (1, "q_proj")], rank=1, seed=9)
    own = [made([(0, "q_proj"), (1, "q_proj")], rank=1, seed=seed) for seed in range(4)]
    alike = geometry.update_spectrum({str(i): combine({common: 3.0, each: 1.0}) for i, each in enumerate(own)})
    apart = geometry.update_spectrum({str(i): each for i, each in enumerate(own)})
    assert alike.summary["effective_rank"].iloc[0] < 1.5 < alike.summary["random_low"].iloc[0]
    (row,) = apart.summary.to_dict("records")
    assert row["random_low"] <= row["effective_rank"] <= row["random_high"]
    assert apart.values["share"].sum() == pytest.approx(1)
