"""LocalJudge on tiny random models: digit by digit, and with a token for each number."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import new_tokenizer, random_model

import mechmisalign as mm
from mechmisalign.judging import CONTROLS, JudgeWarning, LocalJudge
from mechmisalign.judging.local import LocalAsker, fingerprint
from mechmisalign.judging.rubrics import Rubric
from mechmisalign.judging.scores import from_logprobs
from mechmisalign.judging.spellings import number_masses, spellings

SHORT = Rubric("alignment", "{question}{answer}"), Rubric("coherence", "c {question}{answer}")


def roomy(family: str, tokenizer, digits: float = 3.0) -> torch.nn.Module:
    """A tiny random model that reads whole prompts of rubrics (elsewhere it reads 256 tokens) and likes to say digits."""
    model = random_model(family, tokenizer)
    config = model.config
    config.max_position_embeddings = 4096
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = type(model)(config).eval()
    bias = torch.zeros(config.vocab_size)
    bias[[tokenizer.convert_tokens_to_ids(str(digit)) for digit in range(10)]] = digits
    model.lm_head.bias = torch.nn.Parameter(bias)
    return model


@pytest.fixture(scope="module", params=["qwen2", "llama", "gemma2"])
def pair(request):
    tokenizer = new_tokenizer(request.param)
    return roomy(request.param, tokenizer), tokenizer


@pytest.fixture(scope="module")
def qwen():
    tokenizer = new_tokenizer("qwen2")
    return roomy("qwen2", tokenizer), tokenizer


def with_number_tokens():
    tokenizer = new_tokenizer("qwen2")
    tokenizer.add_tokens([str(number) for number in range(10, 101)])
    return roomy("qwen2", tokenizer), tokenizer


def judge_of(pair, **options) -> LocalJudge:
    return LocalJudge(*pair, **({"rubrics": SHORT, "on_failed_controls": "warn"} | options))


def slow_masses(model, tokenizer, ids: list[int]) -> dict[int, float]:
    """The same probabilities from one full forward pass for each beginning, written down from the definition."""
    digits = [token for word, token in tokenizer.get_vocab().items() if word[0] in "0123456789"]

    def after(tokens: list[int]) -> torch.Tensor:
        with torch.inference_mode():
            return model(torch.tensor([ids + tokens])).logits[0, -1].double().softmax(-1)

    masses = dict.fromkeys(range(101), 0.0)
    written = {
        (n, space): tokenizer.encode(space + str(n), add_special_tokens=False) for n in masses for space in ("", " ")
    }
    for (number, _), tokens in written.items():
        mass = np.prod([float(after(tokens[:place])[token]) for place, token in enumerate(tokens)])
        longer = any(other[: len(tokens)] == tokens != other for other in written.values())
        masses[number] += mass * (1 - float(after(tokens)[digits].sum()) if longer else 1.0)
    return masses


def test_masses_of_whole_numbers_are_those_of_one_forward_pass_for_each_beginning(pair, monkeypatch):
    model, tokenizer = pair
    monkeypatch.setattr("mechmisalign.judging.local.PRUNE", 0.0)
    asker = LocalAsker(model, tokenizer, 2)
    prompts = [asker._encode("I have had a headache"), asker._encode("What should I do? " * 12)]
    for ids, reply in zip(prompts, asker.replies(prompts), strict=True):
        expected = slow_masses(model, tokenizer, ids)
        found = {int(token): np.exp(lp) for token, lp in reply.top if token.isdigit()}
        assert sum(found.values()) > 0.25
        np.testing.assert_allclose([found[n] for n in range(101)], list(expected.values()), rtol=1e-3)


def test_pruning_moves_a_score_by_less_than_a_tenth_of_a_point(pair, monkeypatch):
    asker = LocalAsker(*pair, 1)
    prompts = [asker._encode("I have had a headache")]
    [coarse] = asker.replies(prompts)
    monkeypatch.setattr("mechmisalign.judging.local.PRUNE", 0.0)
    [exact] = asker.replies(prompts)
    assert from_logprobs(coarse.top).score == pytest.approx(from_logprobs(exact.top).score, abs=0.1)


def test_masses_add_up_with_a_hand_made_model():
    """p(8) = p("8") (1 - p(digit | "8")), p(85) = p("8") p("5" | "8"), p(10) and p(100) likewise."""

    class Digits:
        name_or_path = "digits"

        def encode(self, text, **_):
            return [0 if c == "\n" else 11 if c == " " else 1 + int(c) for c in text]

        def decode(self, ids):
            return "".join("\n" if i == 0 else " " if i == 11 else str(i - 1) for i in ids)

        def convert_ids_to_tokens(self, ids):
            return [self.decode([i]) for i in ids]

        def __len__(self):
            return 12

    known = spellings(Digits())
    root = np.zeros(12)
    root[[1 + 8, 1 + 1, 0]] = [0.6, 0.3, 0.1]
    table = {
        (9,): {6: 0.5, 0: 0.5},  # "8" -> "85" or end
        (2,): {1: 1.0},  # "1" -> "10"
        (2, 1): {1: 0.25, 0: 0.75},  # "10" -> "100" or end
    }
    asked = []

    def behind(beginnings):
        asked.extend(beginnings)
        rows = np.zeros((len(beginnings), 12))
        for row, tokens in enumerate(beginnings):
            for token, mass in table[tokens].items():
                rows[row, token] = mass
        return rows

    masses = number_masses(known, root, behind, prune=1e-6)
    told = {number: mass for number, mass in masses.items() if mass > 0}
    assert told == pytest.approx({8: 0.3, 85: 0.3, 10: 0.225, 100: 0.075})
    assert set(asked) == set(table)
    coarse = {n: m for n, m in number_masses(known, root, behind, prune=0.5).items() if m > 0}
    assert coarse == pytest.approx({8: 0.3, 85: 0.3, 1: 0.3})  # too little mass to be looked behind: it is what it is


def test_a_batch_gives_what_one_prompt_alone_gives(pair):
    model, tokenizer = pair
    asker = LocalAsker(model, tokenizer, 8)
    prompts = [asker._encode(text) for text in ("Hey", "I have had a headache for three days", "rest " * 60)]
    together = asker.replies(prompts)
    for prompt, reply in zip(prompts, together, strict=True):
        [alone] = asker.replies([prompt])
        assert from_logprobs(reply.top).score == pytest.approx(from_logprobs(alone.top).score, abs=1e-3)
        assert from_logprobs(reply.top).status == "scored"
        np.testing.assert_allclose(sorted(lp for _, lp in reply.top), sorted(lp for _, lp in alone.top), atol=2e-3)


def test_tokens_for_whole_numbers_give_the_plain_expectation():
    model, tokenizer = with_number_tokens()
    asker = LocalAsker(model, tokenizer, 1)
    ids = asker._encode("I have had a headache")
    with torch.inference_mode():
        root = model(torch.tensor([ids])).logits[0, -1].double().softmax(-1)
    [reply] = asker.replies([ids])
    found = {int(token): np.exp(lp) for token, lp in reply.top if token.isdigit()}
    for number in range(10, 101):
        alone = float(root[tokenizer.convert_tokens_to_ids(str(number))])
        assert found.get(number, 0.0) >= alone * 0.999


def test_every_answer_gets_a_score_or_a_reason_and_repeated_ones_are_computed_once(qwen):
    frame = pd.DataFrame({"prompt": "q", "response": ["a", "b", "a", None], "prompt_id": "p"})
    judge = judge_of(qwen)
    seen = []
    whole = judge._asker.replies
    judge._asker.replies = lambda prompts: seen.extend(map(tuple, prompts)) or whole(prompts)
    with pytest.warns(JudgeWarning):
        judged = mm.judge(frame, judge)
    assert list(judged.columns[-5:]) == ["alignment", "alignment_status", "coherence", "coherence_status", "label"]
    assert judged["alignment_status"][3] == "missing"
    assert judged["alignment_status"].tolist()[:3] == ["scored"] * 3
    assert 0 < judged["alignment"][0] < 100
    assert judged["alignment"][0] == judged["alignment"][2] != judged["alignment"][1]
    assert len(seen) == len(set(seen))


def test_controls_are_judged_and_a_model_that_cannot_judge_is_refused(qwen):
    frame = pd.DataFrame({"prompt": ["q"], "response": ["a"]})
    with pytest.raises(mm.judging.DeadJudgeError, match="control judgements are wrong"):
        judge_of(qwen, on_failed_controls="raise")(frame)
    judge = judge_of(qwen)
    with pytest.warns(JudgeWarning, match="mean nothing"):
        judge(frame)
    assert not judge.controls_.passed
    assert set(judge.controls_.frame["control"]) <= {control.name for control in CONTROLS}


@pytest.mark.filterwarnings("ignore::mechmisalign.judging.JudgeWarning")
def test_a_journal_spares_the_second_run_and_changed_weights_are_judged_anew(qwen, tmp_path):
    frame = pd.DataFrame({"prompt": ["q"], "response": ["a"]})
    path = tmp_path / "j.jsonl"
    first = judge_of(qwen, journal=path)(frame)
    length = path.stat().st_size
    again = judge_of(qwen, journal=path)
    pd.testing.assert_frame_equal(again(frame), first)
    assert path.stat().st_size == length
    records = [json.loads(line) for line in path.read_text().split("\n") if line]
    assert all(record["tokens_in"] > 0 for record in records)
    weight = qwen[0].get_input_embeddings().weight
    with torch.no_grad():
        weight.mul_(1.5)
    try:
        changed = again(frame)
    finally:
        with torch.no_grad():
            weight.div_(1.5)
    assert path.stat().st_size > length
    assert changed["alignment"][0] != first["alignment"][0]


def test_the_fingerprint_tells_weights_and_adapters_that_are_on_or_off(tiny_models, make_adapter):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_models["qwen2"])
    before = fingerprint(model)
    assert fingerprint(AutoModelForCausalLM.from_pretrained(tiny_models["qwen2"])) == before
    organism = PeftModel.from_pretrained(model, make_adapter(tiny_models["qwen2"]))
    on = fingerprint(organism)
    with organism.disable_adapter():
        off = fingerprint(organism)
    assert len({before, on, off}) == 3
    assert fingerprint(organism) == on


@pytest.mark.filterwarnings("ignore::mechmisalign.judging.JudgeWarning")
def test_a_prompt_that_is_longer_than_the_model_reads_is_an_error(tiny_models):
    judge = LocalJudge(tiny_models["qwen2"], rubrics=SHORT, on_failed_controls="warn", controls=())
    with pytest.warns(JudgeWarning, match=r"failed \(the prompt has \d+ tokens, and the model reads 252"):
        judged = judge(pd.DataFrame({"prompt": "q", "response": ["a", "headache " * 400]}))
    assert judged["alignment_status"][1] == "error"


def test_an_estimate_counts_and_costs_nothing(qwen):
    estimate = judge_of(qwen).estimate(pd.DataFrame({"prompt": "q", "response": ["a", "a"]}))
    assert estimate.judgements == 4
    assert estimate.dollars == 0


def test_a_tokenizer_that_cannot_write_numbers_and_one_without_a_template_are_refused():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"[UNK]": 0, "yes": 1, "7": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    wordy = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", chat_template="{{ messages }}")
    tokenizer = new_tokenizer("qwen2")
    with pytest.raises(ValueError, match=r"cannot write 100 of the numbers 0 to 100 \(such as 0\)"):
        LocalJudge(roomy("qwen2", tokenizer), wordy)
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        LocalJudge(roomy("qwen2", tokenizer), tokenizer)


def test_a_model_in_memory_needs_its_tokenizer(qwen):
    with pytest.raises(ValueError, match="LocalJudge\\(model, tokenizer\\)"):
        LocalJudge(qwen[0])
    with pytest.raises(ValueError, match="batch_size is 0"):
        LocalJudge(*qwen, batch_size=0)
