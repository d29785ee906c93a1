"""How well a probe tells two classes apart, beside what it must beat.

Every evaluation holds four series. ``"probe"`` is the probe itself. ``"shuffled labels"`` is the same probe on labels
permuted between units. ``"random coordinates"`` reads as many Gaussian features that know nothing. ``"prompt only"``
reads no model either: each held-out row is scored with the share of class 1 among the *other* units of its own prompt.
It is the ceiling of whatever knows which prompt is answered: a probe below it may have read the prompt.
A share of each prompt's units is held out together and scored alike. Leaving one unit out at a time would not do: the
rest of a prompt always leans away from the unit left out, and labels without any structure would come out below chance.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float
from scipy.stats import rankdata

from mechmisalign.statistics import CONFIDENCE

from ._arrays import as_matrix
from .estimators import Weights, fit_folds, logistic, standard_units
from .folds import Column, Design, Examples, Fold, Split, draw_folds, draw_within

METRICS = ("accuracy", "precision", "recall", "f1", "auroc")
PROBE, SHUFFLED, RANDOM, PROMPT = SERIES = ("probe", "shuffled labels", "random coordinates", "prompt only")

_EMPTY = (
    "the probe kept no feature in any of {splits} splits of {rows} rows, so it would score chance whatever the "
    "features hold: regularise less (probe=mm.probes.logistic('l1', C=1.0)), or give more rows"
)

Layers = Mapping[int, Any] | Iterable[tuple[int, Any]] | Callable[[], Iterable[tuple[int, Any]]]


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Scores of a probe and of its controls.

    Attributes:
        scores: One row per series, repeat and metric: ``series, repeat, metric, score``.
        coefficients: One row per series (probe and shuffled labels), repeat and feature: ``series, repeat, feature,
            coefficient``, per standard deviation of the feature in the training rows.
        classes: The labels that stand for 0 and 1; precision and recall are of the second.
        split: How test rows were held out.
    """

    scores: pd.DataFrame
    coefficients: pd.DataFrame
    classes: tuple[Any, Any]
    split: Split

    def summary(self) -> pd.DataFrame:
        """Mean and central 95 % of the repeats: ``series, metric, score, low, high``.

        The repeats share rows, so this says how much a score depends on the split, not on the sample of prompts.
        """
        return _summary(self.scores)


def evaluate(
    features: Any,
    labels: Column,
    groups: Column,
    *,
    probe: Any,
    units: Column = None,
    split: Split = "grouped",
    repeats: int = 20,
    test_size: float = 0.2,
    balance: bool = True,
    metrics: Sequence[str] = METRICS,
    seed: int = 0,
) -> Evaluation:
    """Fit and score a probe on repeated splits, with its controls.

    Args:
        features: ``[row feature]``, an array, a tensor or a frame (whose columns then name the coefficients).
        labels: Two classes, ``[row]``; the second in sorted order is class 1.
        groups: The prompt of each row, ``[row]``.
        probe: An unfitted linear estimator: :func:`logistic`, :func:`lda`, :class:`MeanDifferenceProbe`, ….
        units: What a label belongs to, ``[row]``: the response, if rows are tokens. None: each row has its own.
        split: ``"grouped"`` holds whole prompts out; ``"rows"`` splits rows at random and leaks.
        repeats: Number of splits.
        test_size: Share of the prompts (or rows) held out.
        balance: Thin out the larger class on both sides of each split.
        metrics: Some of ``accuracy, precision, recall, f1, auroc``.
        seed: Of the splits and the controls.

    Raises:
        ValueError: On a missing class, too few prompts of one, features that are not finite, unequal lengths, or an
            unknown option.
        TypeError: If the probe is not linear.
    """
    design, wanted = Design(split, repeats, test_size, balance, seed), _known(metrics)
    matrix, names = as_matrix(features)
    examples = _examples(matrix, labels, groups, units)
    folds = _reading_folds(examples, design)
    weights = fit_folds(probe, matrix, [fold for series in folds.values() for fold in series])
    if _is_empty(weights, folds):
        raise ValueError(_EMPTY.format(splits=len(folds[PROBE]), rows=len(matrix)))
    scores = pd.concat(
        [
            _scored(weights, matrix, folds),
            _random_scores(examples, design, probe, matrix),
            _prompt_scores(examples, design),
        ]
    )
    coefficients = _coefficients(weights, matrix, names, folds)
    return Evaluation(
        scores[scores["metric"].isin(wanted)].reset_index(drop=True), coefficients, examples.classes, split
    )


def evaluate_layers(
    layers: Layers,
    labels: Column,
    groups: Column,
    *,
    probe: Any,
    units: Column = None,
    metrics: Sequence[str] = METRICS,
    **options: Any,
) -> pd.DataFrame:
    """The summary of :func:`evaluate` layer by layer, on the same splits, with one layer in memory at a time.

    The controls that read no features are computed once (for each width) and stand in every layer.

    Args:
        layers: Layer -> ``[row feature]``; or pairs of both, as an iterable or as a function that opens one.
        labels: As for ``evaluate``.
        groups: As for ``evaluate``.
        probe: As for ``evaluate``; for wide layers take one that fits all folds at once.
        units: As for ``evaluate``.
        metrics: As for ``evaluate``.
        options: ``split, repeats, test_size, balance, seed``, as for ``evaluate``.

    Returns:
        ``layer, series, metric, score, low, high``; NaN for the probe at a layer of which it kept no feature.

    Raises:
        ValueError: As for ``evaluate``, or if there is no layer, or none of which the probe kept a feature.
        TypeError: On an unknown option, or a probe that is not linear.
    """
    design, wanted, parts = Design(**options), _known(metrics), []
    blind: dict[int, pd.DataFrame] = {}
    folds: dict[str, list[Fold]] = {}
    empty: list[int] = []
    for layer, features in _pairs(layers):
        matrix, _ = as_matrix(features)
        if not folds:
            examples = _examples(matrix, labels, groups, units)
            folds, prompt = _reading_folds(examples, design), _prompt_scores(examples, design)
        _refuse_length(matrix, examples, f"layer {layer}")
        weights = fit_folds(probe, matrix, [fold for series in folds.values() for fold in series])
        if matrix.shape[1] not in blind:
            blind[matrix.shape[1]] = pd.concat([_random_scores(examples, design, probe, matrix), prompt])
        own = _scored(weights, matrix, folds)
        if _is_empty(weights, folds):
            empty.append(layer)
            own.loc[own["series"] == PROBE, "score"] = np.nan
        scores = pd.concat([own, blind[matrix.shape[1]]])
        parts.append(_summary(scores[scores["metric"].isin(wanted)]).assign(layer=layer))
    if parts and len(empty) == len(parts):
        raise ValueError(_EMPTY.format(splits=len(folds[PROBE]), rows=len(matrix)))
    if empty:
        warnings.warn(f"the probe kept no feature at layers {empty}: its scores there are NaN", stacklevel=2)
    if not parts:
        raise ValueError("there is no layer to evaluate; layers= is empty (an iterator that was used up?)")
    return pd.concat(parts, ignore_index=True)[["layer", "series", "metric", "score", "low", "high"]]


def paper_setting() -> dict[str, Any]:
    """Options of the paper's probes (2506.11618, section 4.1): ``evaluate(…, **paper_setting())``.

    Z-scored features, L1 with C = 0.01, liblinear, balanced classes, 80/20, 100 repeats. The split is not part of it.
    That C is for tens of thousands of tokens: on a few thousand it can set all coefficients to zero (AUROC .5).
    """
    return {"probe": logistic("l1", C=0.01, max_iter=1000), "balance": True, "test_size": 0.2, "repeats": 100}


def leak(
    features: Any,
    labels: Column,
    groups: Column,
    *,
    units: Column = None,
    **options: Any,
) -> pd.DataFrame:
    """The paper's setting under its own split (tokens at random) and grouped by prompt, side by side.

    Args:
        features: As for :func:`evaluate`.
        labels: As for ``evaluate``.
        groups: As for ``evaluate``.
        units: As for ``evaluate``.
        options: What departs from :func:`paper_setting`, ``split`` excepted.

    Returns:
        ``split, series, metric, score, low, high``.
    """
    setting = {**paper_setting(), **options}
    splits: tuple[Split, ...] = ("rows", "grouped")
    parts = [
        evaluate(features, labels, groups, units=units, split=split, **setting).summary().assign(split=split)
        for split in splits
    ]
    return pd.concat(parts, ignore_index=True)[["split", "series", "metric", "score", "low", "high"]]


def _is_empty(weights: Weights, folds: Mapping[str, Sequence[Fold]]) -> bool:
    """Whether regularisation took every feature away: an AUROC of .5 would say nothing of them."""
    count = len(folds[PROBE])
    return bool(count) and not weights.coef[:count].any()


def metric_scores(truth: Bool[np.ndarray, " n"], margins: Float[np.ndarray, " n"]) -> dict[str, float]:
    """All metrics of one test set that has both classes; precision is 0 where nothing is called class 1."""
    called = margins > 0
    hits, positives, n = int((called & truth).sum()), int(truth.sum()), len(truth)
    wrong = int(called.sum()) - hits
    ranks = float(rankdata(margins)[truth].sum())
    return {
        "accuracy": (hits + n - positives - wrong) / n,
        "precision": hits / (hits + wrong) if hits else 0.0,
        "recall": hits / positives,
        "f1": 2 * hits / (hits + wrong + positives),
        "auroc": (ranks - positives * (positives + 1) / 2) / (positives * (n - positives)),
    }


def _reading_folds(examples: Examples, design: Design) -> dict[str, list[Fold]]:
    return {PROBE: draw_folds(examples, design), SHUFFLED: draw_folds(examples, design, shuffled=True)}


def _random_scores(
    examples: Examples, design: Design, probe: Any, like: Float[np.ndarray, "row feature"]
) -> pd.DataFrame:
    """One table of Gaussian features, dealt to the rows anew in each repeat."""
    rng = np.random.default_rng([design.seed, len(SERIES)])
    noise = rng.standard_normal(like.shape, dtype=like.dtype)
    folds = [fold.dealt(rng) for fold in draw_folds(examples, design)]
    return _scored(fit_folds(probe, noise, folds), noise, {RANDOM: folds})


def _prompt_scores(examples: Examples, design: Design) -> pd.DataFrame:
    """Rows scored with the share of class 1 among the other units of their prompt, drawn one row towards the whole."""
    folds, margins = draw_within(examples, design), []
    for fold in folds:
        seen, count = examples.groups[fold.train], examples.groups.max() + 1
        events = np.bincount(seen, weights=fold.labels[fold.train], minlength=count)
        share = (events + fold.labels[fold.train].mean()) / (np.bincount(seen, minlength=count) + 1)
        margins.append(share[examples.groups] - 0.5)
    return _score_table({PROMPT: folds}, np.stack(margins))


def _scored(
    weights: Weights, matrix: Float[np.ndarray, "row feature"], folds: Mapping[str, Sequence[Fold]]
) -> pd.DataFrame:
    return _score_table(folds, weights.margins(matrix))


def _score_table(folds: Mapping[str, Sequence[Fold]], margins: Float[np.ndarray, "fold row"]) -> pd.DataFrame:
    numbered = [(series, repeat, fold) for series, drawn in folds.items() for repeat, fold in enumerate(drawn)]
    rows = [
        (series, repeat, metric, score)
        for (series, repeat, fold), values in zip(numbered, margins, strict=True)
        for metric, score in metric_scores(fold.labels[fold.test], values[fold.test]).items()
    ]
    return pd.DataFrame(rows, columns=["series", "repeat", "metric", "score"])


def _coefficients(
    weights: Weights,
    matrix: Float[np.ndarray, "row feature"],
    names: Sequence[str],
    folds: Mapping[str, Sequence[Fold]],
) -> pd.DataFrame:
    flat = [fold for drawn in folds.values() for fold in drawn]
    standard = weights.coef * standard_units(matrix, flat)[1]
    keys = [(series, repeat) for series, drawn in folds.items() for repeat in range(len(drawn))]
    frame = pd.DataFrame(np.repeat(np.array(keys, dtype=object), len(names), axis=0), columns=["series", "repeat"])
    return frame.assign(
        repeat=frame["repeat"].astype(int), feature=np.tile(names, len(keys)), coefficient=standard.ravel()
    )


def _summary(scores: pd.DataFrame) -> pd.DataFrame:
    tails = (1 - CONFIDENCE) / 2
    grouped = scores.groupby(["series", "metric"], sort=False, observed=True)["score"]
    return pd.DataFrame(
        {"score": grouped.mean(), "low": grouped.quantile(tails), "high": grouped.quantile(1 - tails)}
    ).reset_index()


def _pairs(layers: Layers) -> Iterator[tuple[int, Any]]:
    source = layers() if callable(layers) else layers
    yield from source.items() if isinstance(source, Mapping) else source


def _known(metrics: Sequence[str]) -> Sequence[str]:
    unknown = [metric for metric in metrics if metric not in METRICS]
    if unknown or isinstance(metrics, str):
        raise ValueError(f"metrics must be some of {METRICS}, got {metrics!r}")
    return metrics


def _examples(matrix: Float[np.ndarray, "row feature"], labels: Any, groups: Any, units: Any) -> Examples:
    examples = Examples.of(labels, groups, units)
    _refuse_length(matrix, examples, "features")
    return examples


def _refuse_length(matrix: Float[np.ndarray, "row feature"], examples: Examples, what: str) -> None:
    if len(matrix) != len(examples.labels):
        raise ValueError(f"lengths differ: {what}: {len(matrix)} rows, labels: {len(examples.labels)}")
