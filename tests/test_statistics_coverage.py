"""Do intervals hold the true value as often as they say? A part of ``benchmarks/coverage.py``, with its seeds."""

from itertools import product

import numpy as np
import pytest

from mechmisalign.statistics import clustered_shares, paired_intervals, paired_ratios

LEAST = 0.92
RUNS = 400


def prompt_rates(rng, rate: float, within: float | str, shape):
    """Rates of prompts: of a beta distribution with that correlation of answers, or none and four of five."""
    if within != "bimodal":
        scale = (1 - within) / within
        return rng.beta(rate * scale, (1 - rate) * scale, shape)
    rare = min(rate, 1 - rate)
    found = np.where(rng.random(shape) < rare / 0.8, 0.8, 0.0)
    return found if rare == rate else 1 - found


@pytest.mark.parametrize("rate", [0.02, 0.1, 0.4, 0.97])
@pytest.mark.parametrize("prompts", [8, 28, 50])
def test_the_interval_of_a_rate_holds_it_as_often_as_it_says(rate, prompts):
    for seed, (answers, within) in enumerate(product((2, 8, 24), (0.05, 0.4, 0.6, "bimodal"))):
        rng = np.random.default_rng(seed)
        hits = rng.binomial(answers, prompt_rates(rng, rate, within, (RUNS, prompts))).astype(float)
        told = clustered_shares(hits, np.full_like(hits, answers))
        held = ((told.low <= rate) & (rate <= told.high)).mean()
        assert held >= LEAST, (answers, within, held)
        assert (told.high > told.low).all()


@pytest.mark.parametrize("rates", [(0.02, 0.4), (0.02, 0.02), (0.4, 0.4), (0.97, 0.9), (0.02, 0.97)])
def test_intervals_of_differences_and_reductions_hold_them_as_often_as_they_say(rates):
    """A prompt's rate under both conditions comes from the same draw, or from two."""
    for seed, (prompts, answers, within, shared) in enumerate(product((8, 50), (2, 24), (0.1, 0.5), (True, False))):
        rng = np.random.default_rng(seed)
        scale, shape = (1 - within) / within, (RUNS, prompts)
        if shared:
            common = rng.beta(0.5 * scale, 0.5 * scale, shape)  # both rates a factor or complement of one draw
            chances = [2 * rate * common if rate <= 0.5 else 1 - 2 * (1 - rate) * common for rate in rates]
        else:
            chances = [rng.beta(rate * scale, (1 - rate) * scale, shape) for rate in rates]
        first, second = (
            (rng.binomial(answers, each).astype(float), np.full(shape, float(answers))) for each in chances
        )
        gap, ratio = paired_intervals(first, second), paired_ratios(first, second)
        held = ((gap.low <= rates[0] - rates[1]) & (rates[0] - rates[1] <= gap.high)).mean()
        known = ~np.isnan(ratio.value)
        true = rates[0] / rates[1]
        covered = ((ratio.low[known] <= true) & (true <= ratio.high[known])).mean()
        assert min(held, covered) >= LEAST, (prompts, answers, within, shared, held, covered)
        assert (ratio.high > ratio.low)[known].all() and (gap.high > gap.low).all()


def test_a_percentile_bootstrap_would_not_have_passed():
    rng = np.random.default_rng(0)
    hits = rng.binomial(8, prompt_rates(rng, 0.02, 0.4, (RUNS, 8))).astype(float)
    drawn = hits @ rng.multinomial(8, np.full(8, 1 / 8), 500).T / 64
    low, high = np.quantile(drawn, [0.025, 0.975], axis=1)
    assert ((low <= 0.02) & (high >= 0.02)).mean() < 0.6


def test_a_full_cure_is_not_certain():
    """24 of 24 and none of 24 at eight prompts each: no "cut 100 [100, 100]"."""
    sizes = np.full((1, 8), 3.0)
    ratio = paired_ratios((np.zeros((1, 8)), sizes), (sizes, sizes))
    assert ratio.value[0] == ratio.low[0] == 0 and 0.2 < ratio.high[0] < 1
    gap = paired_intervals((np.zeros((1, 8)), sizes), (sizes, sizes))
    assert gap.value[0] == -1 == gap.low[0] and gap.high[0] > -0.9


def test_a_ratio_to_nothing_has_no_value():
    sizes = np.full((1, 8), 3.0)
    found = paired_ratios((sizes, sizes), (np.zeros((1, 8)), sizes))
    assert np.isnan([found.value[0], found.low[0], found.high[0]]).all()
