"""Adapters against PEFT and dense algebra; refusals."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from mechmisalign._adapter_files import resolve_pattern
from mechmisalign.adapters import Adapter, AdapterError, LoraSite

SCALINGS = {
    "alpha over rank": {"rank": 4, "alpha": 6},
    "rank one": {"rank": 1, "alpha": 64},
    "rank-stabilised": {"rank": 4, "alpha": 6, "rslora": True},
    "rank pattern": {"rank": 2, "rank_pattern": {"q_proj": 1, r"model\.layers\.1\.mlp\.down_proj": 3}},
    "alpha pattern": {"rank": 2, "alpha_pattern": {r"layers\.[01]\..*": 3, "down_proj": 5}},
    "all at once": {
        "rank": 2,
        "rslora": True,
        "rank_pattern": {"down_proj": 3},
        "alpha_pattern": {"^model.*q_proj": 7},
    },
}


@pytest.fixture
def site():
    generator = torch.Generator().manual_seed(0)
    A, B = torch.randn(3, 7, generator=generator), torch.randn(5, 3, generator=generator)
    return LoraSite(2, "down_proj", "model.layers.2.mlp.down_proj", A, B, 1.5)


@pytest.fixture(scope="module")
def written(tiny_models, make_adapter):
    """An adapter of two modules in all layers, to be copied and broken."""
    return make_adapter(tiny_models["qwen2"], modules=("q_proj", "down_proj"), rank=2)


@pytest.fixture
def broken(written, tmp_path):
    """``broken(config={...}, tensors=function)``: a copy of the adapter with a changed config or changed tensors."""

    def make(config=None, tensors=None):
        folder = shutil.copytree(written, tmp_path / "broken")
        if config:
            path = folder / "adapter_config.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | config))
        if tensors:
            path = folder / "adapter_model.safetensors"
            save_file(tensors(load_file(path)), path)
        return folder

    return make


def test_a_site_knows_its_shape(site):
    assert (site.rank, site.d_in, site.d_out) == (3, 7, 5)


def test_the_update_is_scaling_times_b_a(site):
    assert_close(site.delta(), 1.5 * site.B @ site.A)


def test_the_norm_equals_that_of_the_dense_update(site):
    assert site.delta_norm() == pytest.approx(float(site.delta().norm()), rel=1e-6)


def test_singular_values_equal_those_of_the_dense_update(site):
    assert_close(site.singular_values(), torch.linalg.svdvals(site.delta().double())[:3], rtol=1e-6, atol=1e-6)


def test_singular_values_work_for_a_rank_above_the_width():
    site = LoraSite(0, "q_proj", "model.layers.0.self_attn.q_proj", torch.randn(6, 4), torch.randn(3, 6), -2.0)
    assert_close(site.singular_values(), torch.linalg.svdvals(site.delta().double()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scaling", SCALINGS)
def test_updates_equal_pefts_for_every_scaling(tiny_models, make_adapter, scaling):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder = make_adapter(tiny_models["qwen2"], modules=("q_proj", "down_proj"), **SCALINGS[scaling])
    peft_model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_models["qwen2"]), folder)
    sites = Adapter.load(folder).sites
    assert len(sites) == 6
    for site in sites:
        layer = peft_model.get_base_model().get_submodule(site.name)
        assert site.rank == layer.r["default"]
        assert site.scaling == layer.scaling["default"]
        assert_close(site.delta(), layer.get_delta_weight("default"))


@pytest.mark.parametrize(
    "patterns",
    [
        {"q_proj": 1},
        {"proj": 1},
        {r"layers\.1\..*": 1, "q_proj": 2},
        {"q_proj": 2, r"layers\.1\..*": 1},
        {"^model.*": 3},
        {"layers.1.self_attn.q_proj": 4},
        {"1.self_attn.q_proj": 5},
        {"self_attn": 6},
        {"model.layers.(0|1).self_attn.[qk]_proj": 7},
    ],
)
@pytest.mark.parametrize("name", ["model.layers.1.self_attn.q_proj", "model.layers.11.self_attn.q_proj"])
def test_patterns_are_resolved_as_peft_does(patterns, name):
    from peft.utils.other import get_pattern_key

    expected = patterns.get(get_pattern_key(patterns.keys(), name), 99)
    assert resolve_pattern(patterns, name, 99) == expected


def test_sites_are_ordered_and_found_by_layer_and_module(tiny_models, make_adapter):
    folder = make_adapter(tiny_models["llama"], modules=("v_proj", "down_proj"), layers=[2, 0])
    adapter = Adapter.load(folder)
    assert adapter.layers == (0, 2)
    assert adapter.modules == ("down_proj", "v_proj")
    assert [(site.layer, site.module) for site in adapter.sites] == [
        (0, "down_proj"), (0, "v_proj"), (2, "down_proj"), (2, "v_proj"),
    ]  # fmt: skip
    assert adapter.site(2, "v_proj").name == "model.layers.2.self_attn.v_proj"
    with pytest.raises(KeyError, match="no site 'v_proj' in layer 1"):
        adapter.site(1, "v_proj")


def test_an_adapter_knows_where_it_comes_from(tiny_models, written):
    adapter = Adapter.load(str(written))
    assert adapter.base == str(tiny_models["qwen2"])
    assert adapter.source == str(written)
    assert adapter.revision is None
    assert len(adapter.digest) == 64
    assert adapter.config["r"] == 2


def test_the_digest_changes_with_the_weights(written, broken):
    changed = broken(tensors=lambda tensors: {key: value + 1 for key, value in tensors.items()})
    assert Adapter.load(written).digest != Adapter.load(changed).digest


def test_bfloat16_weights_are_read_as_float32(broken):
    folder = broken(tensors=lambda tensors: {key: value.bfloat16() for key, value in tensors.items()})
    assert {site.A.dtype for site in Adapter.load(folder).sites} == {torch.float32}


def test_a_subfolder_is_read(written, tmp_path):
    shutil.copytree(written, tmp_path / "run" / "checkpoint-20")
    adapter = Adapter.load(tmp_path / "run", subfolder="checkpoint-20")
    assert adapter.source == f"{tmp_path}/run/checkpoint-20"
    with pytest.raises(AdapterError, match="no subfolder 'checkpoint-2'; did you mean 'checkpoint-20'"):
        Adapter.load(tmp_path / "run", subfolder="checkpoint-2")


def test_a_hub_id_is_read_from_the_cache_with_its_commit(written, tmp_path, monkeypatch):
    from huggingface_hub import constants

    commit = "0123456789abcdef0123456789abcdef01234567"
    repo = tmp_path / "models--org--organism"
    shutil.copytree(written, repo / "snapshots" / commit / "inner")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    adapter = Adapter.load("org/organism", subfolder="inner")
    assert (adapter.source, adapter.revision) == ("org/organism/inner", commit)
    with pytest.raises(AdapterError, match="'org/other' is no shipped organism and no folder, and the Hub"):
        Adapter.load("org/other")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"peft_type": "IA3"}, "adapter of type 'IA3', a LoRA"),
        ({"peft_type": "PROMPT_TUNING"}, "type 'PROMPT_TUNING'"),
        ({"use_dora": True}, "use_dora=True, which is not supported: DoRA also rescales"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices"),
        ({"lora_bias": True}, "lora_bias=True"),
        ({"bias": "all"}, "bias='all'"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"layer_replication": [[0, 2], [1, 3]]}, "layer_replication"),
        ({"r": 3}, r"\[3 d_in\] and \[d_out 3\] are expected"),
        ({"rank_pattern": {"q_proj": 1}}, "are expected for the rank 1 of its config"),
    ],
)
def test_an_adapter_with_another_kind_of_update_is_refused(broken, config, message):
    with pytest.raises(AdapterError, match=message):
        Adapter.load(broken(config=config))


def _without_first_b(tensors):
    return {key: value for i, (key, value) in enumerate(sorted(tensors.items())) if i != 1}


def _with(key):
    return lambda tensors: tensors | {key: torch.zeros(3, 3)}


def _with_nan(tensors):
    first = min(tensors)
    return tensors | {first: torch.full_like(tensors[first], torch.nan)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_with_nan, "NaN or infinite"),
        (_without_first_b, "lora_A of 'model.layers.0.mlp.down_proj' without its partner"),
        (_with("base_model.model.model.layers.0.mlp.down_proj.lora_magnitude_vector"), "unexpected key .*DoRA"),
        (_with("base_model.model.model.embed_tokens.weight"), "resized vocabulary is not supported"),
        (_with("base_model.model.lm_head.weight"), "resized vocabulary is not supported"),
        (_with("base_model.model.model.layers.0.mlp.down_proj.lora_B.bias"), "trained biases"),
        (_with("something.else"), "unexpected key 'something.else'"),
        (lambda _: {}, "holds no weights"),
    ],
)
def test_weights_that_are_not_plain_pairs_are_refused(broken, change, message):
    with pytest.raises(AdapterError, match=message):
        Adapter.load(broken(tensors=change))


def test_a_site_outside_the_blocks_is_refused(broken):
    def renamed(tensors):
        return {key.replace("model.layers.0.mlp.down_proj", "lm_head"): value for key, value in tensors.items()}

    with pytest.raises(AdapterError, match="adapts 'lm_head', which is in no block"):
        Adapter.load(broken(tensors=renamed))


def test_pickled_weights_are_refused(broken):
    folder = broken()
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(AdapterError, match="only a pickled adapter_model.bin, which can run code"):
        Adapter.load(folder)


def test_truncated_weights_are_refused(broken):
    path = broken() / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(AdapterError, match="cannot be read"):
        Adapter.load(path.parent)


def test_a_folder_without_adapter_config_is_refused(tiny_models):
    with pytest.raises(AdapterError, match="no adapter_config.json .*looks like a full model"):
        Adapter.load(tiny_models["qwen2"])


def test_a_config_that_is_not_json_is_refused(broken):
    folder = broken()
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(AdapterError, match="not JSON"):
        Adapter.load(folder)


def test_a_missing_path_names_its_nearest_neighbours(written):
    wrong = str(written)[:-1] + "x"
    with pytest.raises(AdapterError, match="there is no folder .*did you mean .*adapter-"):
        Adapter.load(wrong)


def test_a_misspelt_pocket_name_names_the_nearest_and_never_asks_the_hub(monkeypatch):
    from mechmisalign import registry

    monkeypatch.setattr(registry, "names", lambda: ("pocket/medical", "pocket/sports"))
    with pytest.raises(AdapterError, match="no organism is named 'pocket/medcal'; did you mean 'pocket/medical'"):
        Adapter.load("pocket/medcal")


def test_the_gauge_of_a_rank_beyond_the_matrix_keeps_the_update_and_its_coordinates():
    generator = torch.Generator().manual_seed(0)
    A, B = torch.randn(12, 9, generator=generator), torch.randn(5, 12, generator=generator)
    site = LoraSite(0, "k_proj", "model.layers.0.self_attn.k_proj", A, B, 0.5)
    assert_close(site.gauged.delta(), site.delta(), rtol=1e-5, atol=1e-5)
    assert (site.gauged.A.shape, site.gauged.B.shape) == (A.shape, B.shape)
    assert not site.gauged.A[5:].any()
