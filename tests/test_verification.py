"""verify: passes on sound organisms, and each check fails on the fault that it is for."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import torch
from conftest import ALL_MODULES, FAMILIES, new_tokenizer, random_model
from safetensors.torch import load_file, save_file

from mechmisalign import models
from mechmisalign.adapters import Adapter
from mechmisalign.organisms import load_organism
from mechmisalign.verification import verify


@pytest.fixture(scope="module")
def adapter(tiny_models, make_adapter):
    return make_adapter(tiny_models["qwen2"], modules=("q_proj", "down_proj"), rank=2, scale=0.05)


def failed(table):
    return list(table.loc[~table["passed"], "check"])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_sound_organism_passes_every_check(tiny_models, make_adapter, family):
    folder = make_adapter(tiny_models[family], modules=ALL_MODULES, rank=4, rslora=True, scale=0.05)
    table = verify(folder)
    assert list(table.columns) == ["check", "passed", "value", "expected"]
    assert failed(table) == []
    checks = list(table["check"])
    assert checks[:6] == [
        "logits equal PEFT's",
        "logits differ from the base's",
        "as_base() is the base",
        "restored after as_base()",
        "one BOS in a rendered chat",
        "merged equals live",
    ]
    assert len(checks) == 7 + 21


def test_a_live_and_a_bfloat16_organism_pass(adapter):
    assert failed(verify(load_organism(adapter, weights="live"))) == []
    assert failed(verify(load_organism(adapter, dtype=torch.bfloat16))) == []


def test_verifying_leaves_the_organism_as_it_was(adapter):
    organism = load_organism(adapter)
    before = {name: value.clone() for name, value in organism.model.state_dict().items()}
    verify(organism)
    assert all(torch.equal(value, before[name]) for name, value in organism.model.state_dict().items())


def test_a_wrong_merge_fails_parity_and_fidelity(adapter):
    organism = load_organism(adapter)
    models.matrix(organism.model, organism.adapter.sites[0].name, 0).parameter.data *= 1.5
    found = failed(verify(organism))
    assert "logits equal PEFT's" in found
    assert "merged equals live" in found
    assert "update stored in layer 0 down_proj" in found


def test_a_wrong_scaling_fails_parity(adapter):
    read = Adapter.load(adapter)
    doubled = replace(read, sites=tuple(replace(site, scaling=2 * site.scaling) for site in read.sites))
    assert failed(verify(load_organism(doubled))) == ["logits equal PEFT's"]


def test_an_adapter_without_an_update_fails(adapter, tmp_path):
    folder = shutil.copytree(adapter, tmp_path / "empty")
    weights = load_file(folder / "adapter_model.safetensors")
    save_file({key: value * ("lora_A" in key) for key, value in weights.items()}, folder / "adapter_model.safetensors")
    assert failed(verify(folder)) == ["logits differ from the base's", "each of 6 sites has an update"]


def test_a_template_with_two_bos_tokens_is_refused(tiny_models, make_adapter):
    tokenizer = new_tokenizer("gemma2")
    tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    organism = load_organism(make_adapter(tiny_models["gemma2"], scale=0.05), tokenizer=tokenizer)
    with pytest.raises(ValueError, match="two BOS tokens"):
        verify(organism)


def test_an_organism_that_lives_only_in_memory_cannot_be_verified(adapter):
    tokenizer = new_tokenizer("qwen2")
    organism = load_organism(adapter, base=random_model("qwen2", tokenizer), tokenizer=tokenizer)
    with pytest.raises(ValueError, match="lives only in memory"):
        verify(organism)
