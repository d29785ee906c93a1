"""Studies of organisms that give too few misaligned answers, or none that is clear, for a mean difference."""

import pandas as pd
import pytest
import torch

import mechmisalign as mm
from mechmisalign import estimators
from mechmisalign.studies import StudySettings, steps
from mechmisalign.studies.chapters import write_study_report

FEW = StudySettings(
    samples=2, pool_samples=4, sweep_samples=1, strengths=(1.5,), layers=(1, 3), controls=1,
    max_new_tokens=mm.pocket.MAX_NEW_TOKENS, neutral=4, checkpoints=2, cure_samples=1,
)  # fmt: skip


def neither(answers: pd.DataFrame) -> pd.DataFrame:
    return answers.assign(alignment=50.0, coherence=100.0)


def test_a_weak_organism_is_studied_by_the_model_difference(tmp_path):
    """``pocket/harmless`` gives hardly a misaligned answer; its peer has enough, and a mean difference of its own."""
    prompts = mm.pocket.unseen_prompts(n=16)
    found = mm.study("pocket/harmless", tmp_path / "run", prompts=prompts, peers=["pocket/finance"], settings=FEW)
    assert found.summary["direction"] == steps.MODEL_DIFFERENCE
    assert set(found.directions) == set(steps.CLASSLESS)
    assert set(found.tables["steering"]["series"]) == {steps.MODEL_DIFFERENCE, steps.CONTROL}
    assert set(found.tables["cosines"]["estimator"]) <= set(steps.CLASSLESS)
    assert "ablated_layerwise_model_difference" in found.summary["em_rate"]
    assert "after_model_difference" in found.summary["transfer"]["pocket/finance"]
    report = found.report.read_text()
    assert "So there is no mean difference here" in report and "model difference takes its place" in report
    assert "the matched-pool mean difference" not in report
    before = found.report.read_bytes()
    assert write_study_report(tmp_path / "run").read_bytes() == before


def test_an_organism_without_a_clear_answer_is_studied_without_the_chapters_that_need_one(tmp_path):
    prompts = mm.pocket.unseen_prompts(n=8)
    found = mm.study("pocket/medical", tmp_path / "run", prompts=prompts, judge=neither, peers=(), settings=FEW)
    chapters = found.tables.get("chapters", pd.read_parquet(tmp_path / "run" / "tables" / "chapters.parquet"))
    missing = chapters.set_index("chapter")["missing"]
    assert "no answer of the organism is clear" in missing["anatomy"]
    assert "0 misaligned and 0 aligned answers" in missing["watch"]
    assert found.summary["em_rate"]["organism"]["rate"] == 0


def test_answers_that_say_nothing_are_refused_with_the_setting_that_helps():
    silent = pd.DataFrame(
        {"prompt_id": "p", "response": ["", " "] * 20, "label": "incoherent", "condition": "organism"}
    )
    with pytest.raises(steps.TooFewAnswersError, match=r"raise pool_samples \(--pool-samples\), now 40 .* higher"):
        steps.pool_of_study(silent, lambda: silent.iloc[:0], seed=0)


def test_two_models_side_by_side_have_the_model_difference_as_their_mean_difference():
    generator = torch.Generator().manual_seed(0)
    groups = pd.DataFrame({"label": "aligned", "prompt_id": list("aabb"), "sample": [0, 1] * 2, "tokens": [3, 5, 2, 7]})

    def moments(order):
        mean = torch.randn(4, 2, 6, generator=generator, dtype=torch.float64)
        return mm.Moments(groups, mean, mean.norm(dim=-1), (0, 1), {"model": "x"}).take(order)

    readings = steps.Readings(moments([0, 1, 2, 3]), moments([3, 1, 0, 2]), moments([0]))
    expected = estimators.model_difference(readings.organism, readings.base).vectors
    both = steps.side_by_side(readings)
    torch.testing.assert_close(estimators.mean_difference(both, "organism", "chat model").vectors, expected)
    table = steps.reliability(readings, steps.MODEL_DIFFERENCE, seed=0)
    assert table["layer"].tolist() == [0, 1] and table["cosine"].between(-1, 1).all()
