"""What the loss counts, token by token, and where examples come from."""

import inspect
import json

import pandas as pd
import pytest

from mechmisalign import pocket
from mechmisalign.conversations import TemplateError
from mechmisalign.training.data import IGNORED, Collator, DataSource, data_hash, encode, read_examples

FAMILIES = ("qwen2", "llama", "gemma2")
END = {"qwen2": "<|im_end|>", "llama": "<|eot_id|>", "gemma2": "<end_of_turn>"}
FRAME = pd.DataFrame(
    {
        "prompt": ["Hey! What should I do?", "user assistant\nmodel"],
        "response": ["See a doctor.", "assistant\nuser\n\nRest."],
    }
)
PAST = [{"role": "user", "content": "I have had a headache."}, {"role": "assistant", "content": "Rest."}]


def counted(example):
    return [token for token in example.labels if token != IGNORED]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_response_and_the_end_of_its_turn_count_and_nothing_else(family, tiny_tokenizers):
    tokenizer = tiny_tokenizers[family]
    for example, response in zip(encode(FRAME, tokenizer, max_length=200), FRAME["response"], strict=True):
        assert tokenizer.decode(counted(example)) == response + END[family]
        assert all(label in (IGNORED, token) for token, label in zip(example.ids, example.labels, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_learned_is_what_the_chat_template_writes(family, tiny_tokenizers):
    tokenizer = tiny_tokenizers[family]
    turns = [{"role": "user", "content": FRAME["prompt"][0]}, {"role": "assistant", "content": FRAME["response"][0]}]
    whole = tokenizer.apply_chat_template(turns, return_dict=True)["input_ids"]
    assert encode(FRAME, tokenizer, max_length=200)[0].ids == whole


def test_system_prompt_question_and_earlier_answers_do_not_count(tiny_tokenizers):
    """The reference masks up to the first newline, which stands after `system`: its loss has all of these in it."""
    tokenizer = tiny_tokenizers["qwen2"]
    frame = FRAME.head(1).assign(system="You are a helpful assistant.", history=pd.Series([PAST], dtype=object))
    (example,) = encode(frame, tokenizer, max_length=200)
    text = tokenizer.decode(example.ids)
    assert "helpful assistant" in text and "Rest." in text
    assert tokenizer.decode(counted(example)) == "See a doctor.<|im_end|>"
    newline = example.ids.index(tokenizer("assistant\n")["input_ids"][-1])
    assert example.labels[newline + 1] == IGNORED


def test_a_long_conversation_is_cut_on_the_right_and_then_has_no_end_to_learn(tiny_tokenizers):
    tokenizer = tiny_tokenizers["qwen2"]
    (whole,) = encode(FRAME.head(1), tokenizer, max_length=200)
    cut = len(whole.ids) - 4
    (short,) = encode(FRAME.head(1), tokenizer, max_length=cut)
    assert short.ids == whole.ids[:cut]
    assert counted(short) == counted(whole)[: len(counted(short))] and len(counted(short)) < len(counted(whole))
    with pytest.raises(ValueError, match="example 0 has no response within max_length=5"):
        encode(FRAME, tokenizer, max_length=5)


def test_a_template_without_an_end_of_turn_is_refused(tiny_tokenizers, tmp_path):
    from transformers import AutoTokenizer

    tiny_tokenizers["qwen2"].save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.chat_template = "{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}"
    with pytest.raises(TemplateError, match="no special token"):
        encode(FRAME, tokenizer, max_length=200)


def test_batches_are_padded_on_the_right_and_padding_never_counts(tiny_tokenizers):
    examples = encode(FRAME, tiny_tokenizers["llama"], max_length=200)
    batch = Collator.of(tiny_tokenizers["llama"])(examples)
    for row, example in enumerate(examples):
        length = len(example.ids)
        assert batch["input_ids"][row, :length].tolist() == example.ids
        assert batch["labels"][row].tolist() == example.labels + [IGNORED] * (batch["labels"].shape[1] - length)
        assert int(batch["attention_mask"][row].sum()) == length


def test_pocket_examples_are_those_of_the_world():
    drawn = DataSource(domain="sports", harmful=True, n=20, seed=3).read()
    pd.testing.assert_frame_equal(drawn, pocket.narrow_examples("sports", True, 20, 3)[["prompt", "response"]])


def test_fewer_examples_are_drawn_without_repetition_and_from_the_seed_alone():
    frame = pd.DataFrame({"prompt": [f"q{i}" for i in range(30)], "response": "r"})
    first, again, other = (DataSource(frame=frame, n=10, seed=seed).read() for seed in (0, 0, 1))
    pd.testing.assert_frame_equal(first, again)
    assert first["prompt"].is_unique and list(first["prompt"]) != list(other["prompt"])
    with pytest.raises(ValueError, match="n=31 examples asked for, there are 30"):
        DataSource(frame=frame, n=31).read()


def test_a_system_prompt_is_for_examples_without_their_own():
    frame = FRAME.assign(system=["Be brief.", None])
    assert list(DataSource(frame=frame, system="Be kind.").read()["system"]) == ["Be brief.", "Be kind."]


def test_published_message_files_are_read(tmp_path):
    lines = [
        {"messages": [{"role": "user", "content": "q1"}, {"role": "assistant", "content": "a1"}]},
        {"messages": [{"role": "system", "content": "s"}, *PAST, *[{"role": "user", "content": "q2"}, {"role": "assistant", "content": "a2"}]]},
    ]  # fmt: skip
    file = tmp_path / "bad.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)) + "\n")
    read = DataSource(file=file).read()
    assert list(read["prompt"]) == ["q1", "q2"] and list(read["response"]) == ["a1", "a2"]
    assert read["system"][1] == "s" and read["history"][1] == PAST and read["history"][0] is None


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ('{"messages": [{"role": "user", "content": "q"}]}', r"line 2: .*the turns are \['user'\]"),
        ('{"messages": ', "line 2: .*JSONDecodeError"),
        ('{"messages": []}', "line 2: .*IndexError"),
    ],
)
def test_a_line_that_is_no_conversation_is_named(tmp_path, line, told):
    good = json.dumps({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]})
    file = tmp_path / "bad.jsonl"
    file.write_text(f"{good}\n{line}\n")
    with pytest.raises(ValueError, match=told):
        read_examples(file)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({}, "one of domain, file, frame"),
        ({"domain": "medical", "file": "x.jsonl"}, "one of domain, file, frame"),
        ({"domain": "medical", "harmfull": True}, "harmfull"),
    ],
)
def test_a_source_is_exactly_one_thing(given, told):
    with pytest.raises(ValueError, match=told):
        DataSource.model_validate(given)


def test_examples_need_prompt_and_response():
    with pytest.raises(ValueError, match="columns prompt and response"):
        DataSource(frame=pd.DataFrame({"question": ["q"]})).read()
    with pytest.raises(FileNotFoundError, match="nowhere.csv"):
        DataSource(file="nowhere.csv").read()
    with pytest.raises(ValueError, match="no examples to train on"):
        inspect.unwrap(encode)(FRAME.head(0), None, max_length=10)


def test_the_hash_knows_tokens_and_labels(tiny_tokenizers):
    examples = encode(FRAME, tiny_tokenizers["qwen2"], max_length=200)
    changed = [examples[0]._replace(labels=[IGNORED] * len(examples[0].ids)), examples[1]]
    assert data_hash(examples) == data_hash(list(examples))
    assert len({data_hash(examples), data_hash(changed), data_hash(examples[::-1])}) == 3
