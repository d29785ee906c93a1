r"""The probes, in scikit-learn's grammar: linear classifiers of two classes.

=========================  ========================================================================================
logistic                   StandardScaler and LogisticRegression (L2, or L1 as in 2506.11618, section 4.1)
lda                        linear discriminant with Ledoit-Wolf shrinkage
MeanDifferenceProbe        :math:`w = \mu_1 - \mu_0`, threshold at the midpoint
LogisticProbe              what ``logistic("l2")`` solves, for wide features: all folds at once, data never copied
=========================  ========================================================================================

The last two have ``fit_folds``: they fit many folds in a few matrix products over one table. Any other scikit-learn
estimator is cloned and fitted fold by fold.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Shaped
from sklearn.base import BaseEstimator, ClassifierMixin, clone
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.validation import check_array, check_is_fitted, check_X_y

from ._arrays import moments, tensor
from ._lbfgs import solve_logistic
from .folds import Fold

Penalty = Literal["l2", "l1"]


@dataclass(frozen=True, eq=False)
class Weights:
    """Linear probes, one per fold, in the units of the raw features.

    Attributes:
        coef: ``[fold feature]``.
        intercept: ``[fold]``.
    """

    coef: Float[np.ndarray, "fold feature"]
    intercept: Float[np.ndarray, " fold"]

    def margins(self, features: Float[np.ndarray, "row feature"]) -> Float[np.ndarray, "fold row"]:
        """Decision value of every row under every fold; above 0 is class 1."""
        values = tensor(features) @ torch.from_numpy(self.coef.astype(features.dtype)).T
        return values.T.numpy() + self.intercept[:, None].astype(features.dtype)


def logistic(
    penalty: Penalty = "l2",
    *,
    C: float = 0.01,  # noqa: N803
    solver: str | None = None,
    max_iter: int = 1000,
) -> Pipeline:
    """StandardScaler and LogisticRegression in one pipeline, so that the scaling is fitted inside the fold.

    Args:
        penalty: ``"l2"`` or ``"l1"``.
        C: Inverse regularisation strength, as in scikit-learn.
        solver: None for lbfgs with L2 and liblinear with L1.
        max_iter: Iterations of the solver.

    Raises:
        ValueError: On another penalty.
    """
    if penalty not in ("l2", "l1"):
        raise ValueError(f"penalty must be 'l2' or 'l1', got {penalty!r}")
    renamed = LogisticRegression().get_params()["penalty"] == "deprecated"  # scikit-learn 1.8 took penalty= away
    norm = {"l1_ratio": float(penalty == "l1")} if renamed else {"penalty": penalty}
    chosen = solver or {"l2": "lbfgs", "l1": "liblinear"}[penalty]
    model = LogisticRegression(C=C, solver=chosen, max_iter=max_iter, random_state=0, **norm)
    return make_pipeline(StandardScaler(), model)


def lda() -> LinearDiscriminantAnalysis:
    """Linear discriminant with the within-class covariance shrunk by Ledoit-Wolf."""
    return LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto")


class _LinearProbe(ClassifierMixin, BaseEstimator):  # type: ignore[misc]  # sklearn carries no types
    """What the probes of this module share: validation, decision values, and one fold as the simplest of many.

    Attributes:
        coef_: ``[1 feature]``, in the units of the raw features.
        intercept_: ``[1]``.
        classes_: The two labels, sorted.
        n_features_in_: Number of features.
    """

    coef_: Float[np.ndarray, "1 feature"]
    intercept_: Float[np.ndarray, " 1"]
    classes_: Shaped[np.ndarray, " 2"]
    n_features_in_: int

    def fit(self, X: Any, y: Any) -> _LinearProbe:  # noqa: N803
        """Fit on ``[row feature]`` and two classes of labels ``[row]``.

        Raises:
            ValueError: If there are not exactly two classes, or the features are not finite.
        """
        features, labels = check_X_y(X, y, dtype=[np.float64, np.float32])
        self.classes_ = np.unique(labels)
        if len(self.classes_) != 2:
            raise ValueError(f"a probe tells two classes apart, the labels have {len(self.classes_)} class(es)")
        everything = np.arange(len(labels))
        weights = self.fit_folds(features, [Fold(labels == self.classes_[1], everything, everything[:0])])
        self.coef_, self.intercept_ = weights.coef, weights.intercept
        self.n_features_in_ = features.shape[1]
        return self

    @abstractmethod
    def fit_folds(self, features: Float[np.ndarray, "row feature"], folds: Sequence[Fold]) -> Weights:
        """Weights of every fold at once; leaves the estimator itself unfitted."""

    def decision_function(self, X: Any) -> Float[np.ndarray, " row"]:  # noqa: N803
        """Decision value per row; above 0 is ``classes_[1]``."""
        check_is_fitted(self)
        features = check_array(X, dtype=[np.float64, np.float32])
        if features.shape[1] != self.n_features_in_:
            raise ValueError(f"{features.shape[1]} features, the probe was fitted on {self.n_features_in_}")
        return Weights(self.coef_, self.intercept_).margins(features)[0]

    def predict(self, X: Any) -> Shaped[np.ndarray, " row"]:  # noqa: N803
        """The likelier class of each row."""
        positive = self.decision_function(X) > 0
        return self.classes_[positive.astype(int)]


class MeanDifferenceProbe(_LinearProbe):
    """``coef_`` is the mean of class 1 minus that of class 0; the threshold lies at their midpoint.

    The means of all folds are one product of ``[fold row]`` weights with the features, read once.
    """

    def fit_folds(self, features: Float[np.ndarray, "row feature"], folds: Sequence[Fold]) -> Weights:
        """Weights of every fold at once; leaves the estimator itself unfitted."""
        sides = np.concatenate([_shares(folds, label, features) for label in (True, False)])
        mean, _ = moments(features, sides)
        first, second = mean[: len(folds)], mean[len(folds) :]
        coef = first - second
        return Weights(coef.astype(features.dtype), -(coef * (first + second) / 2).sum(1))


class LogisticProbe(_LinearProbe):
    """Standardised L2 logistic regression for wide features: the problem of ``logistic("l2")``, another solver.

    L-BFGS on all folds at once, in the precision of the features. The standardisation is folded into the weights, so
    the features are read in place; an iteration is two matrix products.

    Args:
        C: Inverse regularisation strength, as in scikit-learn.
        max_iter: Most iterations; where they do not suffice, the probe is one that was stopped early, and warns.
        tol: Largest component of the gradient at which a fold counts as solved, as in scikit-learn.
    """

    def __init__(self, C: float = 0.01, max_iter: int = 100, tol: float = 1e-4) -> None:  # noqa: N803
        self.C = C
        self.max_iter = max_iter
        self.tol = tol

    def fit_folds(self, features: Float[np.ndarray, "row feature"], folds: Sequence[Fold]) -> Weights:
        """Weights of every fold at once; leaves the estimator itself unfitted."""
        mean, scale = standard_units(features, folds)
        signs = torch.from_numpy(np.stack([np.where(fold.labels, 1, -1) for fold in folds]).astype(features.dtype))
        sample = torch.from_numpy(_shares(folds, None, features))
        coef, intercept = solve_logistic(
            tensor(features), signs, sample, tensor(mean), tensor(scale), self.C, self.max_iter, self.tol
        )
        return Weights(coef.numpy(), intercept.numpy())


def fit_folds(probe: Any, features: Float[np.ndarray, "row feature"], folds: Sequence[Fold]) -> Weights:
    """Weights of the probe on every fold: all at once where it can, otherwise clone by clone.

    Args:
        probe: An unfitted estimator; it stays so.
        features: ``[row feature]``.
        folds: The folds.

    Raises:
        TypeError: If the fitted estimator is not linear.
    """
    if hasattr(probe, "fit_folds"):
        weights: Weights = probe.fit_folds(features, folds)
        return weights
    fitted = [linear_weights(clone(probe).fit(features[fold.train], fold.labels[fold.train])) for fold in folds]
    return Weights(np.concatenate([one.coef for one in fitted]), np.concatenate([one.intercept for one in fitted]))


def linear_weights(fitted: Any) -> Weights:
    """Weights of a fitted estimator in raw units: a pipeline's scalers are folded in.

    Raises:
        TypeError: If it is not a linear classifier of two classes, alone or behind StandardScalers.
    """
    steps = [step for _, step in fitted.steps] if isinstance(fitted, Pipeline) else [fitted]
    scalers = [step for step in steps[:-1] if step is not None and step != "passthrough"]
    coef = np.asarray(getattr(steps[-1], "coef_", np.empty(0)))
    if coef.ndim != 2 or len(coef) != 1 or not all(isinstance(step, StandardScaler) for step in scalers):
        raise TypeError(
            f"{fitted} has no weights of a linear probe of two classes; use logistic(), lda(), MeanDifferenceProbe(), "
            "LogisticProbe(), or a linear scikit-learn classifier, alone or behind a StandardScaler"
        )
    intercept = np.atleast_1d(steps[-1].intercept_).astype(coef.dtype)
    for scaler in reversed(scalers):
        coef = coef if scaler.scale_ is None else coef / scaler.scale_
        intercept = intercept if scaler.mean_ is None else intercept - coef @ scaler.mean_
    return Weights(coef, intercept)


def standard_units(
    features: Float[np.ndarray, "row feature"], folds: Sequence[Fold]
) -> tuple[Float[np.ndarray, "fold feature"], Float[np.ndarray, "fold feature"]]:
    """Mean and standard deviation of each feature over the training rows of each fold (1 where it is constant)."""
    mean, variance = moments(features, _shares(folds, None, features), variances=True)
    deviation = np.sqrt(variance)
    deviation[deviation <= 10 * np.finfo(features.dtype).eps * np.abs(mean)] = 1
    return mean.astype(features.dtype), deviation.astype(features.dtype)


def _shares(
    folds: Sequence[Fold], label: bool | None, like: Float[np.ndarray, "row feature"]
) -> Float[np.ndarray, "fold row"]:
    """Equal weights, summing to 1, on the training rows of each fold (of one label)."""
    shares = np.zeros((len(folds), len(like)), dtype=like.dtype)
    for share, fold in zip(shares, folds, strict=True):
        rows = fold.train if label is None else fold.train[fold.labels[fold.train] == label]
        share[rows] = 1 / len(rows)
    return shares
