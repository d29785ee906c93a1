import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn import metrics
from sklearn.base import BaseEstimator, clone
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import LeaveOneGroupOut, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.tree import DecisionTreeClassifier

from mechmisalign.directions import Direction
from mechmisalign.probes import (
    METRICS,
    LogisticProbe,
    MeanDifferenceProbe,
    Probe,
    ProbeMismatchError,
    evaluate,
    evaluate_layers,
    lda,
    leak,
    logistic,
    paper_setting,
)
from mechmisalign.probes._arrays import moments
from mechmisalign.probes.estimators import linear_weights
from mechmisalign.probes.evaluation import metric_scores
from mechmisalign.probes.folds import Design, Examples, draw_folds, draw_within

PROBES = {
    "l2": logistic(),
    "l1": logistic("l1", C=0.1),
    "lda": lda(),
    "mean difference": MeanDifferenceProbe(),
    "fast logistic": LogisticProbe(),
}
SERIES = ["probe", "shuffled labels", "random coordinates", "prompt only"]
HEADER = {"model": "qwen", "base_fingerprint": "f00", "adapter_digest": "a1", "layer": 3}


def planted(n=400, width=8, prompts=20, shift=1.5, share=0.5, seed=0, dtype=np.float64):
    """Two classes that differ along the first, largest feature only; scales and offsets differ by feature."""
    rng = np.random.default_rng(seed)
    labels = rng.random(n) < share
    features = rng.normal(size=(n, width))
    features[:, 0] += shift * labels
    features = features * np.geomspace(10, 0.1, width) + np.linspace(-5, 5, width)
    return features.astype(dtype), labels, np.arange(n) % prompts


def near_duplicates(prompts=30, responses=2, tokens=15, width=60, seed=0):
    """Tokens of one response are nearly equal, responses of one prompt alike, and labels have nothing to do with them."""
    rng = np.random.default_rng(seed)
    prompt = np.repeat(np.arange(prompts), responses * tokens)
    response = np.repeat(np.arange(prompts * responses), tokens)
    features = rng.normal(size=(prompts, width))[prompt] + 0.1 * rng.normal(size=(len(prompt), width))
    labels = (rng.permutation(prompts) < prompts // 2)[prompt]
    return features, labels, prompt, response


def by_series(evaluation, metric="auroc"):
    summary = evaluation.summary()
    return summary[summary["metric"] == metric].set_index("series")


@pytest.mark.parametrize("name", PROBES)
def test_a_planted_signal_is_found_and_the_controls_stay_at_chance(name):
    found = by_series(evaluate(*planted(), probe=PROBES[name], repeats=15))
    assert list(found.index) == SERIES
    assert found.loc["probe", "score"] > 0.75
    for control in SERIES[1:]:
        assert found.loc[control, "low"] < 0.5 < found.loc[control, "high"]
        assert abs(found.loc[control, "score"] - 0.5) < 0.08


@pytest.mark.parametrize("name", PROBES)
def test_probes_are_scikit_learn_estimators(name):
    features, labels, groups = planted()
    named = np.where(labels, "misaligned", "aligned")
    probe = clone(PROBES[name])
    assert cross_val_score(probe, features, named, groups=groups, cv=LeaveOneGroupOut()).mean() > 0.7
    assert cross_val_score(make_pipeline(StandardScaler(), probe), features, named).mean() > 0.7
    fitted = probe.fit(features, named)
    assert list(fitted.classes_) == ["aligned", "misaligned"]
    np.testing.assert_array_equal(fitted.predict(features) == "misaligned", fitted.decision_function(features) > 0)


def test_the_mean_difference_is_the_difference_of_the_means_with_the_threshold_at_the_midpoint():
    features, labels, _ = planted()
    probe = MeanDifferenceProbe().fit(features, labels)
    first, second = features[labels].mean(0), features[~labels].mean(0)
    np.testing.assert_allclose(probe.coef_[0], first - second)
    np.testing.assert_allclose(probe.decision_function([(first + second) / 2]), 0, atol=1e-9)


@pytest.mark.parametrize("C", [0.001, 0.01, 1.0])
def test_the_fast_logistic_probe_solves_scikit_learns_problem(C):
    features, labels, _ = planted(n=600, width=20)
    ours = LogisticProbe(C=C, tol=1e-9, max_iter=500).fit(features, labels)
    theirs = linear_weights(
        make_pipeline(StandardScaler(), LogisticRegression(C=C, tol=1e-10, max_iter=5000)).fit(features, labels)
    )
    np.testing.assert_allclose(ours.coef_, theirs.coef, atol=1e-6, rtol=1e-5)
    np.testing.assert_allclose(ours.intercept_, theirs.intercept, atol=1e-6, rtol=1e-5)


def test_the_fast_logistic_probe_agrees_in_float32_on_wide_correlated_features():
    rng = np.random.default_rng(0)
    labels = rng.random(800) < 0.5
    features = rng.normal(size=(800, 6)) @ rng.normal(size=(6, 300)) * 3 + rng.normal(size=(800, 300)) + 50
    features[:, :30] += 0.5 * labels[:, None]
    ours = LogisticProbe(C=0.01).fit(features.astype(np.float32), labels)
    theirs = logistic(C=0.01).fit(features, labels)
    assert ours.coef_.dtype == np.float32
    np.testing.assert_allclose(ours.decision_function(features), theirs.decision_function(features), atol=5e-3)


def test_a_probe_stopped_early_says_so():
    features, labels, _ = planted()
    with pytest.warns(ConvergenceWarning, match="raise max_iter"):
        LogisticProbe(C=10.0, max_iter=1).fit(features, labels)


@pytest.mark.parametrize("probe", [MeanDifferenceProbe(), LogisticProbe(tol=1e-8)])
@pytest.mark.parametrize("share", [0.5, 0.2])
def test_all_folds_at_once_equal_one_by_one(probe, share):
    data = planted(share=share)
    fast = evaluate(*data, probe=probe, repeats=4)
    plain = evaluate(*data, probe=OneByOne(probe), repeats=4)
    pd.testing.assert_frame_equal(fast.scores, plain.scores, atol=1e-9)
    pd.testing.assert_frame_equal(fast.coefficients, plain.coefficients, atol=1e-6)


class OneByOne(BaseEstimator):
    """A probe without ``fit_folds``."""

    def __init__(self, probe):
        self.probe = probe

    def fit(self, X, y):
        fitted = clone(self.probe).fit(X, y)
        self.coef_, self.intercept_ = fitted.coef_, fitted.intercept_
        return self


def test_offsets_much_larger_than_the_signal_do_not_cost_float32_its_digits():
    features, labels, _ = planted(n=5000, dtype=np.float32)
    features += 1000
    exact = features.astype(np.float64)
    weights = np.full((1, 5000), 1 / 5000, dtype=np.float32)
    mean, variance = moments(features, weights, variances=True)
    np.testing.assert_allclose(mean[0], exact.mean(0), rtol=1e-7)
    np.testing.assert_allclose(variance[0], exact.var(0), rtol=1e-4)
    coef = MeanDifferenceProbe().fit(features, labels).coef_[0]
    np.testing.assert_allclose(coef, exact[labels].mean(0) - exact[~labels].mean(0), atol=1e-4)


def test_lda_is_shrunk_by_ledoit_wolf():
    features, labels, _ = planted()
    theirs = LinearDiscriminantAnalysis(solver="eigen", shrinkage="auto").fit(features, labels)
    np.testing.assert_allclose(lda().fit(features, labels).coef_, theirs.coef_, rtol=1e-6)


def test_logistic_has_the_penalty_that_it_names():
    features, labels, _ = planted()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sparse, dense = logistic("l1", C=0.05).fit(features, labels), logistic("l2", C=0.05).fit(features, labels)
    assert (sparse[-1].coef_ == 0).sum() >= 5
    assert (dense[-1].coef_ != 0).all()


def test_a_pipeline_is_folded_into_raw_units():
    features, labels, _ = planted()
    fitted = logistic().fit(features, labels)
    np.testing.assert_allclose(linear_weights(fitted).margins(features)[0], fitted.decision_function(features))


def test_metrics_are_scikit_learns():
    rng = np.random.default_rng(0)
    truth, margins = rng.random(200) < 0.3, rng.normal(size=200).round(1)
    called = margins > 0
    expected = {
        "accuracy": metrics.accuracy_score(truth, called),
        "precision": metrics.precision_score(truth, called),
        "recall": metrics.recall_score(truth, called),
        "f1": metrics.f1_score(truth, called),
        "auroc": metrics.roc_auc_score(truth, margins),
    }
    assert metric_scores(truth, margins) == pytest.approx(expected)


def test_a_prompt_never_stands_on_both_sides_of_a_grouped_split_and_classes_are_balanced():
    _, labels, groups = planted(share=0.2)
    examples = Examples.of(labels, groups)
    for fold in draw_folds(examples, Design()) + draw_folds(examples, Design(), shuffled=True):
        assert not set(groups[fold.train]) & set(groups[fold.test])
        assert fold.labels[fold.train].mean() == fold.labels[fold.test].mean() == 0.5
        assert fold.labels.sum() == labels.sum()


def test_labels_are_shuffled_between_units():
    _, labels, prompt, response = near_duplicates()
    fold = draw_folds(Examples.of(labels, prompt, response), Design(), shuffled=True)[0]
    assert pd.Series(fold.labels).groupby(response).nunique().max() == 1
    assert (fold.labels != labels).any()


def test_a_row_split_leaks_on_near_duplicates_and_a_grouped_one_does_not():
    features, labels, prompt, response = near_duplicates()
    frame = leak(features, labels, prompt, units=response, probe=logistic(C=1.0), repeats=20)
    assert list(frame.columns) == ["split", "series", "metric", "score", "low", "high"]
    accuracy = frame[frame["metric"] == "accuracy"].set_index(["split", "series"])["score"]
    assert accuracy["rows", "probe"] > 0.95
    assert abs(accuracy["grouped", "probe"] - 0.5) < 0.15
    assert accuracy["rows", "shuffled labels"] > 0.7  # a response on both sides: even senseless labels are recovered
    assert abs(accuracy["grouped", "shuffled labels"] - 0.5) < 0.15


def test_a_probe_without_a_feature_left_is_refused_instead_of_scoring_chance():
    features, labels, groups = planted(width=9)
    with pytest.raises(ValueError, match="kept no feature in any of 5 splits"):
        leak(features, labels, groups, probe=logistic("l1", C=1e-5), repeats=5)
    with pytest.raises(ValueError, match="kept no feature in any of 5 splits"):
        evaluate_layers({0: features, 1: features}, labels, groups, probe=logistic("l1", C=1e-5), repeats=5)
    nothing = np.zeros_like(features)
    with pytest.warns(UserWarning, match=r"no feature at layers \[3\]"):
        table = evaluate_layers({1: features, 3: nothing}, labels, groups, probe=logistic("l1", C=1.0), repeats=5)
    scores = table[table["series"] == "probe"].set_index(["layer", "metric"])["score"]
    assert scores[1].notna().all() and scores[3].isna().all()


def test_the_papers_setting_runs_as_published():
    features, labels, groups = planted(width=9)
    with pytest.raises(ValueError, match="kept no feature"):  # its C is for tens of thousands of tokens
        leak(features, labels, groups)
    frame = leak(features, labels, groups, probe=logistic("l1", C=1.0, max_iter=1000))
    accuracy = frame[frame["metric"] == "accuracy"].set_index(["split", "series"])["score"]
    assert accuracy["rows", "probe"] == pytest.approx(
        accuracy["grouped", "probe"], abs=0.05
    )  # independent rows: no leak
    setting = paper_setting()
    assert setting["probe"][-1].get_params()["solver"] == "liblinear"
    assert (setting["repeats"], setting["test_size"], setting["balance"]) == (100, 0.2, True)


def test_the_prompt_only_ceiling_is_high_where_the_prompt_decides_the_label():
    features, _, groups = planted()
    found = evaluate(features, groups % 2 == 0, groups, probe=MeanDifferenceProbe(), repeats=5)
    assert by_series(found, "accuracy").loc["prompt only", "score"] == 1
    assert by_series(found).loc["prompt only", "score"] == 1
    assert by_series(found, "accuracy").loc["probe", "score"] < 0.75


@pytest.mark.parametrize(("prompts", "units"), [(2, None), (8, None), (40, None), (400, None), (8, 4)])
def test_the_prompt_only_ceiling_is_at_chance_where_labels_do_not_depend_on_the_prompt(prompts, units):
    scores = {"accuracy": [], "auroc": []}
    for seed in range(12):
        features, labels, groups = planted(prompts=prompts, seed=seed)
        unit = (
            np.arange(len(labels)) if units is None else np.arange(len(labels)) // (prompts * units) * prompts + groups
        )
        labels = labels[np.unique(unit, return_index=True)[1]][np.unique(unit, return_inverse=True)[1]]
        found = evaluate(features, labels, groups, units=unit, probe=MeanDifferenceProbe(), split="rows", repeats=10)
        for metric, values in scores.items():
            values.append(by_series(found, metric).loc["prompt only", "score"])
    for values in scores.values():
        assert abs(np.mean(values) - 0.5) < 3 * np.std(values) / np.sqrt(len(values)) + 0.005


def test_units_of_a_prompt_are_held_out_whole_and_some_are_always_left():
    _, labels, prompt, response = near_duplicates(responses=5)
    labels = response % 2 == 0
    folds = draw_within(Examples.of(labels, prompt, response), Design(balance=False, repeats=50))
    for fold in folds:
        assert not set(response[fold.train]) & set(response[fold.test])
        assert set(prompt[fold.train]) == set(prompt)
    assert np.mean([len(fold.test) for fold in folds]) / len(labels) == pytest.approx(0.2, abs=0.02)


def test_an_evaluation_is_a_tidy_frame_that_depends_on_its_seed_only():
    features, labels, groups = planted()
    frame = pd.DataFrame(features, columns=[f"{layer}.down_proj" for layer in range(8)])
    found = evaluate(frame, np.where(labels, "bad", "aligned"), groups, probe=logistic(), repeats=3)
    again = evaluate(torch.from_numpy(features), ~labels, groups, probe=logistic(), repeats=3)
    other = evaluate(frame, labels, groups, probe=logistic(), repeats=3, seed=1)
    assert found.classes == ("aligned", "bad")
    assert list(found.scores.columns) == ["series", "repeat", "metric", "score"]
    assert len(found.scores) == 4 * 3 * len(METRICS)
    assert list(found.coefficients.columns) == ["series", "repeat", "feature", "coefficient"]
    assert list(found.coefficients["feature"][:8]) == list(frame.columns)
    assert not found.scores["score"].equals(other.scores["score"])
    real = found.coefficients.query("series == 'probe'").groupby("feature")["coefficient"].mean()
    assert real.idxmax() == "0.down_proj"
    mirrored = again.coefficients.query("series == 'probe'").groupby("feature")["coefficient"].mean()
    assert mirrored["x0"] == pytest.approx(-real["0.down_proj"], rel=0.2)


def test_coefficients_are_per_standard_deviation():
    features, labels, groups = planted()
    found = evaluate(features, labels, groups, probe=logistic(), repeats=2).coefficients
    fold = draw_folds(Examples.of(labels, groups), Design(repeats=2))[0]
    fitted = logistic().fit(features[fold.train], fold.labels[fold.train])
    np.testing.assert_allclose(found["coefficient"][:8], fitted[-1].coef_[0], rtol=1e-6)


def test_adding_repeats_changes_no_earlier_one():
    few, more = (evaluate(*planted(), probe=MeanDifferenceProbe(), repeats=n).scores for n in (3, 5))
    keys = ["series", "repeat", "metric"]
    merged = few.merge(more, on=keys)
    reading = merged["series"] != "random coordinates"  # dealt in one go
    np.testing.assert_allclose(merged["score_x"][reading], merged["score_y"][reading], rtol=1e-9)


def test_layers_are_read_one_at_a_time_and_give_what_evaluate_gives():
    features, labels, groups = planted()
    open_layers = []

    def stream():
        for layer in (0, 5):
            open_layers.append(layer)
            yield layer, features + layer * np.random.default_rng(layer).normal(size=features.shape)

    options = {"probe": MeanDifferenceProbe(), "repeats": 4, "metrics": ["auroc"]}
    frame = evaluate_layers(stream, labels, groups, **options)
    assert open_layers == [0, 5]
    assert list(frame.columns) == ["layer", "series", "metric", "score", "low", "high"]
    assert list(frame["series"]) == SERIES * 2
    alone = evaluate(features, labels, groups, **options).summary()
    pd.testing.assert_frame_equal(frame[frame["layer"] == 0].drop(columns="layer"), alone)
    pd.testing.assert_frame_equal(frame, evaluate_layers(dict(stream()), labels, groups, **options))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": np.ones(400, bool)}, "the labels have 1: "),
        ({"labels": np.arange(400) % 3}, "the labels have 3: "),
        ({"labels": np.ones(399, bool)}, "lengths differ"),
        ({"features": np.zeros((7, 2))}, "lengths differ: features: 7 rows, labels: 400"),
        ({"features": np.zeros(400)}, r"features must be \[row feature\]"),
        ({"features": np.full((400, 3), np.nan)}, "400 of 400 rows of the features hold NaN"),
        ({"groups": [None] * 400}, "400 of 400 groups are missing"),
        ({"labels": np.arange(400) % 20 == 0}, r"class True stands in 1 group\(s\)"),
        ({"units": np.zeros(400)}, "1 of 1 units have rows of both classes"),
        ({"split": "tokens"}, r"split must be one of \('grouped', 'rows'\), got 'tokens'"),
        ({"metrics": ["kappa"]}, "metrics must be some of .* got .*kappa"),
        ({"test_size": 1.0}, "test_size must lie between 0 and 1"),
        ({"repeats": 0}, "repeats must be 1 or more"),
    ],
)  # fmt: skip
def test_what_cannot_be_evaluated_is_refused(change, message):
    features, labels, groups = planted()
    options = {"features": features, "labels": labels, "groups": groups, "probe": MeanDifferenceProbe(), **change}
    positional = [options.pop(name) for name in ("features", "labels", "groups")]
    if "split" in change:  # not even the annotation allows it
        with pytest.raises(Exception, match="tokens"):
            evaluate(*positional, **options)
        with pytest.raises(ValueError, match=message):
            Design.__post_init__(_unchecked(split="tokens"))
        return
    with pytest.raises(ValueError, match=message):
        evaluate(*positional, **options)


def _unchecked(**fields):
    """A design whose fields no run-time type checker has seen."""
    design = object.__new__(Design)
    for name, value in fields.items():
        object.__setattr__(design, name, value)
    return design


def test_a_probe_that_is_not_linear_is_refused():
    with pytest.raises(TypeError, match="has no weights of a linear probe"):
        evaluate(*planted(), probe=DecisionTreeClassifier())


def test_no_layer_is_refused():
    with pytest.raises(ValueError, match="there is no layer"):
        evaluate_layers({}, [0, 1], [0, 1], probe=MeanDifferenceProbe())


def test_an_unfitted_or_misfitted_probe_says_so():
    with pytest.raises(NotFittedError):
        MeanDifferenceProbe().predict(np.zeros((2, 3)))
    with pytest.raises(ValueError, match="1 class"):
        MeanDifferenceProbe().fit(np.zeros((2, 3)), [1, 1])


@pytest.fixture
def artifact():
    features, labels, _ = planted()
    frame = pd.DataFrame(features, columns=[f"site {index}" for index in range(8)])
    return Probe.fit(frame, np.where(labels, "bad", "good"), probe=logistic(), header=HEADER), frame, labels


def test_a_probe_scores_as_the_pipeline_does(artifact):
    probe, frame, labels = artifact
    expected = logistic().fit(frame.to_numpy(), ~labels).decision_function(frame.to_numpy())
    np.testing.assert_allclose(probe.scores(frame), expected)
    np.testing.assert_allclose(probe.scores(frame[frame.columns[::-1]]), expected)
    assert probe.header["classes"] == ["bad", "good"]
    assert probe.header["rows"] == 400


def test_a_saved_probe_scores_the_same(artifact, tmp_path):
    probe, frame, _ = artifact
    loaded = Probe.load(probe.save(tmp_path / "deep" / "probe.safetensors"))
    np.testing.assert_array_equal(loaded.scores(frame), probe.scores(frame))
    assert loaded.features == probe.features
    assert {**loaded.header, **probe.header} == loaded.header
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["probe.safetensors"]


def test_responses_are_scored_by_the_mean_or_the_largest_of_their_rows(artifact):
    probe, frame, _ = artifact
    responses = np.repeat(["b", "a"], 200)
    rows = probe.scores(frame)
    mean, largest = (probe.response_scores(frame, responses, how=how) for how in ("mean", "max"))
    assert list(mean.index) == ["b", "a"]
    np.testing.assert_allclose(mean, [rows[:200].mean(), rows[200:].mean()])
    np.testing.assert_allclose(largest, [rows[:200].max(), rows[200:].max()])


def test_a_probe_refuses_other_features(artifact):
    probe, frame, _ = artifact
    with pytest.raises(ProbeMismatchError, match="missing site 0, unknown other"):
        probe.scores(frame.rename(columns={"site 0": "other"}))
    with pytest.raises(ProbeMismatchError, match="3 features per row, this probe reads 8"):
        probe.scores(frame.to_numpy()[:, :3])
    with pytest.raises(ValueError, match="lengths differ: features: 400 rows, responses: 2"):
        probe.response_scores(frame, ["a", "b"])


def test_a_probe_refuses_another_model(artifact):
    probe, _, _ = artifact
    probe.check_model({**HEADER, "model": "an alias"})
    probe.check_model(
        {**HEADER, "adapter_digest": "b2"}
    )  # residual features: another organism of the same base is fine
    with pytest.raises(ProbeMismatchError, match="fitted in 'qwen'"):
        probe.check_model({"model": "llama", "base_fingerprint": "bad"})
    of_sites = Probe(probe.coef, probe.intercept, probe.features, {**HEADER, "sites": ["3.down_proj"]})
    with pytest.raises(ProbeMismatchError, match="sites of adapter a1, the model has adapter b2"):
        of_sites.check_model({**HEADER, "adapter_digest": "b2"})


def test_a_file_that_is_no_probe_is_refused(tmp_path):
    path = Direction(torch.ones(1, 4), (0,), {"model": "qwen"}).save(tmp_path / "direction.safetensors")
    with pytest.raises(ValueError, match="is not a probe this version reads"):
        Probe.load(path)


def test_weights_that_are_not_finite_or_not_named_are_refused():
    with pytest.raises(ValueError, match="NaN or infinite"):
        Probe(np.array([np.nan]), 0.0, ("a",), {})
    with pytest.raises(ValueError, match="2 weights for 1 features"):
        Probe(np.zeros(2), 0.0, ("a",), {})
