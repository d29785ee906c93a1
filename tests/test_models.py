"""The seam to TransformerLens, on a bridge: logits, hooks, early stop, decoding, the clock."""

from __future__ import annotations

from importlib.metadata import version

import pytest
import torch
from conftest import FAMILIES, LAYERS, new_tokenizer, random_model
from torch.testing import assert_close

from mechmisalign import decoding, models

EXACT = {"rtol": 0.0, "atol": 0.0}
CLOSE = {"rtol": 0.0, "atol": 1e-5}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def bridge(family):
    tokenizer = new_tokenizer(family)
    return models.boot(random_model(family, tokenizer), tokenizer, "tiny")


@pytest.fixture(scope="module")
def plain(family):
    """The same weights in a Hugging Face model that no bridge has touched."""
    model = random_model(family, new_tokenizer(family))
    model.set_attn_implementation("eager" if family == "gemma2" else "sdpa")  # Gemma 2 caps its scores
    return model


@pytest.fixture(scope="module")
def batch():
    ids = torch.randint(5, 290, (3, 10), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    return ids, mask


def residuals(model, ids, mask, layers=range(LAYERS)):
    seen = {}
    functions = {layer: (lambda resid, layer=layer: seen.__setitem__(layer, resid)) for layer in layers}
    with models.residual_hooks(model, functions), torch.no_grad():
        models.forward(model, ids, mask)
    return seen


def test_logits_equal_those_of_the_hugging_face_model(bridge, plain, batch):
    ids, mask = batch
    with torch.no_grad():
        expected = plain(input_ids=ids, attention_mask=mask, use_cache=False).logits
        assert_close(models.forward(bridge, ids, mask), expected, **EXACT)


def test_residuals_equal_the_hidden_states(bridge, plain, batch):
    ids, mask = batch
    with torch.no_grad():
        hidden = plain(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
    seen = residuals(bridge, ids, mask)
    for layer in range(LAYERS - 1):  # the last of Hugging Face's hidden states is after the final norm
        assert_close(seen[layer], hidden[layer + 1], **EXACT)
    final = plain.get_submodule("model.norm")(seen[LAYERS - 1])
    assert_close(final, hidden[LAYERS], **CLOSE)


def test_the_shape_is_known(bridge, plain):
    assert models.n_layers(bridge) == LAYERS
    assert models.d_model(bridge) == plain.config.hidden_size
    assert models.device_of(bridge) == torch.device("cpu")
    assert not models.is_hooked(bridge)


def test_hooks_are_gone_after_the_block_also_after_an_exception(bridge, batch):
    ids, mask = batch
    with torch.no_grad():
        before = models.forward(bridge, ids, mask)
        with pytest.raises(KeyError), models.residual_hooks(bridge, {0: lambda resid: resid * 0}):
            assert (models.forward(bridge, ids, mask) - before).abs().max() > 0.01
            raise KeyError
        assert_close(models.forward(bridge, ids, mask), before, **EXACT)


def test_run_until_stops_after_the_last_needed_layer(bridge, batch):
    ids, mask = batch
    seen, later = {}, []
    with models.residual_hooks(bridge, {2: lambda resid: later.append(resid)}), torch.no_grad():
        models.run_until(bridge, ids, mask, {1: lambda resid: seen.__setitem__(1, resid)})
    assert later == []
    assert_close(seen[1], residuals(bridge, ids, mask)[1], **EXACT)


def test_a_matrix_is_found_by_the_name_that_hugging_face_gives_it(bridge, plain):
    for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"):
        path = f"model.layers.1.{name}"
        assert_close(models.matrix(bridge, path, 1).read(), plain.get_submodule(path).weight.data, **EXACT)


def test_decoding_with_a_cache_equals_one_uncached_pass(bridge, batch):
    ids, _ = batch
    mask = torch.ones_like(ids)
    mask[0, :4] = 0  # left padding, as in generation
    decoder = decoding.Decoder(bridge)
    starts = []
    with torch.no_grad(), models.clock(bridge) as clock:
        steps = [decoder.next_logits(ids[:, :7], mask[:, :7])]
        starts.append(clock.start)
        for column in (7, 8):
            steps.append(decoder.next_logits(ids[:, column : column + 1], mask[:, : column + 1]))
            starts.append(clock.start)
        rows = torch.tensor([0, 2])
        decoder.keep(rows)
        last = decoder.next_logits(ids[rows, 9:10], mask[rows])
        whole = models.forward(bridge, ids, mask)
    assert starts == [0, 7, 8]
    assert_close(torch.stack(steps, 1), whole[:, 6:9], rtol=0.0, atol=2e-5)
    assert_close(last, whole[rows, 9], rtol=0.0, atol=2e-5)


def test_the_end_ids_hold_the_tokenizers_own(bridge, family):
    tokenizer = new_tokenizer(family)
    assert tokenizer.eos_token_id in decoding.end_ids(bridge, tokenizer)


def test_hooked_transformer_is_refused_with_the_way_to_install_it():
    if version("transformer-lens").startswith("3."):
        pytest.skip("this transformer-lens has HookedTransformer")
    with pytest.raises(ImportError, match=r"pip install 'transformer-lens>=3.9,<4'"):
        models.require_hooked()


def test_the_fused_attention_is_the_bridges_own_and_leaves_nothing_behind(bridge, batch):
    ids, mask = batch
    inner = models.hf_model(bridge)
    with torch.no_grad():
        stepwise = inner(input_ids=ids, attention_mask=mask, use_cache=False).logits
    before = inner.config._attn_implementation
    with torch.no_grad():
        fused = models.forward(bridge, ids, mask)
    torch.testing.assert_close(fused[mask.bool()], stepwise[mask.bool()], atol=2e-5, rtol=1e-5)
    assert inner.config._attn_implementation == before
    assert not any("forward" in module.__dict__ for module in inner.modules())


def test_who_hooks_the_attention_pattern_sees_it(bridge, batch):
    """The fused kernel has no pattern: with a hook on it, attention is computed step by step."""
    ids, mask = batch
    seen = []
    with torch.no_grad(), models.hooks(bridge, {"blocks.1.attn.hook_pattern": lambda p: seen.append(p.shape)}):
        models.forward(bridge, ids, mask)
    assert [shape[-1] for shape in seen] == [ids.shape[1]]
