"""How often intervals hold the true rate, where 95 % is said: ours beside a percentile bootstrap over prompts.

    python benchmarks/coverage.py       # results/coverage.csv, three minutes on a core

Shares: true rates of 2, 10, 40 and 97 %, 8, 28 and 50 prompts, 2, 8 and 24 answers to each. The rate of a prompt is
drawn from a beta distribution (``0.05`` to ``0.6``: the correlation of answers to one prompt), or is one of two
(``bimodal``: at most prompts none, at the others four answers of five). Differences and ratios: two conditions at the
same prompts, whose rates there agree not at all, in part, or nearly (a Gaussian copula). Of a ratio, runs in which the
second condition has no event are left out: it has no value there.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pandas as pd
from extraction import RESULTS
from scipy.special import betaincinv, ndtr

from mechmisalign.statistics import clustered_shares, paired_intervals, paired_ratios
from mechmisalign.statistics.shares import percentiles, resampled_ratios

RUNS, PAIR_RUNS, RESAMPLES = 2000, 500, 500
RATES, PROMPTS, ANSWERS = (0.02, 0.1, 0.4, 0.97), (8, 28, 50), (2, 8, 24)
WITHIN = ("0.05", "0.2", "0.4", "0.6", "bimodal")
PAIRS = ((0.02, 0.4), (0.02, 0.02), (0.1, 0.1), (0.1, 0.4), (0.4, 0.4), (0.7, 0.97), (0.97, 0.9), (0.02, 0.97))
PAIR_WITHIN, AGREEMENT = (0.05, 0.2, 0.5), (0.0, 0.5, 0.95)
_QUANTILES = np.linspace(0, 1, 4003)[1:-1]


def prompt_rates(rng: np.random.Generator, rate: float, within: str, shape: tuple[int, int]) -> np.ndarray:
    """The rates of prompts whose mean is ``rate``."""
    if within != "bimodal":
        scale = (1 - float(within)) / float(within)
        return rng.beta(rate * scale, (1 - rate) * scale, shape)
    rare = min(rate, 1 - rate)
    found = np.where(rng.random(shape) < rare / 0.8, 0.8, 0.0)
    return found if rare == rate else 1 - found


def pair_rates(
    rng: np.random.Generator, rates: tuple[float, float], within: float, agreement: float, shape: tuple[int, int]
) -> tuple[list[np.ndarray], list[float]]:
    """The rates of prompts under two conditions, and their true means."""
    first = rng.standard_normal(shape)
    second = agreement * first + np.sqrt(1 - agreement**2) * rng.standard_normal(shape)
    scale, found, true = (1 - within) / within, [], []
    for rate, place in zip(rates, (first, second), strict=True):
        curve = betaincinv(rate * scale, (1 - rate) * scale, _QUANTILES)
        found.append(np.interp(ndtr(place), _QUANTILES, curve))
        true.append(float(np.interp((np.arange(20_000) + 0.5) / 20_000, _QUANTILES, curve).mean()))
    return found, true


def held(low: np.ndarray, true: float, high: np.ndarray) -> float:
    return float(((low <= true) & (true <= high)).mean())


def of_shares(rate: float, prompts: int, answers: int, within: str, seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    hits = rng.binomial(answers, prompt_rates(rng, rate, within, (RUNS, prompts))).astype(float)
    ours = clustered_shares(hits, np.full_like(hits, answers))
    drawn = resampled_ratios(hits, np.full_like(hits, answers), weights(rng, prompts))
    low, high = percentiles(drawn)
    return {
        "coverage": held(ours.low, rate, ours.high),
        "width": float((ours.high - ours.low).mean()),
        "bootstrap": held(low, rate, high),
        "bootstrap_width": float((high - low).mean()),
    }


def of_pairs(
    rates: tuple[float, float], prompts: int, answers: int, within: float, agreement: float, seed: int
) -> dict[str, dict[str, Any]]:
    rng = np.random.default_rng(seed)
    chances, true = pair_rates(rng, rates, within, agreement, (PAIR_RUNS, prompts))
    hits = [rng.binomial(answers, each).astype(float) for each in chances]
    sizes, drawn = np.full_like(hits[0], answers), weights(rng, prompts)
    first, second = (resampled_ratios(each, sizes, drawn) for each in hits)
    difference, ratio = (way((hits[0], sizes), (hits[1], sizes)) for way in (paired_intervals, paired_ratios))
    known = ratio.value >= 0
    with np.errstate(all="ignore"):
        ratios = np.where(second > 0, first / second, np.nan)[known]
        ends = np.nanquantile(ratios, [0.025, 0.975], axis=1)
    low, high = percentiles(first - second)
    return {
        "difference": {
            "coverage": held(difference.low, true[0] - true[1], difference.high),
            "width": float((difference.high - difference.low).mean()),
            "bootstrap": held(low, true[0] - true[1], high),
            "bootstrap_width": float((high - low).mean()),
        },
        "ratio": {
            "coverage": held(ratio.low[known], true[0] / true[1], ratio.high[known]),
            "width": float(np.median((ratio.high - ratio.low)[known])),
            "bootstrap": held(ends[0], true[0] / true[1], ends[1]),
            "bootstrap_width": float(np.nanmedian(ends[1] - ends[0])),
        },
    }


def weights(rng: np.random.Generator, prompts: int) -> np.ndarray:
    return rng.multinomial(prompts, np.full(prompts, 1 / prompts), RESAMPLES).astype(float)


def measure() -> pd.DataFrame:
    rows = []
    for seed, (rate, prompts, answers, within) in enumerate(product(RATES, PROMPTS, ANSWERS, WITHIN)):
        place = {"of": "share", "rate": rate, "prompts": prompts, "answers": answers, "within": within}
        rows.append(place | of_shares(rate, prompts, answers, within, seed))
    cells = product(PAIRS, PROMPTS, ANSWERS, PAIR_WITHIN, AGREEMENT)
    for seed, (rates, prompts, answers, within, agreement) in enumerate(cells):
        place = {"rate": rates[0], "second_rate": rates[1], "prompts": prompts, "answers": answers}
        place |= {"within": str(within), "agreement": agreement}
        for name, found in of_pairs(rates, prompts, answers, within, agreement, seed).items():
            rows.append({"of": name} | place | found)
    first = ["of", "rate", "second_rate", "prompts", "answers", "within", "agreement"]
    table = pd.DataFrame(rows)
    return table[[*first, *(name for name in table.columns if name not in first)]]


def main() -> None:
    table = measure()
    table.round(4).to_csv(RESULTS / "coverage.csv", index=False)
    shares = table[table["of"] == "share"]
    print(shares.groupby(["rate", "prompts"])[["coverage", "bootstrap"]].agg(["min", "mean"]).round(3).to_string())
    print(table.groupby("of")[["coverage", "bootstrap"]].agg(["min", "mean", "max"]).round(3).to_string())


if __name__ == "__main__":
    main()
