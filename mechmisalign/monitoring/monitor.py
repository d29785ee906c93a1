"""The monitor: frozen weights on the residual stream, a score per token and per response, and where the alarm begins.

The forward pass ends behind the last layer that is read, so a monitor costs a part of a forward pass and nothing is
generated. It may read in the model that wrote the answers, or in another one on the same base (the chat model reading
what a fine-tune wrote); its threshold belongs to the model in which it was calibrated.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from mechmisalign import models
from mechmisalign._artifacts import base_name, load_artifact, same_base, write_artifact
from mechmisalign._layers import layer_numbers
from mechmisalign.directions import HOOK, Direction
from mechmisalign.probes import Probe

from .calibration import Calibration
from .fitting import Candidate, Kind, fitted, prompt_hashes
from .reading import Pooling, check_pooling, pooled, token_scores

if TYPE_CHECKING:
    from mechmisalign.conversations import Conversations
    from mechmisalign.organisms import Organism

SCHEMA = 1
MONITOR_FILE = "monitor.safetensors"
"""What a monitor is called in a repository."""
ADDED = ("score", "alarm", "token_texts", "token_scores")
"""Columns that scoring adds."""
_CALIBRATION = "calibration_scores"


class MonitorMismatchError(ValueError):
    """A monitor and a model do not belong together."""


@dataclass(frozen=True, eq=False)
class Monitor:
    """Weights on the residual stream, and a threshold.

    A token scores ``sum over layers of weights · residual + intercept``; a response the mean over its tokens, their
    maximum, or the mean of the highest share of them.

    Attributes:
        weights: ``[layer d_model]``, float32, on the CPU.
        intercept: Added once per token.
        layers: The layer of each vector; layer ``i`` is the residual stream after block ``i``.
        pooling: ``"mean"``, ``"max"``, or a share between 0 and 1 (0.1: mean of the highest tenth, one token or more).
        calibration: Threshold and reference scores; None before :meth:`calibrate`.
        header: Provenance: model, adapter, method, how the layer was chosen, hashes of the prompts fitted on, versions.
        first: Only so many tokens of the response count for its score: an early alarm. None for all.
    """

    weights: Float[Tensor, "layer d_model"]
    intercept: float
    layers: tuple[int, ...]
    pooling: Pooling = "mean"
    calibration: Calibration | None = None
    header: Mapping[str, Any] = field(default_factory=dict)
    first: int | None = None

    def __post_init__(self) -> None:
        if not self.layers or len(self.layers) != len(self.weights):
            raise ValueError(f"{len(self.weights)} vectors for {len(self.layers)} layers; one for each is needed")
        if not (torch.isfinite(self.weights).all() and math.isfinite(self.intercept)):
            raise ValueError("the weights hold NaN or infinite values; check what they were fitted on")
        check_pooling(self.pooling)
        if self.first is not None and self.first < 1:
            raise ValueError(f"first must be 1 or more tokens, or None, got {self.first}")
        object.__setattr__(self, "weights", self.weights.detach().to("cpu", torch.float32))

    @staticmethod
    def fit(
        organism: Organism,
        conversations: Conversations,
        *,
        labels: str = "label",
        positive: str = "misaligned",
        negative: str = "aligned",
        layers: Sequence[Candidate] | None = None,
        kind: Kind = "direction",
        groups: str = "prompt_id",
        pooling: Pooling = "mean",
        first: int | None = None,
        repeats: int = 10,
        C: float = 0.01,  # noqa: N803
        seed: int = 0,
    ) -> Monitor:
        """Fit on labelled conversations; the layer is chosen with whole prompts held out, on these alone.

        Args:
            organism: The model that reads (inside ``organism.as_base()`` it is the chat model).
            conversations: With a column of labels and one of prompts; rows of other classes are left out.
            labels: The column of labels.
            positive: The class that raises the alarm.
            negative: The class that does not.
            layers: Candidates: layers, or tuples of layers that a probe reads together; by default each layer.
            kind: ``"direction"`` (difference of the class means of mean residuals, as unit vector) or ``"probe"``
                (logistic; where the classes are far apart its scores move more with a change of topic).
            groups: The column of prompts.
            pooling: How tokens make a response's score. Weights are fitted on means whatever this is.
            first: Fit and score on the first so many tokens of each response.
            repeats: Splits of the cross-validation.
            C: Inverse regularisation strength of the probe.
            seed: Of the splits.

        Raises:
            ValueError: If a column or a class is missing, there are too few prompts, or an option is unknown.
        """
        found = fitted(
            organism,
            conversations,
            labels=labels,
            positive=positive,
            negative=negative,
            layers=layers,
            kind=kind,
            groups=groups,
            first=first,
            repeats=repeats,
            C=C,
            seed=seed,
        )
        versions = {name: version(name) for name in ("mechmisalign", "torch", "transformers", "transformer-lens")}
        header = {**organism.provenance, **found.header, "versions": versions}
        return Monitor(found.weights, found.intercept, found.layers, pooling, None, header, first)

    @staticmethod
    def of(
        source: Direction | Probe,
        layers: int | Sequence[int] | None = None,
        *,
        pooling: Pooling = "mean",
    ) -> Monitor:
        """A monitor that reads along a direction, or with a probe that was fitted on the residual stream.

        Args:
            source: A direction gives the mean over layers of the projection on its unit vectors; a probe its decision
                value.
            layers: The layer, or several of a direction; by default the one in the probe's header.
            pooling: How tokens make a response's score.

        Raises:
            ValueError: If the layer is not told, or several are told for a probe.
            ZeroDirectionError: If the direction is zero at a layer.
        """
        told = source.header.get("layer") if layers is None else layers
        if told is None:
            raise ValueError("layers= is needed: this header does not say at which layer to read")
        chosen = layer_numbers(told)
        if isinstance(source, Direction):
            units = torch.stack([source.unit(layer) for layer in chosen]) / len(chosen)
            return Monitor(units, 0.0, chosen, pooling, None, dict(source.header))
        if len(chosen) != 1:
            raise ValueError(f"a probe reads one layer, got {list(chosen)}")
        return Monitor(
            torch.from_numpy(source.coef)[None].float(), source.intercept, chosen, pooling, None, source.header
        )

    def score(self, organism: Organism, conversations: Conversations, *, token_budget: int = 2048) -> pd.DataFrame:
        """Score every response and every token of it.

        Args:
            organism: The model that reads.
            conversations: What is read.
            token_budget: Tokens per batch, padding included.

        Returns:
            The conversations' frame with ``score``, ``alarm`` (if calibrated), ``token_texts`` and ``token_scores`` (a
            list for each response). Columns of these names are replaced.

        Raises:
            MonitorMismatchError: On another base, width or depth.
            ValueError: If a score is not finite, which would pass for no alarm.
        """
        self.check_model(organism)
        if self.calibration is not None and self.calibration.reader != _reader(organism):
            warnings.warn(
                f"this monitor was calibrated in {_named(self.calibration.reader)} and reads in "
                f"{_named(_reader(organism))} now: its false-positive rate of {self.calibration.fpr:g} is not known to "
                "hold there; calibrate it in the model that reads",
                UserWarning,
                stacklevel=2,
            )
        texts = conversations.tokens()["token"]
        values = token_scores(organism, conversations, self.weights, self.intercept, self.layers, token_budget)
        cuts = np.searchsorted(texts.index.get_level_values("conversation"), np.arange(1, len(conversations)))
        of_row, text_of_row = (np.split(column.to_numpy(), cuts) for column in (values, texts))
        scores = np.array([pooled(row[: self.first], self.pooling) for row in of_row])
        frame = conversations.frame.drop(columns=list(ADDED), errors="ignore").assign(score=scores)
        if self.calibration is not None:
            frame["alarm"] = scores > self.calibration.threshold
        return frame.assign(
            token_texts=pd.Series([row.tolist() for row in text_of_row], dtype=object),
            token_scores=pd.Series([row.tolist() for row in of_row], dtype=object),
        )

    def calibrate(
        self, organism: Organism, harmless: Conversations, *, fpr: float = 0.01, groups: str = "prompt_id"
    ) -> Monitor:
        """A copy with the threshold for a rate of false alarms; see :class:`Calibration`.

        Args:
            organism: The model that will read.
            harmless: Conversations that should raise no alarm, on prompts that the monitor was not fitted on.
            fpr: The rate of false alarms, 0 to 1.
            groups: The column of prompts.

        Raises:
            ValueError: If there are too few for that rate, a prompt was fitted on, or the column is missing.
        """
        if groups not in harmless.frame.columns:
            raise ValueError(f"no column {groups!r} of prompts; the conversations have {list(harmless.frame.columns)}")
        known = set(self.header.get("fitted_prompts", ()))
        seen = sum(mark in known for mark in prompt_hashes(harmless.frame, harmless.system))
        if seen:
            raise ValueError(
                f"{seen} of {len(harmless)} harmless conversations answer prompts that this monitor was fitted on, so "
                "its false-positive rate would come out too low; hold the prompts of the calibration out of the fit"
            )
        scores = replace(self, calibration=None).score(organism, harmless)["score"].to_numpy()
        prompts = harmless.frame[groups].to_numpy()
        return replace(self, calibration=Calibration.of(scores, prompts, fpr=fpr, reader=_reader(organism)))

    def check_model(self, organism: Organism) -> None:
        """Refuse a model whose residual stream these weights do not belong to.

        Raises:
            MonitorMismatchError: On another base, width or depth.
        """
        if not same_base(self.header, organism.provenance):
            raise MonitorMismatchError(
                f"this monitor was fitted in {base_name(self.header)} and cannot read "
                f"{base_name(organism.provenance)}: residual bases differ between models; fit one there"
            )
        width, depth = models.d_model(organism.model), models.n_layers(organism.model)
        if self.weights.shape[1] != width or max(self.layers) >= depth:
            raise MonitorMismatchError(
                f"this monitor reads layers up to {max(self.layers)} of width {self.weights.shape[1]}; the model has "
                f"width {width} and layers up to {depth - 1}"
            )

    def save(self, path: str | Path) -> Path:
        """Write a safetensors file with the header as JSON metadata; returns the path."""
        header = {**self.header, "schema": SCHEMA, "kind": "monitor", "hook": HOOK, "pooling": self.pooling}
        header |= {"layers": list(self.layers), "first": self.first, "calibration": None}
        tensors = {"weights": self.weights, "intercept": torch.tensor([self.intercept], dtype=torch.float64)}
        if self.calibration is not None:
            told = asdict(self.calibration)
            tensors[_CALIBRATION] = torch.from_numpy(told.pop("scores"))
            header["calibration"] = told
        return write_artifact(path, tensors, header)

    @staticmethod
    def load(path: str | Path, *, revision: str | None = None, local_files_only: bool = False) -> Monitor:
        """Read a monitor back, from a file, a folder with a ``monitor.safetensors``, or a repository on the Hub.

        Raises:
            ValueError: If the file is not a monitor of this schema, or the Hub does not give it.
            FileNotFoundError: If there is no such file.
        """
        header, tensors = load_artifact(path, MONITOR_FILE, revision=revision, local_files_only=local_files_only)
        found = (header.get("kind"), header.get("schema"), header.get("hook"))
        if found != ("monitor", SCHEMA, HOOK):
            raise ValueError(
                f"{path} is not a monitor this version reads: kind, schema, hook are {found}, expected "
                f"{('monitor', SCHEMA, HOOK)}"
            )
        told = header.pop("calibration")
        calibration = told and Calibration(scores=tensors[_CALIBRATION].numpy(), **told)
        weights, intercept, layers = tensors["weights"], float(tensors["intercept"][0]), tuple(header["layers"])
        return Monitor(weights, intercept, layers, header["pooling"], calibration, header, header["first"])


def _reader(organism: Organism) -> str | None:
    """Which adapter is in the model that reads."""
    digest = organism.provenance["adapter_digest"]
    return None if digest is None else str(digest)


def _named(reader: str | None) -> str:
    return "the chat model" if reader is None else f"the model with adapter {reader[:12]}"
