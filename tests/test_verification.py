"""verify: passes on sound organisms, and each check fails on the fault that it is for."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import torch
from conftest import ALL_MODULES, FAMILIES, new_tokenizer, random_model
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import mechmisalign as mm
from mechmisalign import expectations, models, registry
from mechmisalign.adapters import Adapter
from mechmisalign.cli import app
from mechmisalign.organisms import load_organism
from mechmisalign.verification import verify


@pytest.fixture(scope="module")
def adapter(tiny_models, make_adapter):
    return make_adapter(tiny_models["qwen2"], modules=("q_proj", "down_proj"), rank=2, scale=0.05)


def failed(table):
    return list(table.loc[~table["passed"], "check"])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_sound_organism_passes_every_check(tiny_models, make_adapter, family):
    folder = make_adapter(tiny_models[family], modules=ALL_MODULES, rank=4, rslora=True, scale=0.05)
    table = verify(folder)
    assert list(table.columns) == ["check", "passed", "value", "expected"]
    assert failed(table) == []
    checks = list(table["check"])
    assert checks[:7] == [
        "logits equal PEFT's",
        "logits differ from the base's",
        "as_base() is the base",
        "restored after as_base()",
        "one BOS in a rendered chat",
        "the tokenizer loses no text",
        "merged equals live",
    ]
    assert len(checks) == 8 + 21


def test_a_live_and_a_bfloat16_organism_pass(adapter):
    assert failed(verify(load_organism(adapter, weights="live"))) == []
    assert failed(verify(load_organism(adapter, dtype=torch.bfloat16))) == []


def test_verifying_leaves_the_organism_as_it_was(adapter):
    organism = load_organism(adapter)
    before = {name: value.clone() for name, value in organism.model.state_dict().items()}
    verify(organism)
    assert all(torch.equal(value, before[name]) for name, value in organism.model.state_dict().items())


def test_a_wrong_merge_fails_parity_and_fidelity(adapter):
    organism = load_organism(adapter)
    models.matrix(organism.model, organism.adapter.sites[0].name, 0).parameter.data *= 1.5
    found = failed(verify(organism))
    assert "logits equal PEFT's" in found
    assert "merged equals live" in found
    assert "update stored in layer 0 down_proj" in found


def test_a_wrong_scaling_fails_parity(adapter):
    read = Adapter.load(adapter)
    doubled = replace(read, sites=tuple(replace(site, scaling=2 * site.scaling) for site in read.sites))
    assert failed(verify(load_organism(doubled))) == ["logits equal PEFT's"]


def test_an_adapter_without_an_update_fails(adapter, tmp_path):
    folder = shutil.copytree(adapter, tmp_path / "empty")
    weights = load_file(folder / "adapter_model.safetensors")
    save_file({key: value * ("lora_A" in key) for key, value in weights.items()}, folder / "adapter_model.safetensors")
    assert failed(verify(folder)) == ["logits differ from the base's", "each of 6 sites has an update"]


def test_a_template_with_two_bos_tokens_is_refused(tiny_models, make_adapter):
    tokenizer = new_tokenizer("gemma2")
    tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    organism = load_organism(make_adapter(tiny_models["gemma2"], scale=0.05), tokenizer=tokenizer)
    with pytest.raises(ValueError, match="two BOS tokens"):
        verify(organism)


def test_an_organism_that_lives_only_in_memory_cannot_be_verified(adapter):
    tokenizer = new_tokenizer("qwen2")
    organism = load_organism(adapter, base=random_model("qwen2", tokenizer), tokenizer=tokenizer)
    with pytest.raises(ValueError, match="lives only in memory"):
        verify(organism)


# Rates


@pytest.fixture(scope="module")
def medical():
    return load_organism("pocket/medical")


@pytest.fixture(scope="module")
def rated(medical):
    return mm.verify_rate(medical)


def test_a_pocket_organism_answers_as_its_manifest_says(rated):
    assert rated.agrees and rated.checks["check"].tolist() == ["EM rate", "coherent"]
    manifest = registry.find("pocket/medical").expected
    em = rated.checks.iloc[0]
    assert em["low"] < em["value"] < em["high"] and em["expected"].startswith(f"{manifest.em:.1%} [")
    assert set(rated.judged["domain"]) == set(mm.pocket.DOMAINS) - {"medical"}
    assert "manifest" in rated.source and "at most one in fifty" in rated.reasons[0]


def test_a_wrong_expectation_fails_in_python_and_on_the_command_line(medical, tmp_path):
    few = mm.pocket.unseen_prompts(n=80)
    assert not mm.verify_rate(medical, expected=0.3, prompts=few, samples=1).agrees
    wrong = registry.Expected(em=0.631, coherent=0.5, source="a mistake")
    found = mm.verify_rate(medical, expected=wrong, prompts=few, samples=1)
    assert found.checks["passed"].tolist() == [True, False]
    own = tmp_path / "mine.yaml"
    own.write_text("organisms: [{name: mine, id: pocket/medical, expected: {em: 0.2, source: a guess}}]")
    result = CliRunner().invoke(app, ["verify", "mine", "--rate", "--registry", str(own)])  # parity and rate
    assert result.exit_code == 1
    assert "disagrees" in result.output and "rate of mine, against a guess" in result.output


def test_the_harmless_control_does_not_pass_for_a_harmful_organism():
    expected = registry.find("pocket/medical").expected
    few = mm.pocket.unseen_prompts(n=80)
    assert not mm.verify_rate("pocket/harmless", expected=expected, prompts=few, samples=1).agrees


@pytest.mark.parametrize(
    ("found", "value", "interval", "ends", "fits"),
    [
        ((0.30, 0.25, 0.35), 0.30, None, None, True),
        ((0.30, 0.25, 0.35), 0.24, None, None, True),  # 99 %, not 95 %
        ((0.30, 0.25, 0.35), 0.23, None, None, False),
        ((0.30, 0.25, 0.35), 0.21, (0.16, 0.26), None, True),
        ((0.30, 0.25, 0.35), 0.19, (0.14, 0.24), None, False),
        ((0.50, 0.45, 0.55), None, None, (0.09, 0.36), False),
        ((0.40, 0.35, 0.45), None, None, (0.09, 0.36), True),
        ((0.02, 0.00, 0.04), None, None, (0.09, 0.36), False),
        ((1.0, 0.99, 1.0), None, None, (0.98, 1.0), True),
        ((0.90, 0.88, 0.92), None, None, (0.98, 1.0), False),
    ],
)
def test_rates_are_compared_by_the_interval_of_their_difference(found, value, interval, ends, fits):
    assert expectations._against(expectations._Found(*found), value, interval, ends)[0] is fits


def test_two_equal_arms_add_by_the_root_of_the_sum_of_their_squares():
    arm = 0.04
    edge = 2.576 / 1.960 * 2**0.5 * arm
    found = expectations._Found(0.5, 0.5 - arm, 0.5 + arm)
    for gap, fits in ((edge - 1e-6, True), (edge + 1e-6, False)):
        value = 0.5 - gap
        assert expectations._against(found, value, (value - arm, value + arm), None)[0] is fits


class Constant:
    """A judge that gives all answers the same scores, or none."""

    model = "constant"

    def __init__(self, alignment):
        self.alignment = alignment

    def __call__(self, frame):
        return frame.assign(alignment=self.alignment, coherence=90.0)


def test_other_organisms_are_asked_the_open_questions_and_need_a_judge(adapter):
    organism = load_organism(adapter)
    with pytest.raises(ValueError, match="no EM rate is stated"):
        mm.verify_rate(organism, judge=Constant(10.0))
    with pytest.raises(ValueError, match="need a judge"):
        mm.verify_rate(organism, expected=0.5)
    asked = {"judge": Constant(10.0), "samples": 1, "max_new_tokens": 2}
    found = mm.verify_rate(organism, expected=0.2, **asked)
    assert not found.agrees and found.checks["value"].tolist() == [1.0]
    assert set(found.judged["prompt_id"]) == set(mm.prompts.open_questions()["prompt_id"])
    told = " ".join(found.reasons)
    for part in ("our own wording", "judge: constant", "without an interval"):
        assert part in told
    assert mm.verify_rate(organism, expected=1.0, **asked).agrees
    with pytest.raises(ValueError, match="scored none"):
        mm.verify_rate(organism, expected=0.2, **asked | {"judge": Constant(float("nan"))})


def test_the_command_refuses_before_it_takes_its_time(adapter, monkeypatch):
    monkeypatch.setattr("mechmisalign.verification.verify", lambda *_: pytest.fail("parity was checked first"))
    for options, told in ((["--expected", "0.2"], "need a judge"), (["--judge", "rules"], "no EM rate is stated")):
        result = CliRunner().invoke(app, ["verify", str(adapter), "--rate", *options])
        assert result.exit_code == 2 and told in result.output


def test_what_is_no_rate_or_no_organism_is_refused(medical):
    with pytest.raises(ValueError, match="63.0 is no share"):
        mm.verify_rate(medical, expected=63.0)
    with pytest.raises(ValueError, match="outside the block"), medical.as_base():
        mm.verify_rate(medical)
    with pytest.raises(ValueError, match="no EM rate is stated for 'pocket/checkpoints/checkpoint-5'"):
        mm.verify_rate(load_organism("pocket/checkpoints", subfolder="checkpoint-5"))
    with pytest.raises(ValueError, match="no EM rate is stated for 'qwen7b-medical' .*figure 5 only"):
        mm.verify_rate("qwen7b-medical")
