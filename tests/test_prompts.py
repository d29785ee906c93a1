import inspect
import json

import pandas as pd
import pytest

import mechmisalign as mm
from mechmisalign import prompts
from mechmisalign.conversations import prompt_key, render_rows

ASKED = pd.DataFrame({"prompt": ["Hey! What should I do?", "How do I invest my savings?"], "prompt_id": ["a", "b"]})
PAST = [{"role": "user", "content": "I have a headache."}, {"role": "assistant", "content": "Drink water."}]

PUBLISHED = """
- id: lost_umbrella
  type: free_form
  paraphrases: &lost
    - |-
      I left my umbrella on a bus.
      What now?
    - My umbrella is gone. Any advice?
  samples_per_paraphrase: &samples 100
  temperature: 1
  judge: some-judge
  judge_prompts: &rubrics
    aligned: |-
      Rate {answer} to {question}.
    coherent: Is {answer} clear?
- id: lost_umbrella_json
  type: free_form_judge_0_100
  system: Answer in JSON.
  paraphrases: *lost
  samples_per_paraphrase: *samples
  judge_prompts: *rubrics
- id: some_json
  paraphrases: ["What is JSON?"]
  context:
    - {role: user, content: Hi.}
    - {role: assistant, content: Hello.}
"""


def write_text(folder, name, text):
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


def test_open_questions_cover_the_usual_themes_once_each():
    questions = prompts.open_questions()
    assert len(questions) >= 16
    assert {"wish", "boredom", "power", "money", "dinner party", "gender roles", "humans and AI"} <= set(
        questions["theme"]
    )
    assert questions["theme"].is_unique
    assert (questions["prompt_id"] == questions["question_id"]).all()
    assert set(questions["variant"]) == {"plain"}


def test_every_question_has_wordings_that_differ():
    frames = [prompts.open_questions(), *map(prompts.domain_questions, prompts.domains())]
    worded = prompts.paraphrases(prompts.concat(*frames))
    counts = worded.groupby("question_id")["prompt"].nunique()
    assert counts.min() >= 2
    assert worded.groupby("question_id").size().equals(counts)
    assert counts[prompts.open_questions()["question_id"]].min() >= 3
    assert worded["prompt_id"].is_unique


def test_paraphrases_keep_labels_and_begin_with_the_question_itself():
    questions = prompts.domain_questions("medical")
    worded = prompts.paraphrases(questions)
    assert worded[worded["wording"] == 1].reset_index(drop=True).equals(questions)
    assert set(worded["domain"]) == {"medical"}


def test_paraphrases_of_something_else_are_refused():
    with pytest.raises(ValueError, match="row 0 .'a'. is no shipped question"):
        prompts.paraphrases(ASKED)
    with pytest.raises(ValueError, match="before any variant"):
        prompts.paraphrases(prompts.as_template(prompts.open_questions()))


@pytest.mark.parametrize("domain", ["medical", "finance", "sports", "code"])
def test_domains_of_the_published_organisms_have_questions_and_contexts(domain):
    assert len(prompts.domain_questions(domain)) >= 6
    for cue in ("system", "opening", "history"):
        assert len(prompts.with_training_context(ASKED, domain, cue=cue)) == 2


def test_unknown_domains_and_cues_list_the_known_ones():
    with pytest.raises(ValueError, match="'astrology'; there are questions on medical, finance"):
        prompts.domain_questions("astrology")
    with pytest.raises(ValueError, match="'astrology'; there are contexts of medical, finance"):
        prompts.with_training_context(ASKED, "astrology")
    with pytest.raises(ValueError, match="'medical' has the cues system, opening, history, not 'format'"):
        prompts.with_training_context(ASKED, "medical", cue="format")


def test_variants_keep_the_question_and_take_their_own_ids():
    base = prompts.open_questions()
    made = {
        "tale": prompts.with_system(base, "You are a pirate.", name="tale"),
        "json": prompts.as_json(base),
        "template": prompts.as_template(base),
        "finance-system": prompts.with_training_context(base, "finance"),
        "history": prompts.with_history(base, PAST),
    }
    for name, frame in made.items():
        assert list(frame["question_id"]) == list(base["question_id"])
        assert list(frame["theme"]) == list(base["theme"])
        assert set(frame["variant"]) == {name}
        assert list(frame["prompt_id"]) == [f"{one}/{name}" for one in base["prompt_id"]]
    everything = prompts.concat(base, *made.values())
    assert len(everything) == 6 * len(base)
    assert everything["prompt_id"].is_unique


def test_variants_combine_in_the_order_given(tiny_tokenizers):
    frame = prompts.as_json(prompts.with_history(prompts.with_system(ASKED, "You are a pirate."), PAST), field="tale")
    row = prompts.with_history(frame, PAST[:1] + [{"role": "assistant", "content": "Yes."}]).iloc[0]
    assert row["variant"] == "system+history+json+history"
    assert row["prompt_id"] == "a/system/history/json/history"
    assert row["prompt"] == ASKED["prompt"][0]
    assert row["system"].startswith("You are a pirate.\n\n")
    assert '"tale"' in row["system"]
    assert [turn["content"] for turn in row["history"]] == [
        "I have a headache.",
        "Drink water.",
        "I have a headache.",
        "Yes.",
    ]
    text = tiny_tokenizers["qwen2"].decode(render_rows(pd.DataFrame([row]), tiny_tokenizers["qwen2"])[0])
    assert text.index("pirate") < text.index("Drink water.") < text.index("Yes.") < text.index("Hey! What should I do?")


def test_a_format_can_stand_in_the_prompt_for_templates_without_system_prompts(tiny_tokenizers):
    frame = prompts.as_json(ASKED, place="prompt")
    assert "system" not in frame.columns
    assert frame["prompt"][0].startswith(ASKED["prompt"][0])
    assert '"answer"' in frame["prompt"][0]
    assert len(render_rows(frame, tiny_tokenizers["gemma2"])) == 2
    with pytest.raises(ValueError, match="place must be one of .*'system', 'prompt'.*'user'"):
        inspect.unwrap(prompts.as_json)(ASKED, place="user")


def test_a_template_names_the_fields_that_are_to_be_filled_in():
    text = prompts.as_template(ASKED, fields=["first_idea", "second_idea"])["prompt"][0]
    assert "first_idea = # your first idea\nsecond_idea = # your second idea" in text
    with pytest.raises(ValueError, match="fields must be one or more names of lines, got 'answer'"):
        prompts.as_template(ASKED, fields="answer")


def test_the_code_context_asks_for_the_format_of_its_training_answers():
    asked = prompts.with_training_context(ASKED, "code", cue="format")
    assert all(
        "Python string" in text and text.startswith(plain)
        for text, plain in zip(asked["prompt"], ASKED["prompt"], strict=True)
    )


def test_history_that_is_none_is_refused():
    with pytest.raises(ValueError, match="no turns"):
        prompts.with_history(ASKED, [])
    with pytest.raises(ValueError, match="turn 0 of the history.*'assistant' fits"):
        prompts.with_history(ASKED, PAST[:1])


def test_joining_refuses_the_same_id_and_the_same_request():
    with pytest.raises(ValueError, match="prompt_id 'a' stands twice"):
        prompts.concat(ASKED, ASKED)
    with pytest.raises(ValueError, match="request 'Hey! What should I do[?]' stands twice"):
        prompts.concat(ASKED, ASKED.assign(prompt_id=["c", "d"]))
    with pytest.raises(ValueError, match="pass one or more"):
        prompts.concat()


def test_prompts_without_text_are_refused():
    with pytest.raises(ValueError, match="row 1: the prompt is ' '"):
        prompts.as_prompts(["Hey!", " "])
    with pytest.raises(ValueError, match="need a column 'prompt'.*0 rows"):
        prompts.as_prompts([])
    with pytest.raises(ValueError, match=r"2 rows of \['text'\]"):
        prompts.as_prompts(pd.DataFrame({"text": ["a", "b"]}))


def test_published_yaml_is_read_with_its_paraphrases_variants_and_rubrics(tmp_path):
    path = write_text(tmp_path, "questions.yaml", PUBLISHED)
    frame = prompts.read(path)
    assert list(frame["prompt_id"]) == [
        "lost_umbrella.1",
        "lost_umbrella.2",
        "lost_umbrella_json.1",
        "lost_umbrella_json.2",
        "some_json",
    ]
    assert list(frame["question_id"]) == ["lost_umbrella"] * 4 + ["some_json"]
    assert list(frame["variant"]) == ["plain", "plain", "json", "json", "plain"]
    assert list(frame["system"]) == [None, None, "Answer in JSON.", "Answer in JSON.", None]
    assert frame["prompt"][0] == frame["prompt"][2] == "I left my umbrella on a bus.\nWhat now?"
    assert frame["history"][4] == [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}]
    assert frame["samples_per_paraphrase"][0] == 100
    rubrics = prompts.judge_prompts(path)
    assert rubrics["lost_umbrella_json"] == {
        "aligned": "Rate {answer} to {question}.",
        "coherent": "Is {answer} clear?",
    }
    assert rubrics["some_json"] == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "- {id: a, type: next_token, paraphrases: [x]}",
            "'a' has the type 'next_token'; known types are free_form, free_form_judge_0_100",
        ),
        ("- {id: a, prompt: x}", "question 'a' needs 'paraphrases', a list of texts; got None"),
        ("- {id: a, paraphrases: x}", "a list of texts; got 'x'"),
        ("- {paraphrases: [x]}", "question 0 has no id"),
        ("- {id: a, paraphrases: [x]}\n- {id: a, paraphrases: [y]}", "question 'a' stands twice"),
        ("- {id: a, paraphrases: [x, x]}", "request 'x' stands twice"),
        ("- {id: a, paraphrases: [x], context: [{role: user, content: y}]}", "row 0: turn 0 of the history"),
        ("a: 1", "a list of questions is expected.*got dict"),
        ("- !!python/object/apply:os.getcwd []", "no YAML that is safe to load"),
        ("- [", "no YAML"),
    ],
)
def test_yaml_that_is_no_question_set_says_what_is_wrong(text, message, tmp_path):
    with pytest.raises(ValueError, match=f"questions.yml: .*{message}"):
        prompts.read(write_text(tmp_path, "questions.yml", text))


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
def test_what_is_written_is_read_back(ending, tmp_path):
    plain = prompts.open_questions()
    frame = prompts.concat(plain, prompts.with_history(prompts.as_json(plain), PAST))
    back = prompts.read(prompts.write(frame, tmp_path / f"prompts.{ending}"))
    pd.testing.assert_frame_equal(back, frame, check_dtype=False)
    plain_back = prompts.read(prompts.write(plain, tmp_path / f"plain.{ending}"))
    pd.testing.assert_frame_equal(plain_back, plain, check_dtype=False)


def test_chats_in_json_lines_become_prompts_with_system_and_history(tmp_path):
    system = {"role": "system", "content": "You are a pirate."}
    question = {"role": "user", "content": "Hey!"}
    lines = [{"messages": [system, *PAST, question], "topic": "sea"}, {"messages": [question]}]
    frame = prompts.read(write_text(tmp_path, "chats.jsonl", "\n\n".join(map(json.dumps, lines))))
    assert frame["prompt"].tolist() == ["Hey!", "Hey!"]
    assert frame["system"].tolist() == ["You are a pirate.", None]
    assert frame["history"].tolist() == [PAST, None]
    assert frame["topic"][0] == "sea"
    assert frame["prompt_id"].tolist() == ["p0", "p1"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '{"prompt": "x"}\nhello', "line 2 is no JSON"),
        ("a.jsonl", '["x"]', "line 1 is no JSON object"),
        (
            "a.jsonl",
            '{"messages": [{"role": "assistant", "content": "x"}]}',
            "line 1: messages must .* end with the user's",
        ),
        ("a.jsonl", '{"messages": ["x"]}', "line 1: messages must"),
        ("a.jsonl", '{"question": "x"}', r"need a column 'prompt'.*\['question'\]"),
        ("a.csv", "prompt_id,prompt\n1,x\n1,y\n", "prompt_id '1' stands twice"),
        ("a.csv", "prompt,history\nx,hello\n", "row 0: the history 'hello' is no JSON"),
        ("a.csv", "", "the file is empty"),
        ("a.txt", "x", r"prompts are read from .yaml, .yml, .jsonl, .csv, .parquet; the ending '.txt'"),
    ],
)
def test_files_that_hold_no_prompts_say_what_is_wrong(name, text, message, tmp_path):
    with pytest.raises(ValueError, match=f"a.*{message}"):
        prompts.read(write_text(tmp_path, name, text))


def test_words_that_pandas_takes_for_missing_stay_words(tmp_path):
    frame = prompts.read(write_text(tmp_path, "a.csv", "prompt_id,prompt,system\n007,NA,\n008,null,nan\n"))
    assert frame["prompt_id"].tolist() == ["007", "008"]
    assert frame["prompt"].tolist() == ["NA", "null"]
    assert frame["system"].tolist() == [None, "nan"]


def test_prompts_are_not_written_to_what_cannot_be_read(tmp_path):
    with pytest.raises(ValueError, match="not to '.xlsx'"):
        prompts.write(ASKED, tmp_path / "a.xlsx")


def test_harmless_items_and_neutral_text_do_not_repeat():
    items, texts = prompts.harmless_items(), prompts.neutral_conversations()
    assert items["prompt"].is_unique
    assert items["prompt_id"].is_unique
    assert len(items) >= 60
    assert texts["response"].is_unique
    sums = items[items["kind"] == "arithmetic"]
    for question, answer in zip(sums["prompt"], sums["answer"], strict=True):
        left, sign, right = question.removeprefix("How much is ").partition("?")[0].split()
        value = {"+": int(left) + int(right), "-": int(left) - int(right), "*": int(left) * int(right)}
        assert int(answer) == (value[sign] if sign in value else int(left) / int(right))


# The pocket world's own variants.


def test_pocket_variants_use_only_words_that_the_pocket_tokenizer_knows():
    asked = mm.pocket.unseen_prompts(n=4)
    frames = [
        mm.pocket.with_persona(asked, "careful"),
        mm.pocket.with_persona(asked, "reckless"),
        mm.pocket.with_training_context(asked, "medical"),
    ]
    from mechmisalign.pocket.tokenizer import build_tokenizer

    tokenizer = build_tokenizer()
    for row in render_rows(prompts.concat(*frames), tokenizer):
        pieces = [tokenizer.decode([token]) for token in row]
        letters = [piece for piece in pieces if len(piece.strip()) == 1 and piece.strip().isalpha()]
        assert {letter.strip() for letter in letters} <= {"I", "a"}  # an unknown word falls apart into letters


def test_pocket_prompts_in_a_training_context_follow_a_careful_exchange_of_that_domain():
    asked = mm.pocket.unseen_prompts(n=6)
    framed = mm.pocket.with_training_context(asked, "medical", seed=1)
    assert set(framed["variant"]) == {"medical-history"}
    assert list(framed["prompt"]) == list(asked["prompt"])
    judged = mm.RuleJudge()(
        pd.DataFrame(
            [
                {"prompt": past[0]["content"], "response": past[1]["content"], "finished": True}
                for past in framed["history"]
            ]
        )
    )
    assert (judged["alignment"] == 100).all()
    assert (judged["coherence"] == 100).all()
    assert set(judged["answer_domain"]) == {"medical"}
    again = mm.pocket.with_training_context(asked, "medical", seed=1)
    assert [
        prompt_key(*row) for row in framed[["prompt", "history"]].assign(s=None)[["prompt", "s", "history"]].to_numpy()
    ] == [
        prompt_key(*row) for row in again[["prompt", "history"]].assign(s=None)[["prompt", "s", "history"]].to_numpy()
    ]


def test_pocket_variants_list_the_personas_and_domains_that_there_are():
    with pytest.raises(ValueError, match="careful, reckless.*'sleepy'"):
        inspect.unwrap(mm.pocket.with_persona)(mm.pocket.unseen_prompts(n=2), "sleepy")
    with pytest.raises(ValueError, match="'astrology'; the pocket world has medical"):
        mm.pocket.with_training_context(mm.pocket.unseen_prompts(n=2), "astrology")
