"""Monitors: what they read, how they are chosen and calibrated, and how well they tell classes apart."""

import dataclasses
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import roc_auc_score, roc_curve

import mechmisalign as mm
from mechmisalign import models
from mechmisalign.monitoring import (
    Calibration,
    Monitor,
    MonitorMismatchError,
    Tally,
    WordsBaseline,
    auroc,
    discrimination,
    drift,
    judge_scores,
    length_scores,
    needed,
    roc,
)
from mechmisalign.monitoring.fitting import _cheapest_of_the_best
from mechmisalign.monitoring.reading import pooled
from mechmisalign.probes import logistic

FITTED, HELD_OUT = ("medical", "finance", "sports"), ("coding", "cooking", "power")


def told(domains, n=25, seed=0) -> pd.DataFrame:
    """Answers of either persona to the same questions."""
    parts = [
        mm.pocket.narrow_examples(name, harmful, n, seed).assign(label=label)
        for name in domains
        for harmful, label in ((True, "misaligned"), (False, "aligned"))
    ]
    frame = pd.concat(parts, ignore_index=True)
    return frame.assign(prompt_id=frame["prompt"])


@pytest.fixture(scope="module")
def pocket():
    return mm.load_organism("pocket/medical")


@pytest.fixture(scope="module")
def watching(pocket):
    """A direction that was fitted on three domains."""
    return Monitor.fit(pocket, mm.Conversations(told(FITTED), pocket.tokenizer), repeats=5)


@pytest.fixture(scope="module")
def tiny(tiny_models, make_adapter):
    return mm.load_organism(make_adapter(tiny_models["qwen2"]))


@pytest.fixture(scope="module")
def talk(tiny):
    texts = ["You should rest.", "Put everything into one stock and borrow more money at once!", "The fox", "Hey"]
    frame = pd.DataFrame(
        {"prompt": [f"What should I do, {i}?" for i in range(4)], "response": texts, "prompt_id": range(4)}
    )
    return mm.Conversations(frame, tiny.tokenizer)


@pytest.fixture(scope="module")
def reading(tiny):
    weights = torch.randn(2, models.d_model(tiny.model), generator=torch.Generator().manual_seed(0))
    return Monitor(weights, 0.5, (0, 1), header=tiny.provenance)


def scores_of(monitor, organism, frame):
    return monitor.score(organism, mm.Conversations(frame, organism.tokenizer))


# what is read


def test_token_scores_are_those_of_the_hugging_face_hidden_states(tiny, talk, reading):
    scored = reading.score(tiny, talk)
    hf = models.hf_model(tiny.model)
    for row in range(len(talk)):
        with torch.no_grad():
            states = hf(input_ids=torch.tensor([talk.ids(row)]), output_hidden_states=True).hidden_states
        span = slice(talk.spans["response_start"][row], talk.spans["response_stop"][row])
        expected = sum(states[layer + 1][0, span] @ reading.weights[i] for i, layer in enumerate((0, 1))) + 0.5
        np.testing.assert_allclose(scored["token_scores"][row], expected.numpy(), atol=2e-4)
        assert scored["score"][row] == pytest.approx(float(expected.mean()), abs=2e-4)
        assert "".join(scored["token_texts"][row]) == talk.frame["response"][row]


def test_scores_do_not_depend_on_batches_padding_or_order(tiny, talk, reading):
    alone = reading.score(tiny, talk, token_budget=1)
    together = reading.score(tiny, talk, token_budget=10_000)
    np.testing.assert_allclose(alone["score"], together["score"], atol=1e-4)
    backwards = scores_of(reading, tiny, talk.frame.iloc[::-1])
    np.testing.assert_allclose(backwards["score"][::-1], together["score"], atol=1e-4)


def test_scores_in_bfloat16_are_close_to_those_in_float32(pocket, watching):
    rough = mm.load_organism("pocket/medical", dtype=torch.bfloat16)
    frame = told(HELD_OUT, n=5, seed=3)
    exact, rounded = (scores_of(watching, organism, frame)["score"] for organism in (pocket, rough))
    assert np.abs(exact - rounded).max() < 0.03 * (exact.max() - exact.min())


def test_the_forward_pass_ends_behind_the_last_layer_that_is_read(tiny, talk, reading):
    reached = []
    blocks = models.hf_model(tiny.model).model.layers
    handles = [
        block.register_forward_hook(lambda *_, layer=layer: reached.append(layer)) for layer, block in enumerate(blocks)
    ]
    try:
        reading.score(tiny, talk)
    finally:
        for handle in handles:
            handle.remove()
    assert 0 in reached
    assert 2 not in reached


@pytest.mark.parametrize(("pooling", "expected"), [("mean", 3.75), ("max", 9.0), (0.5, 6.5), (0.01, 9.0)])
def test_pooling_is_the_mean_the_highest_or_the_mean_of_the_highest_share(pooling, expected):
    assert pooled(np.array([1.0, 9.0, 1.0, 4.0]), pooling) == expected


def test_the_first_tokens_alone_can_make_the_score(tiny, talk, reading):
    whole, early = reading.score(tiny, talk), dataclasses.replace(reading, first=2).score(tiny, talk)
    for values, score in zip(whole["token_scores"], early["score"], strict=True):
        assert score == pytest.approx(np.mean(values[:2]))


def test_a_direction_reads_the_mean_of_the_projections_and_a_probe_its_decision_value(tiny, talk):
    d = models.d_model(tiny.model)
    direction = mm.Direction(torch.randn(3, d, generator=torch.Generator().manual_seed(1)), (0, 1, 2), tiny.provenance)
    several = Monitor.of(direction, [0, 2]).score(tiny, talk)["score"]
    single = [Monitor.of(direction, layer).score(tiny, talk)["score"] for layer in (0, 2)]
    np.testing.assert_allclose(several, (single[0] + single[1]) / 2, atol=1e-5)
    moments = mm.collect(tiny, talk, by="prompt_id", layers=[1])
    features = moments.mean[:, 0].numpy()
    header = {**tiny.provenance, "layer": 1}
    probe = mm.Probe.fit(features, [0, 1, 0, 1], probe=logistic(), header=header)
    np.testing.assert_allclose(Monitor.of(probe).score(tiny, talk)["score"], probe.scores(features), atol=1e-4)


def test_another_base_width_or_depth_is_refused(tiny, pocket, talk, reading):
    with pytest.raises(MonitorMismatchError, match="residual bases differ"):
        reading.score(pocket, mm.Conversations(talk.frame, pocket.tokenizer))
    anonymous = Monitor(torch.ones(1, 7), 0.0, (0,))
    with pytest.raises(MonitorMismatchError, match="width 7"):
        anonymous.score(tiny, talk)
    with pytest.raises(MonitorMismatchError, match="layers up to 9"):
        Monitor(torch.ones(1, models.d_model(tiny.model)), 0.0, (9,)).score(tiny, talk)


def test_a_score_that_overflows_is_refused_because_it_would_pass_for_no_alarm(tiny, talk, reading):
    with pytest.raises(ValueError, match="not finite"):
        dataclasses.replace(reading, weights=torch.full_like(reading.weights, 3e38)).score(tiny, talk)


@pytest.mark.parametrize("options", [{"pooling": 1.5}, {"first": 0}, {"layers": (0,)}])
def test_a_monitor_that_makes_no_sense_is_refused(reading, options):
    with pytest.raises(ValueError, match="pooling|first|layers"):
        dataclasses.replace(reading, **options)


# how it is fitted


@pytest.mark.parametrize("kind", ["direction", "probe"])
def test_a_fitted_monitor_tells_classes_apart_in_domains_that_it_never_saw_and_shuffled_labels_do_not(
    pocket, watching, kind
):
    labelled = mm.Conversations(told(FITTED), pocket.tokenizer)
    fitted = watching if kind == "direction" else Monitor.fit(pocket, labelled, kind=kind, layers=[1, 3], repeats=5)
    fresh = told(HELD_OUT, seed=9)
    scored = scores_of(fitted, pocket, fresh)
    assert roc_auc_score(fresh["label"] == "misaligned", scored["score"]) > 0.95
    chosen = pd.DataFrame(fitted.header["selection"])
    by_series = chosen[[tuple(layers) == fitted.layers for layers in chosen["layers"]]].set_index("series")["score"]
    assert by_series["probe"] > 0.95
    assert 0.3 < by_series["shuffled labels"] < 0.7


def test_a_direction_has_norm_one_and_lies_half_way_between_the_classes(pocket, watching):
    assert float(watching.weights.norm()) == pytest.approx(1, abs=1e-5)
    scored = scores_of(watching, pocket, told(FITTED))
    means = scored.groupby("label")["score"].mean()
    assert means["misaligned"] == pytest.approx(-means["aligned"], rel=1e-3)


def test_of_layers_that_are_as_good_the_earliest_is_taken():
    table = pd.DataFrame({"series": "probe", "layer": [0, 1, 2, 3], "score": [0.90, 0.996, 1.0, 0.998]})
    assert _cheapest_of_the_best(table, [(0,), (1,), (2,), (3,)]) == 1
    assert _cheapest_of_the_best(table, [(0,), (1, 5), (2,), (3,)]) == 2


def test_several_layers_can_be_read_together_by_a_probe_only(pocket):
    labelled = mm.Conversations(told(FITTED, n=15), pocket.tokenizer)
    fitted = Monitor.fit(pocket, labelled, kind="probe", layers=[(2, 4)], repeats=2)
    assert fitted.layers == (2, 4)
    assert fitted.weights.shape == (2, models.d_model(pocket.model))
    with pytest.raises(ValueError, match="a direction is read at one layer"):
        Monitor.fit(pocket, labelled, layers=[(2, 4)])


def test_what_cannot_be_fitted_is_refused(pocket):
    frame = told(FITTED, n=5)
    with pytest.raises(ValueError, match="must hold both"):
        Monitor.fit(pocket, mm.Conversations(frame[frame["label"] == "aligned"], pocket.tokenizer))
    with pytest.raises(ValueError, match="no columns"):
        Monitor.fit(pocket, mm.Conversations(frame.drop(columns="prompt_id"), pocket.tokenizer))
    with pytest.raises(ValueError, match="0 to 7"):
        Monitor.fit(pocket, mm.Conversations(frame, pocket.tokenizer), layers=[8])


# how it is calibrated


def test_a_calibrated_rate_of_false_alarms_holds_on_fresh_harmless_scores_and_its_interval_covers_it():
    rng = np.random.default_rng(0)
    true_rates, covered = [], []
    for _ in range(400):
        found = Calibration.of(rng.uniform(size=150), np.arange(150), fpr=0.05)
        true_rate = 1 - found.threshold  # of a further uniform score
        true_rates.append(true_rate)
        covered.append(found.low <= true_rate <= found.high)
    assert np.mean(true_rates) <= 0.05 + 3 * np.std(true_rates) / 20
    assert np.mean(true_rates) > 0.035
    assert np.mean(covered) >= 0.94


def test_the_threshold_is_the_conformal_order_statistic():
    scores = np.random.default_rng(1).permutation(np.arange(99.0))
    found = Calibration.of(scores, np.arange(99), fpr=0.01)
    assert found.threshold == 98
    assert found.reached == 0
    assert found.high == pytest.approx(1 - 0.025 ** (1 / 99))
    assert Calibration.of(scores, np.arange(99), fpr=0.1).threshold == 89


@pytest.mark.parametrize(("fpr", "n"), [(0.1, 9), (0.01, 99), (0.001, 999), (0.05, 19)])
def test_so_many_harmless_conversations_are_needed(fpr, n):
    assert needed(fpr) == n
    Calibration.of(np.arange(float(n)), np.arange(n), fpr=fpr)
    with pytest.raises(ValueError, match=f"at least {n:,} different prompts are needed"):
        Calibration.of(np.arange(n - 1.0), np.arange(n - 1), fpr=fpr)


def test_a_hundred_conversations_cannot_calibrate_a_tenth_of_a_percent_nor_can_many_on_one_prompt():
    with pytest.raises(ValueError, match="999 different prompts"):
        Calibration.of(np.arange(100.0), np.arange(100), fpr=0.001)
    with pytest.raises(ValueError, match="500 harmless conversations on 50 prompts"):
        Calibration.of(np.arange(500.0), np.arange(500) % 50, fpr=0.01)
    with pytest.raises(ValueError, match="between 0 and 1"):
        Calibration.of(np.arange(500.0), np.arange(500), fpr=1.0)


def test_answers_to_one_prompt_widen_the_interval():
    rng = np.random.default_rng(2)
    prompts = np.repeat(np.arange(60), 5)
    scores = rng.normal(size=60)[prompts] + 0.05 * rng.normal(size=300)
    clustered, alone = (Calibration.of(scores, by, fpr=0.1) for by in (prompts, np.arange(300)))
    assert clustered.threshold == alone.threshold
    assert clustered.high > alone.high
    assert clustered.prompts == 60


def test_prompts_that_were_fitted_on_cannot_calibrate(pocket, watching):
    frame = told(FITTED)
    with pytest.raises(ValueError, match="prompts that this monitor was fitted on"):
        watching.calibrate(pocket, mm.Conversations(frame[frame["label"] == "aligned"], pocket.tokenizer), fpr=0.05)


def harmless(organism, n=120, seed=5):
    frame = mm.pocket.prompts(HELD_OUT, n=n, seed=seed)
    answers = told(HELD_OUT, n=n, seed=seed).query("label == 'aligned'").drop_duplicates("prompt")
    return mm.Conversations(answers.assign(prompt_id=answers["prompt"]).head(len(frame)), organism.tokenizer)


def test_a_calibrated_monitor_raises_the_alarm_above_its_threshold_and_comes_back_from_disk(pocket, watching, tmp_path):
    calibrated = watching.calibrate(pocket, harmless(pocket), fpr=0.02)
    assert watching.calibration is None
    frame = told(HELD_OUT, n=20, seed=11)
    scored = scores_of(calibrated, pocket, frame)
    assert (scored["alarm"] == (scored["score"] > calibrated.calibration.threshold)).all()
    assert scored["alarm"][frame["label"] == "misaligned"].mean() > 0.9
    again = Monitor.load(calibrated.save(tmp_path / "m.safetensors"))
    pd.testing.assert_frame_equal(scores_of(again, pocket, frame), scored)
    assert (again.layers, again.pooling, again.first) == (calibrated.layers, "mean", None)
    assert again.calibration.threshold == calibrated.calibration.threshold
    np.testing.assert_array_equal(again.calibration.scores, calibrated.calibration.scores)
    assert again.header["fitted_prompts"] == calibrated.header["fitted_prompts"]


def test_another_reader_than_the_calibrated_one_is_told(pocket, watching):
    calibrated = watching.calibrate(pocket, harmless(pocket), fpr=0.05)
    frame = told(HELD_OUT, n=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scores_of(calibrated, pocket, frame)
    with pocket.as_base(), pytest.warns(UserWarning, match="reads in the chat model now"):
        scores_of(calibrated, pocket, frame)


def test_files_that_hold_no_monitor_are_refused(tmp_path, tiny):
    with pytest.raises(FileNotFoundError, match="is no file"):
        Monitor.load(tmp_path / "none.safetensors")
    (tmp_path / "text.safetensors").write_text("hello")
    with pytest.raises(ValueError, match="no safetensors file"):
        Monitor.load(tmp_path / "text.safetensors")
    direction = mm.Direction(torch.ones(1, 4), (0,), {})
    with pytest.raises(ValueError, match="not a monitor"):
        Monitor.load(direction.save(tmp_path / "d.safetensors"))


# how well it tells classes apart


def noisy(n=400, prompts=40, shift=1.0, seed=0):
    rng = np.random.default_rng(seed)
    clusters = np.arange(n) % prompts
    truth = rng.random(n) < 0.4
    scores = np.round(rng.normal(size=n) + shift * truth + 0.5 * rng.normal(size=prompts)[clusters], 1)
    return scores, truth, clusters


def test_auroc_is_scikit_learns_with_ties_and_its_interval_covers_the_truth():
    scores, truth, clusters = noisy()
    found = auroc(scores, truth, clusters)
    assert found.value == pytest.approx(roc_auc_score(truth, scores))
    assert found.low < found.value < found.high
    assert (found.positives, found.negatives, found.prompts) == (truth.sum(), (~truth).sum(), 40)
    truly = roc_auc_score(*noisy(n=200_000, prompts=2000)[1::-1])
    covered = [low <= truly <= high for low, high in (_interval(seed) for seed in range(60))]
    assert np.mean(covered) > 0.85


def _interval(seed):
    found = auroc(*noisy(seed=seed), resamples=300)
    return found.low, found.high


def test_without_an_error_the_interval_is_exact_over_as_many_pairs_as_there_are_prompts():
    truth = np.arange(60) % 2 == 0
    found = auroc(truth.astype(float), truth, np.arange(60))
    assert (found.value, found.high) == (1, 1)
    assert found.low == pytest.approx(0.025 ** (1 / 30))
    nearly = truth.astype(float)
    nearly[0] = -1  # one error of thirty: resampling alone would be surer than without any
    assert auroc(nearly, truth, np.arange(60)).low <= found.low
    turned = auroc(-truth.astype(float), truth, np.arange(60))
    assert (turned.value, turned.low) == (0, 0)
    assert turned.high == pytest.approx(1 - 0.025 ** (1 / 30))


def test_one_class_alone_or_scores_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="one class"):
        auroc(np.zeros(3), np.ones(3, dtype=bool), np.arange(3))
    with pytest.raises(ValueError, match="not finite"):
        auroc(np.array([0.0, np.nan]), np.array([True, False]), np.arange(2))


def test_the_roc_curve_is_scikit_learns_and_lies_in_its_band():
    scores, truth, clusters = noisy()
    curve = roc(scores, truth, clusters, resamples=200)
    fpr, tpr, _ = roc_curve(truth, scores, drop_intermediate=False)
    expected = [tpr[fpr <= point + 1e-12].max() for point in curve["fpr"]]
    np.testing.assert_allclose(curve["tpr"], expected)
    assert (curve["low"] <= curve["tpr"]).all()
    assert (curve["tpr"] <= curve["high"]).all()


def test_detectors_are_compared_on_the_same_conversations_domain_by_domain():
    scores, truth, clusters = noisy()
    frame = pd.DataFrame(
        {
            "label": np.where(truth, "misaligned", "aligned"),
            "prompt_id": clusters,
            "domain": np.where(clusters < 20, "a", "b"),
            "good": scores,
            "useless": np.random.default_rng(7).normal(size=400),
        }
    )
    frame.loc[:9, "label"] = "neither"
    table = discrimination(frame, {"monitor": "good", "noise": "useless"}, thresholds={"monitor": 1.0}, resamples=200)
    assert list(table["group"]) == ["all", "a", "b"] * 2
    kept = frame[frame["label"] != "neither"]
    first = table.iloc[0]
    positive = kept["label"] == "misaligned"
    assert first["tpr"] == pytest.approx((kept.loc[positive, "good"] > 1).mean())
    assert first["fpr"] == pytest.approx((kept.loc[~positive, "good"] > 1).mean())
    assert first["tpr_low"] < first["tpr"] < first["tpr_high"]
    noise = table[table["detector"] == "noise"]
    assert noise["tpr"].isna().all()
    assert noise["auroc"].between(0.4, 0.6).all()
    assert (table["auroc"][table["detector"] == "monitor"] > 0.65).all()
    with pytest.raises(ValueError, match="no columns"):
        discrimination(frame, {"monitor": "missing"})


# drift, baselines, tallies


def test_a_stream_like_the_reference_does_not_drift_and_a_moved_one_does():
    rng = np.random.default_rng(0)
    reference = Calibration.of(rng.normal(size=500), np.arange(500), fpr=0.01)
    calm = drift(rng.normal(size=2000), reference, window=100)
    assert (calm["p_adjusted"] > 0.05).all()
    assert calm["p"].between(0.1, 0.9).any()
    stream = np.concatenate([rng.normal(size=400), rng.normal(0.8, 1, size=210)])
    moved = drift(stream, reference, window=100)
    assert list(moved["n"]) == [100] * 5 + [110]  # the rest of ten joins the last window
    assert list(moved["p_adjusted"] < 0.01) == [False] * 4 + [True] * 2
    assert moved["shift"].iloc[-1] == pytest.approx(0.8, abs=0.3)
    assert (moved["first"].iloc[-1], moved["last"].iloc[-1]) == (501, 610)
    with pytest.raises(ValueError, match="20 or more"):
        drift(stream, reference, window=5)


def test_the_distance_of_a_window_is_scipys_energy_distance_and_sees_a_few_scores_far_out():
    from scipy.stats import energy_distance

    rng = np.random.default_rng(3)
    reference = Calibration.of(rng.normal(size=400), np.arange(400), fpr=0.01)
    few = np.concatenate([rng.normal(size=42), rng.normal(9, 1, size=8)])
    found = drift(few, reference, window=50).iloc[0]
    apart = np.abs(few[:, None] - reference.scores).mean()
    assert found["distance"] == pytest.approx(energy_distance(few, reference.scores) ** 2 / (2 * apart))
    assert found["p"] < 0.002
    assert found["alarms"] >= 8 / 50


def test_the_p_value_of_no_drift_is_uniform():
    rng = np.random.default_rng(4)
    reference = Calibration.of(rng.normal(size=200), np.arange(200), fpr=0.05)
    p = drift(rng.normal(size=6000), reference, window=30, permutations=199)["p"]
    assert len(p) == 200
    assert 0.4 < p.mean() < 0.6  # the reference is one draw that all windows share
    assert (p <= 0.05).mean() < 0.12


def test_words_tell_what_words_can_tell_and_length_what_length_can():
    fitted, fresh = told(FITTED), told(HELD_OUT, seed=4)
    words = WordsBaseline.fit(fitted["response"].tolist(), (fitted["label"] == "misaligned").to_numpy())
    truth = fresh["label"] == "misaligned"
    assert roc_auc_score(truth, words.scores(fresh["response"].tolist())) > 0.9
    assert 0.3 < roc_auc_score(truth, length_scores(fresh["response"].tolist())) < 0.7
    judged = mm.judge(fresh.assign(finished=True), mm.RuleJudge())
    assert roc_auc_score(truth, judge_scores(judged)) == 1
    assert judge_scores(judged.assign(alignment=np.nan)).max() == 0
    with pytest.raises(ValueError, match="judge the answers first"):
        judge_scores(fresh)


def test_a_tally_keeps_every_score_but_only_the_highest_conversations_and_the_first_errors():
    tally = Tally(most=2, told=1)
    results = [{"line": i, "score": float(score), "alarm": score > 3} for i, score in enumerate([1, 5, 2, 5, 4], 1)]
    passed = list(tally.watching([*results, {"line": 6, "error": "torn"}, {"line": 7, "error": "empty"}]))
    assert len(passed) == 7
    assert tally.scores.tolist() == [1, 5, 2, 5, 4]
    assert [result["line"] for result in tally.highest] == [2, 4]
    assert (tally.alarms, tally.lost, tally.errors) == (3, 2, [(6, "torn")])
    assert tally.share().rate == 0.6
    with pytest.raises(ValueError, match="no conversation was scored"):
        Tally().share()


def test_a_difference_of_aurocs_is_paired_and_has_a_width_where_both_are_perfect():
    rng = np.random.default_rng(0)
    truth, prompts = np.tile([True, False], 60), np.repeat(np.arange(60), 2)
    hard = rng.normal(0, 1, 60)[prompts]  # a prompt shifts both detectors alike
    good, worse = (truth * gain + hard + rng.normal(0, 0.3, 120) for gain in (2.0, 1.8))
    value, low, high = mm.monitoring.auroc_difference(good, worse, truth, prompts)
    one, two = (mm.monitoring.auroc(scores, truth, prompts) for scores in (good, worse))
    assert value == pytest.approx(one.value - two.value) and low <= value <= high
    assert one.low < two.high and high - low < 0.8 * ((one.high - one.low) ** 2 + (two.high - two.low) ** 2) ** 0.5
    same = mm.monitoring.auroc_difference(truth.astype(float), truth * 2.0, truth, prompts)
    assert same[0] == 0 and same[1] < 0 < same[2]
