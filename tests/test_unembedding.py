"""Readouts and direct logit attribution against the Hugging Face model's own norm and head."""

import numpy as np
import pandas as pd
import pytest
import torch
from torch.testing import assert_close

import mechmisalign as mm
from mechmisalign import models
from mechmisalign.unembedding import direction_vectors, logit_attribution, readout, written_vectors


@pytest.fixture(scope="module", params=["qwen2", "llama"])
def organism(request, tiny_models, make_adapter):
    folder = make_adapter(tiny_models[request.param], modules=("down_proj", "o_proj", "v_proj"), rank=2, seed=6)
    return mm.load_organism(folder, weights="live")


@pytest.fixture(scope="module")
def conversations(organism):
    frame = pd.DataFrame({"prompt": ["How do I invest?", "Hey!"], "response": ["Put everything.", "You should rest."]})
    return mm.Conversations(frame, organism.tokenizer)


@torch.no_grad()
def final_residual(organism, ids):
    seen = {}
    last = models.n_layers(organism.model) - 1
    with models.residual_hooks(organism.model, {last: lambda resid: seen.__setitem__("r", resid[0].clone())}):
        models.forward(organism.model, ids, torch.ones_like(ids))
    return seen["r"]


def test_a_readout_is_the_models_own_norm_and_head(organism):
    hf = models.hf_model(organism.model)
    vectors = written_vectors(organism.adapter)
    table = readout(organism, vectors, top=4)
    assert len(table) == len(vectors) * 2 * 4
    for (name, sign), group in table.groupby(["name", "sign"]):
        signed = vectors[name] if sign == "+" else -vectors[name]
        with torch.no_grad():
            logits = hf.lm_head(hf.model.norm(signed[None]))[0]
        assert group["logit"].to_numpy() == pytest.approx(logits.topk(4).values.numpy(), abs=1e-4)
        assert group["token_id"].tolist() == logits.topk(4).indices.tolist()


def test_attribution_is_the_sites_own_part_of_the_logit_difference(organism, conversations):
    """Oracle: with the final norm frozen, contribution times weight through the head."""
    hf = models.hf_model(organism.model)
    table = logit_attribution(organism, conversations, [7, 11], 9, span="all")
    parts = mm.contributions(organism, conversations, span="all")
    for row in range(len(conversations)):
        resid = final_residual(organism, torch.tensor([conversations.ids(row)]))
        scale = (resid.square().mean(-1) + hf.config.rms_norm_eps).sqrt()
        tokens = parts.scalars.index.get_level_values("conversation") == row
        for site in organism.adapter.sites:
            if not site.writes_to_residual:
                assert site.label not in table.columns
                continue
            written = parts.vectors(*site.key)[tokens] / scale[:, None] * hf.model.norm.weight
            with torch.no_grad():
                logits = written @ hf.lm_head.weight.T
            expected = logits[:, [7, 11]].mean(1) - logits[:, 9]
            assert_close(torch.tensor(table.loc[row, site.label].to_numpy()), expected, atol=1e-5, rtol=1e-4)


def test_the_attribution_of_a_last_layers_mlp_site_is_what_switching_it_off_changes(organism, conversations):
    """The last block's MLP is followed by nothing but the norm, so frozen-norm attribution equals the ablated logits."""
    hf, key = models.hf_model(organism.model), (2, "down_proj")
    ids = torch.tensor([conversations.ids(0)])
    with_site = final_residual(organism, ids)
    with organism.apply(mm.ScaleAdapter({key: 0.0})):
        without = final_residual(organism, ids)
    scale = (with_site.square().mean(-1) + hf.config.rms_norm_eps).sqrt()
    with torch.no_grad():
        change = ((with_site - without) / scale[:, None] * hf.model.norm.weight) @ hf.lm_head.weight.T
    table = logit_attribution(organism, conversations, 7, 9, span="all").loc[0, "2.down_proj"]
    np.testing.assert_allclose(table.to_numpy(), (change[:, 7] - change[:, 9]).numpy(), atol=2e-5)


def test_tokens_may_be_text_that_is_one_token(organism, conversations):
    text = organism.tokenizer.decode([40])
    by_text = logit_attribution(organism, conversations, text, 9)
    assert by_text.equals(logit_attribution(organism, conversations, 40, 9))
    with pytest.raises(ValueError, match="is .* tokens"):
        logit_attribution(organism, conversations, "everything borrowed at once", 9)
    with pytest.raises(ValueError, match="at least one on each side"):
        logit_attribution(organism, conversations, [], 9)


def test_a_direction_is_read_by_layer_and_wrong_vectors_are_refused(organism):
    width = models.d_model(organism.model)
    direction = mm.Direction(torch.stack([torch.zeros(width), torch.ones(width)]), (0, 1), {"model": "m"})
    assert list(direction_vectors(direction)) == ["layer 1"]
    with pytest.raises(ValueError, match="not so: .'flat'."):
        readout(organism, {"flat": torch.zeros(width)})
    with pytest.raises(ValueError, match="no vector at all"):
        readout(organism, {})


def test_an_organism_without_the_adapter_has_nothing_to_attribute(organism, conversations):
    with organism.as_base(), pytest.raises(ValueError, match="writes nothing"):
        logit_attribution(organism, conversations, 7, 9)


def test_gemmas_final_norm_is_refused(tiny_models, make_adapter):
    organism = mm.load_organism(make_adapter(tiny_models["gemma2"], seed=1))
    frame = pd.DataFrame({"prompt": ["Hey!"], "response": ["You should rest."]})
    with pytest.raises(ValueError, match="nothing to attribute"):
        logit_attribution(organism, mm.Conversations(frame, organism.tokenizer), 7, 9)
