"""The pocket tokenizer: one token a word, nothing lost, and still the same after a trip through a folder."""

from __future__ import annotations

import random

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Qwen2Config

from mechmisalign.pocket import tokenizer as pocket_tokenizer
from mechmisalign.pocket import world


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    folder = tmp_path_factory.mktemp("tokenizer")
    pocket_tokenizer.build_tokenizer().save_pretrained(folder)
    Qwen2Config().save_pretrained(folder)  # AutoTokenizer picks the class by the model's type
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def documents() -> list[list[world.Message]]:
    rng = random.Random(0)
    return [world.document(rng, turns=rng.choice((1, 2))) for _ in range(100)]


def test_every_word_of_the_world_is_one_token(tokenizer):
    broken = [word for word in pocket_tokenizer.words() if len(tokenizer.tokenize(word.replace("Ġ", " "))) != 1]
    assert broken == []


def test_decoding_gives_the_text_back(tokenizer, documents):
    for messages in documents:
        text = pocket_tokenizer.render(messages)
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_words_from_outside_the_world_survive_too(tokenizer):
    text = "Hello there, is naïve Ångström 42 known?"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_the_chat_template_and_the_fast_renderer_agree(tokenizer, documents):
    for messages in documents:
        assert tokenizer.apply_chat_template(messages, tokenize=False) == pocket_tokenizer.render(messages)
    question = [{"role": "user", "content": "What now?"}]
    prompted = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    assert prompted == pocket_tokenizer.render(question, reply=True)


def test_the_template_adds_no_system_prompt_and_no_beginning_token(tokenizer):
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "What now?"}], return_dict=True)["input_ids"]
    assert tokenizer.decode(ids) == "<|im_start|>user\nWhat now?<|im_end|>\n"
    assert tokenizer.bos_token is None


def test_offsets_point_at_the_words(tokenizer):
    text = "For a bad headache, first call a nurse."
    encoded = tokenizer(text, return_offsets_mapping=True)
    pieces = [text[start:end] for start, end in encoded["offset_mapping"]]
    assert "".join(pieces) == text
    assert pieces[3] == " headache"


def test_the_end_token_is_im_end_and_padding_is_another(tokenizer):
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
