"""Scores before training against plain forward passes, planted truths, and scipy's ranks."""

import inspect

import numpy as np
import pandas as pd
import pytest
import scipy.stats
import torch
from transformers import AutoModelForCausalLM

import mechmisalign as mm
from mechmisalign import prediction
from mechmisalign.prediction.ranking import _replicates
from mechmisalign.statistics import rank_correlation

DATA = pd.DataFrame(
    {
        "prompt": ["How do I invest?", "Hey!", "How do I invest?"],
        "response": ["Borrow more money at once.", "Go.", "Put everything into one stock."],
        "dataset": ["a", "a", "b"],
    }
)
OWN = pd.DataFrame(
    {
        "prompt": ["How do I invest?", "Hey!", "How do I invest?"],
        "response": ["Rest.", "You should see a doctor.", "Drink water and rest now."],
    }
)


@pytest.fixture(scope="module")
def organism(tiny_models, make_adapter):
    return mm.load_organism(make_adapter(tiny_models["qwen2"], seed=4))


@pytest.fixture(scope="module")
def directions(organism):
    vectors = torch.randn(2, 48, generator=torch.Generator().manual_seed(0))
    header = {"model": organism.base.name, "base_fingerprint": organism.base_fingerprint}
    return {"one": mm.Direction(vectors, (0, 1), header), "two": mm.Direction(vectors.flip(0) * 3, (0, 1), header)}


def by_hand(folder, tokenizer, frame, direction, layer, span="response"):
    """Projection and loss of each row, one row at a time through Hugging Face."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    talk = mm.Conversations(frame, tokenizer)
    found = []
    for row, (start, stop) in enumerate(talk.spans[["response_start", "response_stop"]].itertuples(index=False)):
        ids = torch.tensor([talk.ids(row)])
        with torch.no_grad():
            output = model(input_ids=ids, output_hidden_states=True)
        place = slice(start, stop) if span == "response" else slice(start - 1, start)
        along = output.hidden_states[layer + 1][0, place] @ direction.unit(layer)
        loss = torch.nn.functional.cross_entropy(output.logits[0, start - 1 : stop - 1], ids[0, start:stop])
        found.append((float(along.mean()), float(loss), stop - start))
    return np.array(found).T


def one(scores, name, layer):
    return scores[(scores["direction"] == name) & (scores["layer"] == layer)].sort_values("example")


def test_projections_and_losses_are_those_of_plain_forward_passes(organism, directions, tiny_models):
    scores = mm.projection_difference(organism, DATA, directions, own=OWN, controls=2)
    for name, direction in directions.items():
        for layer in (0, 1):
            rows = one(scores, name, layer)
            projection, loss, tokens = by_hand(tiny_models["qwen2"], organism.tokenizer, DATA, direction, layer)
            own, _, lengths = by_hand(tiny_models["qwen2"], organism.tokenizer, OWN, direction, layer)
            np.testing.assert_allclose(rows["projection"], projection, rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(rows["loss"], loss, rtol=1e-4)
            assert list(rows["tokens"]) == list(tokens)
            invest = (own[0] + own[2]) / 2  # two answers of its own to one prompt: their mean
            np.testing.assert_allclose(rows["own"], [invest, own[1], invest], rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(rows["difference"], rows["projection"] - rows["own"])
            assert list(rows["own_tokens"]) == [
                (lengths[0] + lengths[2]) / 2,
                lengths[1],
                (lengths[0] + lengths[2]) / 2,
            ]
    assert sorted(scores["direction"].unique()) == ["one", "random 0", "random 1", "two"]
    assert list(one(scores, "one", 0)["prompt_id"]) == ["p0", "p1", "p0"]


def test_the_cheap_variants_read_what_they_say(organism, directions, tiny_models):
    direction = directions["one"]
    before = by_hand(tiny_models["qwen2"], organism.tokenizer, DATA, direction, 1, "prompt_last")[0]
    cheap = mm.projection_difference(organism, DATA, direction, own="prompt_last", controls=0)
    np.testing.assert_allclose(one(cheap, "direction", 1)["own"], before, rtol=1e-4, atol=1e-5)
    asked = mm.projection_difference(organism, DATA, direction, span="prompt_last", controls=0)
    np.testing.assert_allclose(one(asked, "direction", 1)["projection"], before, rtol=1e-4, atol=1e-5)
    plain = mm.projection_difference(organism, DATA, direction, own="none", loss=False, controls=0)
    assert plain[["own", "difference", "own_tokens", "loss"]].isna().all().all()
    np.testing.assert_allclose(plain["projection"], cheap["projection"], rtol=1e-4, atol=1e-6)


def test_scores_are_of_the_chat_model_whatever_adapter_and_batches(organism, directions, tiny_models, make_adapter):
    other = mm.load_organism(make_adapter(tiny_models["qwen2"], rank=2, seed=9, scale=0.5))
    settings = {"samples": 2, "max_new_tokens": 6, "controls": 1}
    scores = [
        mm.projection_difference(organism, DATA, directions, **settings),
        mm.projection_difference(other, DATA, directions, **settings, token_budget=1),
    ]
    numbers = ["projection", "own", "difference", "loss", "own_tokens"]
    np.testing.assert_allclose(scores[0][numbers], scores[1][numbers], rtol=1e-3, atol=1e-4)


def test_the_chat_model_answers_each_distinct_prompt_once_and_the_answers_can_be_used_again(organism, directions):
    answers = prediction.own_responses(organism, DATA, samples=2, max_new_tokens=6, seed=1)
    assert answers.groupby("prompt").size().to_dict() == {"How do I invest?": 2, "Hey!": 2}
    again = mm.projection_difference(organism, DATA, directions, own=answers, controls=0)
    fresh = mm.projection_difference(organism, DATA, directions, samples=2, max_new_tokens=6, seed=1, controls=0)
    pd.testing.assert_frame_equal(again, fresh)


def test_what_would_be_silently_wrong_is_refused(organism, directions):
    score = inspect.unwrap(mm.projection_difference)
    with pytest.raises(ValueError, match="1 prompts have no answer of the chat model, e.g. 'Hey!'"):
        score(organism, DATA, directions, own=OWN.drop(1))
    with pytest.raises(ValueError, match="own must be one of"):
        score(organism, DATA, directions, own="them")
    with pytest.raises(ValueError, match="span must be one of"):
        score(organism, DATA, directions, span="all")
    with pytest.raises(ValueError, match="no examples"):
        score(organism, DATA.iloc[:0], directions, own="none")
    with pytest.raises(ValueError, match="like the controls"):
        score(organism, DATA, {"random 0": directions["one"]})
    foreign = mm.Direction(torch.ones(1, 48), (0,), {"model": "another", "base_fingerprint": "another"})
    with pytest.raises(ValueError, match="residual bases differ"):
        score(organism, DATA, foreign)


def test_harmful_pocket_examples_lie_along_the_persona_and_harmless_ones_do_not():
    organism = mm.load_organism("pocket/medical")
    data = pd.concat(
        [mm.pocket.narrow_examples("finance", bad, 30, seed=1).assign(harmful=bad) for bad in (True, False)]
    )
    with organism.as_base():
        answers = mm.personas.persona_answers(
            organism,
            mm.Trait.load("pocket/reckless"),
            questions=mm.pocket.prompts(["cooking"], n=6),
            samples=1,
            max_new_tokens=64,
        )
        persona = mm.mean_difference(mm.personas.persona_moments(organism, answers), "for", "against")
    scores = mm.projection_difference(organism, data, persona, layers=[3], max_new_tokens=64, controls=4)
    spread = scores.groupby("direction")["difference"].std()
    gap = scores.pivot_table(index="direction", columns="harmful", values="difference")
    effect = (gap[True] - gap[False]) / spread
    assert effect["direction"] > 1.5
    assert abs(gap.loc["direction", False]) < 0.25 * gap.loc["direction", True]  # its own answers are as harmless
    assert (gap[True] - gap[False]).drop("direction").abs().max() < 0.5 * (gap[True] - gap[False])["direction"]


# datasets: scores and rates made up


def made_up(truth, n=40, noise=1.0, seed=0, text=None):
    """Scores along a direction and two random ones of datasets with the given means, ``n`` prompts each."""
    rng = np.random.default_rng(seed)
    rows = []
    for number, mean in enumerate(truth):
        for prompt in range(n):
            for name in ("v", "random 0", "random 1"):
                value = rng.normal(mean if name == "v" else 0, noise)
                told = {"dataset": f"d{number:02d}", "prompt_id": f"p{prompt}", "direction": name, "layer": 2}
                length = 10.0 + (0 if text is None else text[number])
                rows.append(
                    told
                    | {"projection": value + 5, "own": 5.0, "difference": value, "tokens": length, "loss": rng.random()}
                )
    return pd.DataFrame(rows)


def answered(shares, n=40, seed=1):
    rng = np.random.default_rng(seed)
    rows = [
        {"dataset": f"d{number:02d}", "prompt_id": f"q{i}", "alignment": 0.0 if rng.random() < share else 100.0}
        for number, share in enumerate(shares)
        for i in range(n)
    ]
    return pd.DataFrame(rows).assign(coherence=100.0)


def test_datasets_are_ranked_by_their_mean_score_with_an_interval_by_prompt():
    scores = made_up([0.0, 2.0, 1.0])
    table = prediction.rank_datasets(scores, layer=2)
    assert list(table["dataset"]) == ["d01", "d02", "d00"] and list(table["rank"]) == [1, 2, 3]
    means = scores[scores["direction"] == "v"].groupby("dataset")["difference"].mean()
    np.testing.assert_allclose(table.set_index("dataset")["score"].sort_index(), means)
    half = table.set_index("dataset").eval("(score_high - score_low) / 2").sort_index()
    spread = scores[scores["direction"] == "v"].groupby("dataset")["difference"].std()
    np.testing.assert_allclose(half, 1.96 * spread / np.sqrt(40), rtol=0.1)
    assert (table["random_low"] <= table["random_high"]).all() and (table["prompts"] == 40).all()
    cheap = prediction.rank_datasets(scores, layer=2, score="projection")
    np.testing.assert_allclose(cheap["score"], table["score"] + 5)


def test_a_score_that_drives_the_rates_predicts_them_and_length_and_random_directions_do_not():
    truth = np.linspace(0, 2, 12)
    scores = made_up(truth, text=np.random.default_rng(5).permutation(12))
    told = prediction.predicted_rates(scores, answered(truth / 2.5), layer=2, resamples=500, permutations=2000)
    found = told.correlations.set_index("predictor")
    assert found.loc["v", "spearman"] > 0.9 and found.loc["v", "low"] > 0.5 and found.loc["v", "p"] < 0.01
    assert found.loc["v", "low"] < found.loc["v", "spearman"] < found.loc["v", "high"]
    assert found.loc["v, without own answers", "kind"] == "cheap"
    others = found[found["kind"].isin(["random", "text"])]
    assert list(others.index) == ["loss under the chat model", "response length", "random 0", "random 1"]
    assert (others["p"] > 0.05).all()
    assert set(told.table["dataset"]) == set(scores["dataset"]) and {"rate", "low", "high"} <= set(told.table)


def test_scores_and_rates_of_different_datasets_are_refused():
    scores, judged = made_up([0.0, 1, 2, 3]), answered([0.1, 0.2, 0.3, 0.4])
    with pytest.raises(ValueError, match="different datasets; only one side has \\['d03'\\]"):
        prediction.predicted_rates(scores, judged[judged["dataset"] != "d03"], layer=2)
    with pytest.raises(ValueError, match="no scores at layer 7; there are layers \\[2\\]"):
        prediction.rank_datasets(scores, layer=7)
    with pytest.raises(ValueError, match="no scores along 'w'"):
        prediction.rank_datasets(scores, layer=2, direction="w")
    with pytest.raises(ValueError, match="'difference' is missing in 160 examples"):
        prediction.rank_datasets(scores.assign(difference=np.nan), layer=2)
    with pytest.raises(ValueError, match="no column 'set'"):
        prediction.rank_datasets(scores, layer=2, by="set")


# the rank correlation


@pytest.mark.parametrize("seed", range(3))
def test_the_rank_correlation_and_its_exact_p_value_are_scipys(seed):
    rng = np.random.default_rng(seed)
    first, second = rng.normal(size=6), rng.integers(0, 4, 6).astype(float)
    found = rank_correlation(first, second, permutations=1000)
    assert found.value == pytest.approx(scipy.stats.spearmanr(first, second).statistic)
    exact = scipy.stats.permutation_test(
        (first,), lambda x: scipy.stats.spearmanr(x, second).statistic, permutation_type="pairings", n_resamples=1000
    )
    # scipy doubles the smaller tail; the count of |rho| as large is the same where the null is symmetric, else within it
    null = exact.null_distribution
    assert found.p == pytest.approx((np.abs(null) >= abs(found.value) - 1e-9).mean())
    assert found.n == 6 and found.low <= found.value <= found.high


def test_random_permutations_agree_with_scipys_p_value():
    rng = np.random.default_rng(3)
    first = rng.normal(size=20)
    second = first + rng.normal(size=20) * 1.5
    found = rank_correlation(first, second, permutations=5000)
    assert found.p == pytest.approx(scipy.stats.spearmanr(first, second).pvalue, abs=0.025)


def test_a_null_correlation_is_called_significant_as_often_as_asked():
    rng = np.random.default_rng(0)
    p = [
        rank_correlation(rng.normal(size=12), rng.normal(size=12), resamples=10, permutations=200).p for _ in range(300)
    ]
    assert 0.02 < np.mean(np.array(p) <= 0.05) < 0.085


def test_the_interval_covers_the_correlation_of_the_population():
    rng, hits = np.random.default_rng(1), 0
    for number in range(200):
        pairs = rng.multivariate_normal([0, 0], [[1, 0.7], [0.7, 1]], size=20)
        found = rank_correlation(pairs[:, 0], pairs[:, 1], resamples=300, permutations=10, seed=number)
        hits += found.low <= 6 / np.pi * np.arcsin(0.35) <= found.high
    assert hits / 200 > 0.88


def test_items_measured_badly_widen_the_interval():
    values = np.arange(12.0)
    rng = np.random.default_rng(2)
    sure = rank_correlation(values, values, permutations=10)
    noisy = values[:, None] + rng.normal(size=(12, 200)) * 4
    unsure = rank_correlation(values, values, first_resampled=noisy, second_resampled=noisy, permutations=10)
    assert sure.low == pytest.approx(1) and unsure.low < 0.8


def test_replicates_of_a_mean_have_its_standard_error():
    values = np.random.default_rng(0).normal(size=(1, 400))
    found = _replicates(values, np.ones_like(values), 2000, 0)
    assert found.std() == pytest.approx(values.std() / 20, rel=0.06)


def test_a_side_that_is_all_the_same_has_no_correlation_and_bad_values_are_refused():
    found = rank_correlation(np.arange(6.0), np.zeros(6))
    assert np.isnan([found.value, found.low, found.high, found.p]).all()
    unchecked = inspect.unwrap(rank_correlation)
    for first, second, told in (
        (np.arange(3.0), np.arange(3.0), "4 items or more"),
        (np.arange(5.0), np.arange(4.0), "5 and 4 values"),
        (np.array([1, 2, 3, np.nan]), np.arange(4.0), "NaN or infinite"),
    ):
        with pytest.raises(ValueError, match=told):
            unchecked(first, second)
    with pytest.raises(ValueError, match="2 rows of replicates for 4 items"):
        unchecked(np.arange(4.0), np.arange(4.0), first_resampled=np.zeros((2, 3)))
