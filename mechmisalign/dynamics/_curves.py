"""Signals as functions of a few inner products, and these for paths with other directions or other coordinates."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from .paths import Path

_ROUNDING = 1e-7
"""A move that is smaller than the largest by this factor is none."""


class Bands(NamedTuple):
    """The inner products that the signals need, the last axis that of the steps.

    Attributes:
        squares: ``⟨v_t, v_t⟩``.
        near: ``⟨v_t, v_{t+s}⟩``.
        far: ``⟨v_t, v_{t+2s}⟩``.
        last: ``⟨v_t, v_end⟩``.
    """

    squares: np.ndarray
    near: np.ndarray
    far: np.ndarray
    last: np.ndarray


Curve = Callable[[Bands], np.ndarray]


def of_gram(gram: Float[np.ndarray, "*group step step"], s: int) -> Bands:
    """From all inner products."""
    squares, near, far = (np.diagonal(gram, offset, axis1=-2, axis2=-1) for offset in (0, s, 2 * s))
    return Bands(squares, near, far, gram[..., -1, :])


def of_vectors(vectors: Float[np.ndarray, "step dim"], s: int) -> Bands:
    """From the vectors."""
    products = (np.einsum("td,td->t", vectors[: len(vectors) - k], vectors[k:]) for k in (0, s, 2 * s))
    squares, near, far = products
    return Bands(squares, near, far, vectors @ vectors[-1])


def curve_of(signal: str, observed: Bands, threshold: float) -> Curve:
    """The signal as a function of inner products, at the steps that have both neighbours."""
    if signal == "rotation":
        least = threshold * np.sqrt(np.maximum(*_legs(observed)[:2])).max(initial=0.0)

        def cosine(bands: Bands) -> np.ndarray:
            before, after, between = _legs(bands)
            moves = np.sqrt(np.minimum(before, after)) >= max(least, 1e-12)
            size = np.sqrt(before * after)
            return np.where(moves, -between / np.where(size > 0, size, 1), np.nan)

        return cosine

    def rise(bands: Bands) -> np.ndarray:
        level = np.sqrt(bands.squares.clip(0))
        if signal == "similarity":
            size = level * level[..., -1:]
            level = np.divide(bands.last, size, out=np.full(size.shape, np.nan), where=size > 0)
        twice = level.shape[-1] - bands.far.shape[-1]
        return level[..., twice:] - level[..., :-twice]

    return rise


def _legs(bands: Bands) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """``‖v_t - v_{t-s}‖²``, ``‖v_{t+s} - v_t‖²`` and their inner product, for each t with both neighbours."""
    s, places = bands.squares.shape[-1] - bands.near.shape[-1], bands.far.shape[-1]
    square = [bands.squares[..., i * s : i * s + places] for i in range(3)]
    near = [bands.near[..., i * s : i * s + places] for i in range(2)]
    before, after = square[1] + square[0] - 2 * near[0], square[2] + square[1] - 2 * near[1]
    return before.clip(0), after.clip(0), near[1] - square[1] - bands.far + near[0]


def reordering(gram: Float[np.ndarray, "step step"]) -> Callable[[np.ndarray], Float[np.ndarray, "step dim"]]:
    """Vectors of a path from the same start, of the same step sizes, with its directions in the order that is given.

    The start and the moves are found, up to a rotation, from their inner products.
    """
    moves = np.diff(gram, axis=0, prepend=0)  # the start itself, then the moves
    values, vectors = np.linalg.eigh(np.diff(moves, axis=1, prepend=0))
    start, *rest = vectors * np.sqrt(values.clip(0))
    found = np.array(rest)
    sizes = np.linalg.norm(found, axis=1, keepdims=True)
    moves_at_all = sizes > _ROUNDING * sizes.max()
    directions = np.where(
        moves_at_all, found / np.where(moves_at_all, sizes, 1), 0
    )  # without one: zero, wherever it is
    return lambda order: np.vstack([start, directions[order] * sizes]).cumsum(0)


def resampled(path: Path, s: int, resamples: int, rng: np.random.Generator) -> Bands:
    """The inner products with the groups of coordinates drawn with replacement."""
    groups = len(path.parts)
    weights = rng.multinomial(groups, np.full(groups, 1 / groups), size=resamples).astype(float)
    return Bands(*(weights @ band for band in of_gram(path.parts, s)))
