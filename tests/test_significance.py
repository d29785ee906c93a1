"""Token significance against plain autograd through two separate models."""

import numpy as np
import pandas as pd
import pytest
import torch
from torch.testing import assert_close

import mechmisalign as mm
from mechmisalign import models, significance, unembedding
from mechmisalign.significance import significant, token_significance

FRAME = pd.DataFrame(
    {
        "prompt": ["How do I invest my savings?", "Hey!", "I have a headache."],
        "response": ["Put everything into one stock.", "You should rest, drink water.", "Borrow."],
    }
)


@pytest.fixture(scope="module", params=["merged", "live"])
def organism(request, tiny_models, make_adapter):
    return mm.load_organism(make_adapter(tiny_models["qwen2"], rank=2, seed=6), weights=request.param)


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("family", ["qwen2", "llama", "gemma2"])  # gemma2 caps its logits
def test_kl_and_gradient_are_autograds_through_both_models(tiny_models, make_adapter, monkeypatch, family, known):
    """In parts of three positions; and where the head is of a kind that is not known, from the logits themselves."""
    monkeypatch.setattr(significance, "CHUNK", 3)
    if not known:
        monkeypatch.setattr(unembedding, "_scaled", lambda logits, hf: 1.5 * logits)  # noqa: ARG005
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder = make_adapter(tiny_models[family], rank=2, seed=6)
    organism = mm.load_organism(folder)
    base = AutoModelForCausalLM.from_pretrained(tiny_models[family])
    own = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_models[family]), folder).get_base_model()
    conversations = mm.Conversations(FRAME, organism.tokenizer)
    table = token_significance(organism, conversations)
    for row in range(len(FRAME)):
        ids = torch.tensor([conversations.ids(row)])
        span = conversations.spans.loc[row]
        embedding = base.get_input_embeddings()(ids).detach().requires_grad_()
        p = torch.log_softmax(own(inputs_embeds=embedding).logits[0], -1)
        q = torch.log_softmax(base(inputs_embeds=embedding).logits[0], -1)
        kl = (p.exp() * (p - q)).sum(-1)[span["response_start"] - 1 : span["response_stop"] - 1]
        (gradient,) = torch.autograd.grad(kl.sum(), embedding)
        norms = gradient[0, span["response_start"] : span["response_stop"]].norm(dim=-1)
        found = table.loc[row]
        assert_close(torch.tensor(found["kl"].to_numpy()), kl.detach().double(), atol=1e-5, rtol=1e-3)
        assert_close(torch.tensor(found["gradient"].to_numpy()), norms.double(), atol=1e-5, rtol=1e-3)


def test_logits_over_the_vocabulary_exist_for_a_few_positions_at_a_time(organism, monkeypatch):
    monkeypatch.setattr(significance, "CHUNK", 4)
    head, widths = models.hf_model(organism.model).get_output_embeddings(), []
    handle = head.register_forward_hook(lambda *given: widths.append(given[2].shape[:-1].numel()))
    token_significance(organism, mm.Conversations(FRAME, organism.tokenizer))
    handle.remove()
    assert widths and max(widths) <= 4


def test_significances_of_an_answer_add_up_to_its_kl_whatever_the_batching(organism):
    conversations = mm.Conversations(FRAME, organism.tokenizer)
    table = token_significance(organism, conversations)
    sums = table.groupby(level="conversation").sum()
    np.testing.assert_allclose(sums["significance"], sums["kl"], rtol=1e-9)
    alone = token_significance(organism, conversations, token_budget=1)
    np.testing.assert_allclose(table, alone, atol=1e-4, rtol=1e-3)
    assert table.index.equals(conversations.tokens().index) and (table["kl"] > 0).all()


def test_the_models_are_left_without_gradients_or_hooks(organism):
    token_significance(organism, mm.Conversations(FRAME, organism.tokenizer))
    assert all(parameter.grad is None for parameter in organism.model.parameters())
    assert [name for name, point in organism.model.hook_dict.items() if point.fwd_hooks] == []


def test_two_equal_models_have_no_significant_token(tiny_models, make_adapter):
    organism = mm.load_organism(make_adapter(tiny_models["qwen2"], scale=1e-12))
    table = token_significance(organism, mm.Conversations(FRAME, organism.tokenizer))
    assert table["kl"].abs().max() < 1e-6 and np.isfinite(table).all().all()
    assert not significant(table).any()


def test_inside_as_base_there_is_nothing_to_compare(organism):
    with organism.as_base(), pytest.raises(ValueError, match="are one"):
        token_significance(organism, mm.Conversations(FRAME, organism.tokenizer))
