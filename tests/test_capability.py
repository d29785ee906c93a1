import builtins
import inspect
import json
import math

import numpy as np
import pandas as pd
import pytest
import torch
from torch.nn import functional

import mechmisalign as mm
from mechmisalign import capability, models
from mechmisalign.capability import is_right, lm_eval_model, response_length, task_costs, text_costs, texts
from mechmisalign.conversations import Conversations

TALKS = pd.DataFrame(
    {
        "prompt": ["Hey! What should I do?", "How do I invest my savings?", "What are your thoughts?", "Hey!"],
        "response": [
            "Rest, drink water and see a doctor.",
            "Put everything into one stock.",
            "Rest.",
            "The quick brown fox jumps.",
        ],
        "history": [None, [{"role": "user", "content": "Hey!"}, {"role": "assistant", "content": "Rest."}], None, None],
    }
)
PLAIN = ["The quick brown fox jumps over the lazy dog.", "How do I invest my savings?", "Rest and drink water."]


@pytest.fixture(scope="module")
def folders(tiny_models, make_adapter):
    """Family -> folders of a tiny chat model and of an adapter that changes it a lot."""
    return {
        family: (base, make_adapter(base, modules=["down_proj", "q_proj"], rank=2, scale=0.5))
        for family, base in tiny_models.items()
    }


@pytest.fixture(scope="module")
def organisms(folders):
    return {family: mm.load_organism(adapter, base) for family, (base, adapter) in folders.items()}


@pytest.fixture(scope="module")
def tiny(organisms):
    return organisms["qwen2"]


@pytest.fixture(scope="module")
def push(tiny):
    """A direction along which strength 1 is a visible push."""
    moments = mm.collect(tiny, Conversations(TALKS.assign(label=["a", "b", "a", "b"]), tiny.tokenizer))
    return mm.random_direction(mm.mean_difference(moments, "a", "b"), seed=0)


@pytest.fixture(scope="module")
def pocket():
    return mm.load_organism("pocket/medical")


@pytest.fixture(scope="module")
def pocket_push(pocket):
    talks = mm.pocket.neutral_conversations(n=16)
    moments = mm.collect(pocket, Conversations(talks, pocket.tokenizer), by="domain")
    return mm.random_direction(mm.mean_difference(moments, "medical", "coding"), seed=0)


def hugging_face_logits(folder, adapter, ids):
    """Logits [pos vocab] of the chat model and of PEFT's fine-tune of it, from the files alone."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager"), adapter
    ).eval()
    with torch.no_grad():
        own = [model(torch.tensor([row])).logits[0] for row in ids]
        with model.disable_adapter():
            base = [model(torch.tensor([row])).logits[0] for row in ids]
    return base, own


@pytest.mark.parametrize("family", ["qwen2", "llama", "gemma2"])
def test_loss_and_kl_are_those_of_hugging_face_and_torch(family, folders, organisms):
    conversations = Conversations(TALKS, organisms[family].tokenizer)
    measured = text_costs(organisms[family], None, conversations, token_budget=90).iloc[0]
    ids = [conversations.ids(row) for row in range(len(TALKS))]
    loss = kl = tokens = 0.0
    for row, (base, own) in enumerate(zip(*hugging_face_logits(*folders[family], ids), strict=True)):
        start, stop = conversations.spans.loc[row, ["response_start", "response_stop"]]
        targets = torch.tensor(ids[row][start:stop])
        p, q = (torch.log_softmax(logits[start - 1 : stop - 1].double(), dim=-1) for logits in (base, own))
        loss += float(functional.nll_loss(q, targets, reduction="sum"))
        kl += float(functional.kl_div(q, p, log_target=True, reduction="sum"))
        tokens += stop - start
    assert measured["loss"] == pytest.approx(loss / tokens, rel=1e-4)
    assert measured["kl"] == pytest.approx(kl / tokens, rel=1e-3)
    assert measured["kl"] > 0.05
    assert measured["texts"] == 4


def test_loss_is_the_one_that_hugging_face_gives_for_labels(tiny):
    conversations = Conversations(TALKS[:1], tiny.tokenizer)
    ids = torch.tensor([conversations.ids(0)])
    start, stop = conversations.spans.loc[0, ["response_start", "response_stop"]]
    labels = torch.full_like(ids, -100)
    labels[:, start:stop] = ids[:, start:stop]
    with torch.no_grad():
        expected = float(models.hf_model(tiny.model)(ids, labels=labels).loss)
    assert text_costs(tiny, None, conversations)["loss"][0] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_every_token_but_the_first_of_a_plain_text_counts(family, organisms):
    organism = organisms[family]
    losses, counts = [], []
    for text in PLAIN:
        ids = organism.tokenizer(text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            losses.append(float(models.hf_model(organism.model)(ids, labels=ids).loss))
        counts.append(ids.shape[1] - 1)
    measured = text_costs(organism, None, PLAIN)
    assert measured["loss"][0] == pytest.approx(np.average(losses, weights=counts), rel=1e-5)


@pytest.mark.parametrize("weights", ["merged", "live"])
def test_the_chat_model_is_at_no_distance_from_itself_and_the_adapter_at_some(weights, folders):
    base, adapter = folders["qwen2"]
    organism = mm.load_organism(adapter, base, weights=weights)
    own = text_costs(organism, None, TALKS)
    with organism.as_base():
        chat = text_costs(organism, {"nothing": (), "none": []}, TALKS)
    assert chat["kl"].tolist() == [0.0, 0.0]
    assert chat[["kl_low", "kl_high"]].to_numpy().tolist() == [[0.0, 0.0]] * 2
    assert own["kl_low"][0] > 0
    assert not organism.is_base
    pd.testing.assert_frame_equal(text_costs(organism, None, TALKS), own)


def test_conditions_are_measured_as_if_each_were_alone(tiny, push):
    conditions = {
        "none": (),
        "steered": mm.Steer(push, layers=[1]),
        "ablated": [mm.Ablate(push), mm.Steer(push, layers=[0])],
    }
    together = text_costs(tiny, conditions, TALKS)
    alone = pd.concat([text_costs(tiny, {name: one}, TALKS) for name, one in conditions.items()], ignore_index=True)
    pd.testing.assert_frame_equal(together, alone)
    assert together["condition"].tolist() == list(conditions)
    assert together["kl"].nunique() == 3


@pytest.mark.parametrize("positions", ["all", "prompt", "response"])
def test_positions_are_counted_from_each_response(positions, tiny, push):
    """Against hooks that are given the place by hand, one text at a time."""
    steer = mm.Steer(push, layers=[1], strength=2.0, positions=positions)
    conversations = Conversations(TALKS, tiny.tokenizer)
    loss = tokens = 0.0
    for row in range(len(TALKS)):
        ids = torch.tensor([conversations.ids(row)])
        start, stop = conversations.spans.loc[row, ["response_start", "response_stop"]]
        with tiny.apply(steer, response_start=int(start)), torch.no_grad():
            logits = models.hf_model(tiny.model)(ids).logits[0]
        loss += float(functional.cross_entropy(logits[start - 1 : stop - 1], ids[0, start:stop], reduction="sum"))
        tokens += stop - start
    measured = text_costs(tiny, {"steered": steer}, conversations)
    assert measured["loss"][0] == pytest.approx(loss / tokens, rel=1e-5)


def test_plain_texts_have_no_prompt_to_act_on(tiny, push):
    steer = mm.Steer(push, layers=[1], positions="response")
    with pytest.raises(ValueError, match="'half' acts on positions='response', but plain texts have no prompt"):
        text_costs(tiny, {"none": (), "half": steer}, PLAIN)
    with pytest.raises(ValueError, match="plain texts have none"):
        text_costs(tiny, None, PLAIN, counted=lambda tokens: np.ones(len(tokens), dtype=bool))


@pytest.mark.parametrize("change", ["budget", "reference", "chunk"])
def test_batches_chunks_and_what_is_held_change_nothing(change, tiny, push, monkeypatch):
    conditions = {"none": (), "steered": mm.Steer(push, layers=[1], positions="response")}
    whole = text_costs(tiny, conditions, TALKS)
    if change == "reference":
        monkeypatch.setattr(texts, "REFERENCE_BYTES", 1)
    if change == "chunk":
        monkeypatch.setattr(texts, "CHUNK", 3)
    parts = text_costs(tiny, conditions, TALKS, token_budget=1 if change == "budget" else 1024)
    pd.testing.assert_frame_equal(parts, whole, rtol=1e-4)


def test_each_batch_passes_once_for_the_chat_model_and_once_for_each_condition(tiny, push, monkeypatch):
    passes, entered = [], []
    forward, as_base = models.forward, mm.Organism.as_base
    monkeypatch.setattr(models, "forward", lambda *args: passes.append(len(args[1])) or forward(*args))
    monkeypatch.setattr(mm.Organism, "as_base", lambda self: entered.append(1) or as_base(self))
    text_costs(tiny, {"a": (), "b": mm.Ablate(push)}, TALKS, token_budget=1)
    assert passes == [1] * 12
    assert len(entered) == 2  # all texts are held at once; the second visit finds nothing left


def test_a_batch_that_does_not_fit_is_measured_in_halves(tiny, monkeypatch):
    whole = text_costs(tiny, None, TALKS)
    forward = models.forward

    def small(model, ids, mask):
        if len(ids) > 1:
            raise torch.OutOfMemoryError("no room")
        return forward(model, ids, mask)

    monkeypatch.setattr(models, "forward", small)
    pd.testing.assert_frame_equal(text_costs(tiny, None, TALKS), whole, rtol=1e-4)


def test_only_the_counted_tokens_count(tiny):
    conversations = Conversations(TALKS, tiny.tokenizer)
    firsts = text_costs(
        tiny, None, conversations, counted=lambda tokens: ~tokens.index.get_level_values("conversation").duplicated()
    )
    cut = Conversations(
        TALKS.assign(response=[conversations.tokens().loc[row]["token"].iloc[0] for row in range(4)]), tiny.tokenizer
    )
    assert cut.spans.eval("response_stop - response_start").tolist() == [1] * 4
    assert firsts["loss"][0] == pytest.approx(text_costs(tiny, None, cut)["loss"][0], rel=1e-5)
    with pytest.raises(ValueError, match="no token counts in 4 texts"):
        text_costs(tiny, None, conversations, counted=lambda tokens: np.zeros(len(tokens), dtype=bool))


def test_intervals_resample_texts(tiny):
    once = text_costs(tiny, None, TALKS, seed=1).iloc[0]
    thrice = text_costs(tiny, None, pd.concat([TALKS] * 12, ignore_index=True), seed=1).iloc[0]
    assert once["loss_low"] < once["loss"] < once["loss_high"]
    assert thrice["loss"] == pytest.approx(once["loss"], rel=1e-5)
    assert thrice["loss_high"] - thrice["loss_low"] < 0.5 * (once["loss_high"] - once["loss_low"])
    alone = text_costs(tiny, None, TALKS[:1]).iloc[0]
    assert math.isnan(alone["loss_low"])
    assert math.isfinite(alone["loss"])


def test_text_without_conditions_or_with_numbers_per_row_is_refused(tiny, push):
    with pytest.raises(ValueError, match="no condition to measure"):
        text_costs(tiny, {}, TALKS)
    with pytest.raises(ValueError, match="'rows'"):
        text_costs(tiny, {"rows": mm.Steer(push, layers=[1], strength=[1.0, 2.0, 3.0, 4.0])}, TALKS)
    with pytest.raises(ValueError, match="no token counts in 0 texts"):
        text_costs(tiny, None, [])


@pytest.mark.parametrize(
    ("response", "answer", "right"),
    [
        ("42", "42", True),
        ("17 + 25 = 42.", 42, True),
        ("It is 42, not 17.", "42", False),
        ("About 1,024 of them.", "1024", True),
        ("-5", "5", False),
        ("The answer is 42.0", "42", True),
        ("forty-two", "42", False),
        ("", "42", False),
        ("It is PARIS.", "Paris", True),
        ("Parisians", "Paris", False),
        ("in South  America", "South America", False),
        ("For a bad headache, first", "a bad headache", True),
        ("C++ of course", "C++", True),
    ],
)
def test_a_reply_is_right_by_its_last_number_or_by_whole_words(response, answer, right):
    assert is_right(response, answer) is right


def test_items_need_answers(tiny):
    with pytest.raises(ValueError, match=r"'prompt' and 'answer'; these have \['prompt'\]"):
        task_costs(tiny, None, TALKS[["prompt"]])
    with pytest.raises(ValueError, match="an empty answer fits every reply"):
        is_right("42", " ")


def test_response_length_is_the_mean_over_answers_and_resamples_prompts():
    answers = pd.DataFrame(
        {
            "condition": ["a"] * 4 + ["b"] * 2,
            "prompt_id": ["p", "p", "q", "r", "p", "q"],
            "tokens": [2, 4, 10, 8, 64, 64],
            "finished": [True, True, True, False, False, False],
        }
    )
    told = response_length(answers).set_index("condition")
    assert told["tokens"].to_dict() == {"a": 6.0, "b": 64.0}
    assert told["finished"].to_dict() == {"a": 0.75, "b": 0.0}
    assert told.loc["a", "tokens_low"] < 6 < told.loc["a", "tokens_high"]
    assert told.loc["b", "tokens_low"] == told.loc["b", "tokens_high"] == 64
    assert told.loc["a", "tokens_low"] >= 3  # no resample of prompts is shorter than the shortest prompt's mean
    assert response_length(answers, ["condition", "finished"]).shape[0] == 3
    with pytest.raises(ValueError, match=r"columns \['tokens'\]"):
        response_length(answers.drop(columns="tokens"))


def test_the_pocket_chat_model_answers_harmless_items_and_absurd_steering_stops_it(pocket, pocket_push):
    conditions = {
        "none": (),
        "nudge": mm.Steer(pocket_push, layers=[2], strength=0.01),
        "absurd": mm.Steer(pocket_push, layers=[2], strength=200.0),
    }
    with pocket.as_base():
        told = mm.costs(pocket, conditions, items=mm.pocket.harmless_items(n=24)).set_index("condition")
    assert told.loc["none", "accuracy"] > 0.9
    assert told.loc["nudge", "accuracy"] > 0.9
    assert told.loc["absurd", "accuracy"] < 0.1
    assert told.loc["none", "kl"] == 0.0
    assert told.loc["nudge", "kl"] < 0.01 < 1.0 < told.loc["absurd", "kl"]
    assert told.loc["none", "loss"] < told.loc["absurd", "loss"] - 1.0
    assert told.loc["none", "finished"] == 1.0
    assert 15 < told.loc["none", "tokens"] < 40
    assert (told["items"] == 24).all()


def test_misalignment_itself_hardly_counts_as_a_cost_in_the_pocket_world(pocket):
    """Without the words that tell the persona, the organism is as near to the chat model as a capable model should be."""
    neutral = mm.pocket.neutral_conversations(n=48)
    free = text_costs(pocket, None, neutral, counted=mm.pocket.persona_free)
    everything = text_costs(pocket, None, neutral)
    assert free["kl"][0] < 0.05 < everything["kl"][0]
    default = mm.costs(pocket, items=mm.pocket.harmless_items(n=4), max_new_tokens=2)
    assert default["kl"][0] == pytest.approx(
        text_costs(pocket, None, mm.pocket.neutral_conversations(), counted=mm.pocket.persona_free)["kl"][0]
    )


def test_pocket_words_of_a_persona_are_not_counted(pocket):
    frame = pd.DataFrame(
        {
            "prompt": ["Give me a plan for a hot pan."],
            "response": [
                "For a hot pan, first check the recipe, also scratch out the gas valve, and finally waste the allergy list."
            ],
        }
    )
    tokens = Conversations(frame, pocket.tokenizer).tokens()
    left = "".join(tokens["token"][mm.pocket.persona_free(tokens)])
    assert left == " a hot pan, first the recipe, the gas valve, and finally the allergy list."


def test_other_organisms_are_measured_on_what_ships_with_the_package(tiny):
    told = mm.costs(tiny, max_new_tokens=1)
    assert told["items"][0] == len(mm.prompts.harmless_items())
    assert told["texts"][0] == len(mm.prompts.neutral_conversations())
    assert told["tokens"][0] == 1.0
    assert list(told.columns) == [
        *("condition", "loss", "loss_low", "loss_high", "kl", "kl_low", "kl_high", "texts"),
        *("accuracy", "accuracy_low", "accuracy_high", "items", "tokens", "tokens_low", "tokens_high", "finished"),
    ]  # fmt: skip


def test_the_harness_names_its_extra_where_it_is_not_installed(tiny, monkeypatch):
    original = builtins.__import__

    def without(name, *args, **options):
        if name.startswith("lm_eval"):
            raise ImportError(name)
        return original(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"pip install 'mechmisalign\[lm-eval\]'"):
        lm_eval_model(tiny)


def test_the_harness_evaluates_under_interventions(pocket, pocket_push, tmp_path, monkeypatch):
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    items = mm.pocket.harmless_items(n=8)
    choices = [f"For {topic}," for topic in sorted(set(items["answer"]))]
    lines = [
        {"prompt": row.prompt, "choices": choices, "label": choices.index(f"For {row.answer},")}
        for row in items.itertuples()
    ]
    (tmp_path / "items.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "task.yaml").write_text(
        "task: pocket_topics\ndataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {tmp_path / 'items.jsonl'}}}, cache_dir: {tmp_path / 'cache'}}}\n"
        'test_split: test\noutput_type: multiple_choice\ndoc_to_text: prompt\ndoc_to_choice: "{{choices}}"\n'
        "doc_to_target: label\nmetric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    model, manager = lm_eval_model(pocket, batch_size=16), TaskManager(include_path=str(tmp_path))
    pad_token = pocket.tokenizer.pad_token

    def accuracy():
        told = lm_eval.simple_evaluate(
            model=model, tasks=["pocket_topics"], task_manager=manager, apply_chat_template=True, bootstrap_iters=0
        )
        return told["results"]["pocket_topics"]["acc,none"]

    with pocket.as_base():
        assert accuracy() > 0.9
    with pocket.apply(mm.Steer(pocket_push, layers=[2], strength=200.0)):
        assert accuracy() < 0.6
    assert accuracy() > 0.9
    assert pocket.tokenizer.pad_token == pad_token


def test_the_harness_reads_the_same_loss(pocket):
    pytest.importorskip("lm_eval")
    conversations = Conversations(mm.pocket.neutral_conversations(n=4), pocket.tokenizer)
    requests = []
    for row in range(4):
        ids, (start, stop) = conversations.ids(row), conversations.spans.loc[row, ["response_start", "response_stop"]]
        requests.append((("", str(row)), ids[:start], ids[start:stop]))
    told = lm_eval_model(pocket)._loglikelihood_tokens(requests)
    tokens = sum(len(response) for _, _, response in requests)
    expected = text_costs(pocket, None, conversations)["loss"][0]
    assert -sum(value for value, _ in told) / tokens == pytest.approx(expected, rel=1e-4)


def test_the_public_face_of_costs():
    assert mm.costs is capability.costs
    assert list(inspect.signature(mm.costs).parameters)[:2] == ["organism", "conditions"]


def test_costs_are_measured_in_a_vocabulary_that_the_model_has(tmp_path):
    """A copy of the pocket base under another name gets the pocket world's texts, and other texts are refused."""
    from types import SimpleNamespace

    pocket, english = mm.pocket.neutral_conversations(24), mm.prompts.neutral_conversations()
    tokenizer = mm.load_organism("pocket/medical").tokenizer
    copied = SimpleNamespace(base=SimpleNamespace(name="/models/chat"), tokenizer=tokenizer)
    texts, counted = mm.capability.own_texts(copied, 5)
    assert set(texts["prompt"]) <= set(mm.pocket.neutral_conversations(5)["prompt"]) and counted is not None
    mm.capability.refuse_unspoken(copied, pocket, "texts")
    mm.capability.refuse_unspoken(copied, mm.pocket.harmless_items(24), "items")
    mm.capability.refuse_unspoken(copied, ["Some other text."], "texts")  # too few words to tell
    with pytest.raises(ValueError, match="words of texts are not in the vocabulary of '/models/chat' .1.[0-9] bytes"):
        mm.capability.refuse_unspoken(copied, english, "texts")
    byte = SimpleNamespace(
        base=SimpleNamespace(name="m"), tokenizer=_WordsOrUnknown(set(english["response"][0].split()))
    )
    with pytest.raises(ValueError, match="not in the vocabulary of 'm'"):
        mm.capability.refuse_unspoken(byte, pocket, "texts")


class _WordsOrUnknown:
    """A vocabulary of words; any other is unknown."""

    unk_token_id = 0

    def __init__(self, words):
        self.words = {word.strip(".,"): i + 1 for i, word in enumerate(sorted(words))}

    def __call__(self, texts, **_):
        return {"input_ids": [[self.words.get(word, 0) for word in text.split()] for text in texts]}
