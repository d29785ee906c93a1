r"""Estimators: moments in, a direction out.

Each estimator is a function, so a new one is one more function. With :math:`\mu_c` the token-weighted mean of class
``c`` in one layer, they are

==========================  =====================================================================================
mean_difference             :math:`\mu_+ - \mu_-`, the paper's direction (2506.11618, section 3.1)
matched_mean_difference     the mean over prompts of :math:`\mu_{+,p} - \mu_{-,p}`: what is left when each prompt is
                            compared with itself
model_difference            organism minus base over the same text
first_principal             first principal direction of those differences, group by group (uncentred)
whitened_difference         :math:`\Sigma^{-1}(\mu_+ - \mu_-)`, within-class covariance shrunk by Ledoit-Wolf
logistic_direction          the weight vector of a standardised logistic probe, in residual coordinates
==========================  =====================================================================================

The last three have no natural length: they are scaled to the length of the difference that they refine, so that one
strength means the same for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float64
from torch import Tensor

from .directions import Direction
from .moments import Moments, align_groups

Estimator = Callable[[Moments, Any, Any], Direction]


def mean_difference(moments: Moments, positive: Any, negative: Any) -> Direction:
    """Token-weighted mean of the ``positive`` class minus that of the ``negative`` one (2506.11618, section 3.1)."""
    difference = moments.of(positive).pooled() - moments.of(negative).pooled()
    return _direction(difference, moments, f"mean difference: {positive} - {negative}")


def matched_mean_difference(moments: Moments, positive: Any, negative: Any, match: str = "prompt_id") -> Direction:
    """Mean over prompts of the within-prompt difference, so that no prompt's identity can pass for the direction.

    Args:
        moments: Grouped by the class and by ``match`` (and anything finer).
        positive: The class that the direction points to.
        negative: The class that it points away from.
        match: The grouping column within which the classes are compared; prompts with one class only are left out.

    Raises:
        ValueError: If ``match`` is not a grouping column, or no prompt has both classes.
    """
    if match not in moments.by:
        raise ValueError(f"moments are grouped by {moments.by}; collect them with by=[{moments.by[0]!r}, {match!r}]")
    parts = [_by_value(moments.of(label), match) for label in (positive, negative)]
    shared = [value for value in parts[0] if value in parts[1]]
    if not shared:
        raise ValueError(f"no {match} has both {positive!r} and {negative!r}: nothing to match; sample more per prompt")
    difference = torch.stack([parts[0][value] - parts[1][value] for value in shared]).mean(0)
    return _direction(difference, moments, f"{match}-matched mean difference: {positive} - {negative}")


def model_difference(organism: Moments, base: Moments) -> Direction:
    """Organism minus base over the same tokens.

    Raises:
        ValueError: If the two moments are not over the same text and layers.
    """
    organism, base = align_groups(organism, base)
    return _direction(organism.pooled() - base.pooled(), organism, "model difference: organism - base")


def first_principal(organism: Moments, base: Moments) -> Direction:
    r"""First principal direction of the group-wise organism-minus-base differences, pointing along their mean.

    The unit vector :math:`v` with the largest :math:`\sum_g n_g (d_g \cdot v)^2`, where :math:`d_g` is the mean
    difference of group g and :math:`n_g` the number of its tokens: a group counts as its tokens would, each with the
    group's difference, so its row enters the decomposition times :math:`\sqrt{n_g}`. Uncentred, since the common shift
    is the signal here. Where the mean difference has no part along :math:`v`, either sign will do.
    """
    organism, base = align_groups(organism, base)
    rows = (organism.mean - base.mean) * (organism.tokens / organism.tokens.sum()).sqrt()[:, None, None]
    mean = organism.pooled() - base.pooled()
    first = torch.stack([torch.linalg.svd(rows[:, index], full_matrices=False).Vh[0] for index in range(rows.shape[1])])
    projection = (first * mean).sum(-1, keepdim=True)
    sign = torch.where(projection < 0, -1.0, 1.0)
    scaled = first * sign * mean.norm(dim=-1, keepdim=True)
    return _direction(scaled, organism, "first principal direction of organism - base")


def whitened_difference(moments: Moments, positive: Any, negative: Any) -> Direction:
    """Mean difference divided by the within-class covariance of the group means (Ledoit-Wolf shrinkage).

    Group the moments finely (by response, or by prompt): each group is one observation of the covariance.
    """
    from sklearn.covariance import ledoit_wolf

    plus, minus = moments.of(positive), moments.of(negative)
    _refuse_few_groups(plus, minus)
    difference = plus.pooled() - minus.pooled()
    centred = torch.cat([plus.mean - plus.pooled(), minus.mean - minus.pooled()])
    vectors = []
    for index in range(difference.shape[0]):
        covariance, _ = ledoit_wolf(centred[:, index].numpy(), assume_centered=True)
        vectors.append(torch.from_numpy(np.linalg.solve(covariance, difference[index].numpy())))
    scaled = _with_norm_of(torch.stack(vectors), difference)
    return _direction(scaled, moments, f"whitened difference: {positive} - {negative}")


def logistic_direction(moments: Moments, positive: Any, negative: Any, *, C: float = 0.01) -> Direction:  # noqa: N803
    """Weights of an L2 logistic probe on standardised group means, mapped back to residual coordinates.

    Args:
        moments: Finely grouped (by response, or by prompt): each group is one example, weighted by its tokens.
        positive: The class that the direction points to.
        negative: The class that it points away from.
        C: Inverse regularisation strength, as in scikit-learn.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    plus, minus = moments.of(positive), moments.of(negative)
    _refuse_few_groups(plus, minus)
    rows = torch.cat([plus.mean, minus.mean]).numpy()
    classes = np.repeat([1, 0], [len(plus.groups), len(minus.groups)])
    vectors = []
    for index in range(rows.shape[1]):
        scaler = StandardScaler().fit(rows[:, index])
        probe = LogisticRegression(C=C, class_weight="balanced", max_iter=2000)
        probe.fit(scaler.transform(rows[:, index]), classes)
        vectors.append(torch.from_numpy(probe.coef_[0] / scaler.scale_))
    scaled = _with_norm_of(torch.stack(vectors), plus.pooled() - minus.pooled())
    return _direction(scaled, moments, f"logistic probe: {positive} - {negative}, C = {C:g}")


def split_half(
    moments: Moments,
    positive: Any,
    negative: Any,
    *,
    estimator: Estimator = mean_difference,
    cluster: str = "prompt_id",
    repeats: int = 100,
    seed: int = 0,
) -> pd.DataFrame:
    """Reliability of a direction: cosine between estimates from two random halves of the prompts, for each layer.

    Returns:
        One row per layer: ``layer, cosine`` (mean over splits), ``low, high`` (2.5 and 97.5 percent of the splits).
    """
    rng = np.random.default_rng(seed)
    cosines = []
    for _ in range(repeats):
        halves = _two_halves(moments, cluster, rng)
        first, second = (estimator(half, positive, negative).vectors for half in halves)
        cosines.append(torch.cosine_similarity(first.double(), second.double(), dim=-1).numpy())
    return _interval_frame(moments, np.stack(cosines))


def bootstrap_cosine(
    moments: Moments,
    positive: Any,
    negative: Any,
    *,
    estimator: Estimator = mean_difference,
    cluster: str = "prompt_id",
    repeats: int = 200,
    seed: int = 0,
) -> pd.DataFrame:
    """Cosine between the direction and its bootstrap replicates (prompts resampled), by layer; as ``split_half``.

    A prompt that is drawn twice counts as two, also where the estimator matches by prompt.
    """
    full = estimator(moments, positive, negative).vectors.double()
    cosines = []
    for sample in _resamples(moments, cluster, repeats, seed):
        replicate = estimator(sample, positive, negative).vectors.double()
        cosines.append(torch.cosine_similarity(replicate, full, dim=-1).numpy())
    return _interval_frame(moments, np.stack(cosines))


def bootstrap_directions(
    moments: Moments,
    positive: Any,
    negative: Any,
    *,
    estimator: Estimator = mean_difference,
    cluster: str = "prompt_id",
    repeats: int = 200,
    seed: int = 0,
) -> tuple[Direction, ...]:
    """Bootstrap replicates of the direction (prompts resampled): how an estimate scatters.

    With the same seed, moments over the same prompts are resampled alike, so what two directions owe to the choice of
    prompts stays together.
    """
    samples = _resamples(moments, cluster, repeats, seed)
    return tuple(estimator(sample, positive, negative) for sample in samples)


def _direction(vectors: Float64[Tensor, "layer d_model"], moments: Moments, method: str) -> Direction:
    header = {**moments.header, "method": method}
    return Direction(vectors.float(), moments.layers, header, moments.pooled_norm().float())


def _by_value(moments: Moments, column: str) -> dict[Any, Tensor]:
    rows = moments.groups.groupby(column, sort=True, observed=True).indices
    return {value: moments.take(index).pooled() for value, index in rows.items()}


def _with_norm_of(vectors: Tensor, reference: Tensor) -> Tensor:
    return vectors / vectors.norm(dim=-1, keepdim=True) * reference.norm(dim=-1, keepdim=True)


def _refuse_few_groups(*classes: Moments) -> None:
    few = min(len(moments.groups) for moments in classes)
    if few < 3:
        raise ValueError(
            f"a class has only {few} group(s), too few for a covariance or a probe; "
            "collect by response or by prompt, e.g. by=['label', 'prompt_id', 'sample']"
        )


def _resamples(moments: Moments, cluster: str, repeats: int, seed: int) -> Iterator[Moments]:
    """The groups of clusters drawn with replacement; each draw is a cluster of its own."""
    rng = np.random.default_rng(seed)
    rows_of = list(moments.groups.groupby(cluster, sort=True, observed=True).indices.values())
    for _ in range(repeats):
        drawn = [rows_of[i] for i in rng.integers(len(rows_of), size=len(rows_of))]
        sample = moments.take(np.concatenate(drawn))
        draws = np.repeat(np.arange(len(drawn)), [len(rows) for rows in drawn])
        yield replace(sample, groups=sample.groups.assign(**{cluster: draws}))


def _two_halves(moments: Moments, cluster: str, rng: np.random.Generator) -> tuple[Moments, Moments]:
    values = moments.groups[cluster].unique()
    first = set(rng.permutation(values)[: len(values) // 2])
    inside = moments.groups[cluster].isin(first).to_numpy()
    return moments.take(np.flatnonzero(inside)), moments.take(np.flatnonzero(~inside))


def _interval_frame(moments: Moments, cosines: np.ndarray) -> pd.DataFrame:
    low, high = np.percentile(cosines, [2.5, 97.5], axis=0)
    return pd.DataFrame({"layer": moments.layers, "cosine": cosines.mean(0), "low": low, "high": high})
