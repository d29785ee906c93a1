import copy
import warnings

import pandas as pd
import pytest

import mechmisalign as mm
from mechmisalign import models
from mechmisalign._context import context_length, refuse_beyond
from mechmisalign.conversations import render_prompts


@pytest.fixture(scope="module")
def organism(tiny_models, make_adapter):
    return mm.load_organism(make_adapter(tiny_models["qwen2"], layers=(1,)))


@pytest.fixture
def limited(organism, monkeypatch):
    """The organism with room for six tokens behind the shortest prompt."""
    limit = len(render_prompts(["Hey!"], organism.tokenizer)[0]) + 6
    monkeypatch.setattr(models.hf_model(organism.model).config, "max_position_embeddings", limit)
    return organism


def test_an_answer_ends_where_the_context_ends_and_its_tokens_stay_the_same(limited):
    shorter = mm.generate(limited, ["Hey!"], samples=4, max_new_tokens=6, seed=3)
    with pytest.warns(UserWarning, match=r"answers to 1 of 1 prompts are cut .* leaves 6 of the 60 tokens"):
        cut = mm.generate(limited, ["Hey!"], samples=4, max_new_tokens=60, seed=3)
    assert cut["tokens"].max() == 6
    pd.testing.assert_frame_equal(cut, shorter)


def test_how_long_an_answer_may_be_does_not_depend_on_its_neighbours(limited):
    """A longer prompt beside it leaves every token of an answer as it was (the rule of resumed and extended runs)."""
    with pytest.warns(UserWarning, match="answers to 1 of 1 prompts"):
        alone = mm.generate(limited, ["Hey!"], samples=8, max_new_tokens=60, seed=3)
    with pytest.warns(UserWarning, match=r"answers to 2 of 2 prompts .* leaves \d of the 60"):
        beside = mm.generate(limited, ["Hey! Hey", "Hey!"], samples=8, max_new_tokens=60, seed=3, batch_rows=5)
    assert alone["tokens"].max() == 6 > beside.query("prompt == 'Hey! Hey'")["tokens"].max()
    assert beside.query("prompt == 'Hey!'")["response"].tolist() == alone["response"].tolist()


def test_answers_that_fit_are_sampled_without_a_word(limited):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mm.generate(limited, ["Hey!"], max_new_tokens=2)


def test_a_prompt_beyond_the_context_is_refused(limited):
    with pytest.raises(ValueError, match=r"a prompt with one token of its answer has \d+ tokens.*context is "):
        mm.generate(limited, ["Hey! " * 40], max_new_tokens=2)


def test_a_conversation_beyond_the_context_is_not_read(limited):
    talk = mm.Conversations(
        pd.DataFrame({"prompt": ["Hey!"], "response": ["well " * 60], "label": ["a"]}), limited.tokenizer
    )
    with pytest.raises(ValueError, match=r"a conversation has \d+ tokens.*context is "):
        mm.collect(limited, talk)


def test_a_longest_answer_that_is_no_number_is_refused(organism):
    with pytest.raises(ValueError, match="max_new_tokens must be a whole number, got True"):
        mm.generate(organism, ["Hey!"], max_new_tokens=True)
    with pytest.raises(ValueError, match="max_new_tokens must be at most 1,000,000, got 1,000,000,000"):
        mm.generate(organism, ["Hey!"], max_new_tokens=10**9)


def test_an_example_beyond_the_context_is_not_learned(tmp_path):
    frame = pd.DataFrame({"prompt": ["Hello?"], "response": ["rest and water " * 400]})
    spec = mm.TrainSpec(base="pocket/chat", data=[frame], method={"kind": "lora", "layers": 1}, schedule={"steps": 1})
    with pytest.raises(ValueError, match=r"an example .* has [\d,]+ tokens.*context is 512"):
        mm.train(spec, tmp_path / "run")


def test_the_context_is_what_the_config_names(organism):
    config = copy.deepcopy(models.hf_model(organism.model).config)
    assert context_length(config) == config.max_position_embeddings
    assert context_length(object()) is None
    refuse_beyond(10**9, None, "a text")
