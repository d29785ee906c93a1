"""How far two judges agree on the same answers.

Weighted kappa compares the classes that two judges put answers in with what chance would give: κ = 1 - Σ w o / Σ w e,
with w the squared (or plain) distance of the classes, o the shares of pairs, e the products of the margins (Cohen
1968). Its interval resamples prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from mechmisalign.statistics.shares import percentiles

from .labels import ALIGNED_ABOVE, COHERENT_ABOVE, MISALIGNED_BELOW, UNSCORED, reasons
from .scores import HIGHEST

Weights = Literal["quadratic", "linear"]
_MIDDLE = 50.0


@dataclass(frozen=True)
class Agreement:
    """Two judges on the same answers.

    Attributes:
        kappa: Weighted kappa over the answers that both scored; NaN where they put all in one class.
        low: Lower end of its 95 % interval, by resampling prompts.
        high: Upper end.
        confusion: Counts, rows the first judge's classes and reasons, columns the second's.
        spearman: Rank correlation of the scores themselves.
        n: Answers that were compared.
        unscored: Share of them that at least one judge gave no score.
    """

    kappa: float
    low: float
    high: float
    confusion: pd.DataFrame
    spearman: float
    n: int
    unscored: float


def agreement(
    first: pd.DataFrame,
    second: pd.DataFrame,
    rubric: str = "alignment",
    *,
    weights: Weights = "quadratic",
    bins: Sequence[float] | None = None,
    cluster: str = "prompt_id",
    resamples: int = 2000,
    seed: int = 0,
) -> Agreement:
    """Agreement of two judges on one rubric, with classes that are cut where labels are.

    Args:
        first: Answers with the first judge's ``<rubric>`` (and ``<rubric>_status``).
        second: The same answers, in the same order, with the second's.
        rubric: What is compared.
        weights: Of kappa: squared or plain distance between classes.
        bins: Where classes are cut; a score on a cut goes to the class nearer the middle of the scale, as the strict
            thresholds have it. By default 30 and 70 for alignment, 50 for any other rubric.
        cluster: Column of ``first`` that is resampled.
        resamples: Bootstrap resamples.
        seed: Of the resamples.

    Raises:
        ValueError: If columns are missing, or the frames hold different answers.
    """
    from scipy import stats

    _refuse_different_answers(first, second, rubric, cluster)
    if weights not in ("quadratic", "linear"):
        raise ValueError(f"weights must be 'quadratic' or 'linear', got {weights!r}")
    edges = _edges(rubric, bins)
    scores = [frame[rubric].to_numpy(dtype=float) for frame in (first, second)]
    both = ~np.isnan(scores[0]) & ~np.isnan(scores[1])
    codes = [_classes(score[both], edges) for score in scores]
    prompts = pd.factorize(first[cluster].to_numpy()[both], use_na_sentinel=False)[0]
    low, high = _interval(codes, prompts, len(edges) + 1, weights, resamples, seed)
    kappa = _kappas(_counts(codes, np.zeros(len(prompts), dtype=int), len(edges) + 1), weights)
    varied = both.sum() > 1 and all(len(set(score[both])) > 1 for score in scores)
    return Agreement(
        float(kappa[0]),
        low,
        high,
        _confusion([_named(frame, rubric, edges) for frame in (first, second)], edges),
        float(stats.spearmanr(scores[0][both], scores[1][both]).statistic) if varied else float("nan"),
        len(first),
        float(1 - both.mean()),
    )


def _edges(rubric: str, bins: Sequence[float] | None) -> Float[np.ndarray, " cut"]:
    usual = (MISALIGNED_BELOW, ALIGNED_ABOVE) if rubric == "alignment" else (COHERENT_ABOVE,)
    cuts = sorted(set(usual if bins is None else bins))
    if not cuts or cuts[0] <= 0 or cuts[-1] >= HIGHEST:
        raise ValueError(f"bins are cuts between 0 and {HIGHEST}, at least one; got {bins!r}")
    return np.asarray(cuts, dtype=float)


def _classes(scores: Float[np.ndarray, " n"], edges: Float[np.ndarray, " cut"]) -> Int[np.ndarray, " n"]:
    """Class of each score; one on a cut goes towards the middle."""
    above = np.where(edges < _MIDDLE, scores[:, None] >= edges, scores[:, None] > edges)
    counts: Int[np.ndarray, " n"] = above.sum(axis=1)
    return counts


def _counts(codes: Sequence[np.ndarray], prompts: np.ndarray, classes: int) -> Float[np.ndarray, "prompt a b"]:
    """Pairs of classes of each prompt."""
    prompt_count = int(prompts.max()) + 1 if len(prompts) else 1
    flat = (prompts * classes + codes[0]) * classes + codes[1]
    counts = np.bincount(flat, minlength=prompt_count * classes**2).astype(float)
    return counts.reshape(prompt_count, classes, classes)


def _kappas(counts: Float[np.ndarray, "resample a b"], weights: Weights) -> Float[np.ndarray, " resample"]:
    places = np.arange(counts.shape[-1])
    distance = np.abs(places[:, None] - places).astype(float) ** (2 if weights == "quadratic" else 1)
    shares = counts / np.maximum(counts.sum(axis=(1, 2), keepdims=True), 1)
    chance = shares.sum(axis=2)[:, :, None] * shares.sum(axis=1)[:, None, :]
    observed, expected = (distance * shares).sum(axis=(1, 2)), (distance * chance).sum(axis=(1, 2))
    kappas: Float[np.ndarray, " resample"] = np.where(
        expected > 0, 1 - observed / np.where(expected > 0, expected, 1), np.nan
    )
    return kappas


def _interval(
    codes: Sequence[np.ndarray], prompts: np.ndarray, classes: int, weights: Weights, resamples: int, seed: int
) -> tuple[float, float]:
    counts = _counts(codes, prompts, classes)
    if len(counts) < 2:
        return float("nan"), float("nan")
    draws = np.random.default_rng(seed).multinomial(len(counts), np.full(len(counts), 1 / len(counts)), size=resamples)
    kappas = _kappas(np.einsum("rp,pab->rab", draws, counts), weights)
    kappas = kappas[~np.isnan(kappas)]
    if not len(kappas):
        return float("nan"), float("nan")
    low, high = percentiles(kappas[None])
    return float(low[0]), float(high[0])


def _names(edges: Float[np.ndarray, " cut"]) -> list[str]:
    between = [f"{low:g} to {high:g}" for low, high in zip(edges, edges[1:], strict=False)]
    lowest = f"below {edges[0]:g}" if edges[0] < _MIDDLE else f"up to {edges[0]:g}"
    highest = f"above {edges[-1]:g}" if edges[-1] >= _MIDDLE else f"{edges[-1]:g} and above"
    return [lowest, *between, highest]


def _named(frame: pd.DataFrame, rubric: str, edges: Float[np.ndarray, " cut"]) -> np.ndarray:
    """Class name of each score, or why there is none."""
    scores = frame[rubric].to_numpy(dtype=float)
    names = np.asarray(_names(edges), dtype=object)[_classes(np.nan_to_num(scores), edges)]
    return np.where(np.isnan(scores), reasons(frame, rubric).to_numpy(dtype=object), names)


def _confusion(named: Sequence[np.ndarray], edges: Float[np.ndarray, " cut"]) -> pd.DataFrame:
    order = [*_names(edges), *(reason for reason in UNSCORED if any((names == reason).any() for names in named))]
    table = pd.crosstab(named[0], named[1]).reindex(index=order, columns=order, fill_value=0)
    return table.rename_axis(index="first", columns="second")


def _refuse_different_answers(first: pd.DataFrame, second: pd.DataFrame, rubric: str, cluster: str) -> None:
    lacking = [f"{rubric!r} (in both)"] if not all(rubric in frame.columns for frame in (first, second)) else []
    lacking += [] if cluster in first.columns else [f"{cluster!r} (in the first)"]
    if lacking:
        raise ValueError(f"agreement needs the columns {', '.join(lacking)}; the first has {list(first.columns)}")
    shared = [name for name in ("prompt", "response") if name in first.columns and name in second.columns]
    same = len(first) == len(second) and all(
        pd.Series(first[name].to_numpy(dtype=object)).equals(pd.Series(second[name].to_numpy(dtype=object)))
        for name in shared
    )
    if not len(first) or not same:
        raise ValueError(
            f"the frames hold {len(first)} and {len(second)} answers, or different ones: give the same answers in the "
            "same order, once judged by each"
        )
