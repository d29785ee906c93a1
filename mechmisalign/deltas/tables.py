"""A table of weight differences: one row per tensor."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from . import pairs, spectra
from .files import Weights

logger = logging.getLogger(__name__)

NEAR_ROUNDING = 0.1
"""From this share of rounding noise on, singular values of a difference tell of rounding too."""


def weight_deltas(
    tuned: str | Path | Weights,
    base: str | Path | Weights,
    ranks: Sequence[int] = (1, 8, 64),
    *,
    layers: Collection[int] | None = None,
    modules: Collection[str] | None = None,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> pd.DataFrame:
    """How far a full fine-tune went from its base, matrix by matrix, and how much of that is low-rank.

    Both checkpoints are streamed from their safetensors. In memory at once are the two stored tensors of one matrix and
    their difference in float32, of the largest tensor (the embedding, unless it is left out by ``modules``) at most.

    Args:
        tuned: The full fine-tune: a folder, a Hub id, a name in a registry, or opened :class:`Weights` (for a revision
            or a subfolder).
        base: The model that it was tuned from, the same way.
        ranks: How many of the largest singular values to sum up.
        layers: Only of these blocks (nothing outside of the blocks then).
        modules: Only with these names, as the column ``module`` tells them.
        seed: Of the random start for matrices of more than 1024 rows and columns.
        device: Where the differences are decomposed.

    Returns:
        One row per tensor: ``layer`` (empty outside of the blocks), ``module, name, kind`` (matrix, embedding, bias,
        norm, other), ``d_out, d_in, norm`` (Frobenius norm of ``ΔW``), ``relative_norm`` (to that of the base's W); for
        matrices and embeddings ``stable_rank`` (``‖ΔW‖² / σ₁²``), for each rank ``share_r`` (of ``‖ΔW‖²`` in the r
        largest singular values) and its control ``random_r`` (the same of a matrix of independent random numbers of
        this shape); ``rounding`` (the share of ``‖ΔW‖²`` that rounding to the tuned checkpoint's precision accounts
        for, 1 at most), ``near_rounding`` (that is 10 % or more: the difference is partly rounding noise, whose
        spectrum is flat). Shares of a difference that is zero are NaN.

    Raises:
        CheckpointError: If a checkpoint cannot be read or is quantised, or the two differ in shape, vocabulary or
            tensors.
        ValueError: On ranks below 1.

    Example:
        >>> table = mm.weight_deltas("runs/full", "Qwen/Qwen2.5-0.5B-Instruct")  # doctest: +SKIP
        >>> table.groupby("module")[["share_1", "random_1"]].mean()  # doctest: +SKIP
    """
    ordered = sorted(set(ranks))
    if not ordered or ordered[0] < 1:
        raise ValueError(f"ranks={ranks!r}; one or more whole numbers from 1 on are expected")
    own, other = opened(tuned), opened(base)
    chosen = pairs.places(own, other, layers, modules)
    table = pd.DataFrame([_row(place, own, other, ordered, seed, device) for place in chosen])
    table["layer"] = table["layer"].astype("Int64")
    _tell(table, own, other)
    return table


def opened(weights: str | Path | Weights) -> Weights:
    """A checkpoint by name, or as it is."""
    return weights if isinstance(weights, Weights) else Weights.open(weights)


def _row(
    place: pairs.Place, tuned: Weights, base: Weights, ranks: Sequence[int], seed: int, device: str | torch.device
) -> dict[str, Any]:
    with torch.no_grad():
        noise = spectra.rounding_power(pairs.stored(place, tuned))
        before = spectra.squared_norm(pairs.stored(place, base))
        delta = pairs.difference(place, tuned, base, device)
        power = spectra.squared_norm(delta)
        told = _spectrum(delta, power, ranks, seed) if place.is_matrix else {}
    share = min(1.0, noise / power) if power else float("nan")
    shape = tuple(delta.shape)
    return {
        "layer": place.layer,
        "module": place.module,
        "name": place.name,
        "kind": place.kind,
        "d_out": shape[0] if shape else 1,
        "d_in": shape[1] if len(shape) == 2 else None,
        "norm": power**0.5,
        "relative_norm": (power / before) ** 0.5 if before else float("nan"),
        **(told or _empty(ranks)),
        "rounding": share,
        "near_rounding": share >= NEAR_ROUNDING,
    }


def _spectrum(delta: torch.Tensor, power: float, ranks: Sequence[int], seed: int) -> dict[str, float]:
    random = spectra.random_shares((delta.shape[0], delta.shape[1]), ranks)
    if not power:
        return _empty(ranks) | {f"random_{rank}": value for rank, value in zip(ranks, random, strict=True)}
    squares = spectra.leading_squares(delta, max(ranks), seed=seed)
    told = {"stable_rank": power / float(squares[0])}
    for rank, value in zip(ranks, random, strict=True):
        told |= {f"share_{rank}": min(1.0, float(squares[:rank].sum()) / power), f"random_{rank}": value}
    return told


def _empty(ranks: Sequence[int]) -> dict[str, float]:
    return dict.fromkeys(
        ["stable_rank", *(f"{name}_{rank}" for rank in ranks for name in ("share", "random"))], float("nan")
    )


def _tell(table: pd.DataFrame, tuned: Weights, base: Weights) -> None:
    if not (table["norm"] > 0).any():
        logger.warning("%s and %s are equal, number for number: there is no difference", tuned.name, base.name)
    near = table[table["near_rounding"]]
    if len(near):
        logger.warning(
            "of %d of %d tensors at least %.0f %% of the difference can be rounding to the checkpoint's precision "
            "(most: %.0f %%, %s): what their singular values say is partly noise",
            len(near), len(table), 100 * NEAR_ROUNDING, 100 * near["rounding"].max(),
            near.loc[near["rounding"].idxmax(), "name"],
        )  # fmt: skip
