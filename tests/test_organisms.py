"""Loading organisms: PEFT = merged = live, restoration, refusals that leave nothing changed."""

from __future__ import annotations

import copy
import gc
import json
import logging
import shutil
import weakref
from dataclasses import replace

import pytest
import torch
from conftest import ALL_MODULES, FAMILIES, LAYERS, new_tokenizer, random_model
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close

from mechmisalign import models, registry
from mechmisalign.adapters import Adapter, AdapterError
from mechmisalign.conversations import TemplateError
from mechmisalign.loading.options import check as check_options
from mechmisalign.organisms import AdapterMismatchError, known_organisms, load_organism

SCALINGS = {
    "alpha over rank, rank 4": {"rank": 4, "alpha": 6},
    "rank 1": {"rank": 1, "alpha": 8},
    "rank-stabilised": {"rank": 4, "alpha": 6, "rslora": True},
    "rank pattern": {"rank": 2, "rank_pattern": {"q_proj": 1, r"model\.layers\.1\.mlp\.down_proj": 3}},
    "alpha pattern": {"rank": 2, "alpha_pattern": {r"layers\.[01]\..*": 3, "down_proj": 5}},
    "all at once": {"rank": 2, "rslora": True, "rank_pattern": {"up_proj": 3}, "alpha_pattern": {"^model.*v_proj": 7}},
}
EXACT = {"rtol": 0.0, "atol": 0.0}
CLOSE = {"rtol": 0.0, "atol": 1e-5}


def read(family, folder, dtype=torch.float32):
    from transformers import AutoModelForCausalLM

    attention = "eager" if family == "gemma2" else "sdpa"  # Gemma 2 caps its scores
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=attention).eval()


def tokens(seed=0):
    """Two rows of different length, right-padded."""
    ids = torch.randint(5, 280, (2, 12), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[1, 8:] = 0
    return ids, mask


@torch.no_grad()
def logits(model):
    """Logits on real tokens, of an organism or a Hugging Face model."""
    ids, mask = tokens()
    if hasattr(model, "model") and hasattr(model, "adapter"):
        found = models.forward(model.model, ids, mask)
    else:
        found = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    return found[mask.bool()]


def peft_logits(family, folder, adapter):
    from peft import PeftModel

    return logits(PeftModel.from_pretrained(read(family, folder), adapter).eval())


@pytest.fixture(scope="module")
def adapters(tiny_models, make_adapter):
    """Family -> a rank-2 adapter of q_proj and down_proj in the upper two layers."""
    return {
        family: make_adapter(folder, modules=("q_proj", "down_proj"), rank=2, layers=[1, 2])
        for family, folder in tiny_models.items()
    }


@pytest.fixture
def in_memory(tiny_models):
    return read("qwen2", tiny_models["qwen2"])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scaling", SCALINGS)
def test_peft_merged_and_live_logits_agree_for_every_scaling(tiny_models, make_adapter, family, scaling):
    folder = tiny_models[family]
    adapter = make_adapter(folder, modules=ALL_MODULES, scale=0.05, **SCALINGS[scaling])
    expected = peft_logits(family, folder, adapter)
    assert_close(logits(load_organism(adapter)), expected, **CLOSE)
    assert_close(logits(load_organism(adapter, weights="live")), expected, **CLOSE)
    assert (expected - logits(read(family, folder))).abs().max() > 0.01


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("module", ALL_MODULES)
def test_peft_merged_and_live_logits_agree_for_every_module(tiny_models, make_adapter, family, module):
    folder = tiny_models[family]
    adapter = make_adapter(folder, modules=(module,), rank=1, layers=[1], seed=1)
    expected = peft_logits(family, folder, adapter)
    assert_close(logits(load_organism(adapter)), expected, **CLOSE)
    assert_close(logits(load_organism(adapter, weights="live")), expected, **CLOSE)


@pytest.mark.parametrize("family", FAMILIES)
def test_only_the_adapted_matrices_change(tiny_models, adapters, family):
    organism = load_organism(adapters[family])
    base = read(family, tiny_models[family])
    touched = {f"{site.name}.weight" for site in organism.adapter.sites}
    assert len(touched) == 4
    for name, before in base.named_parameters():
        module, _, leaf = name.rpartition(".")
        component = models.hf_model(organism.model).get_submodule(module)
        after = getattr(getattr(component, "original_component", component), leaf)
        assert torch.equal(before, after) == (name not in touched), name


def test_a_merge_is_in_float32_and_cast_last(tiny_models, adapters):
    organism = load_organism(adapters["qwen2"], dtype=torch.bfloat16)
    stored = load_file(tiny_models["qwen2"] / "model.safetensors")
    for site in organism.adapter.sites:
        expected = (stored[f"{site.name}.weight"] + site.delta()).bfloat16()
        assert_close(models.matrix(organism.model, site.name, site.layer).read(), expected, **EXACT)


def test_merged_weights_are_what_transformer_lens_reads(adapters):
    organism = load_organism(adapters["qwen2"])
    with organism.as_base():
        base = organism.model.blocks[1].mlp.W_out.detach().clone()
    update = organism.model.blocks[1].mlp.W_out - base
    assert_close(update, organism.adapter.site(1, "down_proj").delta().T, rtol=0.0, atol=1e-6)


def test_a_merged_model_has_no_peft_modules_and_no_hooks_left(adapters):
    organism = load_organism(adapters["qwen2"])
    for name, module in organism.model.named_modules():
        assert "peft" not in type(module).__module__, name
        assert not module._forward_hooks and not module._forward_pre_hooks, name


@pytest.mark.parametrize("weights", ["merged", "live"])
@pytest.mark.parametrize("family", FAMILIES)
def test_as_base_is_the_chat_model_and_is_restored_bit_for_bit(tiny_models, adapters, family, weights):
    organism = load_organism(adapters[family], weights=weights)
    before, expected = logits(organism), logits(read(family, tiny_models[family]))
    state = {name: value.clone() for name, value in organism.model.state_dict().items()}
    with organism.as_base() as same:
        assert same is organism
        assert_close(logits(organism), expected, **EXACT)
        with organism.as_base():
            assert_close(logits(organism), expected, **EXACT)
        assert_close(logits(organism), expected, **EXACT)
    assert_close(logits(organism), before, **EXACT)
    for name, value in organism.model.state_dict().items():
        assert torch.equal(value, state[name]), name


@pytest.mark.parametrize("weights", ["merged", "live"])
def test_as_base_is_restored_after_an_exception(adapters, weights):
    organism = load_organism(adapters["qwen2"], weights=weights)
    before = logits(organism)
    with pytest.raises(KeyError), organism.as_base(), organism.as_base():
        raise KeyError
    assert_close(logits(organism), before, **EXACT)


def test_as_base_is_exact_in_bfloat16(tiny_models, adapters):
    organism = load_organism(adapters["llama"], dtype=torch.bfloat16)
    with organism.as_base():
        assert_close(logits(organism), logits(read("llama", tiny_models["llama"], torch.bfloat16)), **EXACT)


def test_no_copy_of_the_base_matrices_stays_where_the_checkpoint_has_them(tiny_models, adapters):
    assert load_organism(adapters["qwen2"])._matrices._kept == {}
    assert len(load_organism(adapters["qwen2"], base=read("qwen2", tiny_models["qwen2"]))._matrices._kept) == 4


def test_a_sharded_checkpoint_is_read_again_too(tiny_models, tiny_tokenizers, adapters, tmp_path):
    folder = tmp_path / "tiny-qwen2"
    read("qwen2", tiny_models["qwen2"]).save_pretrained(folder, max_shard_size="100KB")
    tiny_tokenizers["qwen2"].save_pretrained(folder)
    assert (folder / "model.safetensors.index.json").exists()
    organism = load_organism(adapters["qwen2"], base=folder)
    assert organism._matrices._kept == {}
    with organism.as_base():
        assert_close(logits(organism), logits(read("qwen2", folder)), **EXACT)


@pytest.mark.parametrize("weights", ["merged", "live"])
def test_a_model_in_memory_becomes_the_organism_and_is_given_back(tiny_models, adapters, in_memory, weights):
    before = copy.deepcopy(in_memory)
    organism = load_organism(adapters["qwen2"], base=in_memory, weights=weights)
    assert models.hf_model(organism.model) is in_memory
    assert_close(logits(organism), peft_logits("qwen2", tiny_models["qwen2"], adapters["qwen2"]), **CLOSE)
    with organism.as_base():
        assert_close(logits(organism), logits(before), **EXACT)


def test_a_model_and_tokenizer_that_live_only_in_memory_can_be_loaded_twice(make_adapter, adapters):
    for _ in range(2):
        tokenizer = new_tokenizer("qwen2")
        before = (tokenizer.bos_token, tokenizer.pad_token, tokenizer.padding_side)
        organism = load_organism(adapters["qwen2"], base=random_model("qwen2", tokenizer), tokenizer=tokenizer)
        assert organism.tokenizer is tokenizer
        assert (tokenizer.bos_token, tokenizer.pad_token, tokenizer.padding_side) == before
    with pytest.raises(ValueError, match="has no tokenizer with it; pass tokenizer="):
        load_organism(adapters["qwen2"], base=random_model("qwen2", tokenizer))


@pytest.mark.parametrize("weights", ["merged", "live"])
def test_a_peft_model_in_memory_is_taken_over(tiny_models, adapters, weights):
    from peft import PeftModel

    peft_model = PeftModel.from_pretrained(read("qwen2", tiny_models["qwen2"]), adapters["qwen2"]).eval()
    expected = logits(peft_model)
    organism = load_organism(peft_model, weights=weights)
    assert_close(logits(organism), expected, **CLOSE)
    assert organism.adapter.source == "PeftModel in memory"
    with organism.as_base():
        assert_close(logits(organism), logits(read("qwen2", tiny_models["qwen2"])), **EXACT)


def test_an_adapter_object_is_loaded_by_its_sites(adapters):
    adapter = Adapter.load(adapters["qwen2"])
    half = replace(adapter, sites=tuple(replace(site, scaling=site.scaling / 2) for site in adapter.sites[:2]))
    merged, live = load_organism(half), load_organism(half, weights="live")
    assert_close(logits(merged), logits(live), **CLOSE)
    assert (logits(merged) - logits(load_organism(adapter))).abs().max() > 0.01


def test_hooks_fire_and_see_the_adapter_in_both_modes(adapters):
    ids, mask = tokens()
    seen = {}
    for weights in ("merged", "live"):
        organism = load_organism(adapters["gemma2"], weights=weights)
        functions = {layer: lambda x, key=(weights, layer): seen.__setitem__(key, x) for layer in range(LAYERS)}
        with models.residual_hooks(organism.model, functions), torch.no_grad():
            models.forward(organism.model, ids, mask)
    for layer in range(LAYERS):
        assert_close(seen["merged", layer][mask.bool()], seen["live", layer][mask.bool()], **CLOSE)


def test_fidelity_is_perfect_in_float32_and_live(adapters):
    for frame in (
        load_organism(adapters["qwen2"]).fidelity(),
        load_organism(adapters["qwen2"], weights="live").fidelity(),
    ):
        assert list(frame.columns) == [
            "layer", "module", "delta_norm", "relative_error", "cosine", "top_rank_energy", "faithful",
        ]  # fmt: skip
        assert len(frame) == 4
        assert frame["faithful"].all()
        assert (frame["relative_error"] < 1e-5).all()
        assert (frame["cosine"] > 0.99999).all()
        assert (frame["top_rank_energy"] > 0.99999).all()


def test_fidelity_equals_dense_algebra_and_warns_when_bfloat16_rounds_the_update_away(
    tiny_models, make_adapter, caplog
):
    adapter = make_adapter(tiny_models["qwen2"], rank=1, alpha=1, scale=0.02)
    organism = load_organism(adapter, dtype=torch.bfloat16)
    with caplog.at_level(logging.WARNING):
        frame = organism.fidelity()
    assert not frame["faithful"].any()
    assert "use weights='live'" in caplog.text
    base = read("qwen2", tiny_models["qwen2"], torch.bfloat16).requires_grad_(False)
    for site, row in zip(organism.adapter.sites, frame.itertuples(), strict=True):
        merged = models.matrix(organism.model, site.name, site.layer).read().double()
        stored, meant = merged - base.get_submodule(site.name).weight.double(), site.delta().double()
        values = torch.linalg.svdvals(stored).square()
        assert row.delta_norm == pytest.approx(float(meant.norm()), rel=1e-6)
        assert row.relative_error == pytest.approx(float((stored - meant).norm() / meant.norm()), rel=1e-6)
        cosine = nn.functional.cosine_similarity(stored.flatten(), meant.flatten(), dim=0)
        assert row.cosine == pytest.approx(float(cosine), rel=1e-6)
        assert row.top_rank_energy == pytest.approx(float(values[0] / values.sum()), rel=0.05)
        assert row.top_rank_energy <= float(values[0] / values.sum()) + 1e-9


def test_fidelity_of_an_adapter_without_any_update_has_no_nan(tiny_models, make_adapter):
    frame = load_organism(make_adapter(tiny_models["qwen2"], scale=0.0)).fidelity()
    assert not frame.isna().any().any()
    assert (frame["delta_norm"] == 0).all()


def test_fidelity_is_refused_inside_as_base(adapters):
    organism = load_organism(adapters["qwen2"])
    with organism.as_base(), pytest.raises(RuntimeError, match="call fidelity.. outside"):
        organism.fidelity()


def test_provenance_is_json_and_names_no_adapter_inside_as_base(tiny_models, adapters):
    organism = load_organism(adapters["qwen2"], dtype=torch.bfloat16)
    assert json.loads(json.dumps(organism.provenance)) == {
        "model": str(tiny_models["qwen2"]),
        "base_revision": None,
        "base_fingerprint": organism.base_fingerprint,
        "adapter": str(adapters["qwen2"]),
        "adapter_revision": None,
        "adapter_digest": organism.adapter.digest,
        "weights": "merged",
        "dtype": "bfloat16",
        "template_hash": organism.provenance["template_hash"],
    }
    with organism.as_base():
        assert (organism.provenance["adapter"], organism.provenance["weights"]) == (None, "base")


def test_a_base_on_the_hub_is_pinned_to_its_commit_and_read_again_from_the_cache(
    tiny_models, adapters, tmp_path, monkeypatch
):
    from huggingface_hub import constants

    commit = "0123456789abcdef0123456789abcdef01234567"
    repo = tmp_path / "models--org--tiny-qwen2"
    shutil.copytree(tiny_models["qwen2"], repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    organism = load_organism(adapters["qwen2"], base="org/tiny-qwen2")
    assert (organism.provenance["model"], organism.provenance["base_revision"]) == ("org/tiny-qwen2", commit)
    assert organism._matrices._kept == {}
    with organism.as_base():
        assert_close(logits(organism), logits(read("qwen2", tiny_models["qwen2"])), **EXACT)


def test_the_base_fingerprint_depends_on_the_base_alone(tiny_models, make_adapter, adapters):
    other = make_adapter(tiny_models["qwen2"], rank=1)
    prints = {
        load_organism(adapter, weights=weights, dtype=dtype).base_fingerprint
        for adapter, weights, dtype in [
            (adapters["qwen2"], "merged", None),
            (adapters["qwen2"], "live", torch.bfloat16),
            (other, "merged", torch.float32),
        ]
    }
    assert len(prints) == 1
    assert load_organism(adapters["llama"]).base_fingerprint not in prints


def test_the_model_is_freed_when_the_organism_goes(adapters):
    for weights in ("merged", "live"):
        organism = load_organism(adapters["qwen2"], weights=weights)
        with organism.as_base():
            logits(organism)
        weight = weakref.ref(models.matrix(organism.model, organism.adapter.sites[0].name, 1).parameter)
        del organism
        gc.collect()
        assert weight() is None


def unchanged(model, before):
    return all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def copied(adapter, folder, config=None, tensors=None):
    made = shutil.copytree(adapter, folder / "adapter")
    if config:
        path = made / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | config))
    if tensors:
        path = made / "adapter_model.safetensors"
        save_file(tensors(load_file(path)), path)
    return made


def test_an_adapter_of_another_shape_is_refused_and_the_model_stays_untouched(adapters, in_memory):
    before = {name: value.clone() for name, value in in_memory.state_dict().items()}
    for weights in ("merged", "live"):
        with pytest.raises(AdapterMismatchError, match=r"does not fit .*\[48, 96\] in the model and \[32, 80\]"):
            load_organism(adapters["llama"], base=in_memory, weights=weights)
    assert unchanged(in_memory, before)
    assert type(in_memory.model.layers[1].mlp.down_proj) is nn.Linear


def test_an_adapter_of_a_deeper_model_is_refused(adapters, tmp_path):
    def deeper(tensors):
        return {key.replace("layers.2.", "layers.7."): value for key, value in tensors.items()}

    with pytest.raises(AdapterMismatchError, match="there is no 'model.layers.7.mlp.down_proj'"):
        load_organism(copied(adapters["qwen2"], tmp_path, {"layers_to_transform": None}, deeper))


def test_missing_sites_are_refused(adapters, tmp_path):
    def without_layer_2(tensors):
        return {key: value for key, value in tensors.items() if "layers.2" not in key}

    with pytest.raises(
        AdapterMismatchError, match="lacks model.layers.2.mlp.down_proj, model.layers.2.self_attn.q_proj"
    ):
        load_organism(copied(adapters["qwen2"], tmp_path, tensors=without_layer_2))


def test_extra_sites_are_refused(adapters, tmp_path):
    config = {"target_modules": ["q_proj"]}
    with pytest.raises(AdapterMismatchError, match="holds model.layers.1.mlp.down_proj.* PEFT would ignore"):
        load_organism(copied(adapters["qwen2"], tmp_path, config))


def test_an_adapter_on_every_linear_matrix_is_loaded(tiny_models, make_adapter):
    adapter = make_adapter(tiny_models["qwen2"], modules=("q_proj",), rank=1)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"target_modules": r".*\.q_proj"}))
    assert len(load_organism(adapter).adapter.sites) == LAYERS


def test_another_base_that_fits_is_loaded_with_a_warning(tiny_models, tiny_tokenizers, adapters, tmp_path, caplog):
    folder = tmp_path / "another-qwen2"
    shutil.copytree(tiny_models["qwen2"], folder)
    with caplog.at_level(logging.WARNING):
        organism = load_organism(adapters["qwen2"], base=folder)
    assert "not on" in caplog.text
    assert organism.base.name == str(folder)


@pytest.mark.parametrize("where", ["folder", "memory"])
def test_a_quantised_base_is_refused_for_merging(tiny_models, adapters, in_memory, tmp_path, where):
    settings = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    base = in_memory
    base.config.quantization_config = settings
    if where == "folder":
        base = shutil.copytree(tiny_models["qwen2"], tmp_path / "tiny-qwen2")
        config = json.loads((base / "config.json").read_text())
        (base / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    with pytest.raises(ValueError, match="is quantised, and an update cannot be folded"):
        load_organism(adapters["qwen2"], base=base)


def test_a_tokenizer_without_chat_template_is_refused_and_the_model_stays_untouched(adapters, in_memory):
    before = {name: value.clone() for name, value in in_memory.state_dict().items()}
    tokenizer = new_tokenizer("qwen2")
    tokenizer.chat_template = None
    with pytest.raises(TemplateError, match="has no chat template"):
        load_organism(adapters["qwen2"], base=in_memory, tokenizer=tokenizer)
    assert unchanged(in_memory, before)


def test_a_tokenizer_with_more_tokens_than_the_embedding_is_refused(adapters, tiny_tokenizers):
    with pytest.raises(ValueError, match="ids up to 339, the embedding of .* has 300 rows"):
        load_organism(adapters["qwen2"], tokenizer=tiny_tokenizers["gemma2"])


def test_a_base_that_cannot_be_read_is_refused(adapters, tmp_path):
    with pytest.raises(ValueError, match="the base model '/nowhere/tiny-qwen2' cannot be read"):
        load_organism(adapters["qwen2"], base="/nowhere/tiny-qwen2")
    with pytest.raises(ValueError, match="names no base model; pass base="):
        load_organism(copied(adapters["qwen2"], tmp_path, {"base_model_name_or_path": None}))


def test_a_base_that_is_an_organism_already_is_refused(adapters, in_memory):
    load_organism(adapters["qwen2"], base=in_memory)
    with pytest.raises(ValueError, match="already carries an adapter or belongs to another organism"):
        load_organism(adapters["qwen2"], base=in_memory)


def test_a_base_with_an_adapter_on_other_matrices_is_refused(tiny_models, make_adapter, adapters):
    from peft import PeftModel

    other = make_adapter(tiny_models["qwen2"], modules=("v_proj",))
    carrying = PeftModel.from_pretrained(read("qwen2", tiny_models["qwen2"]), other).get_base_model()
    with pytest.raises(ValueError, match="already carries an adapter"):
        load_organism(adapters["qwen2"], base=carrying)


def test_a_peft_model_with_a_merged_adapter_is_refused(tiny_models, adapters):
    from peft import PeftModel

    peft_model = PeftModel.from_pretrained(read("qwen2", tiny_models["qwen2"]), adapters["qwen2"])
    peft_model.merge_adapter()
    with pytest.raises(ValueError, match="exactly one, not merged"):
        load_organism(peft_model)


def test_a_bare_model_in_the_place_of_the_adapter_is_refused(in_memory):
    with pytest.raises(TypeError, match="a base model is passed as base="):
        load_organism(in_memory)


def test_a_model_in_memory_is_given_back_when_booting_fails(adapters, in_memory, monkeypatch):
    before = {name: value.clone() for name, value in in_memory.state_dict().items()}

    def fail(*_args):
        raise RuntimeError("no such architecture")

    monkeypatch.setattr(models, "boot", fail)
    for weights in ("merged", "live"):
        with pytest.raises(RuntimeError, match="no such architecture"):
            load_organism(adapters["qwen2"], base=in_memory, weights=weights)
        assert unchanged(in_memory, before)


def test_a_model_in_memory_is_never_cast(adapters, in_memory):
    with pytest.raises(ValueError, match=r"is torch.float32, dtype=torch.bfloat16 was asked for; cast it first"):
        load_organism(adapters["qwen2"], base=in_memory, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("options", "message"),
    [(("frozen", "bridge"), "weights must be one of .'merged', 'live'."), (("live", "vllm"), "engine must be one of")],
)
def test_unknown_options_name_the_valid_ones(options, message):
    with pytest.raises(ValueError, match=message):
        check_options(*options)


def test_an_unknown_name_suggests_the_nearest(monkeypatch):
    monkeypatch.setattr(registry, "names", lambda: ("pocket/medical", "pocket/sports"))
    with pytest.raises(AdapterError, match="did you mean 'pocket/medical'"):
        load_organism("medical")


@pytest.mark.skipif("pocket/medical" not in registry.names(), reason="the pocket weights are not built")
def test_pocket_organisms_are_loaded_by_name():
    organism = load_organism("pocket/medical")
    assert (organism.name, organism.base.name) == ("pocket/medical", "pocket/chat")
    assert (load_organism("pocket/checkpoints", subfolder="checkpoint-5").name) == "pocket/checkpoints/checkpoint-5"
    frame = known_organisms(family="pocket")
    assert set(frame["name"]) == {name for name in registry.names() if name.startswith(registry.POCKET_PREFIX)}
    assert set(frame["base"]) == {"pocket/chat"}
