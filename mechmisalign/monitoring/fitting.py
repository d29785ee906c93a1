"""Fitting a monitor: what it reads, chosen with whole prompts held out and never on what is reported.

Candidates are layers, or several layers read together. Each is scored by grouped cross-validation on the labelled
conversations, beside shuffled labels. Of those that are as good as the best (to half a point of AUROC) the one whose
last layer comes first is taken: the forward pass ends there, so it is also the cheapest.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechmisalign import models
from mechmisalign._layers import layer_numbers
from mechmisalign._rendering import is_missing
from mechmisalign.activations import collect
from mechmisalign.conversations import Conversations
from mechmisalign.generation.rows import prompt_keys
from mechmisalign.moments import Moments
from mechmisalign.probes import LogisticProbe, MeanDifferenceProbe, evaluate_layers
from mechmisalign.probes.evaluation import PROBE

if TYPE_CHECKING:
    from mechmisalign.organisms import Organism

Kind = Literal["probe", "direction"]
Candidate = int | tuple[int, ...]
AS_GOOD = 0.005
"""Candidates within so much AUROC of the best count as good as it."""
_ROW = "_row"


@dataclass(frozen=True, eq=False)
class Reading:
    """What a monitor reads: a weight vector per layer, an offset, and how these were found.

    Attributes:
        weights: ``[layer d_model]``.
        intercept: Added once.
        layers: The layer of each vector.
        header: Method, candidates with their cross-validated scores, hashes of the prompts.
    """

    weights: Float[Tensor, "layer d_model"]
    intercept: float
    layers: tuple[int, ...]
    header: dict[str, Any]


def fitted(
    organism: Organism,
    conversations: Conversations,
    *,
    labels: str,
    positive: str,
    negative: str,
    layers: Sequence[Candidate] | None,
    kind: Kind,
    groups: str,
    first: int | None,
    repeats: int,
    C: float,  # noqa: N803
    seed: int,
) -> Reading:
    """Choose the layers and fit on all conversations of the two classes; the arguments are those of ``Monitor.fit``."""
    if kind not in get_args(Kind):
        raise ValueError(f"kind must be one of {get_args(Kind)}, got {kind!r}")
    chosen = _of_two_classes(conversations, labels, positive, negative, groups)
    candidates = _candidates(layers, models.n_layers(organism.model), kind)
    wanted = sorted({layer for one in candidates for layer in one})
    moments = collect(organism, chosen, by=[labels, groups, _ROW], layers=wanted, first=first)
    truth = (moments.groups[labels] == positive).to_numpy(dtype=bool)
    probe = LogisticProbe(C=C) if kind == "probe" else MeanDifferenceProbe()
    table = _cross_validated(moments, candidates, truth, groups, probe, repeats, seed)
    best = candidates[_cheapest_of_the_best(table, candidates)]
    weights, intercept = _weights(probe, _features(moments, best), truth, best, kind)
    read = f"{'layer' if len(best) == 1 else 'layers'} {', '.join(map(str, best))}"
    told = table.assign(layers=[list(candidates[number]) for number in table["layer"]])
    header = {
        "method": f"{kind} of {read}" + ("" if first is None else f", first {first} tokens"),
        "classes": [negative, positive],
        "rows": len(truth),
        "selection": told[["layers", "series", "score", "low", "high"]].to_dict("records"),
        "fitted_prompts": sorted(set(prompt_hashes(chosen.frame, chosen.system))),
        "data_hash": chosen.data_hash,
        "span": "response",
    }
    return Reading(weights, intercept, best, header)


def prompt_hashes(frame: pd.DataFrame, system: str | None) -> list[str]:
    """A short hash of what each conversation asks: to see whether a prompt was fitted on."""
    own = frame["system"] if "system" in frame.columns else [None] * len(frame)
    asked = frame.assign(system=[system if is_missing(each) else each for each in own])
    return [hashlib.sha256(key.encode("utf-8", "replace")).hexdigest()[:12] for key in prompt_keys(asked)]


def _of_two_classes(
    conversations: Conversations, labels: str, positive: str, negative: str, groups: str
) -> Conversations:
    frame = conversations.frame
    missing = [name for name in (labels, groups) if name not in frame.columns]
    if missing:
        raise ValueError(f"no columns {missing}; the conversations have {list(frame.columns)}")
    kept = frame[frame[labels].isin([positive, negative])]
    counts = kept[labels].value_counts()
    if len(counts) < 2:
        found = dict(frame[labels].value_counts())
        raise ValueError(f"{labels} must hold both {positive!r} and {negative!r} to fit on; it holds {found}")
    kept = kept.assign(**{_ROW: np.arange(len(kept))})
    return Conversations(kept, conversations.tokenizer, conversations.system, conversations.max_length)


def _candidates(layers: Sequence[Candidate] | None, n_layers: int, kind: Kind) -> list[tuple[int, ...]]:
    given = range(n_layers) if layers is None else layers
    candidates = [tuple(sorted(set(layer_numbers(one)))) for one in given]
    flat = [layer for one in candidates for layer in one]
    if not candidates or not all(candidates) or min(flat) < 0 or max(flat) >= n_layers:
        raise ValueError(f"layers must be some of 0 to {n_layers - 1}, or tuples of them, got {layers}")
    if kind == "direction" and any(len(one) > 1 for one in candidates):
        raise ValueError("a direction is read at one layer; take kind='probe' to read several together")
    return candidates


def _features(moments: Moments, layers: tuple[int, ...]) -> Float[np.ndarray, "row feature"]:
    """Mean residuals of each response, ``[row layer * d_model]``."""
    places = [moments.layers.index(layer) for layer in layers]
    return moments.mean[:, places].flatten(1).numpy()


def _cross_validated(
    moments: Moments,
    candidates: list[tuple[int, ...]],
    truth: Bool[np.ndarray, " row"],
    groups: str,
    probe: Any,
    repeats: int,
    seed: int,
) -> pd.DataFrame:
    def pairs() -> Iterator[tuple[int, Any]]:
        for number, candidate in enumerate(candidates):
            yield number, _features(moments, candidate)

    prompts = moments.groups[groups].to_numpy()
    table = evaluate_layers(pairs, truth, prompts, probe=probe, metrics=("auroc",), repeats=repeats, seed=seed)
    return table[table["series"].isin([PROBE, "shuffled labels", "prompt only"])].reset_index(drop=True)


def _cheapest_of_the_best(table: pd.DataFrame, candidates: list[tuple[int, ...]]) -> int:
    scores = table[table["series"] == PROBE].set_index("layer")["score"]
    good = [int(number) for number in scores.index[scores >= scores.max() - AS_GOOD]]
    return min(good, key=lambda number: (max(candidates[number]), len(candidates[number])))


def _weights(
    probe: Any,
    features: Float[np.ndarray, "row feature"],
    truth: Bool[np.ndarray, " row"],
    layers: tuple[int, ...],
    kind: Kind,
) -> tuple[Float[Tensor, "layer d_model"], float]:
    """A probe in log-odds; a direction as unit vector, zero half-way between the classes."""
    probe.fit(features, truth)
    coef, intercept = probe.coef_[0].astype(np.float64), float(probe.intercept_[0])
    if kind == "direction":
        norm = float(np.linalg.norm(coef))
        if norm == 0:
            raise ValueError(f"the classes have the same mean at layer {layers[0]}, so there is no direction")
        coef, intercept = coef / norm, intercept / norm
    return torch.from_numpy(coef.reshape(len(layers), -1)).float(), intercept
