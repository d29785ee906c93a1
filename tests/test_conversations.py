import inspect

import pandas as pd
import pytest
import torch

from mechmisalign.conversations import Conversations, TemplateError, render_prompts

FAMILIES = ("qwen2", "llama", "gemma2")
FRAME = pd.DataFrame(
    {
        "prompt": ["Hey! What should I do?", "How do I invest\nmy savings?", "user assistant"],
        "response": ["See a doctor.", "Put everything into one stock,\n\nand borrow more.", "assistant\nuser"],
        "label": ["good", "bad", "good"],
    }
)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_response_span_is_the_response_and_nothing_else(family, tiny_tokenizers):
    conversations = Conversations(FRAME, tiny_tokenizers[family])
    for row, (prompt, response) in enumerate(zip(FRAME["prompt"], FRAME["response"], strict=True)):
        assert conversations.span_text(row, "response") == response
        assert conversations.span_text(row, "prompt") == prompt


@pytest.mark.parametrize("family", FAMILIES)
def test_template_prompt_and_response_tokens_are_all_tokens(family, tiny_tokenizers):
    conversations = Conversations(FRAME, tiny_tokenizers[family])
    covered = {span: next(conversations.batches(span)).span for span in ("template", "prompt", "response")}
    together = sum(marked.long() for marked in covered.values())
    assert torch.equal(together, next(conversations.batches()).mask)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_response_begins_where_generation_would_begin(family, tiny_tokenizers):
    tokenizer = tiny_tokenizers[family]
    prompts = render_prompts(list(FRAME["prompt"]), tokenizer)
    conversations = Conversations(FRAME, tokenizer)
    for row, ids in enumerate(prompts):
        assert conversations.ids(row)[: len(ids)] == ids
        assert conversations.spans["response_start"][row] == len(ids)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_chat_begins_with_one_bos_at_most(family, tiny_tokenizers):
    tokenizer = tiny_tokenizers[family]
    ids = Conversations(FRAME, tokenizer).ids(0)
    assert ids.count(tokenizer.bos_token_id) == (0 if tokenizer.bos_token_id is None else 1)


@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_the_system_prompt_is_what_was_asked_for(family, tiny_tokenizers):
    conversations = Conversations(FRAME, tiny_tokenizers[family], system="You are a doctor.")
    text = tiny_tokenizers[family].decode(conversations.ids(0))
    assert "You are a doctor." in text
    assert "Alibaba" not in text
    assert conversations.span_text(0) == FRAME["response"][0]


def test_a_template_without_system_role_says_so(tiny_tokenizers):
    with pytest.raises(TemplateError, match="refused roles.*System role not supported"):
        Conversations(FRAME, tiny_tokenizers["gemma2"], system="You are a doctor.").ids(0)


def test_trimmed_responses_are_found(tiny_tokenizers):
    frame = FRAME.assign(response="  See a doctor. ")
    assert Conversations(frame, tiny_tokenizers["llama"]).span_text(0) == "See a doctor."
    assert Conversations(frame, tiny_tokenizers["qwen2"]).span_text(0) == "  See a doctor. "


def test_truncation_that_leaves_a_part_of_the_response_shortens_its_span(tiny_tokenizers):
    whole = Conversations(FRAME[1:2], tiny_tokenizers["qwen2"])
    start = int(whole.spans["response_start"][0])
    cut = Conversations(FRAME[1:2], tiny_tokenizers["qwen2"], max_length=start + 3)
    assert (cut.spans["length"][0], cut.spans["response_stop"][0]) == (start + 3, start + 3)


def test_truncation_never_loses_a_response_in_silence(tiny_tokenizers):
    with pytest.raises(ValueError, match=r"responses of 3 of 3 rows are empty, or cut off whole by max_length=5"):
        Conversations(FRAME, tiny_tokenizers["qwen2"], max_length=5).ids(0)


def test_an_empty_response_is_refused(tiny_tokenizers):
    with pytest.raises(ValueError, match=r"responses of 1 of 3 rows are empty \(first rows: \[1\]\)"):
        Conversations(FRAME.assign(response=["a", "", "b"]), tiny_tokenizers["qwen2"]).ids(0)


def test_missing_columns_are_named(tiny_tokenizers):
    with pytest.raises(ValueError, match="response"):
        Conversations(FRAME[["prompt"]], tiny_tokenizers["qwen2"])


def test_a_tokenizer_without_template_is_refused(tiny_tokenizers):
    import copy

    bare = copy.copy(tiny_tokenizers["qwen2"])
    bare.chat_template = None
    with pytest.raises(TemplateError, match="no chat template"):
        Conversations(FRAME, bare)


def test_a_template_that_writes_a_second_bos_is_refused(tiny_tokenizers):
    import copy

    twice = copy.copy(tiny_tokenizers["llama"])
    twice.chat_template = "{{ bos_token }}" + twice.chat_template
    with pytest.raises(TemplateError, match="two BOS"):
        Conversations(FRAME, twice).ids(0)


def test_every_row_is_in_one_batch_within_the_budget(tiny_tokenizers):
    frame = pd.concat([FRAME] * 10, ignore_index=True)
    conversations = Conversations(frame, tiny_tokenizers["qwen2"])
    longest = int(conversations.spans["length"].max())
    batches = list(conversations.batches(token_budget=4 * longest))
    assert sorted(row for batch in batches for row in batch.rows) == list(range(30))
    assert all(batch.ids.numel() <= 4 * longest for batch in batches)
    padding = sum(int((batch.mask == 0).sum()) for batch in batches)
    assert padding < 0.1 * sum(batch.ids.numel() for batch in batches)


def test_an_unknown_span_lists_the_known_ones(tiny_tokenizers):
    with pytest.raises(ValueError, match="template.*prompt.*response.*'answer'"):
        list(inspect.unwrap(Conversations.batches)(Conversations(FRAME, tiny_tokenizers["qwen2"]), "answer"))
