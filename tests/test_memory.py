"""Memory: freed after use, one base for many adapters, quantised bases."""

import gc
import shutil
import weakref
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import new_tokenizer
from torch.testing import assert_close

import mechmisalign as mm
from mechmisalign import models
from mechmisalign.loading import planning

IDS = torch.randint(5, 280, (2, 9), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)
IN_FILES = {
    "model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk",
    "model.layers.2": "cpu", "model.norm": "cpu", "lm_head": "cpu",
}  # fmt: skip


@torch.no_grad()
def logits(organism):
    return models.forward(organism.model, IDS, MASK)


def used(organism, adapter):
    """Everything that leaves something behind in a module, a hook or a cache."""
    logits(organism)
    with organism.as_base():
        logits(organism)
    with organism.with_adapter(adapter) as other:
        logits(other)
    with organism.apply(mm.ScaleAdapter({}, others=2.0)):
        logits(organism)
    mm.generate(organism, ["Hey!"], samples=2, max_new_tokens=3)


@pytest.fixture(scope="module")
def adapters(tiny_models, make_adapter):
    return [make_adapter(tiny_models["llama"], layers=[1, 2], rank=2, seed=seed) for seed in range(3)]


@pytest.mark.parametrize("where", [None, IN_FILES], ids=["here", "in files"])
@pytest.mark.parametrize("weights", ["merged", "live"])
def test_an_organism_is_freed_after_use(adapters, weights, where):
    organism = mm.load_organism(adapters[0], weights=weights, device_map=where)
    used(organism, adapters[1])
    held = [weakref.ref(each) for each in organism.model.parameters()]
    assert sum(each() is not None for each in held) == len(held) > 20
    del organism
    gc.collect()
    assert not any(each() is not None for each in held)


def test_many_adapters_share_one_base(adapters):
    """Nothing but the adapters is new: the weights inside the blocks are the very same tensors, and no more of them."""
    organism = mm.load_organism(adapters[0], weights="live")
    before = {name: each.data_ptr() for name, each in organism.model.named_parameters()}
    size = sum(each.numel() for each in organism.model.parameters())
    for folder in adapters[1:]:
        with organism.with_adapter(folder) as other:
            assert {name: each.data_ptr() for name, each in other.model.named_parameters()} == before
            gc.collect()
            beside = [each for each in gc.get_objects() if isinstance(each, torch.nn.Parameter)]
            assert sum(each.numel() for each in beside if each.data_ptr() in before.values()) == size
            assert logits(other).isfinite().all()


def test_before_a_big_load_what_is_garbage_is_collected(adapters, monkeypatch):
    """Modules and their hooks refer to each other, so the one before would lie beside the next until Python notices."""
    monkeypatch.setattr(planning, "TOLD_FROM", 0)
    organism = mm.load_organism(adapters[0])
    held = [weakref.ref(each) for each in organism.model.parameters()]
    gc.disable()
    try:
        del organism
        mm.load_organism(adapters[1])
        assert not any(each() is not None for each in held)
    finally:
        gc.enable()


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> Path:
    """A random Llama whose matrices are as wide as a block of four-bit numbers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("models") / "wide-llama"
    tokenizer = new_tokenizer("llama")
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, vocab_size=len(tokenizer), num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.1, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def narrow(wide, make_adapter):
    return make_adapter(wide, modules=("q_proj", "down_proj"), layers=[1, 2], seed=1)


def quantisation(bits):
    pytest.importorskip("bitsandbytes", minversion="0.46")  # the first that computes on a CPU
    from transformers import BitsAndBytesConfig

    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)


@pytest.fixture(scope="module", params=[4, 8], ids=["4 bit", "8 bit"])
def quantised(request, wide, narrow, tmp_path_factory):
    """The settings, a quantised checkpoint, and what PEFT makes of it: base model, with the adapter."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    settings = quantisation(request.param)
    folder = tmp_path_factory.mktemp("models") / f"in-{request.param}-bit"

    def loaded():
        return AutoModelForCausalLM.from_pretrained(wide, quantization_config=settings, device_map={"": "cpu"}).eval()

    loaded().save_pretrained(folder)
    for file in wide.glob("*token*"), wide.glob("chat*"):
        for each in file:
            shutil.copy(each, folder)
    with torch.no_grad():
        chat = loaded()(input_ids=IDS, attention_mask=MASK).logits
        tuned = PeftModel.from_pretrained(loaded(), narrow).eval()(input_ids=IDS, attention_mask=MASK).logits
    return settings, folder, loaded, chat, tuned


def test_a_quantised_base_with_a_live_adapter_is_what_peft_computes(quantised, narrow, wide, tiny_tokenizers):
    settings, folder, loaded, chat, tuned = quantised
    adapter = mm.Adapter.load(narrow)
    for organism in (
        mm.load_organism(narrow, weights="live", quantization_config=settings, device="cpu"),
        mm.load_organism(adapter, folder, weights="live", device="cpu"),
        mm.load_organism(adapter, loaded(), weights="live", tokenizer=tiny_tokenizers["llama"]),
    ):
        assert_close(logits(organism), tuned)
        with organism.as_base():
            assert_close(logits(organism), chat)
        with organism.with_adapter(adapter) as worn:
            assert_close(logits(worn), tuned)
    assert (tuned - chat).abs().max() > 0.1
    conversations = mm.Conversations(
        pd.DataFrame({"prompt": ["Hey!"], "response": ["You should rest."], "label": ["a"]}), organism.tokenizer
    )
    assert mm.lora_scalars(organism, conversations).shape[1] == 4
    assert mm.collect(organism, conversations).mean.shape == (1, 3, 64)
    assert len(mm.generate(organism, ["Hey!"], samples=2, max_new_tokens=4)) == 2


def test_a_quantised_base_is_refused_for_merging_and_planned_for_what_it_takes(quantised, narrow):
    settings, folder, *_ = quantised
    with pytest.raises(ValueError, match="use weights='live' with quantization_config="):
        mm.load_organism(narrow, quantization_config=settings)
    with pytest.raises(ValueError, match="is quantised, and an update cannot be folded"):
        mm.load_organism(mm.Adapter.load(narrow), folder)
    planned = mm.loading_plan(narrow, weights="live", quantization_config=settings)
    stored = mm.loading_plan(mm.Adapter.load(narrow), folder, weights="live")
    assert planned.weights["quantised"] == pytest.approx(stored.weights["quantised"], rel=0.05)


def test_a_model_in_memory_is_not_quantised_again(tiny_models, tiny_tokenizers, adapters):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_models["llama"])
    with pytest.raises(ValueError, match="is loaded already"):
        mm.load_organism(
            mm.Adapter.load(adapters[0]), model, weights="live", quantization_config={"load_in_4bit": True},
            tokenizer=tiny_tokenizers["llama"],
        )  # fmt: skip
