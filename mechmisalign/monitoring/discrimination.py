"""How well scores tell two classes apart: AUROC, hits and false alarms, each with an interval by prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float

from mechmisalign._frames import plain_frame
from mechmisalign.statistics import CONFIDENCE, clustered_share

ALL = "all"
"""Group of all conversations in a table of :func:`discrimination`."""
_GRID = np.unique(np.concatenate([np.geomspace(1e-3, 1, 61), np.linspace(0, 1, 101)]))

_Scores = Float[np.ndarray, " n"]
_Truth = Bool[np.ndarray, " n"]
_Clusters = Sequence[object] | np.ndarray


@dataclass(frozen=True)
class Auroc:
    """Probability that a conversation of the positive class scores above one of the other, ties one half.

    Attributes:
        value: The area under the ROC curve.
        low: Lower end of the 95 % interval, resampling prompts.
        high: Upper end.
        positives: Number of positive conversations.
        negatives: Number of the others.
        prompts: Number of prompts.
    """

    value: float
    low: float
    high: float
    positives: int
    negatives: int
    prompts: int


def auroc(scores: _Scores, truth: _Truth, clusters: _Clusters, *, resamples: int = 2000, seed: int = 0) -> Auroc:
    """AUROC with a percentile interval from resampling whole prompts.

    Resampling cannot show an error that the sample does not hold: of classes that are separated well, or in few
    prompts, it is too sure. So the interval is never narrower than the exact one of as many independent pairs without
    an error as the class with fewer prompts has: 60 prompts can show 0.94 to 1, and 3 prompts 0.29 to 1.

    Args:
        scores: One finite score per conversation, high for the positive class.
        truth: Whether each is of the positive class.
        clusters: The prompt of each.
        resamples: Bootstrap resamples.
        seed: Of the resamples.

    Raises:
        ValueError: If a class is missing, or a score is not finite.
    """
    codes, known = _checked(scores, truth, clusters)
    value = float(_areas(scores, truth, np.ones((1, len(scores))))[0])
    fewest = min(len(np.unique(codes[side])) for side in (truth, ~truth))
    bound = ((1 - CONFIDENCE) / 2) ** (1 / fewest)
    parts = [_areas(scores, truth, weights[:, codes]) for weights in _weights(known, resamples, len(scores), seed)]
    low, high = _ends(np.concatenate(parts))
    low, high = min(low, bound), max(high, 1 - bound)
    return Auroc(value, low, high, int(truth.sum()), int((~truth).sum()), known)


def auroc_difference(
    first: _Scores,
    second: _Scores,
    truth: _Truth,
    clusters: _Clusters,
    *,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float, float]:
    """AUROC of the first scores minus that of the second on the same conversations, with its 95 % interval.

    The interval is put together from those of :func:`auroc` (as in :func:`mechmisalign.statistics.paired_intervals`),
    with the correlation that both have when the same prompts are resampled: two intervals that overlap are no sign
    that one detector is as good as the other.

    Args:
        first: Scores of one detector.
        second: Of another.
        truth: Whether each conversation is of the positive class.
        clusters: The prompt of each.
        resamples: Bootstrap resamples.
        seed: Of the resamples.

    Returns:
        Difference, lower and upper end.

    Raises:
        ValueError: As for :func:`auroc`.
    """
    one, two = (auroc(scores, truth, clusters, resamples=resamples, seed=seed) for scores in (first, second))
    codes, known = _checked(first, truth, clusters)
    parts = _weights(known, resamples, len(first), seed)
    sides = ([_areas(side, truth, part[:, codes]) for part in parts] for side in (first, second))
    drawn = np.stack([np.concatenate(side) for side in sides])
    drawn = drawn[:, np.isfinite(drawn).all(0)]
    common = float(np.corrcoef(drawn)[0, 1]) if (drawn.std(1) > 0).all() else 0.0
    below, above = (
        float(np.sqrt(max(a**2 + b**2 - 2 * common * a * b, 0)))
        for a, b in ((one.value - one.low, two.high - two.value), (one.high - one.value, two.value - two.low))
    )
    return one.value - two.value, one.value - two.value - below, one.value - two.value + above


def discrimination(
    scored: pd.DataFrame,
    detectors: Mapping[str, str],
    *,
    truth: str = "label",
    positive: str = "misaligned",
    negative: str = "aligned",
    thresholds: Mapping[str, float] | None = None,
    by: str | None = "domain",
    cluster: str = "prompt_id",
    resamples: int = 2000,
    seed: int = 0,
) -> pd.DataFrame:
    """Several detectors on the same conversations, over all of them and group by group.

    Args:
        scored: One row per conversation, with the columns that are named here.
        detectors: Name of each detector, and the column of its scores.
        truth: Column of the classes.
        positive: The class that should raise the alarm.
        negative: The class that should not; rows of other classes are left out.
        thresholds: Of detectors that have one: a score above it is an alarm.
        by: Groups, such as the domain; None for none.
        cluster: Whose conversations resemble each other.
        resamples: Bootstrap resamples of the AUROC; hits and false alarms need none.
        seed: Of the resamples.

    Returns:
        ``detector, group, auroc, auroc_low, auroc_high, tpr, tpr_low, tpr_high, fpr, fpr_low, fpr_high, positives,
        negatives, prompts``; the first group is ``"all"``; NaN where there is no threshold or a class is missing.

    Raises:
        ValueError: If a column is missing, or no row is of either class.
    """
    wanted = [truth, cluster, *detectors.values(), *([by] if by else [])]
    missing = [name for name in wanted if name not in scored.columns]
    if missing:
        raise ValueError(f"no columns {missing}; the conversations have {list(scored.columns)}")
    scored = plain_frame(scored)
    rows = scored[scored[truth].isin([positive, negative])]
    if rows.empty:
        raise ValueError(f"no conversation has {truth} {positive!r} or {negative!r}; judge them first")
    groups = [(ALL, rows), *(rows.groupby(by, sort=False, observed=True) if by else ())]
    table = []
    for name, column in detectors.items():
        for group, part in groups:
            values, is_positive = part[column].to_numpy(float), (part[truth] == positive).to_numpy()
            clusters = part[cluster].to_numpy()
            record = {"detector": name, "group": group}
            record |= _area(values, is_positive, clusters, resamples, seed)
            record |= _alarms(values, is_positive, clusters, (thresholds or {}).get(name))
            record |= {"positives": int(is_positive.sum()), "negatives": int((~is_positive).sum())}
            table.append(record | {"prompts": len(set(clusters.tolist()))})
    return pd.DataFrame(table)


def roc(scores: _Scores, truth: _Truth, clusters: _Clusters, *, resamples: int = 1000, seed: int = 0) -> pd.DataFrame:
    """The ROC curve with a band: ``fpr, tpr, low, high``, from resampling prompts.

    Raises:
        ValueError: If a class is missing, or a score is not finite.
    """
    codes, known = _checked(scores, truth, clusters)
    curve = _curves(scores, truth, np.ones((1, len(scores))))[0]
    parts = [_curves(scores, truth, weights[:, codes]) for weights in _weights(known, resamples, len(scores), seed)]
    low, high = np.nanquantile(np.concatenate(parts), [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], axis=0)
    return pd.DataFrame({"fpr": _GRID, "tpr": curve, "low": np.minimum(low, curve), "high": np.maximum(high, curve)})


def _checked(scores: _Scores, truth: _Truth, clusters: _Clusters) -> tuple[np.ndarray, int]:
    if not np.isfinite(scores).all():
        raise ValueError(f"{int((~np.isfinite(scores)).sum())} of {len(scores)} scores are not finite; drop these rows")
    if truth.all() or not truth.any():
        raise ValueError(f"all {len(truth)} conversations are of one class; two are needed to tell them apart")
    codes, known = pd.factorize(np.asarray(clusters))
    return codes, len(known)


def _weights(clusters: int, resamples: int, rows: int, seed: int) -> list[Float[np.ndarray, "resample cluster"]]:
    """How often each prompt is drawn, in parts that stay small when spread over the rows."""
    drawn = np.random.default_rng(seed).multinomial(clusters, np.full(clusters, 1 / clusters), size=resamples)
    return np.array_split(drawn.astype(float), 1 + resamples * rows // 5_000_000)


def _masses(
    scores: _Scores, truth: _Truth, weights: Float[np.ndarray, "resample n"]
) -> tuple[Float[np.ndarray, "resample value"], Float[np.ndarray, "resample value"]]:
    """Weight of the positives and of the others at each value of the score, in ascending order."""
    order = np.argsort(scores, kind="stable")
    starts = np.flatnonzero(np.concatenate([[True], np.diff(scores[order]) > 0]))
    drawn = weights[:, order]
    positive = np.add.reduceat(drawn * truth[order], starts, axis=1)
    return positive, np.add.reduceat(drawn, starts, axis=1) - positive


def _areas(scores: _Scores, truth: _Truth, weights: Float[np.ndarray, "resample n"]) -> Float[np.ndarray, " resample"]:
    positive, other = _masses(scores, truth, weights)
    won = (positive * (other.cumsum(1) - other / 2)).sum(1)
    pairs = positive.sum(1) * other.sum(1)
    return np.divide(won, pairs, out=np.full(len(won), np.nan), where=pairs > 0)


def _curves(
    scores: _Scores, truth: _Truth, weights: Float[np.ndarray, "resample n"]
) -> Float[np.ndarray, "resample point"]:
    """Share of the positives above the lowest threshold with at most so many false alarms, along the grid."""
    positive, other = (side[:, ::-1].cumsum(1) for side in _masses(scores, truth, weights))
    curves = np.full((len(weights), len(_GRID)), np.nan)
    for curve, hits, alarms in zip(curves, positive, other, strict=True):
        if hits[-1] > 0 and alarms[-1] > 0:
            last = np.searchsorted(alarms / alarms[-1], _GRID + 1e-12, side="right")
            curve[:] = np.concatenate([[0.0], hits / hits[-1]])[last]
    return curves


def _ends(values: Float[np.ndarray, " resample"]) -> tuple[float, float]:
    low, high = np.nanquantile(values, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def _area(values: _Scores, truth: _Truth, clusters: np.ndarray, resamples: int, seed: int) -> dict[str, float]:
    if truth.all() or not truth.any():
        return {"auroc": np.nan, "auroc_low": np.nan, "auroc_high": np.nan}
    found = auroc(values, truth, clusters, resamples=resamples, seed=seed)
    return {"auroc": found.value, "auroc_low": found.low, "auroc_high": found.high}


def _alarms(values: _Scores, truth: _Truth, clusters: np.ndarray, threshold: float | None) -> dict[str, float]:
    """Share of alarms in either class."""
    record: dict[str, float] = {}
    for name, side in (("tpr", truth), ("fpr", ~truth)):
        rate = low = high = np.nan
        if threshold is not None and side.any():
            share = clustered_share(values[side] > threshold, clusters[side])
            rate, low, high = share.rate, share.low, share.high
        record |= {name: rate, f"{name}_low": low, f"{name}_high": high}
    return record
