import numpy as np
import pytest
from scipy import stats

from mechmisalign.statistics import clustered_difference, clustered_share


def test_no_event_gives_the_exact_interval():
    share = clustered_share(np.zeros(400, dtype=bool), np.arange(400) % 8)
    exact = stats.binomtest(0, 400).proportion_ci(method="exact")
    assert (share.rate, share.low, share.n, share.clusters) == (0, 0, 400, 8)
    assert share.high == pytest.approx(exact.high)


def test_the_interval_is_wider_when_answers_to_one_prompt_agree():
    events = np.repeat([True, False] * 4, 50)
    clustered = clustered_share(events, np.repeat(np.arange(8), 50))
    independent = clustered_share(events, np.arange(400))
    assert clustered.high - clustered.low > 3 * (independent.high - independent.low)


def test_the_interval_of_independent_answers_is_the_binomial_one():
    events = np.random.default_rng(0).random(2000) < 0.3
    share = clustered_share(events, np.arange(2000))
    exact = stats.binomtest(int(events.sum()), 2000).proportion_ci(method="exact")
    assert share.low == pytest.approx(exact.low, abs=0.005)
    assert share.high == pytest.approx(exact.high, abs=0.005)


def test_the_interval_covers_a_clustered_rate_as_often_as_it_says():
    rng = np.random.default_rng(0)
    clusters = np.repeat(np.arange(40), 10)
    covered = 0
    for seed in range(200):
        rates = rng.beta(2, 3, 40)
        events = rng.random(400) < rates[clusters]
        share = clustered_share(events, clusters, resamples=500, seed=seed)
        covered += share.low <= 0.4 <= share.high
    assert 0.88 <= covered / 200 <= 0.99


def test_a_share_of_nothing_is_refused():
    with pytest.raises(ValueError, match="no answers"):
        clustered_share(np.zeros(0, dtype=bool), [])


def test_the_same_seed_gives_the_same_interval():
    events = np.arange(100) % 3 == 0
    assert clustered_share(events, np.arange(100) // 5) == clustered_share(events, np.arange(100) // 5)


def test_a_paired_difference_is_narrower_where_prompts_decide():
    """Prompts that always or never fail on both sides: the difference is certain, the rates are not."""
    prompts = np.repeat(np.arange(20), 10)
    hard = np.repeat(np.arange(20) % 2 == 0, 10)
    same = clustered_difference((hard, prompts), (hard, prompts))
    assert (same.value, same.low, same.high) == (0.0, 0.0, 0.0)
    fewer = hard & (np.tile(np.arange(10), 20) < 5)
    half = clustered_difference((hard, prompts), (fewer, prompts))
    assert half.value == pytest.approx(0.25) and half.low < 0.25 < half.high
    share = clustered_share(hard, prompts)
    assert half.high - half.low < share.high - share.low


def test_a_difference_needs_the_same_prompts_on_both_sides():
    events = np.array([True, False])
    with pytest.raises(ValueError, match="on one side only"):
        clustered_difference((events, ["a", "b"]), (events, ["a", "a"]))
    with pytest.raises(ValueError, match="no answers"):
        clustered_difference((events, ["a", "b"]), (events[:0], []))
