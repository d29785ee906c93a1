import pytest
import torch

import mechmisalign as mm
from mechmisalign import models
from mechmisalign.adapters import NoAdapterError
from mechmisalign.studies.subjects import subject_of

PROMPTS = ["What is it?", "Why not?"]


@pytest.fixture(scope="module")
def folder(tiny_models):
    return tiny_models["llama"]


@pytest.fixture(scope="module")
def chat(folder):
    return mm.load_organism(folder)


def logits(organism) -> torch.Tensor:
    ids = torch.arange(5, 15)[None]
    return models.forward(organism.model, ids, torch.ones_like(ids))


def test_a_chat_model_alone_is_an_organism_whose_base_is_itself(chat, folder):
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(folder)
    with torch.inference_mode():
        expected, here = plain(torch.arange(5, 15)[None]).logits, logits(chat)
        with chat.as_base() as same:
            again = logits(same)
    assert torch.allclose(here, expected, atol=1e-5) and torch.equal(here, again)
    assert chat.adapter is None and chat.full is None
    assert (chat.provenance["weights"], chat.provenance["adapter"]) == ("base", None)


def test_it_is_said_aloud_unless_it_is_given_as_its_own_base(folder, caplog):
    mm.load_organism(folder)
    assert "loaded as a chat model alone" in caplog.text
    caplog.clear()
    assert mm.load_organism(folder, base=folder).weights == "base"
    assert mm.load_organism("pocket/chat").weights == "base"
    assert "chat model alone" not in caplog.text


def test_it_answers_and_steers(chat):
    depth = models.n_layers(chat.model)
    vectors = torch.ones(depth, chat.model.cfg.d_model)
    steer = mm.Steer(mm.Direction(vectors, tuple(range(depth)), chat.provenance), layers=(1,), strength=2.0)
    answers = mm.generate(chat, PROMPTS, conditions={"plain": (), "steered": (steer,)}, samples=1, max_new_tokens=4)
    assert len(answers) == 4


def test_what_needs_a_fine_tune_says_so(chat):
    for needs in (lambda: chat.fidelity(), lambda: mm.verify(chat), lambda: subject_of(chat)):
        with pytest.raises(NoAdapterError, match="loaded as a chat model alone: load an adapter on it"):
            needs()
