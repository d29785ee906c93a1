"""Downstream effect: what a single site's contribution becomes in later layers (2506.11618, appendix D, figure 14).

B of a rank-1 site need not lie along the misalignment direction; what it causes later may. Over the same text, the
shift that the adapter causes (organism minus chat model) is compared with the shift that steering causes (steered chat
model minus chat model), layer by layer, beside the same comparison for random directions of that norm.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from .activations import collect
from .conversations import Conversations
from .directions import Direction, random_direction
from .interventions import Steer
from .moments import Moments, align_groups
from .statistics import CONFIDENCE

if TYPE_CHECKING:
    from .organisms import Organism

CONTROL = "random control"


def downstream(
    organism: Organism,
    conversations: Conversations,
    direction: Direction,
    *,
    layer: int,
    strength: float = 1.0,
    by: str = "label",
    controls: int = 4,
    resamples: int = 200,
    seed: int = 0,
) -> pd.DataFrame:
    """Cosine, in every layer, between the shift of the adapter and the shift of steering with the direction.

    Args:
        organism: With its adapter in.
        conversations: The text, with the columns ``by`` and ``prompt_id`` (what intervals resample).
        direction: What the chat model is steered with.
        layer: Where it is steered.
        strength: Multiples of the vector.
        by: Labels whose conversations are averaged apart.
        controls: Random directions of the same norm.
        resamples: Bootstrap resamples of prompts.
        seed: Of controls and resamples.

    Returns:
        ``layer, label, series ("steered" or "random control"), cosine, low, high``; the control's interval spans its
        directions. Layers in which a shift is exactly zero are left out.
    """
    organism.require_fine_tune("downstream()")
    keys = [by, "prompt_id"]
    shifted = {"steered": (Steer(direction, layers=(layer,), strength=strength),)}
    for number in range(controls):
        random = random_direction(direction, seed=seed + 5000 + number)
        shifted[f"{CONTROL} {number}"] = (Steer(random, layers=(layer,), strength=strength),)
    own = collect(organism, conversations, by=keys)
    steered = {}
    with organism.as_base():
        base = collect(organism, conversations, by=keys)
        for name, interventions in shifted.items():
            with organism.apply(*interventions):
                steered[name] = collect(organism, conversations, by=keys)
    cause = _shift(own, base)
    rows = []
    for label, groups in base.groups.reset_index(drop=True).groupby(by, sort=False, observed=True):
        weights = _resampled_weights(groups["tokens"].to_numpy(), resamples, seed)
        part = torch.tensor(groups.index.to_numpy())
        for name, moments in steered.items():
            table = _cosines(cause[part], _shift(moments, base)[part], weights, base.layers)
            rows.append(table.assign(label=label, series=name))
    return _controls_as_one(pd.concat(rows, ignore_index=True))


def _shift(moments: Moments, base: Moments) -> Tensor:
    """Mean activation minus the base's, group by group: ``[group layer d_model]``."""
    moments, base = align_groups(moments, base)
    return moments.mean - base.mean


def _resampled_weights(tokens: np.ndarray, resamples: int, seed: int) -> Tensor:
    """Weights of the groups: first those of the data, then those of resampled groups, ``[1 + resample, group]``."""
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(len(tokens), np.full(len(tokens), 1 / len(tokens)), size=resamples)
    counts = np.concatenate([np.ones((1, len(tokens))), drawn]) * tokens
    return torch.from_numpy(counts / counts.sum(1, keepdims=True))


def _cosines(cause: Tensor, effect: Tensor, weights: Tensor, layers: tuple[int, ...]) -> pd.DataFrame:
    rows = []
    for position, layer in enumerate(layers):
        first, second = weights @ cause[:, position], weights @ effect[:, position]
        if not (bool(first[0].any()) and bool(second[0].any())):
            continue
        cosines = torch.cosine_similarity(first, second, dim=-1).numpy()
        low, high = np.quantile(cosines[1:], [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
        rows.append({"layer": layer, "cosine": float(cosines[0]), "low": float(low), "high": float(high)})
    return pd.DataFrame(rows, columns=["layer", "cosine", "low", "high"])


def _controls_as_one(table: pd.DataFrame) -> pd.DataFrame:
    is_control = table["series"].str.startswith(CONTROL)
    control = table[is_control].groupby(["label", "layer"], sort=False, as_index=False, observed=True)["cosine"]
    merged = control.agg(low="min", high="max", cosine="mean").assign(series=CONTROL)
    columns = ["layer", "label", "series", "cosine", "low", "high"]
    return pd.concat([table[~is_control], merged], ignore_index=True)[columns]
