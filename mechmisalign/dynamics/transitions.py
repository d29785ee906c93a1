"""Where a path turns: a peak that stands out on both sides, tested against its own directions in another order.

A signal is a curve over steps; its transition is where it is highest. The *height* of a peak is how far it stands
above the median of the curve on its left and above that on its right, whichever is higher: a curve that rises and stays
up, as the local cosine does where training stops and only noise is left, has no peak.

Null: a path of the same step sizes whose directions ``(v_{t+1} - v_t) / ‖v_{t+1} - v_t‖`` come in random order. A
straight noisy path and a random walk are both of this kind. In simulations (128 coordinates, 100 runs each of 20, 40
and 99 increments) straight noisy paths, random walks, paths that slow down, paths that stop, and either with momentum
(noise correlated 0.9 from step to step) were called a turn at p ≤ 0.05 in 0 to 6 % of runs.

Interval: coordinates are resampled in groups, all steps together. In the simulations it held the place of a planted
turn of 60 or 90 degrees, sudden or over a fifth of the path, in 98 to 100 % of runs. It says how sure the place is for
this run; another seed of training is another run. Fine checkpoints matter: a right angle over a fifth of the path is
found in none of 60 runs with 20 increments, in 30 % with 40 and in all with 99; with momentum, over a tenth of it, in
2 % with 40 and 95 % with 99. Similarity and growth are less sure: called in 0 to 13 % of 60 runs of most such paths,
but in 42 % of random walks with momentum (similarity) and 30 % of paths whose first steps are mostly noise (growth),
both with 99 increments.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal, get_args

import numpy as np
import pandas as pd
from jaxtyping import Float

from ._curves import curve_of, of_gram, of_vectors, reordering, resampled
from .paths import Path

Signal = Literal["rotation", "similarity", "growth"]
"""The local cosine; how fast the cosine with the end rises; how fast the norm grows."""

_TIE = 1e-9


@dataclass(frozen=True, eq=False)
class Transition:
    """Where one signal turns.

    Attributes:
        signal: Which one.
        step: Where it is highest; NaN if no transition can be told from the null.
        low: Lower end of the 95 % interval of the step; NaN as well.
        high: Upper end.
        p: Share of the null's curves whose peak stands out as far (add-one rule).
        height: How far the peak stands out; ``-inf`` if it is at an end of the curve.
        peak: Where the curve is highest, whether or not it is a transition.
        draws: Places of the peak in the resamples.
    """

    signal: str
    step: float
    low: float
    high: float
    p: float
    height: float
    peak: float
    draws: Float[np.ndarray, " draw"]


def transition(
    path: Path,
    signal: Signal = "rotation",
    *,
    spacing: int | None = None,
    threshold: float = 0.05,
    level: float = 0.05,
    permutations: int = 499,
    resamples: int = 500,
    seed: int = 0,
) -> Transition:
    """The step at which a path turns, approaches its end fastest, or grows fastest.

    Args:
        path: What is followed; steps off the commonest gap are left out.
        signal: ``"rotation"``: the local cosine; ``"similarity"``: the rise of the cosine with the last step;
            ``"growth"``: the rise of the norm.
        spacing: The s over which the curve is taken, in training steps; by default a sixth of the path. A turn that
            takes much longer is none at this scale.
        threshold: The local cosine is left out where either of its legs is shorter than this share of the longest.
        level: A transition is told where p is at most this.
        permutations: Orders of the directions.
        resamples: Of the coordinates.
        seed: Of both.

    Raises:
        ValueError: On another signal, or fewer than seven evenly spaced steps.
    """
    if signal not in get_args(Signal):
        raise ValueError(f"signal must be one of {', '.join(get_args(Signal))}, got {signal!r}")
    path = path.evenly_spaced()
    if len(path.steps) < 7:
        raise ValueError(f"{len(path.steps)} evenly spaced steps; seven at least are needed to tell a turn")
    gap = path.steps[1] - path.steps[0]
    s = max(2, (len(path.steps) - 1) // 6) if spacing is None else round(spacing / gap)
    if not 1 <= s <= (len(path.steps) - 3) // 2:
        raise ValueError(f"spacing={spacing} is too wide or too narrow for {len(path.steps)} steps {gap} apart")
    rng, bands = np.random.default_rng(seed), of_gram(path.gram, s)
    curve = curve_of(signal, bands, threshold)
    found, height = _peak(curve(bands), s)
    reordered = reordering(path.gram)
    orders = (rng.permutation(len(path.steps) - 1) for _ in range(permutations))
    higher = sum(_peak(curve(of_vectors(reordered(order), s)), s)[1] >= height - _TIE for order in orders)
    p = (1 + higher) / (1 + permutations) if np.isfinite(height) else 1.0
    at = np.array(path.steps, float)[s : len(path.steps) - s]
    draws = at[[_peak(each, s)[0] for each in curve(resampled(path, s, resamples, rng))]]
    return _told(f"{signal} ({path.name})", at[found], height, p, draws, level=level, gap=gap)


def series_transition(
    steps: Sequence[int] | np.ndarray | pd.Series,
    values: Sequence[float] | np.ndarray | pd.Series,
    signal: str,
    *,
    window: int | None = None,
    level: float = 0.05,
    permutations: int = 499,
    resamples: int = 500,
    seed: int = 0,
) -> Transition:
    """The peak of a noisy number per step, such as the gradient norm, after a running mean.

    Null: the values in random order. Interval: what the running mean leaves is resampled and put on it again.

    Args:
        steps: Ascending.
        values: One for each; rows with NaN are left out.
        signal: What they are.
        window: Rows of the running mean; by default a tenth of them.
        level: A transition is told where p is at most this.
        permutations: Orders of the values.
        resamples: Of the residuals.
        seed: Of both.

    Raises:
        ValueError: If fewer than seven values are there.
    """
    frame = pd.DataFrame({"step": np.asarray(steps, float), "value": np.asarray(values, float)}).dropna()
    if len(frame) < 7:
        raise ValueError(f"{len(frame)} values of {signal!r}; seven at least are needed to tell a peak")
    w = max(3, len(frame) // 10) if window is None else window
    at, given, rng = frame["step"].to_numpy(), frame["value"].to_numpy(), np.random.default_rng(seed)
    smooth = running_mean(given, w)
    found, height = _peak(smooth, w)
    higher = sum(_peak(running_mean(rng.permutation(given), w), w)[1] >= height - _TIE for _ in range(permutations))
    p = (1 + higher) / (1 + permutations) if np.isfinite(height) else 1.0
    left = given - smooth
    drawn = (running_mean(smooth + rng.choice(left, len(left)), w) for _ in range(resamples))
    draws = at[[int(np.argmax(each)) for each in drawn]]
    return _told(signal, at[found], height, p, draws, level=level, gap=float(np.median(np.diff(at))))


def coincidence(transitions: Sequence[Transition]) -> pd.DataFrame:
    """Whether transitions fall together, pair by pair.

    Overlapping intervals do not say that two steps are equal, nor disjoint ones alone that they differ; so the
    difference has an interval of its own, from independent draws of both.

    Returns:
        Columns ``first, second, difference`` (second minus first, steps), ``low, high`` and ``coincide``: whether 0
        lies in the interval; NaN and None where one of the two has no transition.

    Raises:
        ValueError: With fewer than two transitions.
    """
    if len(transitions) < 2:
        raise ValueError(f"{len(transitions)} transition; two at least are compared")
    rows = []
    for first, second in combinations(transitions, 2):
        row: dict[str, object] = {"first": first.signal, "second": second.signal}
        difference = second.step - first.step
        low = high = np.nan
        if np.isfinite(difference):
            rng = np.random.default_rng(0)
            drawn = rng.choice(second.draws, 4000) - rng.choice(first.draws, 4000)
            reach = _half_width(first) + _half_width(second)
            low, high = np.quantile(drawn, [0.025, 0.975]) + np.array([-reach, reach])
        told = bool(low <= 0 <= high) if np.isfinite(difference) else None
        rows.append(row | {"difference": difference, "low": low, "high": high, "coincide": told})
    return pd.DataFrame(rows)


def table(transitions: Sequence[Transition]) -> pd.DataFrame:
    """One row for each: ``signal, step, low, high, p, height, peak``."""
    names = ("signal", "step", "low", "high", "p", "height", "peak")
    return pd.DataFrame([{name: getattr(each, name) for name in names} for each in transitions])


def running_mean(values: Float[np.ndarray, " n"], window: int) -> Float[np.ndarray, " n"]:
    """The mean of the values around each, fewer at the ends."""
    kernel = np.ones(min(window, len(values)))
    return np.convolve(values, kernel, "same") / np.convolve(np.ones(len(values)), kernel, "same")


def _told(
    signal: str, peak: float, height: float, p: float, draws: np.ndarray, *, level: float, gap: float
) -> Transition:
    """A transition, or NaN; its interval is never narrower than the gap between checkpoints."""
    low, high = np.quantile(draws, [0.025, 0.975]) + np.array([-gap / 2, gap / 2])
    step = peak
    if p > level:
        step = low = high = np.nan
    return Transition(signal, float(step), float(low), float(high), float(p), float(height), float(peak), draws)


def _half_width(one: Transition) -> float:
    """What the interval has beyond its draws, for the gap between checkpoints."""
    low, high = np.quantile(one.draws, [0.025, 0.975])
    return float(max(one.high - high, low - one.low, 0.0))


def _peak(curve: Float[np.ndarray, " place"], margin: int) -> tuple[int, float]:
    """Where a curve is highest, and how far it stands above the medians of both sides, those near it left out."""
    if np.isnan(curve).all():
        return len(curve) // 2, -np.inf
    place = int(np.nanargmax(curve))
    sides = curve[: max(place - margin, 0)], curve[place + margin + 1 :]
    if not all(np.isfinite(side).any() for side in sides):
        sides = curve[:place], curve[place + 1 :]
    if not all(np.isfinite(side).any() for side in sides):
        return place, -np.inf
    return place, float(curve[place] - max(np.nanmedian(side) for side in sides))
