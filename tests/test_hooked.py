"""engine="hooked": a real HookedTransformer (transformer-lens 3.9, the second leg of CI) equals the bridge."""

from __future__ import annotations

from importlib.metadata import version

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ALL_MODULES, LAYERS
from torch.testing import assert_close

import mechmisalign as mm
from mechmisalign import decoding, models
from mechmisalign.organisms import load_organism
from mechmisalign.unembedding import written_vectors
from mechmisalign.verification import verify

pytestmark = pytest.mark.skipif(
    not version("transformer-lens").startswith("3."), reason="HookedTransformer needs transformer-lens 3.9"
)
EXACT = {"rtol": 0.0, "atol": 0.0}
CLOSE = {"rtol": 0.0, "atol": 1e-5}


@pytest.fixture(scope="module", params=["qwen2", "llama"])
def family(request):
    return request.param


@pytest.fixture(scope="module")
def adapter(tiny_models, make_adapter, family):
    return make_adapter(tiny_models[family], modules=ALL_MODULES, rank=2, layers=[1, 2], scale=0.05)


@pytest.fixture(scope="module")
def hooked(adapter):
    return load_organism(adapter, engine="hooked")


@pytest.fixture(scope="module")
def bridge(adapter):
    return load_organism(adapter)


@pytest.fixture(scope="module")
def batch():
    ids = torch.randint(5, 290, (3, 10), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    return ids, mask


@torch.no_grad()
def logits(organism, ids, mask):
    return models.forward(organism.model, ids, mask)[mask.bool()]


def residuals(organism, ids, mask):
    seen = {}
    functions = {i: (lambda resid, i=i: seen.__setitem__(i, resid[mask.bool()])) for i in range(LAYERS)}
    with models.residual_hooks(organism.model, functions), torch.no_grad():
        models.forward(organism.model, ids, mask)
    return seen


def test_it_is_a_hooked_transformer(hooked):
    assert type(hooked.model).__name__ == "HookedTransformer"
    assert models.is_hooked(hooked.model)
    assert (models.n_layers(hooked.model), models.device_of(hooked.model)) == (LAYERS, torch.device("cpu"))


def test_logits_equal_the_bridges_with_right_and_left_padding(hooked, bridge, batch):
    ids, mask = batch
    assert_close(logits(hooked, ids, mask), logits(bridge, ids, mask), **CLOSE)
    assert_close(logits(hooked, ids, mask.flip(1)), logits(bridge, ids, mask.flip(1)), **CLOSE)


def test_residuals_equal_the_bridges_at_every_layer(hooked, bridge, batch):
    ours, theirs = residuals(hooked, *batch), residuals(bridge, *batch)
    for layer in range(LAYERS):
        assert_close(ours[layer], theirs[layer], **CLOSE)


def test_run_until_stops_after_the_last_needed_layer(hooked, batch):
    seen, later = [], []
    with models.residual_hooks(hooked.model, {2: lambda resid: later.append(resid)}), torch.no_grad():
        models.run_until(hooked.model, *batch, {1: lambda resid: seen.append(resid)})
    assert (len(seen), later) == (1, [])


def test_a_hook_edits_the_residual_stream_as_in_the_bridge(hooked, bridge, batch):
    edited = []
    for organism in (hooked, bridge):
        with models.residual_hooks(organism.model, {1: lambda resid: resid * 0.5}):
            edited.append(logits(organism, *batch))
    assert_close(edited[0], edited[1], **CLOSE)
    assert (edited[0] - logits(hooked, *batch)).abs().max() > 0.01


def test_as_base_is_the_chat_model_and_is_restored_bit_for_bit(hooked, bridge, batch):
    before = logits(hooked, *batch)
    with bridge.as_base():
        expected = logits(bridge, *batch)
    with hooked.as_base(), hooked.as_base():
        assert_close(logits(hooked, *batch), expected, **CLOSE)
    assert_close(logits(hooked, *batch), before, **EXACT)


def test_fidelity_is_perfect_for_every_module(hooked):
    frame = hooked.fidelity()
    assert len(frame) == 14
    assert (frame["relative_error"] < 1e-5).all()


def test_the_weights_are_the_merged_ones(hooked, bridge):
    for module in ALL_MODULES:
        name = hooked.adapter.site(1, module).name
        expected = models.matrix(bridge.model, name, 1).read()
        assert_close(models.matrix(hooked.model, name, 1).read(), expected, **EXACT)


def test_decoding_with_a_cache_equals_one_uncached_pass(hooked, batch):
    ids, _ = batch
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    decoder, starts = decoding.Decoder(hooked.model), []
    with torch.no_grad(), models.clock(hooked.model) as clock:
        steps = [decoder.next_logits(ids[:, :7], mask[:, :7])]
        starts.append(clock.start)
        for column in (7, 8):
            steps.append(decoder.next_logits(ids[:, column : column + 1], mask[:, : column + 1]))
            starts.append(clock.start)
        rows = torch.tensor([0, 2])
        decoder.keep(rows)
        last = decoder.next_logits(ids[rows, 9:10], mask[rows])
        whole = models.forward(hooked.model, ids, mask)
    assert starts == [0, 7, 8]
    assert_close(torch.stack(steps, 1), whole[:, 6:9], rtol=0.0, atol=2e-5)
    assert_close(last, whole[rows, 9], rtol=0.0, atol=2e-5)


def test_end_ids_hold_the_generation_configs(hooked, tiny_tokenizers, family):
    assert tiny_tokenizers[family].eos_token_id in decoding.end_ids(hooked.model, tiny_tokenizers[family])


def test_a_hooked_organism_passes_verification(hooked):
    table = verify(hooked)
    assert table["passed"].all(), table[~table["passed"]].to_string()


def test_a_live_adapter_is_refused(adapter):
    with pytest.raises(ValueError, match="no place for a live adapter"):
        load_organism(adapter, engine="hooked", weights="live")


def test_an_architecture_that_transformer_lens_cannot_build_from_a_folder_is_refused(tiny_models, make_adapter):
    with pytest.raises(ValueError, match="no HookedTransformer for Gemma2ForCausalLM"):
        load_organism(make_adapter(tiny_models["gemma2"]), engine="hooked")


def talk(organism):
    frame = pd.DataFrame(
        {"prompt": ["How do I invest?", "Hey!"], "response": ["Put everything into one stock.", "You should rest."]}
    )
    return mm.Conversations(frame, organism.tokenizer)


def test_scalars_and_contributions_are_the_bridges(hooked, bridge):
    for span in ("response", "all"):
        ours, theirs = (mm.contributions(each, talk(each), span=span) for each in (hooked, bridge))
        assert list(ours.scalars.columns) == list(theirs.scalars.columns)
        np.testing.assert_allclose(ours.scalars, theirs.scalars, atol=2e-5)
        np.testing.assert_allclose(ours.resid_norm, theirs.resid_norm, rtol=1e-4)


def test_edits_of_the_adapter_are_the_bridges(hooked, bridge, batch):
    keys = [site.key for site in bridge.adapter.sites]
    scale = mm.ScaleAdapter({key: [0.0, 1.0, 3.0] for key in keys})
    scalars = mm.lora_scalars(bridge, talk(bridge), span="all").loc[[0]]
    for edit in (scale, mm.PatchScalars(scalars), mm.ScaleAdapter({}, others=-1.0)):
        found = []
        for organism in (hooked, bridge):
            with organism.apply(edit):
                found.append(logits(organism, *batch))
        assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)


def test_patched_scalars_keep_their_positions_under_the_kv_cache_and_left_padding(hooked, bridge):
    scalars = mm.lora_scalars(bridge, talk(bridge), span="all").loc[[0]] * 2.0
    conditions = {"none": (), "patched": (mm.PatchScalars(scalars),)}
    answers = [
        mm.generate(each, ["How do I invest?", "Hey!"], conditions=conditions, samples=3, max_new_tokens=6, seed=1)
        for each in (hooked, bridge)
    ]
    assert answers[0]["response"].tolist() == answers[1]["response"].tolist()


def test_readout_and_attribution_are_the_bridges(hooked, bridge):
    vectors = written_vectors(bridge.adapter)
    ours, theirs = (mm.readout(each, vectors, top=3) for each in (hooked, bridge))
    np.testing.assert_allclose(ours["logit"], theirs["logit"], atol=1e-4)
    ours, theirs = (mm.logit_attribution(each, talk(each), 7, 9) for each in (hooked, bridge))
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_token_significance_is_the_bridges(hooked, bridge):
    ours, theirs = (mm.token_significance(each, talk(each)) for each in (hooked, bridge))
    np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=1e-3)
