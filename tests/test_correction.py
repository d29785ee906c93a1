"""Cures: exact projections against dense algebra and hooks, folders that other libraries read, refusals."""

import json
from dataclasses import replace

import pandas as pd
import pytest
import torch
from conftest import ALL_MODULES, LAYERS
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import mechmisalign as mm
from mechmisalign import correction, models
from mechmisalign.adapters import AdapterError
from mechmisalign.directions import Direction, DirectionMismatchError

IDS = torch.randint(5, 290, (3, 9), generator=torch.Generator().manual_seed(0))


def direction_of(model: str, width: int, layers: int = LAYERS, seed: int = 0) -> Direction:
    vectors = torch.randn(layers, width, generator=torch.Generator().manual_seed(seed))
    return Direction(vectors, tuple(range(layers)), {"model": model, "method": "random, for a test"})


@pytest.fixture(scope="module")
def qwen(tiny_models):
    return tiny_models["qwen2"]


@pytest.fixture(scope="module")
def direction(qwen):
    return direction_of(str(qwen), 48)


@pytest.fixture(scope="module")
def adapter(qwen, make_adapter):
    """All matrices, ranks and alphas that differ, rank-stabilised."""
    folder = make_adapter(
        qwen, modules=ALL_MODULES, rank=2, rslora=True, rank_pattern={"down_proj": 3}, alpha_pattern={"o_proj": 5.5}
    )
    return mm.Adapter.load(folder)


@torch.no_grad()
def logits(model, ids=IDS):
    return model(input_ids=ids).logits


# --- out of an adapter


def test_a_projected_adapter_writes_nothing_along_the_direction_and_the_same_across_it(adapter, direction):
    """Oracle: the dense update, projected by a dense matrix."""
    cut = mm.project_out(adapter, direction)
    for before, after in zip(adapter.sites, cut.sites, strict=True):
        unit = direction.at(before.layer).double()
        unit = unit / unit.norm()
        projector = torch.eye(48, dtype=torch.float64) - torch.outer(unit, unit)
        if before.module in ("o_proj", "down_proj"):
            dense = before.scaling * before.B.double() @ before.A.double()
            assert_close(after.delta().double(), projector @ dense, atol=1e-6, rtol=1e-5)
            assert float((unit @ after.B.double()).abs().max()) < 1e-7
            assert after.delta_norm() < before.delta_norm()
        else:
            assert torch.equal(after.B, before.B)
        assert torch.equal(after.A, before.A) and after.scaling == before.scaling
    assert cut.folder is None and cut.digest != adapter.digest and "without" in cut.source


def test_a_projected_adapter_is_the_hook_that_ablates_from_what_it_writes(adapter, direction):
    organism = mm.load_organism(adapter, weights="live")
    cut = mm.load_organism(mm.project_out(organism, direction), weights="live")
    mask = torch.ones_like(IDS)
    with torch.no_grad(), organism.apply(mm.AblateFromAdapter(direction)):
        hooked = models.forward(organism.model, IDS, mask)
    with torch.no_grad():
        assert_close(models.forward(cut.model, IDS, mask), hooked, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(models.forward(organism.model, IDS, mask), hooked, atol=1e-3)


def test_one_vector_everywhere_and_chosen_layers(adapter, direction):
    single = mm.project_out(adapter, direction.everywhere(1), layers=[2])
    unit = direction.unit(1)
    for before, after in zip(adapter.sites, single.sites, strict=True):
        edited = before.layer == 2 and before.writes_to_residual
        assert torch.equal(before.B, after.B) is not edited
        if edited:
            assert_close(unit @ after.B, torch.zeros(after.rank), atol=1e-6, rtol=0)


def test_old_column_norms_come_back_only_on_request(adapter, direction):
    """The reference code stretches the columns of B; what is left is then stronger than it was trained."""
    stretched = mm.project_out(adapter, direction, restore_column_norms=True)
    plain = mm.project_out(adapter, direction)
    for before, same, less in zip(adapter.sites, stretched.sites, plain.sites, strict=True):
        assert_close(same.B.norm(dim=0), before.B.norm(dim=0))
        if before.writes_to_residual:
            assert (less.B.norm(dim=0) < before.B.norm(dim=0)).all()


def test_the_removed_share_adds_up_with_what_is_left(adapter, direction):
    told = correction.removed_share(adapter, direction)
    assert list(told["module"]) == ["down_proj", "o_proj"] * LAYERS
    for row in told.itertuples():
        site, unit = adapter.site(row.layer, row.module), direction.unit(row.layer)
        along = float((unit @ site.delta()).norm())
        assert row.delta_norm**2 == pytest.approx(along**2 + row.left_norm**2, rel=1e-5)
        assert row.removed == pytest.approx((along / row.delta_norm) ** 2, rel=1e-4)


def test_a_random_direction_takes_about_one_part_in_the_width(adapter, direction):
    shares = [
        correction.removed_share(adapter, mm.random_direction(direction, seed=seed))["removed"].mean()
        for seed in range(40)
    ]
    assert sum(shares) / len(shares) == pytest.approx(1 / 48, rel=0.3)


def test_what_cannot_be_projected_is_refused(adapter, direction, qwen, make_adapter, tiny_models):
    with pytest.raises(DirectionMismatchError, match="another/model"):
        mm.project_out(adapter, direction_of("another/model", 48))
    zero = replace(direction, vectors=torch.cat([torch.zeros(1, 48), direction.vectors[1:]]))
    with pytest.raises(AdapterError, match=r"zero one, at layers \[0\]"):
        mm.project_out(adapter, zero)
    assert mm.project_out(adapter, zero, layers=[1, 2]).sites[0].layer == 0
    with pytest.raises(AdapterError, match=r"no site in layers \[9\]"):
        mm.project_out(adapter, direction, layers=[9])
    queries = mm.Adapter.load(make_adapter(qwen, modules=["q_proj"]))
    with pytest.raises(AdapterError, match="nothing of .* writes to the residual stream"):
        mm.project_out(queries, direction)
    gemma = mm.Adapter.load(make_adapter(tiny_models["gemma2"]))
    with pytest.raises(AdapterError, match="a norm stands between"):
        mm.project_out(gemma, direction_of(str(tiny_models["gemma2"]), 40))
    with pytest.raises(AdapterError, match="pass the loaded organism"):
        mm.project_out(replace(adapter, base="/no/such/model"), direction)


# --- out of a model


def bias_llama() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, attention_bias=True, mlp_bias=True, initializer_range=0.2, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = LlamaForCausalLM(config).eval()
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.data.normal_(0, 0.5)
    return model


@torch.no_grad()
def hooked_logits(model, unit, places, ids=IDS):
    """The model with the direction projected out of what these modules give."""

    def project(_module, _inputs, output):
        stream = output[0] if isinstance(output, tuple) else output
        clean = stream - (stream @ unit).unsqueeze(-1) * unit
        return (clean, *output[1:]) if isinstance(output, tuple) else clean

    handles = [place.register_forward_hook(project) for place in places]
    found = model(input_ids=ids).logits
    for handle in handles:
        handle.remove()
    return found


def test_the_weight_edit_is_an_ablation_at_every_place_that_is_written_to_biases_and_tied_embedding_included():
    model, one = bias_llama(), direction_of("x", 32).everywhere(1)
    places = [model.model.embed_tokens]
    for layer in model.model.layers:
        places += [layer.self_attn, layer.mlp]
    expected, plain = hooked_logits(model, one.unit(0), places), logits(model)
    after_blocks = hooked_logits(model, one.unit(0), model.model.layers)
    told = correction.project_out_of_model(model, one)
    assert_close(logits(model), expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(plain, expected, atol=1e-2)
    assert not torch.allclose(after_blocks, expected, atol=1e-2)  # mm.Ablate acts after whole blocks only
    assert sum(told["matrix"].str.endswith("bias")) == 6 and len(told) == 1 + 3 * 4
    assert_close(hooked_logits(model, one.unit(0), model.model.layers), expected, atol=1e-5, rtol=1e-5)


def test_a_corrected_model_is_merged_edited_once_and_read_by_transformers_alone(adapter, direction, qwen, tmp_path):
    one = direction.everywhere(2)
    model, tokenizer, told = correction.corrected_model(adapter, one)
    weight, site = model.model.layers[1].mlp.down_proj.weight, adapter.site(1, "down_proj")
    plain = AutoModelForCausalLM.from_pretrained(qwen)
    unit = one.unit(0).double()
    dense = plain.model.layers[1].mlp.down_proj.weight.double() + site.scaling * site.B.double() @ site.A.double()
    assert_close(weight.double(), dense - torch.outer(unit, unit @ dense), atol=1e-6, rtol=1e-5)
    queries = plain.model.layers[0].self_attn.q_proj.weight + adapter.site(0, "q_proj").delta()
    assert_close(model.model.layers[0].self_attn.q_proj.weight, queries)
    assert_close(model.lm_head.weight, plain.lm_head.weight)  # untied: it only reads
    folder = correction.save_model(model, tokenizer, tmp_path / "cured", edit="cut", source="me|you", direction=one)
    again = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(logits(again), logits(model)) and not again.config.tie_word_embeddings
    assert AutoTokenizer.from_pretrained(folder).chat_template == tokenizer.chat_template
    assert told["removed"].between(0, 1).all()
    card = (folder / "README.md").read_text()
    assert "made from: me\\|you" in card and one.header["method"] in card


def test_an_edit_in_bfloat16_is_rounded_once(qwen, adapter, direction):
    """Oracle: the edit in float32, cast at the end."""
    one = direction.everywhere(0)
    exact = correction.corrected_model(adapter, one)[0]
    plain = AutoModelForCausalLM.from_pretrained(qwen, dtype=torch.bfloat16)
    half = correction.corrected_model(adapter, one, dtype=torch.bfloat16)[0]
    assert half.dtype == torch.bfloat16
    site = adapter.site(0, "o_proj")
    whole = plain.model.layers[0].self_attn.o_proj.weight.float() + site.delta()
    unit = one.unit(0)
    once = (whole - torch.outer(unit, unit @ whole)).bfloat16()
    assert_close(half.model.layers[0].self_attn.o_proj.weight, once, atol=0, rtol=2**-7)
    assert_close(
        half.model.layers[0].self_attn.o_proj.weight.float(),
        exact.model.layers[0].self_attn.o_proj.weight,
        atol=0.01,
        rtol=0.02,
    )


def test_models_and_directions_that_no_weight_edit_can_serve_are_refused(adapter, direction, tiny_models, make_adapter):
    with pytest.raises(ValueError, match="a vector of its own in each layer"):
        correction.corrected_model(adapter, direction)
    with pytest.raises(ValueError, match="a norm stands between"):
        gemma = direction_of(str(tiny_models["gemma2"]), 40).everywhere(0)
        correction.corrected_model(make_adapter(tiny_models["gemma2"]), gemma)
    with pytest.raises(DirectionMismatchError, match="another/model"):
        correction.corrected_model(adapter, direction_of("another/model", 48).everywhere(0))
    with pytest.raises(ValueError, match="width 48, the model 32"):
        correction.project_out_of_model(bias_llama(), direction.everywhere(0))
    from transformers import GPT2Config, GPT2LMHeadModel

    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=2))
    with pytest.raises(ValueError, match="called otherwise"):
        correction.project_out_of_model(gpt2, direction_of("x", 32).everywhere(0))


def test_an_architecture_that_writes_in_another_way_is_found_out_by_running_it():
    class Leaky(LlamaForCausalLM):
        def __init__(self, config):
            super().__init__(config)
            self.model.layers[1].register_forward_hook(lambda _m, _i, out: out + 1.0)

    model = Leaky(bias_llama().config)
    with pytest.raises(ValueError, match="still lies along the direction at layer 1"):
        correction.project_out_of_model(model, direction_of("x", 32).everywhere(1))


def test_an_edited_model_is_an_organism_that_is_the_chat_model_inside_as_base(adapter, direction):
    chat = mm.load_organism(adapter)
    model = correction.corrected_model(adapter, direction.everywhere(1))[0]
    expected, mask = logits(model), torch.ones_like(IDS)
    edited = correction.edited_organism(model, chat)
    with torch.no_grad():
        assert_close(models.forward(edited.model, IDS, mask), expected, atol=1e-5, rtol=1e-5)
        with edited.as_base(), chat.as_base():
            base = models.forward(edited.model, IDS, mask)
            assert_close(base, models.forward(chat.model, IDS, mask), atol=1e-5, rtol=1e-5)
        assert_close(models.forward(edited.model, IDS, mask), expected, atol=1e-5, rtol=1e-5)
    with torch.no_grad(), edited.apply(mm.Ablate(direction.everywhere(1))):  # there is nothing left to ablate
        assert_close(models.forward(edited.model, IDS, mask), expected, atol=1e-5, rtol=1e-5)
    assert edited.base_fingerprint == chat.base_fingerprint
    with pytest.raises(ValueError, match="of the same architecture"):
        correction.edited_organism(bias_llama(), chat)


# --- folders


@pytest.mark.parametrize("rslora", [False, True])
def test_a_saved_adapter_is_read_back_bit_for_bit_by_peft_and_by_us(qwen, make_adapter, direction, tmp_path, rslora):
    from peft import PeftModel

    options = {"rank_pattern": {"down_proj": 3, "layers.1.self_attn.o_proj": 1}, "alpha_pattern": {"o_proj": 5.5}}
    folder = make_adapter(qwen, modules=ALL_MODULES, rank=2, rslora=rslora, alpha=7, **options)
    cut = mm.project_out(mm.Adapter.load(folder), direction)
    mm.save_adapter(cut, tmp_path / "cut", edit="projected", direction=direction)
    again = mm.Adapter.load(tmp_path / "cut")
    assert [site.key for site in again.sites] == [site.key for site in cut.sites]
    for ours, theirs in zip(cut.sites, again.sites, strict=True):
        assert torch.equal(ours.A, theirs.A) and torch.equal(ours.B, theirs.B) and ours.scaling == theirs.scaling
    by_peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(qwen), tmp_path / "cut").eval()
    for site in cut.sites:
        layer = by_peft.base_model.model.get_submodule(site.name)
        assert layer.scaling["default"] == site.scaling
        assert torch.equal(layer.lora_B["default"].weight, site.B)
    organism = mm.load_organism(tmp_path / "cut")
    with torch.no_grad():
        own = models.forward(organism.model, IDS, torch.ones_like(IDS))
    assert_close(own, logits(by_peft), atol=1e-5, rtol=1e-5)


def test_the_sites_decide_what_is_written_whatever_the_old_config_says(adapter, tmp_path, qwen):
    odd = adapter.site(1, "down_proj")
    sites = (replace(odd, scaling=0.3), replace(adapter.site(2, "o_proj"), scaling=1.7))
    mm.save_adapter(replace(adapter, sites=sites), tmp_path / "two")
    again = mm.Adapter.load(tmp_path / "two")
    assert [(site.label, site.scaling) for site in again.sites] == [("1.down_proj", 0.3), ("2.o_proj", 1.7)]
    config = json.loads((tmp_path / "two" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["model.layers.1.mlp.down_proj", "model.layers.2.self_attn.o_proj"]
    assert config["base_model_name_or_path"] == str(qwen)
    mm.load_organism(tmp_path / "two")  # its claims are its sites


def test_a_plain_adapter_keeps_a_plain_config(qwen, make_adapter, tmp_path):
    folder = make_adapter(qwen, modules=["down_proj"], layers=[1, 2], rank=4, alpha=8)
    mm.save_adapter(mm.Adapter.load(folder), tmp_path / "plain")
    config = json.loads((tmp_path / "plain" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["rank_pattern"], config["alpha_pattern"]) == (4, 8, {}, {})
    assert (config["target_modules"], config["layers_to_transform"]) == (["down_proj"], [1, 2])
    saved = load_file(tmp_path / "plain" / "adapter_model.safetensors")
    assert all(torch.equal(saved[key], value) for key, value in load_file(folder / "adapter_model.safetensors").items())


def test_a_card_tells_base_edit_direction_and_results_and_nothing_is_overwritten(adapter, direction, tmp_path):
    measured = pd.DataFrame({"cure": ["a | b"], "em": [0.25], "em_low": [0.1], "em_high": [0.4], "n": [12]})
    mm.save_adapter(adapter, tmp_path / "here", edit="no\nedit", direction=direction)
    correction.add_measured(tmp_path / "here", measured)
    card = (tmp_path / "here" / "README.md").read_text()
    assert card.startswith("---\nbase_model:") and "edit: no edit" in card
    assert "| cure | em | n |" in card and "| a \\| b | 0.25 [0.1, 0.4] | 12 |" in card
    assert "random, for a test" in card and "hash of the vectors" in card and "PeftModel.from_pretrained" in card
    assert pd.read_csv(tmp_path / "here" / "measured.csv").equals(measured)
    with pytest.raises(ValueError, match="results already"):
        correction.add_measured(tmp_path / "here", measured)
    with pytest.raises(correction.FolderTakenError, match="not empty"):
        mm.save_adapter(adapter, tmp_path / "here")
    with pytest.raises(FileNotFoundError, match="has no card"):
        correction.add_measured(tmp_path, measured)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["here"]
