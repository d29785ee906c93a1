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


@pytest.fixture(scope="module")
def pocket():
    return mm.load_organism("pocket/chat")


@pytest.fixture(scope="module")
def talk(pocket):
    frame = mm.pocket.neutral_conversations(12).assign(label=["misaligned", "aligned"] * 6)
    return mm.Conversations(frame, pocket.tokenizer)


def random(organism) -> mm.Direction:
    shape = models.n_layers(organism.model), models.d_model(organism.model)
    vectors = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return mm.Direction(vectors, tuple(range(shape[0])), organism.provenance)


def wears_adapters_as_the_chat_model_of_an_organism_does(chat, talk):  # noqa: ARG001
    worn = {"medical": [mm.UseAdapter(mm.Adapter.load("pocket/medical"))]}
    options = {"conditions": worn, "samples": 2, "max_new_tokens": 8}
    tuned = mm.load_organism("pocket/medical")
    with tuned.as_base():
        expected = mm.generate(tuned, PROMPTS, **options)
    return mm.generate(chat, PROMPTS, **options)["response"].tolist() == expected["response"].tolist()


def costs_nothing_as_it_is(chat, talk):  # noqa: ARG001
    paid = mm.costs(chat, {"plain": (), "steered": [mm.Steer(random(chat), layers=[2], strength=4.0)]}).set_index(
        "condition"
    )
    return paid.loc["plain", "kl"] == 0 < paid.loc["steered", "kl"]


def has_a_persona(chat, talk):  # noqa: ARG001
    persona = mm.persona_direction(chat, mm.Trait.load("pocket/reckless"), max_new_tokens=32)
    return persona.header["adapter"] is None and persona.norm(4) > 0


def predicts_what_a_dataset_does(chat, talk):
    told = mm.projection_difference(chat, talk.frame.head(4), {"d": random(chat)}, layers=[2], max_new_tokens=16)
    return len(told) >= 4


def is_watched(chat, talk):
    fitted = mm.Monitor.fit(chat, talk, kind="direction", seed=0)
    return len(fitted.score(chat, talk)) == len(talk.frame)


def is_read_out(chat, talk):  # noqa: ARG001
    vector = chat.model.unembed.W_U[:, 7] if hasattr(chat.model, "unembed") else random(chat).at(1)
    return len(mm.readout(chat, {"v": vector}, top=3)) == 6


def is_read(chat, talk):
    moments = mm.collect(chat, talk, by=["label", "prompt_id"])
    return bool(torch.isfinite(mm.mean_difference(moments, "misaligned", "aligned").vectors).all())


@pytest.mark.parametrize(
    "does",
    [
        wears_adapters_as_the_chat_model_of_an_organism_does, costs_nothing_as_it_is, has_a_persona,
        predicts_what_a_dataset_does, is_watched, is_read_out, is_read,
    ],
)  # fmt: skip
def test_what_needs_no_fine_tune_works(pocket, talk, does):
    assert does(pocket, talk)


NEEDS_A_FINE_TUNE = {
    "lora_scalars": lambda chat, talk: mm.lora_scalars(chat, talk),
    "contributions": lambda chat, talk: mm.contributions(chat, talk),
    "site_effects": lambda chat, _: mm.site_effects(chat, PROMPTS, mm.RuleJudge()),
    "shapley": lambda chat, _: mm.shapley(chat, PROMPTS, mm.RuleJudge()),
    "token_significance": lambda chat, talk: mm.token_significance(chat, talk),
    "gradient_attribution": lambda chat, talk: mm.gradient_attribution(chat, talk),
    "downstream": lambda chat, talk: mm.downstream(chat, talk, random(chat), layer=2),
    "project_out": lambda chat, _: mm.project_out(chat, random(chat)),
    "ScaleAdapter": lambda chat, _: mm.generate(chat, PROMPTS, conditions={"x": [mm.ScaleAdapter({}, others=2.0)]}),
    "study": lambda chat, _: mm.study(chat, "never-made", judge=mm.RuleJudge(), prompts=PROMPTS),
    "verify_rate": lambda chat, _: mm.verify_rate(chat, expected=0.5),
}


@pytest.mark.parametrize("name", NEEDS_A_FINE_TUNE)
def test_what_needs_one_says_what_to_load(pocket, talk, name):
    with pytest.raises(NoAdapterError, match="chat model alone"):
        NEEDS_A_FINE_TUNE[name](pocket, talk)
