"""Reading: token scores of conversations in one pass, and what they make of a response."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd
from jaxtyping import Float, Float64
from torch import Tensor

from mechmisalign.scalars import read_tokens, resid_reader

if TYPE_CHECKING:
    from mechmisalign.conversations import Conversations
    from mechmisalign.organisms import Organism

Pooling = Literal["mean", "max"] | float
"""``"mean"``, ``"max"``, or the share of the highest tokens that are averaged."""


def check_pooling(pooling: Pooling) -> None:
    """Refuse another pooling.

    Raises:
        ValueError: If it is neither ``"mean"`` nor ``"max"`` nor a share between 0 and 1.
    """
    if pooling not in ("mean", "max") and not (isinstance(pooling, float) and 0 < pooling < 1):
        raise ValueError(f"pooling must be 'mean', 'max' or a share between 0 and 1, got {pooling!r}")


def pooled(token_scores: Float[np.ndarray, " token"], pooling: Pooling) -> float:
    """The score of a response from those of its tokens; a share takes one token or more."""
    values = np.asarray(token_scores, dtype=np.float64)
    if pooling == "mean":
        return float(values.mean())
    count = 1 if pooling == "max" else max(1, math.ceil(float(pooling) * len(values)))
    return float(np.sort(values)[-count:].mean())


def token_scores(
    organism: Organism,
    conversations: Conversations,
    weights: Float[Tensor, "layer d_model"],
    intercept: float,
    layers: Sequence[int],
    token_budget: int,
) -> pd.Series:
    """``sum over layers of weights · residual + intercept`` at each response token; the pass ends at the last layer.

    Returns:
        Float64, indexed by conversation and position.

    Raises:
        ValueError: If a score is not finite, which would pass for no alarm.
    """
    readers = [resid_reader(layer, _along(vector)) for layer, vector in zip(layers, weights, strict=True)]
    last = max(layers)
    table = read_tokens(organism, conversations, readers, span="response", last_layer=last, token_budget=token_budget)
    values: Float64[np.ndarray, " token"] = table.to_numpy(np.float64).sum(1) + intercept
    if not np.isfinite(values).all():
        raise ValueError(
            f"{int((~np.isfinite(values)).sum())} of {len(values)} token scores are not finite (an overflow in "
            "float16?); load the organism in bfloat16 or float32"
        )
    return pd.Series(values, index=table.index)


def _along(vector: Float[Tensor, " d_model"]) -> Callable[[Tensor], Tensor]:
    return lambda rows: rows @ vector.to(rows)
