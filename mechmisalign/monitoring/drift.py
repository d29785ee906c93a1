r"""Have the scores moved? Each window of a stream against the harmless scores of the calibration.

A change is not harm: another topic, another style or another sampler moves scores too. It says that the threshold was
calibrated on other conversations than those that pass now, so that its false-positive rate no longer holds.

The distance is the energy distance (Szekely and Rizzo, 2013), for numbers :math:`2 \int (F - G)^2`; unlike a distance
of ranks it also sees the few scores of a window that lie far out. Its p-value comes from permutations.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from jaxtyping import Float

from mechmisalign.statistics.shares import AT_ONCE

from .calibration import Calibration

FEWEST = 20
"""A window with fewer conversations is joined to the one before."""
WINDOWS = 50
"""By default no more windows than these: the p-values of very many could not survive their correction."""


def drift(
    scores: Float[np.ndarray, " n"],
    calibration: Calibration,
    *,
    window: int | None = None,
    permutations: int = 1999,
    seed: int = 0,
) -> pd.DataFrame:
    """Each window against the reference, with a permutation test of whether they have one distribution.

    The test takes conversations as independent: where many in a window answer one prompt, its p-value is too small.

    Args:
        scores: In the order of the stream.
        calibration: The reference.
        window: Conversations in a window; by default 200, or more where that would make over fifty windows. A rest of
            fewer than twenty joins the last one.
        permutations: With the add-one rule: no p-value is below ``1 / (permutations + 1)``.
        seed: Of the permutations.

    Returns:
        One row per window: ``window, first, last`` (numbers of its conversations, from 1), ``n, mean, shift`` (of the
        mean, in standard deviations of the reference), ``distance`` (energy distance as a share of the mean distance
        of a score here from one there: 0 alike, 1 each of one value apart), ``p``, ``p_adjusted`` (Benjamini and
        Hochberg over the windows), ``alarms`` (share above the threshold), ``low, high`` (its exact 95 % interval).

    Raises:
        ValueError: If there is no score, or the window is smaller than twenty.
    """
    from scipy.stats import false_discovery_control

    from mechmisalign.statistics import exact_interval

    size = max(200, -(-len(scores) // WINDOWS)) if window is None else window
    if size < FEWEST:
        raise ValueError(f"window={size} conversations; {FEWEST} or more are needed to compare distributions")
    if not len(scores):
        raise ValueError("there are no scores; score some conversations first")
    reference, rng = calibration.scores, np.random.default_rng(seed)
    spread = float(reference.std())
    rows = []
    for number, (first, last) in enumerate(_bounds(len(scores), size)):
        here = scores[first:last]
        distance, p = _tested(here, reference, permutations, rng)
        alarms = float((here > calibration.threshold).sum())
        low, high = exact_interval(np.array([alarms]), np.array([float(len(here))]))
        shift = (here.mean() - reference.mean()) / spread if spread > 0 else np.nan
        record = {"window": number, "first": first + 1, "last": last, "n": len(here), "mean": here.mean()}
        record |= {"shift": shift, "distance": distance, "p": p}
        rows.append(record | {"alarms": alarms / len(here), "low": low[0], "high": high[0]})
    table = pd.DataFrame(rows)
    table.insert(8, "p_adjusted", false_discovery_control(table["p"].to_numpy(), method="bh"))
    return table


def _tested(
    here: Float[np.ndarray, " n"], reference: Float[np.ndarray, " m"], permutations: int, rng: np.random.Generator
) -> tuple[float, float]:
    """The distance, and the p-value of none: which of the pooled scores are in the window is drawn anew."""
    pooled = np.concatenate([here, reference])
    order = np.argsort(pooled, kind="stable")
    gaps, n = np.diff(pooled[order]), len(here)
    inside = (order < n)[None]
    found = _energies(inside, n, gaps)[0]
    reached, done = 0, 0
    most = max(1, AT_ONCE // len(pooled))
    while done < permutations:
        drawn = rng.permuted(np.broadcast_to(inside, (min(most, permutations - done), len(pooled))), axis=1)
        reached += int((_energies(drawn, n, gaps) >= found * (1 - 1e-12)).sum())
        done += len(drawn)
    ours, theirs = _functions(inside, n)
    apart = float(((ours * (1 - theirs) + theirs * (1 - ours))[0] * gaps).sum())
    return (float(found / apart) if apart > 0 else 0.0), (reached + 1) / (permutations + 1)


def _energies(inside: np.ndarray, n: int, gaps: Float[np.ndarray, " gap"]) -> Float[np.ndarray, " row"]:
    """Half the energy distance: the squared distance of the distribution functions, integrated between the scores."""
    ours, theirs = _functions(inside, n)
    energies: Float[np.ndarray, " row"] = (ours - theirs) ** 2 @ gaps
    return energies


def _functions(inside: np.ndarray, n: int) -> tuple[Float[np.ndarray, "row gap"], Float[np.ndarray, "row gap"]]:
    """Both distribution functions behind each of the pooled scores but the last."""
    counts = inside[:, :-1].cumsum(axis=1)
    everyone = np.arange(1, inside.shape[1])
    return counts / n, (everyone - counts) / (inside.shape[1] - n)


def _bounds(n: int, window: int) -> list[tuple[int, int]]:
    starts = list(range(0, n, window))
    if len(starts) > 1 and n - starts[-1] < FEWEST:
        starts.pop()
    return list(zip(starts, [*starts[1:], n], strict=True))
