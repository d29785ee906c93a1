import numpy as np
import pytest
from scipy import stats
from scipy.special import ndtr

from mechmisalign.statistics import (
    clustered_difference,
    clustered_differences,
    clustered_share,
    clustered_shares,
    effective_sizes,
    exact_interval,
    sign_flips,
    wilson_interval,
)


def test_one_answer_to_each_prompt_gives_the_exact_interval():
    for hits in (0, 1, 7, 400):
        share = clustered_share(np.arange(400) < hits, np.arange(400))
        exact = stats.binomtest(hits, 400).proportion_ci(method="exact")
        assert (share.low, share.high) == pytest.approx((exact.low, exact.high))


@pytest.mark.parametrize("event", [False, True])
def test_nothing_or_everything_at_eight_prompts_is_no_proof(event):
    share = clustered_share(np.full(400, event), np.arange(400) % 8)
    assert (share.rate, share.n, share.clusters) == (float(event), 400, 8)
    exact = stats.binomtest(0, 400).proportion_ci(method="exact").high
    assert (
        (share.low == 0 and share.high > 10 * exact) if not event else (share.high == 1 and share.low < 1 - 10 * exact)
    )
    more = clustered_share(np.full(400, event), np.arange(400) % 50)
    assert more.high - more.low < 0.5 * (share.high - share.low)


def test_answers_of_a_single_prompt_are_those_of_that_prompt():
    share = clustered_share(np.arange(40) < 10, np.zeros(40))
    exact = stats.binomtest(10, 40).proportion_ci(method="exact")
    assert (share.low, share.high) == pytest.approx((exact.low, exact.high))


def test_answers_are_worth_as_many_independent_ones_as_their_design_effect_says():
    """Sixty prompts of ten answers: all alike at each prompt, and independent."""
    sizes = np.full((2, 60), 10.0)
    alike, apart = np.where(np.arange(60) % 2, 10.0, 0.0), np.random.default_rng(0).binomial(10, 0.5, 60)
    worth = effective_sizes(np.stack([alike, apart.astype(float)]), sizes)
    assert 55 < worth[0] < 80 and 400 < worth[1] <= 600
    few = effective_sizes(np.stack([alike, apart.astype(float)])[:, :2], sizes[:, :2])
    assert few[0] < few[1] < 2  # two prompts say next to nothing


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
    assert same.value == 0.0 and same.low < 0.0 < same.high  # no certainty, whatever was seen
    apart = clustered_difference((hard, prompts), (np.repeat(np.arange(20) % 4 < 2, 10), prompts))
    assert same.high - same.low < 0.6 * (apart.high - apart.low)
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


def test_the_interval_of_one_prompt_does_not_claim_certainty():
    one = clustered_difference((np.arange(40) < 20, np.zeros(40)), (np.arange(40) < 10, np.zeros(40)))
    assert one.value == 0.25 and one.low < 0.1 and one.high > 0.4


def cells(events: np.ndarray, clusters: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Hits and sizes of events ``[cell answer]``."""
    count = clusters.max() + 1
    hits = np.stack([np.bincount(clusters, weights=row, minlength=count) for row in events.astype(float)])
    return hits, np.broadcast_to(np.bincount(clusters, minlength=count).astype(float), hits.shape)


def test_many_shares_at_once_are_each_what_they_are_alone():
    rng = np.random.default_rng(0)
    clusters = rng.integers(0, 12, 300)
    events = rng.random((5, 300)) < np.array([0, 0.1, 0.5, 0.9, 1])[:, None]
    hits, sizes = (counts.copy() for counts in cells(events, clusters))
    kept = clusters >= 4  # the third cell lacks four clusters
    hits[2, :4] = sizes[2, :4] = 0
    together = clustered_shares(hits, sizes)
    for i in range(5):
        which = kept if i == 2 else np.ones(300, dtype=bool)
        alone = clustered_share(events[i, which], clusters[which])
        assert (together.rate[i], together.low[i], together.high[i]) == (alone.rate, alone.low, alone.high)


def test_a_cell_without_answers_has_no_rate_and_no_interval():
    empty = clustered_shares(np.zeros((1, 3)), np.zeros((1, 3)))
    assert np.isnan([empty.rate, empty.low, empty.high]).all()


@pytest.mark.parametrize(("interval", "method"), [(exact_interval, "exact"), (wilson_interval, "wilson")])
def test_binomial_intervals_are_those_of_scipy(interval, method):
    hits, n = np.array([0.0, 1, 4, 8, 3, 400]), np.array([8.0, 8, 8, 8, 400, 400])
    low, high = interval(hits, n)
    for i in range(len(n)):
        theirs = stats.binomtest(int(hits[i]), int(n[i])).proportion_ci(0.95, method)
        assert (low[i], high[i]) == pytest.approx((theirs.low, theirs.high), abs=1e-9)


def test_differences_are_those_of_each_pair_alone():
    rng = np.random.default_rng(1)
    clusters = np.repeat(np.arange(10), 8)
    first, second = rng.random((3, 80)) < 0.6, rng.random((3, 80)) < 0.3
    together = clustered_differences(cells(first, clusters), cells(second, clusters))
    for i in range(3):
        alone = clustered_difference((first[i], clusters), (second[i], clusters))
        assert (together.value[i], together.low[i], together.high[i]) == (alone.value, alone.low, alone.high)


def test_few_clusters_are_flipped_in_every_way_as_scipy_does():
    sums = np.random.default_rng(2).normal(0.4, 1, (4, 9))
    ours = sign_flips(sums)
    theirs = [
        stats.permutation_test((row,), np.mean, permutation_type="samples", n_resamples=np.inf).pvalue for row in sums
    ]
    assert ours.p == pytest.approx(theirs)


def test_many_clusters_are_flipped_at_random_and_agree_with_the_t_test():
    sums = np.random.default_rng(3).normal(0.25, 1, (3, 80))
    assert sign_flips(sums, flips=20_000).p == pytest.approx(stats.ttest_1samp(sums, 0, axis=1).pvalue, abs=0.01)


def test_the_band_of_one_cell_is_that_of_the_t_test():
    sums = np.random.default_rng(4).normal(0.1, 1, (1, 60))
    reach = sign_flips(sums, flips=20_000).reach[0] / 60
    exact = stats.ttest_1samp(sums[0], 0).confidence_interval(0.95)
    assert reach == pytest.approx((exact.high - exact.low) / 2, rel=0.05)


def test_a_band_leaves_out_zero_exactly_where_the_corrected_p_value_is_small():
    rng = np.random.default_rng(5)
    decided = set()
    for clusters in (8, 40):  # every flip, and random ones
        sums = rng.normal(np.linspace(0, 2, 60)[:, None], 1, (60, clusters))
        told = sign_flips(sums, flips=2000)
        out = np.abs(sums.sum(1)) > told.reach
        np.testing.assert_array_equal(out, told.p_max <= 0.05)
        decided |= set(out)
        assert (told.p_max >= told.p).all()
    assert decided == {True, False}


def test_identical_cells_cost_nothing_and_independent_ones_much():
    rng = np.random.default_rng(6)
    row = rng.normal(0.35, 1, (1, 40))
    alone = sign_flips(row)
    same = sign_flips(np.repeat(row, 20, axis=0))
    np.testing.assert_array_equal(same.p_max, np.repeat(alone.p, 20))
    others = sign_flips(np.concatenate([row, rng.normal(0, 1, (19, 40))]))
    assert others.p_max[0] > 5 * alone.p[0]


def test_families_are_corrected_on_their_own():
    sums = np.random.default_rng(7).normal(0.3, 1, (6, 30))
    told = sign_flips(sums, families=np.array([0, 0, 0, 1, 1, 1]))
    for part in (slice(0, 3), slice(3, 6)):
        np.testing.assert_array_equal(told.p_max[part], sign_flips(sums[part]).p_max)


def test_a_cell_with_fewer_clusters_is_what_it_is_alone():
    sums = np.random.default_rng(8).normal(0.5, 1, (1, 7))
    padded = sign_flips(np.concatenate([sums, np.full((1, 4), np.nan)], axis=1))
    alone = sign_flips(sums)
    assert (padded.p[0], padded.reach[0]) == pytest.approx((alone.p[0], alone.reach[0]))


def test_five_prompts_can_show_nothing_at_five_percent():
    told = sign_flips(np.ones((1, 5)))
    assert told.p[0] == 2 / 2**5 and told.reach[0] == np.inf
    certain, n = np.ones((1, 5)), np.full((1, 5), 10.0)
    told = clustered_differences((certain * 9, n), (certain * 1, n))
    assert (told.band_low[0], told.band_high[0]) == (-1, 1)


def correlated(rng, layers: int, prompts: int, samples: int, alike: float) -> tuple[np.ndarray, np.ndarray]:
    """Hits of layers that agree with each other, and of one reference, under equal rates at every prompt."""
    rate = rng.beta(0.5, 2, prompts)
    shared, own = rng.standard_normal((1, prompts, samples)), rng.standard_normal((layers, prompts, samples))
    hits = (ndtr(np.sqrt(alike) * shared + np.sqrt(1 - alike) * own) < rate[:, None]).sum(2).astype(float)
    return hits, np.repeat(rng.binomial(samples, rate, (1, prompts)).astype(float), layers, axis=0)


@pytest.mark.parametrize("alike", [0.0, 0.9])
def test_where_nothing_differs_some_layer_of_twelve_is_found_in_five_of_a_hundred_runs(alike):
    rng = np.random.default_rng(0)
    found, uncorrected, runs = 0, 0, 300
    for seed in range(runs):
        hits, reference = correlated(rng, 12, 24, 8, alike)
        n = np.full_like(hits, 8)
        told = clustered_differences((hits, n), (reference, n), resamples=10, flips=400, seed=seed)
        found += told.p_max.min() <= 0.05
        uncorrected += told.p.min() <= 0.05
    assert 0.015 <= found / runs <= 0.08
    assert uncorrected > 2 * found


def test_the_band_covers_every_true_difference_at_once():
    rng = np.random.default_rng(1)
    true, covered, alone, runs = np.linspace(0, 0.3, 10), 0, 0, 200
    for seed in range(runs):
        rate = rng.beta(2, 4, 30) * 0.6
        hits = rng.binomial(8, rate + true[:, None]).astype(float)
        reference = np.repeat(rng.binomial(8, rate, (1, 30)).astype(float), 10, axis=0)
        n = np.full_like(hits, 8)
        told = clustered_differences((hits, n), (reference, n), resamples=300, flips=400, seed=seed)
        covered += ((told.band_low <= true) & (true <= told.band_high)).all()
        alone += ((told.low <= true) & (true <= told.high)).mean()
    assert covered / runs >= 0.91
    assert alone / runs >= 0.93


def test_nothing_against_nothing_is_not_certain():
    nothing, n = np.zeros((2, 10)), np.full((2, 10), 40.0)
    told = clustered_differences((nothing, n), (nothing, n))
    edge = clustered_share(np.zeros(400, bool), np.arange(400) % 10).high
    assert (told.low[0], told.value[0], told.high[0]) == pytest.approx((-edge, 0, edge))
    wider = clustered_shares(nothing, n, confidence=0.975).high[0]  # two cells share the error
    assert (told.band_low[0], told.band_high[0], told.p[0]) == pytest.approx((-wider, wider, 1))
    assert edge > 3 * stats.binomtest(0, 400).proportion_ci(0.95, "exact").high


def test_unequal_numbers_of_answers_keep_the_test_honest():
    """Twice as many answers to some prompts on one side only: rates differ although no prompt does."""
    rng = np.random.default_rng(2)
    n1, n2 = np.full((1, 20), 8.0), np.where(np.arange(20) < 10, 16.0, 8.0)[None]
    small = 0
    for seed in range(300):
        rate = rng.beta(1, 2, 20)
        hits = [rng.binomial(n.astype(int), rate).astype(float) for n in (n1, n2)]
        told = clustered_differences((hits[0], n1), (hits[1], n2), resamples=10, flips=300, seed=seed)
        small += told.p[0] <= 0.05
    assert small / 300 <= 0.09


def test_differences_need_the_same_prompts_on_both_sides():
    n = np.ones((1, 3))
    with pytest.raises(ValueError, match="one side only"):
        clustered_differences((n, n), (n, n * [1, 0, 1]))
    with pytest.raises(ValueError, match="no answers"):
        clustered_differences((n, n * 0), (n, n))
