import itertools

import numpy as np
import pandas as pd
import pytest
import torch
from torch.testing import assert_close

from mechmisalign import estimators
from mechmisalign.moments import Moments

CLASSES = ("bad", "good")


def grouped(rows: np.ndarray, labels, prompts, tokens=None) -> Moments:
    """Moments of one layer from one mean per group."""
    groups = pd.DataFrame({"label": labels, "prompt_id": prompts, "sample": range(len(labels))})
    mean = torch.from_numpy(np.asarray(rows, dtype=np.float64))[:, None]
    return Moments(groups.assign(tokens=1 if tokens is None else tokens), mean, mean.norm(dim=-1), (0,), {"model": "m"})


def planted(n=200, width=12, shift=3.0, seed=0):
    """Two classes that differ along one known direction, with strongly correlated noise."""
    rng = np.random.default_rng(seed)
    truth = rng.normal(size=width)
    truth /= np.linalg.norm(truth)
    noise = rng.normal(size=(n, width)) @ np.diag(np.linspace(0.1, 3, width))
    labels = np.array(CLASSES)[np.arange(n) % 2]
    rows = noise + shift * np.outer(labels == "bad", truth)
    return grouped(rows, labels, [f"p{i // 4}" for i in range(n)]), truth


@pytest.mark.parametrize(
    "name", ["mean_difference", "matched_mean_difference", "whitened_difference", "logistic_direction"]
)
def test_a_planted_direction_is_found(name):
    moments, truth = planted(n=4000)
    found = getattr(estimators, name)(moments, *CLASSES)
    projected = np.linalg.solve(np.diag(np.linspace(0.1, 3, 12) ** 2), truth)  # what a discriminant looks for
    target = truth if "mean" in name else projected / np.linalg.norm(projected)
    assert float(found.unit(0).double() @ torch.from_numpy(target)) > 0.9


def test_mean_difference_weighs_tokens():
    moments = grouped([[1.0, 0], [4.0, 0], [0, 1.0]], ["bad", "bad", "good"], ["a", "b", "a"], tokens=[1, 2, 5])
    assert_close(estimators.mean_difference(moments, *CLASSES).at(0), torch.tensor([3.0, -1.0]))


def test_matching_by_prompt_removes_what_only_the_prompt_explains():
    """Prompt a is mostly bad, prompt b mostly good; within a prompt the classes differ along the second axis only."""
    rows, labels, prompts = [], [], []
    for prompt, offset, bad, good in (("a", 10.0, 9, 1), ("b", -10.0, 1, 9)):
        rows += [[offset, 1.0]] * bad + [[offset, 0.0]] * good
        labels += ["bad"] * bad + ["good"] * good
        prompts += [prompt] * (bad + good)
    moments = grouped(rows, labels, prompts)
    assert abs(float(estimators.mean_difference(moments, *CLASSES).unit(0)[0])) > 0.9
    assert_close(estimators.matched_mean_difference(moments, *CLASSES).at(0), torch.tensor([0.0, 1.0]))


def test_matching_needs_a_prompt_with_both_classes():
    moments = grouped([[1.0], [0.0]], ["bad", "good"], ["a", "b"])
    with pytest.raises(ValueError, match="no prompt_id has both"):
        estimators.matched_mean_difference(moments, *CLASSES)


def test_model_difference_and_first_principal_find_a_common_shift():
    moments, truth = planted()
    shifted = grouped(moments.mean[:, 0].numpy() + 2 * truth, moments.groups["label"], moments.groups["prompt_id"])
    for estimator in (estimators.model_difference, estimators.first_principal):
        assert_close(estimator(shifted, moments).at(0).double(), torch.from_numpy(2 * truth), atol=1e-5, rtol=0)


def test_first_principal_is_the_top_right_singular_vector():
    rng = np.random.default_rng(0)
    base = rng.normal(size=(30, 6))
    shift = rng.normal(size=(30, 6)) + np.array([5.0, 0, 0, 0, 0, 0])
    labels, prompts = ["bad"] * 30, [f"p{i}" for i in range(30)]
    found = estimators.first_principal(grouped(base + shift, labels, prompts), grouped(base, labels, prompts)).unit(0)
    top = np.linalg.svd(shift)[2][0]
    assert abs(abs(float(found.double() @ torch.from_numpy(top))) - 1) < 1e-6
    assert float(found[0]) > 0


def test_first_principal_counts_a_group_as_its_tokens_would():
    """Groups of unequal length are what as many groups of one token each would be."""
    rng = np.random.default_rng(1)
    base, shift = rng.normal(size=(12, 5)), rng.normal(size=(12, 5)) * np.linspace(3, 0.5, 12)[:, None]
    tokens = np.array([1, 1, 1, 1, 2, 2, 5, 9, 16, 25, 36, 49])  # long ones differ little, and otherwise
    labels, prompts = ["bad"] * 12, [f"p{i}" for i in range(12)]
    pair = (grouped(rows, labels, prompts, tokens) for rows in (base + shift, base))
    found = estimators.first_principal(*pair).unit(0).double().numpy()
    _, vectors = np.linalg.eigh((shift * tokens[:, None]).T @ shift)
    assert abs(found @ vectors[:, -1]) == pytest.approx(1, abs=1e-6)
    for weights in (
        np.ones(12),
        tokens.astype(float) ** 2,
    ):  # what no weights, and weights in place of roots, would give
        _, others = np.linalg.eigh((shift * weights[:, None]).T @ shift)
        assert abs(found @ others[:, -1]) < 0.99
    long = [np.repeat(rows, tokens, axis=0) for rows in (base + shift, base)]
    spread = (grouped(rows, ["bad"] * len(rows), [f"p{i}" for i in range(len(rows))]) for rows in long)
    assert_close(estimators.first_principal(*spread).at(0), torch.from_numpy(found * np.linalg.norm(
        np.average(shift, axis=0, weights=tokens))).float(), atol=1e-5, rtol=0)  # fmt: skip


def test_a_principal_direction_across_the_mean_is_still_a_direction():
    moments = grouped([[1.0, 0.1], [-1.0, 0.1]], ["bad", "bad"], ["a", "b"])
    nothing = grouped([[0.0, 0.0], [0.0, 0.0]], ["bad", "bad"], ["a", "b"])
    found = estimators.first_principal(moments, nothing).at(0)
    assert_close(found.abs(), torch.tensor([0.1, 0.0]))


def test_the_logistic_direction_is_sklearns_in_raw_coordinates():
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    moments, _ = planted()
    rows, classes = moments.mean[:, 0].numpy(), (moments.groups["label"] == "bad").to_numpy(copy=True)
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, class_weight="balanced", max_iter=2000))
    scores = probe.fit(rows, classes).decision_function(rows)
    found = rows @ estimators.logistic_direction(moments, *CLASSES).at(0).double().numpy()
    assert abs(np.corrcoef(scores, found)[0, 1] - 1) < 1e-6


def test_refinements_keep_the_length_of_the_difference():
    moments, _ = planted()
    length = estimators.mean_difference(moments, *CLASSES).norm(0)
    for estimator in (estimators.whitened_difference, estimators.logistic_direction):
        assert estimator(moments, *CLASSES).norm(0) == pytest.approx(length, rel=1e-5)


def test_split_halves_agree_on_a_planted_direction_and_not_on_shuffled_labels():
    moments, _ = planted(n=400)
    real = estimators.split_half(moments, *CLASSES, repeats=20)
    labels = np.random.default_rng(1).permutation(moments.groups["label"])
    shuffled = grouped(moments.mean[:, 0].numpy(), labels, moments.groups["prompt_id"])
    control = estimators.split_half(shuffled, *CLASSES, repeats=20)
    assert real["cosine"][0] > 0.8
    assert real["low"][0] <= real["cosine"][0] <= real["high"][0]
    assert control["cosine"][0] < 0.4


def test_bootstrap_replicates_stay_near_the_direction():
    moments, _ = planted(n=400)
    frame = estimators.bootstrap_cosine(moments, *CLASSES, repeats=20)
    assert list(frame.columns) == ["layer", "cosine", "low", "high"]
    assert frame["low"][0] > 0.8


def test_a_prompt_that_is_drawn_twice_counts_as_two_where_prompts_are_matched():
    """By hand: the replicate of the draws a, a, b is two thirds of a's difference and one third of b's."""
    answers = [[1.0, 0.0], [0.0, 0.0], [0.0, 1.0], [0.0, 0.0], [1.0, 1.0], [0.0, 0.0]]
    moments = grouped(answers, ["bad", "good"] * 3, ["a", "a", "b", "b", "c", "c"])
    differences, found = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]), []

    def spied(sample, positive, negative):
        found.append(estimators.matched_mean_difference(sample, positive, negative))
        return found[-1]

    estimators.bootstrap_cosine(moments, *CLASSES, estimator=spied, repeats=30)
    possible = {tuple(np.round(differences[list(draw)].mean(0), 5)) for draw in itertools.product(range(3), repeat=3)}
    assert {tuple(np.round(each.vectors[0].double().numpy(), 5)) for each in found} <= possible
    assert len(found) == 31


def test_a_probe_needs_more_than_one_group_a_class():
    moments = grouped([[1.0], [0.0]], ["bad", "good"], ["a", "a"])
    with pytest.raises(ValueError, match="only 1 group"):
        estimators.logistic_direction(moments, *CLASSES)


def test_bootstrap_directions_scatter_as_their_cosines_say_and_alike_over_the_same_prompts():
    moments, _ = planted(n=400)
    drawn = estimators.bootstrap_directions(moments, *CLASSES, repeats=40)
    own = estimators.mean_difference(moments, *CLASSES).vectors[0]
    found = np.mean([float(torch.cosine_similarity(each.vectors[0], own, dim=0)) for each in drawn])
    assert found == pytest.approx(estimators.bootstrap_cosine(moments, *CLASSES, repeats=40)["cosine"][0], abs=1e-5)
    assert found < 1 - 1e-4
    spread = torch.stack([each.vectors[0] for each in drawn]).var(0).sum()
    rows, bad = moments.mean[:, 0], (moments.groups["label"] == "bad").to_numpy(copy=True)
    expected = sum(rows[kept].var(0).sum() / kept.sum() for kept in (bad, ~bad))
    assert float(spread / expected) == pytest.approx(1, abs=0.3)
    again = estimators.bootstrap_directions(moments, *CLASSES, repeats=40)
    assert all(torch.equal(one.vectors, other.vectors) for one, other in zip(drawn, again, strict=True))
