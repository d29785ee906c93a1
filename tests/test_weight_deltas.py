"""Weight differences of full models: a merged LoRA comes back, spectra equal the dense SVD, odd checkpoints are refused."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import ALL_MODULES, LAYERS
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

import mechmisalign as mm
from mechmisalign.adapters import AdapterError
from mechmisalign.deltas import CheckpointError, Weights, captured, spectra

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def qwen(tiny_models):
    return tiny_models["qwen2"]


@pytest.fixture(scope="module")
def merged(qwen, make_adapter, tmp_path_factory):
    """A full model made by PEFT from a known LoRA of rank 3, and the LoRA."""
    from peft import PeftModel

    adapter = make_adapter(qwen, modules=ALL_MODULES, rank=3, alpha=5, layers=[0, 2])
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(qwen), adapter).merge_and_unload()
    folder = tmp_path_factory.mktemp("merged") / "model"
    model.save_pretrained(folder)
    return folder, mm.Adapter.load(adapter)


def changed(source, folder, edit):
    """A copy of a model's folder with its tensors edited."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / WEIGHTS)
    save_file(edit(dict(tensors)), folder / WEIGHTS, metadata={"format": "pt"})
    return folder


def with_noise(tensors, size=0.01, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        key: (value.float() + size * torch.randn(value.shape, generator=generator)).to(value.dtype)
        for key, value in tensors.items()
    }


# --- what is extracted


def test_a_merged_lora_comes_back(qwen, merged):
    folder, adapter = merged
    found = mm.extract_lora(folder, qwen, rank=3)
    assert [site.name for site in found.sites] == [site.name for site in adapter.sites]  # layer 1 was left alone
    for ours, theirs in zip(found.sites, adapter.sites, strict=True):
        assert_close(ours.delta(), theirs.delta(), atol=1e-5 * theirs.delta_norm(), rtol=0)
        assert_close(ours.singular_values(), theirs.singular_values(), rtol=1e-5, atol=1e-6)
    held = captured(found, folder, qwen)
    assert (held["captured"] > 1 - 1e-9).all() and len(held) == len(adapter.sites)


def test_one_rank_is_the_best_rank_one_approximation(qwen, merged):
    """Oracle: the dense SVD of the difference (Eckart and Young)."""
    folder, adapter = merged
    found = mm.extract_lora(folder, qwen, rank=1, modules=["gate_proj", "k_proj"], layers=[2])
    assert [site.label for site in found.sites] == ["2.gate_proj", "2.k_proj"]
    for site in found.sites:
        U, S, Vh = torch.linalg.svd(adapter.site(2, site.module).delta().double())
        assert_close(site.delta().double(), S[0] * torch.outer(U[:, 0], Vh[0]), atol=1e-5, rtol=1e-4)
    shares = mm.weight_deltas(folder, qwen, ranks=[1], modules=["gate_proj", "k_proj"]).dropna(subset=["share_1"])
    held = captured(found, folder, qwen).query("adapter_norm > 0").set_index("module")["captured"]
    told = shares[shares["layer"] == 2].set_index("module")["share_1"]
    assert_close(torch.tensor(held.to_numpy()), torch.tensor(told[held.index].to_numpy()), atol=1e-6, rtol=1e-6)


def test_an_extracted_adapter_is_one_that_peft_reads(qwen, merged, tmp_path):
    from peft import PeftModel

    folder, _ = merged
    mm.save_adapter(mm.extract_lora(folder, qwen, rank=3), tmp_path / "part")
    config = json.loads((tmp_path / "part" / "adapter_config.json").read_text())
    assert config["lora_alpha"] == config["r"] == 3 and not config["rank_pattern"]
    ids = torch.randint(5, 290, (2, 9), generator=torch.Generator().manual_seed(0))
    by_peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(qwen), tmp_path / "part").eval()
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(folder)(input_ids=ids).logits
        assert_close(by_peft(input_ids=ids).logits, expected, atol=1e-4, rtol=1e-4)


def test_a_rank_above_the_smaller_side_stops_there(qwen, tmp_path):
    folder = changed(qwen, tmp_path / "tuned", with_noise)
    found = mm.extract_lora(folder, qwen, rank=30, modules=["k_proj"], layers=[0])
    assert found.sites[0].rank == 24  # two heads of twelve
    mm.save_adapter(found, tmp_path / "part")
    again = mm.Adapter.load(tmp_path / "part").sites[0]
    assert again.rank == 24 and again.scaling == 1.0


def test_an_adapter_of_something_else_captures_nothing(qwen, merged, make_adapter):
    """Control: the same sites with random factors."""
    folder, _ = merged
    other = mm.Adapter.load(make_adapter(qwen, modules=ALL_MODULES, rank=3, layers=[0, 2], alpha=5, seed=9))
    held = captured(other, folder, qwen)
    assert held["captured"].max() < 0 and held["cosine"].abs().max() < 0.5
    lacking = captured(mm.extract_lora(folder, qwen, rank=3, layers=[0]), folder, qwen)
    assert (lacking.query("layer == 2")["captured"] == 0).all()


# --- the table


def test_a_merged_lora_has_its_rank_and_its_norm(qwen, merged):
    folder, adapter = merged
    table = mm.weight_deltas(folder, qwen, ranks=(1, 3, 64))
    touched = table[table["norm"] > 0]
    assert set(touched["layer"]) == {0, 2} and set(touched["kind"]) == {"matrix"}
    for row in touched.itertuples():
        site = adapter.site(int(row.layer), row.module)
        values = site.singular_values().square()
        assert row.norm == pytest.approx(site.delta_norm(), rel=1e-5)
        assert row.share_1 == pytest.approx(float(values[0] / values.sum()), rel=1e-5)
        assert row.stable_rank == pytest.approx(float(values.sum() / values[0]), rel=1e-5)
        assert row.share_3 == pytest.approx(1, abs=1e-6) and row.share_64 == pytest.approx(1, abs=1e-6)
        assert row.random_1 < row.random_3 <= row.random_64 <= 1 and row.random_3 < 0.6
    rest = table[table["norm"] == 0]
    assert rest["share_1"].isna().all() and {"embedding", "bias", "norm"} <= set(rest["kind"])


@pytest.mark.parametrize("family", ["qwen2", "llama", "gemma2"])
def test_every_tensor_has_a_row_with_its_own_norm(tiny_models, tmp_path, family):
    """Oracle: dense differences of the two state dicts."""
    base = tiny_models[family]
    folder = changed(base, tmp_path / "tuned", with_noise)
    table = mm.weight_deltas(folder, base, ranks=[2]).set_index("name")
    ours, theirs = load_file(folder / WEIGHTS), load_file(base / WEIGHTS)
    assert set(table.index) == set(theirs)
    for name, row in table.iterrows():
        delta = (ours[name] - theirs[name]).double()
        assert row["norm"] == pytest.approx(float(delta.norm()), rel=1e-6)
        before = float(theirs[name].double().norm()) or float("nan")  # biases start at zero
        assert row["relative_norm"] == pytest.approx(float(delta.norm()) / before, rel=1e-6, nan_ok=True)
        if delta.ndim == 2:
            values = torch.linalg.svdvals(delta).square()
            assert row["share_2"] == pytest.approx(float(values[:2].sum() / values.sum()), rel=1e-6)
        else:
            assert np.isnan(row["share_2"])
    assert list(table["layer"].dropna().unique()) == list(range(LAYERS))


def test_a_random_difference_has_the_share_of_the_control(tmp_path, qwen):
    table = mm.weight_deltas(changed(qwen, tmp_path / "tuned", with_noise), qwen, ranks=(1, 8))
    rows = table[table["kind"] == "matrix"]
    for rank in (1, 8):
        gap = rows[f"share_{rank}"] / rows[f"random_{rank}"] - 1
        assert gap.abs().max() < 0.15 and abs(gap.mean()) < 0.05


@pytest.mark.parametrize("shape", [(64, 128), (300, 300), (16, 4000), (500, 40)])
def test_shares_of_random_matrices_are_those_of_simulated_ones(shape):
    generator, found = torch.Generator().manual_seed(0), []
    for _ in range(20):
        values = torch.linalg.svdvals(torch.randn(shape, generator=generator)).square()
        found.append([float(values[:rank].sum() / values.sum()) for rank in (1, 8, 64)])
    assert np.allclose(np.mean(found, axis=0), spectra.random_shares(shape, (1, 8, 64)), rtol=0.04)


@pytest.mark.parametrize("decay", [0.0, 0.5, 1.5])
@pytest.mark.parametrize("transposed", [False, True])
def test_large_matrices_are_decomposed_as_the_dense_svd_does(monkeypatch, decay, transposed):
    """Where they are too large for it; a flat spectrum is the worst case of the random subspace."""
    monkeypatch.setattr(spectra, "EXACT", 16)
    generator = torch.Generator().manual_seed(1)
    delta = torch.randn(220, 300, generator=generator)
    U, S, Vh = torch.linalg.svd(delta.double(), full_matrices=False)
    S = S * torch.arange(1, 221) ** -decay
    delta = ((U * S) @ Vh).float()
    delta = delta.T.contiguous() if transposed else delta
    found = spectra.leading_squares(delta, 8)
    assert_close(found.sum(), S[:8].square().sum(), rtol=0.01, atol=0)
    assert bool((found <= S[:8].square() * (1 + 1e-5)).all())
    A, B = spectra.leading_factors(delta, 8)
    held = 1 - float((delta - B @ A).square().sum() / delta.square().sum())
    assert held == pytest.approx(float(S[:8].square().sum() / S.square().sum()), rel=0.01)


def test_extraction_through_a_random_subspace_gives_the_lora_back(monkeypatch, qwen, merged):
    monkeypatch.setattr(spectra, "EXACT", 4)
    monkeypatch.setattr(spectra, "_OVERSAMPLED", 4)
    folder, adapter = merged
    for ours, theirs in zip(mm.extract_lora(folder, qwen, rank=3).sites, adapter.sites, strict=True):
        assert_close(ours.delta(), theirs.delta(), atol=1e-5 * theirs.delta_norm(), rtol=0)


# --- rounding


def test_rounding_noise_is_what_a_cast_leaves():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(400, 300, generator=generator) * torch.logspace(-3, 1, 300)
    for dtype in (torch.bfloat16, torch.float16):
        left = float((values.to(dtype).double() - values.double()).square().sum())
        assert spectra.rounding_power(values.to(dtype)) == pytest.approx(left, rel=0.05)
    told = spectra.rounding_power(values.bfloat16())
    assert spectra.rounding_power(values.bfloat16().float()) == pytest.approx(told, rel=1e-9)  # it fits in bfloat16
    assert spectra.rounding_power(values) < 1e-6 * told
    assert spectra.rounding_power(torch.zeros(3, dtype=torch.bfloat16)) < 1e-70


def test_a_difference_near_the_rounding_of_bfloat16_is_said_to_be(qwen, tmp_path, caplog):
    base = changed(qwen, tmp_path / "base", lambda tensors: {key: each.bfloat16() for key, each in tensors.items()})
    tiny = changed(base, tmp_path / "tiny", lambda tensors: with_noise(tensors, 3e-4))
    table = mm.weight_deltas(tiny, base, ranks=[1], modules=["down_proj"])
    assert table["near_rounding"].all() and (table["rounding"] > 0.2).all() and "rounding" in caplog.text
    caplog.clear()
    table = mm.weight_deltas(changed(base, tmp_path / "large", with_noise), base, ranks=[1], modules=["down_proj"])
    assert not table["near_rounding"].any() and (table["rounding"] < 0.01).all() and not caplog.text


# --- layouts


def test_shards_are_read_as_one_file_is(qwen, merged, tmp_path):
    folder, _ = merged
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "sharded", max_shard_size="40KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 3
    whole, parts = (mm.weight_deltas(each, qwen, ranks=[1]) for each in (folder, tmp_path / "sharded"))
    assert whole.set_index("name").sort_index().equals(parts.set_index("name").sort_index())
    next((tmp_path / "sharded").glob("*-00002-*")).unlink()
    with pytest.raises(CheckpointError, match="which its index names"):
        Weights.open(tmp_path / "sharded")


def test_a_wrapper_around_the_language_model_is_compared_by_the_plain_names(qwen, tmp_path):
    def wrapped(tensors):
        inside = {key.replace("model.", "model.language_model.", 1): each for key, each in tensors.items()}
        return inside | {"model.vision_tower.layers.0.weight": torch.ones(2, 2)}

    base = changed(qwen, tmp_path / "base", wrapped)
    tuned = changed(qwen, tmp_path / "tuned", lambda tensors: with_noise(tensors))
    older = changed(
        qwen, tmp_path / "older", lambda each: {f"language_model.{key}": value for key, value in each.items()}
    )
    plain = mm.weight_deltas(tuned, qwen, ranks=[1])
    assert mm.weight_deltas(tuned, base, ranks=[1]).equals(plain)
    assert mm.weight_deltas(tuned, older, ranks=[1]).equals(plain)
    assert mm.extract_lora(tuned, base, layers=[1]).sites[0].name.startswith("model.layers.1.")


def test_an_unembedding_in_one_file_only_is_compared_with_what_it_was_tied_to(qwen, tmp_path):
    def untied(tensors):
        return tensors | {"lm_head.weight": 2 * tensors["model.embed_tokens.weight"]}

    table = mm.weight_deltas(changed(qwen, tmp_path / "tuned", untied), qwen).set_index("module")
    norm = load_file(qwen / WEIGHTS)["model.embed_tokens.weight"].double().norm()
    assert table.loc["lm_head", "norm"] == pytest.approx(float(norm), rel=1e-6)
    assert table.loc["embed_tokens", "norm"] == 0


# --- refusals


def test_what_cannot_be_compared_is_refused(qwen, tiny_models, make_adapter, tmp_path):
    def wider(tensors):
        return tensors | {"model.embed_tokens.weight": torch.cat([tensors["model.embed_tokens.weight"]] * 2)}

    def lacking(tensors):
        return {key: each for key, each in tensors.items() if "layers.1.mlp.up_proj" not in key}

    resized = changed(qwen, tmp_path / "resized", wider)
    with pytest.raises(CheckpointError, match="vocabulary was resized"):
        mm.weight_deltas(resized, qwen)
    assert len(mm.weight_deltas(resized, qwen, modules=["up_proj"])) == LAYERS
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj\.weight"):
        mm.weight_deltas(changed(qwen, tmp_path / "lacking", lacking), qwen)
    with pytest.raises(CheckpointError, match="different shapes"):
        mm.weight_deltas(tiny_models["llama"], qwen, modules=["up_proj"])
    with pytest.raises(CheckpointError, match=r"read it with mm\.Adapter\.load"):
        mm.weight_deltas(make_adapter(qwen), qwen)
    with pytest.raises(CheckpointError, match="no folder"):
        mm.weight_deltas("nowhere/at/all", qwen)
    with pytest.raises(CheckpointError, match="nothing is left"):
        mm.weight_deltas(qwen, qwen, modules=["no_such"])
    with pytest.raises(ValueError, match="ranks"):
        mm.weight_deltas(qwen, qwen, ranks=[0])
    with pytest.raises(ValueError, match="rank=0"):
        mm.extract_lora(qwen, qwen, rank=0)
    with pytest.raises(AdapterError, match="nothing to extract"):
        mm.extract_lora(qwen, qwen)


def test_spoilt_and_quantised_weights_are_refused(qwen, tmp_path):
    name = "model.layers.1.mlp.up_proj.weight"
    lost = changed(qwen, tmp_path / "lost", lambda each: each | {name: each[name] * float("nan")})
    with pytest.raises(CheckpointError, match="NaN"):
        mm.weight_deltas(lost, qwen)
    small = changed(qwen, tmp_path / "small", lambda each: each | {name: each[name].to(torch.int8)})
    with pytest.raises(CheckpointError, match="quantised"):
        mm.weight_deltas(qwen, small)
    pickled = tmp_path / "pickled"
    shutil.copytree(qwen, pickled)
    (pickled / WEIGHTS).rename(pickled / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pickled weights are not read"):
        mm.weight_deltas(pickled, qwen)
    (pickled / WEIGHTS).write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00not a header....")
    with pytest.raises(CheckpointError, match="cannot be read"):
        mm.weight_deltas(pickled, qwen)


def test_equal_models_are_said_to_be_equal(qwen, caplog):
    table = mm.weight_deltas(qwen, qwen)
    assert (table["norm"] == 0).all() and not table["near_rounding"].any() and "equal, number for number" in caplog.text


def test_the_figure_has_a_panel_for_each_module_and_says_what_it_cannot_draw(qwen, merged):
    table = mm.weight_deltas(merged[0], qwen)
    figure = mm.plots.delta_shares(table)
    shown = [axes for axes in figure.axes if axes.get_visible()]
    assert [axes.get_title(loc="left") for axes in shown] == ["q", "k", "v", "o", "gate", "up", "down"]
    down = table[(table["module"] == "down_proj") & (table["norm"] > 0)]
    drawn = [line.get_ydata() for line in shown[-1].lines if line.get_marker() == "o"]
    assert np.allclose(drawn, down[["share_1", "share_8", "share_64"]].T)
    with pytest.raises(ValueError, match="one to 4 ranks"):
        mm.plots.delta_shares(table.drop(columns=["share_1", "share_8", "share_64"]))
    with pytest.raises(ValueError, match="room for one module"):
        mm.plots.delta_shares(table, ax=shown[0])
