"""A fitted probe as an artifact: weights that know the model they read, to watch it with."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float64
from sklearn.base import clone

from mechmisalign._artifacts import base_name, load_artifact, same_base, write_artifact

from ._arrays import as_matrix
from .estimators import linear_weights
from .folds import Column, Examples

SCHEMA = 1
PROBE_FILE = "probe.safetensors"
"""What a probe is called in a repository."""
How = Literal["mean", "max"]


class ProbeMismatchError(ValueError):
    """A probe and a model, or a probe and features, do not belong together."""


@dataclass(frozen=True, eq=False)
class Probe:
    """A fitted linear probe of two classes.

    Attributes:
        coef: ``[feature]``, float64, in the units of the raw features.
        intercept: Decision value where all features are zero.
        features: Names of the features.
        header: Provenance: model, adapter, layer or sites, classes, training data, versions.
    """

    coef: Float64[np.ndarray, " feature"]
    intercept: float
    features: tuple[str, ...]
    header: Mapping[str, Any]

    def __post_init__(self) -> None:
        if len(self.features) != len(self.coef):
            raise ValueError(f"{len(self.coef)} weights for {len(self.features)} features; give one weight per feature")
        if not (np.isfinite(self.coef).all() and np.isfinite(self.intercept)):
            raise ValueError("the weights hold NaN or infinite values; check the features that they were fitted on")

    @staticmethod
    def fit(features: Any, labels: Column, *, probe: Any, header: Mapping[str, Any]) -> Probe:
        """Fit an estimator and keep its weights, with any scaler folded in.

        Args:
            features: ``[row feature]``, an array, a tensor or a frame (whose columns name the features).
            labels: Two classes, ``[row]``; the second in sorted order is the one that scores high.
            probe: An unfitted linear estimator; it stays so.
            header: What is known of the features: ``Organism.provenance``, and the layer or sites.

        Raises:
            ValueError: If there are not two classes, lengths differ, or the features are not finite.
            TypeError: If the probe is not linear.
        """
        matrix, names = as_matrix(features)
        examples = Examples.of(labels, np.zeros(len(labels)))
        data = hashlib.sha256(matrix.data)
        data.update(examples.labels.data)
        if len(matrix) != len(examples.labels):
            raise ValueError(f"lengths differ: features: {len(matrix)} rows, labels: {len(examples.labels)}")
        weights = linear_weights(clone(probe).fit(matrix, examples.labels))
        own = {
            "method": " ".join(repr(probe).split()),
            "classes": list(examples.classes),
            "rows": len(matrix),
            "data_hash": data.hexdigest()[:16],
            "versions": {name: version(name) for name in ("mechmisalign", "scikit-learn", "numpy")},
        }
        coef = weights.coef[0].astype(np.float64)
        return Probe(coef, float(weights.intercept[0]), tuple(names), {**header, **own})

    def scores(self, features: Any) -> Float64[np.ndarray, " row"]:
        """Decision value per row (log-odds, if the probe is logistic); above 0 is the second class.

        A frame's columns are matched by name, whatever their order.

        Raises:
            ProbeMismatchError: If the features have other names, or another width.
        """
        if isinstance(features, pd.DataFrame):
            features = self._in_order(features)
        matrix, _ = as_matrix(features)
        if matrix.shape[1] != len(self.coef):
            raise ProbeMismatchError(
                f"{matrix.shape[1]} features per row, this probe reads {len(self.coef)}: {_shortened(self.features)}"
            )
        scores: Float64[np.ndarray, " row"] = matrix @ self.coef + self.intercept
        return scores

    def response_scores(self, features: Any, responses: Column, how: How = "mean") -> pd.Series:
        """One score per response, from the scores of its rows; indexed by response, in order of appearance.

        Args:
            features: ``[row feature]``.
            responses: The response of each row, ``[row]``.
            how: ``"mean"`` over the rows, or their ``"max"``: one alarming token is enough.

        Raises:
            ValueError: On another ``how``, or unequal lengths.
            ProbeMismatchError: If the features have other names, or another width.
        """
        if how not in get_args(How):
            raise ValueError(f"how must be one of {get_args(How)}, got {how!r}")
        scores, of = self.scores(features), pd.Series(responses).to_numpy()
        if len(of) != len(scores):
            raise ValueError(f"lengths differ: features: {len(scores)} rows, responses: {len(of)}")
        return (
            pd.Series(scores, name="score").groupby(pd.Series(of, name="response"), sort=False, observed=True).agg(how)
        )

    def check_model(self, provenance: Mapping[str, Any]) -> None:
        """Refuse a model whose features this probe was not fitted on.

        Args:
            provenance: The model's, as in ``Organism.provenance``.

        Raises:
            ProbeMismatchError: On another base; or, if the probe reads an adapter's sites, on another adapter.
        """
        if not same_base(self.header, provenance):
            raise ProbeMismatchError(
                f"this probe was fitted in {base_name(self.header)} and cannot be used in {base_name(provenance)}: "
                "features differ between models; fit one there"
            )
        ours, theirs = (of.get("adapter_digest") for of in (self.header, provenance))
        if self.header.get("sites") is not None and None not in (ours, theirs) and ours != theirs:
            raise ProbeMismatchError(
                f"this probe reads the sites of adapter {ours}, the model has adapter {theirs}: their scalars are "
                "different features; fit one there"
            )

    def save(self, path: str | Path) -> Path:
        """Write a safetensors file with the header as JSON metadata; returns the path."""
        header = {**self.header, "schema": SCHEMA, "kind": "probe", "features": list(self.features)}
        tensors = {"coef": torch.tensor(self.coef), "intercept": torch.tensor([self.intercept], dtype=torch.float64)}
        return write_artifact(path, tensors, header)

    @staticmethod
    def load(path: str | Path, *, revision: str | None = None, local_files_only: bool = False) -> Probe:
        """Read a probe back.

        Args:
            path: The file, a folder that holds a ``probe.safetensors``, or a repository on the Hub that does.
            revision: Branch, tag or commit on the Hub; the header of what is read names the commit (``hub_revision``).
            local_files_only: Take what is in the Hub's cache, and do not ask the Hub.

        Raises:
            ValueError: If the file is not a probe of this schema, or the Hub does not give it.
        """
        header, tensors = load_artifact(path, PROBE_FILE, revision=revision, local_files_only=local_files_only)
        found = (header.get("kind"), header.get("schema"))
        if found != ("probe", SCHEMA):
            raise ValueError(
                f"{path} is not a probe this version reads: kind, schema are {found}, expected {('probe', SCHEMA)}"
            )
        return Probe(tensors["coef"].numpy(), float(tensors["intercept"][0]), tuple(header["features"]), header)

    def _in_order(self, frame: pd.DataFrame) -> pd.DataFrame:
        named = frame.set_axis([str(name) for name in frame.columns], axis=1)
        missing = [name for name in self.features if name not in named.columns]
        extra = [name for name in named.columns if name not in self.features]
        if missing or extra:
            raise ProbeMismatchError(
                f"the features differ by name: missing {_shortened(missing)}, unknown {_shortened(extra)}; "
                f"this probe reads {_shortened(self.features)}"
            )
        return named[list(self.features)]


def _shortened(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (f", … ({len(names)})" if len(names) > 8 else "") if names else "none"
