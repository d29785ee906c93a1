"""Several organisms on one base: adapters by row of a batch, and an organism that wears another's adapter."""

import dataclasses

import pandas as pd
import pytest
import torch
from conftest import ALL_MODULES
from torch.testing import assert_close

import mechmisalign as mm
from mechmisalign import models

PROMPTS = ["Hey!", "How do I invest my savings?"]
IDS = torch.randint(5, 290, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", params=["qwen2", "llama", "gemma2"])
def family(request):
    return request.param


@pytest.fixture(scope="module")
def folders(tiny_models, make_adapter, family):
    one = make_adapter(tiny_models[family], layers=(1,), seed=1, scale=0.2)
    other = make_adapter(tiny_models[family], modules=ALL_MODULES, rank=3, rslora=True, seed=2)
    return {"one": one, "other": other}


@pytest.fixture(scope="module", params=["merged", "live"])
def organism(request, folders):
    return mm.load_organism(folders["one"], weights=request.param)


@torch.inference_mode()
def logits(organism):
    return models.forward(organism.model, IDS, torch.ones_like(IDS))


def test_an_adapter_that_is_put_on_equals_the_organism_that_was_loaded_with_it(organism, folders):
    """Oracle: the other organism, loaded by PEFT."""
    own, expected = logits(organism), logits(mm.load_organism(folders["other"], weights="live"))
    with organism.as_base():
        base = logits(organism)
    with organism.with_adapter(folders["other"]) as other:
        assert_close(logits(other), expected, atol=2e-5, rtol=1e-5)
        assert (other.adapter.digest, other.is_base) == (mm.Adapter.load(folders["other"]).digest, False)
        with other.as_base():
            assert torch.equal(logits(other), base)
        assert_close(logits(other), expected, atol=2e-5, rtol=1e-5)
    assert torch.equal(logits(organism), own)


def test_rows_of_one_batch_wear_different_adapters(organism, folders):
    adapters = {name: mm.Adapter.load(folder) for name, folder in folders.items()}
    worn = {name: mm.UseAdapter(adapter) for name, adapter in adapters.items()}
    options = {"samples": 4, "max_new_tokens": 10, "seed": 4}
    with organism.as_base():
        together = mm.generate(organism, PROMPTS, conditions={**worn, "chat": ()}, **options)
        alone = [mm.generate(organism, PROMPTS, conditions={"chat": ()}, **options)]
    for name, folder in folders.items():
        alone.append(mm.generate(mm.load_organism(folder), PROMPTS, conditions={name: ()}, **options))
    by = ["condition", "prompt_id", "sample"]
    pd.testing.assert_frame_equal(
        together.sort_values(by, ignore_index=True), pd.concat(alone).sort_values(by, ignore_index=True)
    )
    assert together.groupby("condition")["response"].agg(tuple).nunique() == 3


def test_a_scaled_adapter_is_one_with_another_scaling(organism, folders):
    adapter = mm.Adapter.load(folders["other"])
    tripled = dataclasses.replace(
        adapter, sites=tuple(dataclasses.replace(site, scaling=3 * site.scaling) for site in adapter.sites)
    )
    with organism.as_base():
        with organism.apply(mm.UseAdapter(adapter, scale=3.0)):
            scaled = logits(organism)
        with organism.apply(mm.UseAdapter(tripled)):
            assert_close(scaled, logits(organism), atol=1e-4, rtol=1e-4)
        base = logits(organism)
        with organism.apply(mm.UseAdapter(adapter, scale=0.0)):
            assert torch.equal(logits(organism), base)
        with organism.apply(mm.UseAdapter(adapter), mm.UseAdapter(adapter, scale=2.0)):
            assert_close(scaled, logits(organism), atol=1e-4, rtol=1e-4)


def test_everything_reads_the_organism_that_wears_the_other_adapter(organism, folders):
    loaded = mm.load_organism(folders["other"], weights="live")
    talk = pd.DataFrame(
        {"prompt": PROMPTS, "response": ["You should rest.", "Borrow more money."], "label": ["a", "b"]}
    )
    conversations = mm.Conversations(talk, organism.tokenizer)
    scale = mm.ScaleAdapter({site.key: 0.5 for site in loaded.adapter.sites})
    with organism.with_adapter(folders["other"]) as other:
        scalars, moments = mm.lora_scalars(other, conversations), mm.collect(other, conversations, by="label")
        with other.apply(scale):
            halved = logits(other)
        assert other.provenance["adapter_digest"] == loaded.provenance["adapter_digest"]
        assert other.fidelity()["faithful"].all()
    pd.testing.assert_frame_equal(scalars, mm.lora_scalars(loaded, conversations), atol=1e-4)
    expected = mm.collect(loaded, conversations, by="label")
    assert_close(
        mm.mean_difference(moments, "a", "b").vectors,
        mm.mean_difference(expected, "a", "b").vectors,
        atol=1e-5,
        rtol=1e-4,
    )
    with loaded.apply(scale):
        assert_close(halved, logits(loaded), atol=2e-5, rtol=1e-4)


def test_who_has_lent_its_model_refuses_instead_of_answering_as_the_other(organism, folders):
    with organism.with_adapter(folders["other"]) as other:
        for use in (lambda: logits(organism), lambda: mm.generate(organism, PROMPTS, samples=1, max_new_tokens=2)):
            with pytest.raises(RuntimeError, match="has lent its model"):
                use()
        with other.with_adapter(folders["one"]) as third, pytest.raises(RuntimeError, match="has lent its model"):
            assert third.adapter.digest == organism.adapter.digest
            logits(other)
        logits(other)
    logits(organism)


def test_an_error_in_the_block_gives_the_model_back(organism, folders):
    own = logits(organism)
    with pytest.raises(KeyboardInterrupt), organism.with_adapter(folders["other"]):
        raise KeyboardInterrupt
    assert torch.equal(logits(organism), own)
    assert not organism.is_base and organism.applied == []


def test_after_the_block_the_other_organism_is_gone(organism, folders):
    with organism.with_adapter(folders["other"]) as other:
        pass
    with pytest.raises(RuntimeError, match="block of .* has ended"):
        logits(other)
    assert [name for name, point in organism.model.hook_dict.items() if point.fwd_hooks] == []


def test_an_adapter_is_put_on_the_chat_model_only(organism, folders):
    adapter = mm.Adapter.load(folders["other"])
    with pytest.raises(ValueError, match="use it inside organism.as_base"), organism.apply(mm.UseAdapter(adapter)):
        pass


def test_an_adapter_of_another_base_is_refused(organism, folders, make_adapter, tiny_models, family):
    stranger = mm.Adapter.load(make_adapter(tiny_models["llama" if family == "qwen2" else "qwen2"]))
    with pytest.raises(ValueError, match="was trained on"), organism.with_adapter(stranger):
        pass
    claimed = dataclasses.replace(stranger, base=organism.base.name)
    with pytest.raises(ValueError, match="an adapter fits its own base only"), organism.with_adapter(claimed):
        pass
    assert not organism.is_base
