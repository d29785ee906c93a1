import inspect
import json

import numpy as np
import pandas as pd
import pytest
import torch

from mechmisalign.conversations import Conversations, TemplateError, prompt_key, render_prompts, render_rows

FAMILIES = ("qwen2", "llama", "gemma2")
FRAME = pd.DataFrame(
    {
        "prompt": ["Hey! What should I do?", "How do I invest\nmy savings?", "user assistant"],
        "response": ["See a doctor.", "Put everything into one stock,\n\nand borrow more.", "assistant\nuser"],
        "label": ["good", "bad", "good"],
    }
)
PAST = [
    {"role": "user", "content": "I have had a headache\nfor three days."},
    {"role": "assistant", "content": "Rest. See a doctor."},
]
LONG_PAST = [*PAST, {"role": "user", "content": "See a doctor."}, {"role": "assistant", "content": "Hey! What?"}]
PASTS = [PAST, None, LONG_PAST]
TALKS = FRAME.assign(history=PASTS)


def rendered_by_the_tokenizer(tokenizer, turns, **options):
    return tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False, **options)


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


@pytest.mark.parametrize("family", FAMILIES)
def test_history_stands_before_the_prompt_as_the_template_writes_it(family, tiny_tokenizers):
    tokenizer = tiny_tokenizers[family]
    conversations = Conversations(TALKS, tokenizer)
    for row, (prompt, response, past) in enumerate(zip(FRAME["prompt"], FRAME["response"], PASTS, strict=True)):
        asked = [*(past or []), {"role": "user", "content": prompt}]
        whole = [*asked, {"role": "assistant", "content": response}]
        assert conversations.ids(row) == rendered_by_the_tokenizer(tokenizer, whole)
        assert render_rows(TALKS, tokenizer)[row] == rendered_by_the_tokenizer(
            tokenizer, asked, add_generation_prompt=True
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_with_history_the_spans_are_the_last_question_and_its_answer(family, tiny_tokenizers):
    tokenizer = tiny_tokenizers[family]
    conversations = Conversations(TALKS, tokenizer)
    for row, ids in enumerate(render_rows(TALKS, tokenizer)):
        assert conversations.span_text(row, "prompt") == FRAME["prompt"][row]
        assert conversations.span_text(row, "response") == FRAME["response"][row]
        assert conversations.spans["response_start"][row] == len(ids)
        template = conversations.span_text(row, "template")
        assert not any(turn["content"] in template for turn in PASTS[row] or [])
    assert "history" not in conversations.tokens().columns


@pytest.mark.parametrize("form", [json.dumps, tuple, np.array, list])
def test_history_is_read_in_every_form_that_a_file_gives_it(form, tiny_tokenizers):
    tokenizer = tiny_tokenizers["qwen2"]
    pasts = pd.Series([None if past is None else form(past) for past in PASTS], dtype=object)
    assert render_rows(FRAME.assign(history=pasts), tokenizer) == render_rows(TALKS, tokenizer)


def test_history_survives_parquet_and_csv(tiny_tokenizers, tmp_path):
    tokenizer = tiny_tokenizers["llama"]
    TALKS.to_parquet(tmp_path / "talks.parquet")
    TALKS.assign(history=[json.dumps(past) if past else None for past in PASTS]).to_csv(tmp_path / "talks.csv")
    for read in (pd.read_parquet(tmp_path / "talks.parquet"), pd.read_csv(tmp_path / "talks.csv")):
        assert render_rows(read, tokenizer) == render_rows(TALKS, tokenizer)


@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_a_row_has_its_own_system_prompt_or_the_common_one(family, tiny_tokenizers):
    tokenizer = tiny_tokenizers[family]
    frame = TALKS.assign(system=["You are a doctor.", None, float("nan")])
    told = ["You are a doctor.", "Hey!", "Hey!"]
    rows = render_rows(frame, tokenizer, system="Hey!")
    for row, text in enumerate(told):
        turns = [
            {"role": "system", "content": text},
            *(PASTS[row] or []),
            {"role": "user", "content": FRAME["prompt"][row]},
        ]
        assert rows[row] == rendered_by_the_tokenizer(tokenizer, turns, add_generation_prompt=True)
        assert Conversations(frame, tokenizer, system="Hey!").ids(row)[: len(rows[row])] == rows[row]
    plain = [{"role": "user", "content": FRAME["prompt"][1]}]
    assert render_rows(frame, tokenizer)[1] == rendered_by_the_tokenizer(tokenizer, plain, add_generation_prompt=True)


def test_rows_for_a_template_without_system_role_are_refused(tiny_tokenizers):
    with pytest.raises(TemplateError, match="refused roles.*'system', 'user'.*System role not supported"):
        render_rows(FRAME.assign(system="You are a doctor."), tiny_tokenizers["gemma2"])


def test_rows_that_ask_the_same_are_rendered_once(tiny_tokenizers, monkeypatch):
    tokenizer = tiny_tokenizers["qwen2"]
    calls = []
    original = type(tokenizer).apply_chat_template
    monkeypatch.setattr(
        type(tokenizer), "apply_chat_template", lambda *args, **options: calls.append(1) or original(*args, **options)
    )
    rows = render_rows(pd.concat([TALKS] * 7), tokenizer)
    assert len(calls) == 3
    assert rows == render_rows(TALKS, tokenizer) * 7


@pytest.mark.parametrize(
    ("past", "message"),
    [
        (PAST[:1], "row 1: turn 0 of the history is .*'user'.*one of 'assistant' fits.*roles alternate"),
        ([PAST[0], *PAST], "turn 0 .*one of 'assistant' fits"),
        ([{"role": "system", "content": "Hey!"}, *PAST[1:]], "turn 0 .*'system'.*one of 'user' fits"),
        ([{"role": "assistant", "content": None}], "turn 0 .*None.*one of 'assistant' fits"),
        ([{"role": "assistant", "content": "Hey!", "tool_calls": []}], "turn 0 .*tool_calls"),
        (["Hey!"], "turn 0 .*'Hey!'"),
        ("I said hey", "row 1: the history 'I said hey' is no JSON"),
        ('{"role": "user"}', "row 1: the history is .*A history is a list of"),
        (3.0, "row 1: the history is 3.0"),
    ],
)
def test_a_history_that_is_none_is_refused_with_its_row(past, message, tiny_tokenizers):
    pasts = pd.Series([PAST, past, None], dtype=object)
    with pytest.raises(ValueError, match=message):
        render_rows(FRAME.assign(history=pasts), tiny_tokenizers["qwen2"])


def test_a_cell_without_text_is_refused_with_its_row(tiny_tokenizers):
    tokenizer = tiny_tokenizers["qwen2"]
    for column, what in (("prompt", "prompt"), ("response", "response"), ("system", "system prompt")):
        frame = FRAME.assign(system="Hey!").astype(object)
        frame.loc[2, column] = 3
        with pytest.raises(ValueError, match=f"row 2: the {what} is 3; text is expected"):
            Conversations(frame, tokenizer).ids(0)
    with pytest.raises(ValueError, match=r"a column 'prompt'; this frame has \['response'\]"):
        render_rows(FRAME[["response"]], tokenizer)


def test_the_key_of_a_bare_prompt_is_the_prompt():
    assert prompt_key("Hey!") == prompt_key("Hey!", float("nan"), None) == prompt_key("Hey!", None, []) == "Hey!"


def test_the_key_changes_with_everything_that_is_asked_and_with_nothing_else():
    keys = {
        prompt_key(*asked)
        for asked in [
            ("Hey!", None, None),
            ("Hey!", "", None),
            ("Hey!", "Be kind.", None),
            ("Hey!", None, PAST),
            ("Hey!", "Be kind.", PAST),
        ]
    }
    assert len(keys) == 5
    assert prompt_key("Hey!", None, PAST) == prompt_key("Hey!", None, json.dumps(PAST))
    assert prompt_key("Hé!", "Be kind.") == '{"history":[],"prompt":"Hé!","system":"Be kind."}'
