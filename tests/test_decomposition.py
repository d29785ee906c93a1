"""Anatomy of an adapter against dense algebra, and the gauge in which equal adapters read equal."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ALL_MODULES
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

import mechmisalign as mm


@pytest.fixture(scope="module")
def adapter(tiny_models, make_adapter):
    folder = make_adapter(
        tiny_models["qwen2"], modules=ALL_MODULES, rank=3, rank_pattern={"down_proj": 1}, rslora=True, seed=4
    )
    return mm.Adapter.load(folder)


def mixed(site, seed):
    """The same update in another gauge: ``B G, G⁻¹ A``."""
    G = torch.linalg.qr(torch.randn(site.rank, site.rank, generator=torch.Generator().manual_seed(seed)).double())[0]
    G = G @ torch.diag(torch.linspace(0.5, 3.0, site.rank).double())
    return replace(site, A=(torch.linalg.inv(G) @ site.A.double()).float(), B=(site.B.double() @ G).float())


def test_the_table_is_dense_algebra(adapter):
    table = mm.anatomy(adapter)
    total = sum(float(site.delta().double().norm()) ** 2 for site in adapter.sites)
    for row, site in zip(table.itertuples(), adapter.sites, strict=True):
        values = torch.linalg.svdvals(site.delta().double())[: site.rank]
        assert (row.layer, row.module, row.rank, row.scaling) == (*site.key, site.rank, site.scaling)
        assert row.singular_values == pytest.approx(values.tolist(), rel=1e-5)
        assert row.norm_delta == pytest.approx(float(site.delta().norm()), rel=1e-5)
        assert row.stable_rank == pytest.approx(float(values.square().sum() / values[0] ** 2), rel=1e-5)
        assert row.share == pytest.approx(float(values.square().sum()) / total, rel=1e-5)
    assert table["share"].sum() == pytest.approx(1.0)


def test_rank_one_factors_are_read_as_trained(adapter):
    table = mm.anatomy(adapter).set_index(["layer", "module"])
    site = adapter.site(1, "down_proj")
    row = table.loc[site.key]
    assert (row["norm_A"], row["norm_B"]) == pytest.approx((float(site.A.norm()), float(site.B.norm())), rel=1e-6)
    assert row["norm_delta"] == pytest.approx(site.scaling * row["norm_A"] * row["norm_B"], rel=1e-6)
    assert site.gauged is site


def test_equal_adapters_read_equal_in_any_gauge(adapter):
    other = replace(adapter, sites=tuple(site if site.rank == 1 else mixed(site, 1) for site in adapter.sites))
    first, second = mm.anatomy(adapter), mm.anatomy(other)
    columns = ["norm_A", "norm_B", "norm_delta", "stable_rank", "share"]
    np.testing.assert_allclose(first[columns], second[columns], rtol=1e-4)
    for one, two in zip(adapter.sites, other.sites, strict=True):
        assert_close(one.gauged.A, two.gauged.A, atol=1e-4, rtol=1e-3)
        assert_close(one.gauged.B, two.gauged.B, atol=1e-4, rtol=1e-3)
        assert one.rank == 1 or not torch.allclose(one.A, two.A, atol=1e-2)


def test_the_gauge_keeps_the_update_and_is_orthonormal(adapter):
    for site in adapter.sites:
        assert_close(site.gauged.delta(), site.delta(), atol=1e-6, rtol=1e-4)
        if site.rank > 1:
            assert_close(site.gauged.A @ site.gauged.A.T, torch.eye(site.rank), atol=1e-5, rtol=0)
            norms = site.scaling * site.gauged.B.norm(dim=0)
            assert_close(norms, site.singular_values().float(), atol=1e-6, rtol=1e-4)


def test_an_update_that_is_zero_has_no_shares_and_no_nan(adapter):
    dead = replace(adapter, sites=tuple(replace(site, B=torch.zeros_like(site.B)) for site in adapter.sites))
    table = mm.anatomy(dead)
    numbers = table[["norm_A", "norm_B", "norm_delta", "stable_rank", "share"]].to_numpy(float)
    assert np.isfinite(numbers).all() and (table["share"] == 0).all()


def test_bfloat16_files_and_subfolders_are_read(tiny_models, make_adapter, tmp_path):
    folder = make_adapter(tiny_models["qwen2"], rank=2, seed=3)
    inside = tmp_path / "run" / "checkpoint-5"
    inside.mkdir(parents=True)
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({key: value.bfloat16() for key, value in tensors.items()}, inside / "adapter_model.safetensors")
    (inside / "adapter_config.json").write_text(json.dumps(json.loads((folder / "adapter_config.json").read_text())))
    table = mm.anatomy(mm.Adapter.load(tmp_path / "run", subfolder="checkpoint-5"))
    assert table["norm_delta"].to_numpy() == pytest.approx(
        mm.anatomy(mm.Adapter.load(folder))["norm_delta"].to_numpy(), rel=0.01
    )


def test_written_cosines_hold_the_share_of_a_direction_that_a_site_can_write(adapter):
    width = adapter.site(0, "down_proj").d_out
    vectors = torch.randn(3, width, generator=torch.Generator().manual_seed(0))
    direction = mm.Direction(vectors, (0, 1, 2), {"model": "m"})
    table = mm.written_cosines(adapter, direction).set_index(["layer", "module"])
    assert set(table.index.get_level_values("module")) == {"o_proj", "down_proj"}
    for key, row in table.iterrows():
        site, unit = adapter.site(*key), direction.unit(key[0])
        if site.rank == 1:
            expected = torch.cosine_similarity(site.B[:, 0], unit, dim=0)
        else:
            fit = torch.linalg.lstsq(site.B.double(), unit.double()).solution
            expected = (site.B.double() @ fit).norm()
        assert row["cosine"] == pytest.approx(float(expected), abs=1e-5)


def test_the_band_of_random_cosines_holds_95_percent_of_them(adapter):
    from mechmisalign.geometry import random_cosine

    generator = torch.Generator().manual_seed(0)
    vectors = torch.nn.functional.normalize(torch.randn(4000, 48, generator=generator), dim=1)
    for rank in (1, 3):
        _, low, high = random_cosine(48, rank)
        cosines = vectors[:, 0] if rank == 1 else vectors[:, :rank].norm(dim=1)
        assert float(((cosines > low) & (cosines < high)).float().mean()) == pytest.approx(0.95, abs=0.015)
