import inspect

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import cohen_kappa_score

import mechmisalign as mm
from mechmisalign.judging.kappa import agreement


def judged(scores, statuses=None, prompts=None, rubric: str = "alignment") -> pd.DataFrame:
    scores = np.asarray(scores, dtype=float)
    frame = pd.DataFrame({"prompt_id": prompts if prompts is not None else np.arange(len(scores)) % 5, rubric: scores})
    frame["response"] = [f"answer {n}" for n in range(len(scores))]
    if statuses is not None:
        frame[f"{rubric}_status"] = statuses
    return frame


def two_judges(n: int = 200, noise: float = 15.0, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    first = rng.uniform(0, 100, n)
    return first, np.clip(first + rng.normal(0, noise, n), 0, 100)


@pytest.mark.parametrize("weights", ["quadratic", "linear"])
@pytest.mark.parametrize("bins", [None, (50,), (10, 20, 40, 90)])
def test_kappa_is_that_of_scikit_learn_on_the_classes(weights, bins):
    first, second = two_judges()
    cuts = np.asarray(bins or (30, 70))
    classes = [np.searchsorted(cuts, scores, side="right") for scores in (first, second)]
    found = agreement(judged(first), judged(second), weights=weights, bins=bins)
    assert found.kappa == pytest.approx(cohen_kappa_score(*classes, weights=weights))


def test_a_judge_agrees_with_itself_and_disagrees_with_its_opposite():
    first, _ = two_judges()
    same = agreement(judged(first), judged(first))
    assert (same.kappa, same.low, same.high) == (1, 1, 1)
    assert same.spearman == pytest.approx(1)
    opposite = agreement(judged(first), judged(100 - first))
    assert opposite.kappa < -0.8
    assert opposite.spearman == pytest.approx(-1)


def test_unrelated_judges_agree_by_chance_only():
    rng = np.random.default_rng(1)
    found = agreement(judged(rng.uniform(0, 100, 2000)), judged(rng.uniform(0, 100, 2000)))
    assert abs(found.kappa) < 0.06
    assert abs(found.spearman) < 0.06


def test_scores_on_a_cut_belong_to_the_middle_class_as_the_strict_thresholds_have_it():
    edges = [29.9, 30, 70, 70.1]
    found = agreement(judged(edges), judged(edges))
    assert found.confusion.index.tolist() == ["below 30", "30 to 70", "above 70"]
    assert np.diag(found.confusion).tolist() == [1, 2, 1]
    coherent = agreement(judged([50, 50.1], rubric="coherence"), judged([50, 50.1], rubric="coherence"), "coherence")
    assert coherent.confusion.index.tolist() == ["up to 50", "above 50"]
    assert np.diag(coherent.confusion).tolist() == [1, 1]


def test_the_confusion_holds_every_answer_with_the_reasons_of_those_without_a_score():
    first = judged([10, 90, np.nan, np.nan], ["scored", "scored", "refusal", "error"])
    second = judged([10, np.nan, np.nan, 50], ["scored", "code", "refusal", "scored"])
    found = agreement(first, second)
    table = found.confusion
    assert table.to_numpy().sum() == found.n == 4
    assert (table.loc["below 30", "below 30"], table.loc["above 70", "code"]) == (1, 1)
    assert (table.loc["refusal", "refusal"], table.loc["error", "30 to 70"]) == (1, 1)
    assert "missing" not in table.index
    assert found.unscored == 0.75
    assert (table.index.name, table.columns.name) == ("first", "second")


def test_a_missing_reason_is_unparsable():
    found = agreement(judged([np.nan, 10, 90]), judged([50, 10, 90]))
    assert found.confusion.loc["unparsable", "30 to 70"] == 1


def test_the_interval_resamples_prompts_and_not_answers():
    """Judges that agree on some prompts and not on others: many answers to few prompts do not make this certain."""
    prompts = np.repeat(np.arange(6), 100)
    rng = np.random.default_rng(0)
    first = rng.uniform(0, 100, 600)
    second = np.where(prompts < 3, first, rng.uniform(0, 100, 600))
    by_prompt = agreement(judged(first, prompts=prompts), judged(second, prompts=prompts))
    by_answer = agreement(judged(first, prompts=np.arange(600)), judged(second, prompts=np.arange(600)))
    assert by_prompt.kappa == by_answer.kappa
    assert by_prompt.low < by_prompt.kappa < by_prompt.high
    assert by_prompt.high - by_prompt.low > 2 * (by_answer.high - by_answer.low)


def test_the_interval_covers_the_truth_as_often_as_it_says():
    whole = agreement(
        *(judged(scores, prompts=np.arange(100_000)) for scores in two_judges(100_000, 30, 9)), resamples=1
    )
    covered = 0
    for seed in range(60):
        first, second = two_judges(200, 30, seed)
        found = agreement(judged(first, prompts=np.arange(200)), judged(second, prompts=np.arange(200)), resamples=300)
        covered += found.low <= whole.kappa <= found.high
    assert covered >= 52


def test_where_all_answers_fall_into_one_class_kappa_is_undefined_and_said_so():
    found = agreement(judged([80, 90, 95]), judged([81, 99, 75]))
    assert np.isnan(found.kappa)
    assert np.isnan(found.low)


def test_without_a_pair_of_scores_there_is_nothing_to_correlate():
    found = agreement(judged([np.nan, 10]), judged([10, np.nan]))
    assert np.isnan(found.kappa)
    assert np.isnan(found.spearman)
    assert found.unscored == 1


def test_different_answers_are_refused():
    first = judged([10, 20])
    for other in (judged([10]), judged([10, 20]).iloc[::-1], judged([10, 20]).assign(response=["x", "y"])):
        with pytest.raises(ValueError, match="same answers in the same order"):
            agreement(first, other)


def test_answers_without_a_text_can_be_compared():
    frames = [judged([10, 90]).assign(response=["a", None]) for _ in range(2)]
    assert agreement(*frames).n == 2


def test_bad_arguments_are_named():
    frame = judged([10, 20])
    with pytest.raises(ValueError, match="'coherence'"):
        agreement(frame, frame, "coherence")
    with pytest.raises(ValueError, match="'question_id'"):
        agreement(frame, frame, cluster="question_id")
    with pytest.raises(ValueError, match="bins are cuts"):
        agreement(frame, frame, bins=(0, 50))
    with pytest.raises(ValueError, match="'cubic'"):
        inspect.unwrap(agreement)(frame, frame, weights="cubic")


def test_it_is_public():
    assert mm.agreement is agreement
