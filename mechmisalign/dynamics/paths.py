"""Paths: the inner products between the steps of a trajectory, and what can be measured with them alone.

Norms, distances, cosines, the local cosine and principal components of vectors ``v_t`` are functions of
``G[t, u] = ⟨v_t, v_u⟩``. For updates the inner product is Frobenius', ``⟨ΔW_t, ΔW_u⟩ = scaling² · sum((B_tᵀ B_u) ∘
(A_t A_uᵀ))``: it comes from the factors, no dense matrix is built, and it does not depend on their gauge. Several sites
side by side are one long vector, whose inner products are the sums.

The coordinates are divided at random into groups, with inner products for each, so that coordinates can be resampled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

GROUPS = 48
"""Parts of the coordinates that are resampled."""
_AT_ONCE = 30_000_000
"""Numbers that are held at a time."""


@dataclass(frozen=True, eq=False)
class Path:
    """The inner products between all steps of what is followed.

    Attributes:
        steps: Training steps, ascending.
        parts: Inner products over each group of coordinates, ``[group step step]``; they add up to those of the whole.
        name: What is followed, such as ``"dW of 3.down_proj"``.
    """

    steps: tuple[int, ...]
    parts: Float[np.ndarray, "group step step"]
    name: str

    @cached_property
    def gram(self) -> Float[np.ndarray, "step step"]:
        """Inner products ``⟨v_t, v_u⟩``."""
        return self.parts.sum(0)

    @staticmethod
    def of_vectors(
        steps: Sequence[int], vectors: Float[Tensor, "step dim"], name: str = "vectors", *, groups: int = GROUPS
    ) -> Path:
        """The path of any vectors, such as all weights of a full fine-tune."""
        ones = torch.ones(len(vectors), 1, 1, dtype=torch.float32, device="cpu")
        return path_of(tuple(steps), [(ones, vectors.unsqueeze(-1), 1.0)], "dW", name, groups)

    def evenly_spaced(self) -> Path:
        """The steps that are whole multiples of the commonest gap away from the first one, while none is missing."""
        gaps, counts = np.unique(np.diff(self.steps), return_counts=True)
        gap, kept = int(gaps[counts.argmax()]), [0]
        for row, step in enumerate(self.steps):
            if step == self.steps[kept[-1]] + gap:
                kept.append(row)
        rows = np.array(kept)
        return Path(tuple(self.steps[row] for row in kept), self.parts[:, rows[:, None], rows], self.name)


def path_of(
    steps: tuple[int, ...],
    factors: Sequence[tuple[Float[Tensor, "step _ _"], Float[Tensor, "step _ _"], float]],
    quantity: str,
    name: str,
    groups: int,
) -> Path:
    """The path of sites side by side: A ``[step rank d_in]``, B ``[step d_out rank]`` and scaling of each."""
    parts = np.zeros((groups, len(steps), len(steps)))
    for i, (A, B, scaling) in enumerate(factors):
        rows = {"A": A.transpose(1, 2), "B": B, "dW": B}[quantity]  # [step coordinate rank]
        order = torch.from_numpy(np.random.default_rng(i).permutation(rows.shape[1]))
        across = _inner(A.transpose(1, 2)) if quantity == "dW" else None
        for group, chosen in enumerate(order.tensor_split(groups)):
            if len(chosen):
                parts[group] += (
                    scaling**2 * _blocks(rows[:, chosen], across)
                    if quantity == "dW"
                    else (_blocks(rows[:, chosen], None))
                )
    return Path(steps, parts, name)


def norms(path: Path) -> pd.DataFrame:
    """Euclidean (of updates: Frobenius) norm at each step: columns ``step, norm``."""
    return pd.DataFrame({"step": path.steps, "norm": np.sqrt(np.diag(path.gram).clip(0))})


def similarity(path: Path, to: int | None = None) -> pd.DataFrame:
    """Cosine of each step with one of them, the last by default: columns ``step, cosine``; NaN where one is zero."""
    row = len(path.steps) - 1 if to is None else path.steps.index(to)
    return pd.DataFrame({"step": path.steps, "cosine": cosines_with(path.gram, row)})


def local_cosine(
    path: Path, spacings: Sequence[int] | None = None, *, threshold: float = 0.0, relative: bool = False
) -> pd.DataFrame:
    """``cos(v_{t-s} - v_t, v_{t+s} - v_t)``: -1 where the path is straight, 0 at a right angle, +1 where it turns back.

    A turn is a peak *upwards* (2506.11613, section 4.1). Where little moves, the cosine is one of noise with noise:
    steps where ``max(‖v_t - v_{t-s}‖, ‖v_{t+s} - v_t‖)`` is below the threshold are dropped (the paper: 0.0035 for the
    medical adapter of Qwen2.5-14B, 0.002 for the others).

    Args:
        path: What is followed.
        spacings: Each s in training steps; by default one, two and three times the gap between checkpoints, where
            there are enough of them.
        threshold: The least movement.
        relative: The threshold is a share of the largest movement over the same s, and so free of scale.

    Returns:
        Columns ``step, spacing, cosine, moved``: a row for each t with checkpoints at t - s and t + s; ``moved`` is the
        larger of the two movements, and ``cosine`` NaN where it is below the threshold.

    Raises:
        ValueError: If no step has both neighbours, or the threshold is negative.
    """
    if threshold < 0:
        raise ValueError(f"threshold must be 0 or more, got {threshold}")
    frames = []
    for spacing in _usual_spacings(path.steps) if spacings is None else spacings:
        rows = _with_neighbours(path.steps, spacing)
        before, after, between = _legs(path.gram, rows)
        moved = np.sqrt(np.maximum(before, after))
        least = threshold * moved.max(initial=0.0) if relative else threshold
        cosine = _divided(-between, np.sqrt(before * after))
        told = {"spacing": spacing, "cosine": np.where(moved >= least, cosine, np.nan), "moved": moved}
        frames.append(pd.DataFrame({"step": np.array(path.steps)[rows[1]], **told}))
    return pd.concat(frames, ignore_index=True)


class Principal(NamedTuple):
    """Principal components of a path.

    Attributes:
        scores: Columns ``step, pc1, pc2 …``: where each step lies, in the path's own units.
        explained: Share of the variance over steps that each component explains.
    """

    scores: pd.DataFrame
    explained: Float[np.ndarray, " component"]


def principal(path: Path, components: int = 2) -> Principal:
    """Principal components of the steps, from their inner products; the last step's scores are positive.

    A bow in the second component is no sign of a turn by itself: a random walk in many dimensions has one too
    (1806.08805).

    Raises:
        ValueError: If there are fewer steps than components, or nothing moves.
    """
    if not 1 <= components < len(path.steps):
        raise ValueError(f"components must be between 1 and {len(path.steps) - 1}, got {components}")
    centred = path.gram - path.gram.mean(0) - path.gram.mean(1, keepdims=True) + path.gram.mean()
    values, vectors = np.linalg.eigh(centred)
    values, vectors = values[::-1].clip(0), vectors[:, ::-1]
    if values.sum() <= 0:
        raise ValueError(f"{path.name} is the same at every step, so it has no principal components")
    scores = vectors[:, :components] * np.sqrt(values[:components])
    scores *= np.where(scores[-1] < 0, -1, 1)
    frame = pd.DataFrame(scores, columns=[f"pc{i + 1}" for i in range(components)])
    frame.insert(0, "step", path.steps)
    return Principal(frame, values[:components] / values.sum())


def cosines_with(gram: Float[np.ndarray, "*draw step step"], row: int) -> Float[np.ndarray, "*draw step"]:
    """Cosine of every step with one; NaN where either is zero."""
    squares = np.diagonal(gram, axis1=-2, axis2=-1)
    return _divided(gram[..., row, :], np.sqrt(squares * squares[..., row, None]))


def _divided(number: np.ndarray, by: np.ndarray) -> np.ndarray:
    """The quotient, NaN where the divisor is zero."""
    return np.divide(number, by, out=np.full(np.shape(number), np.nan), where=by > 0).clip(-1, 1)


def _usual_spacings(steps: Sequence[int]) -> list[int]:
    gap = int(np.median(np.diff(steps)))
    return [n * gap for n in (1, 2, 3) if n == 1 or 2 * n < len(steps)]


def _with_neighbours(steps: Sequence[int], spacing: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows of t - s, t and t + s, for each t that has both."""
    row = {step: i for i, step in enumerate(steps)}
    known = [step for step in steps if spacing > 0 and {step - spacing, step + spacing} <= row.keys()]
    if not known:
        raise ValueError(
            f"no step has checkpoints {spacing} steps before and after it; the steps are {list(steps)[:8]}…, choose a "
            "multiple of their gap"
        )
    before, at, after = (np.array([row[step + shift] for step in known]) for shift in (-spacing, 0, spacing))
    return before, at, after


def _legs(gram: np.ndarray, rows: tuple[np.ndarray, np.ndarray, np.ndarray]) -> tuple[np.ndarray, ...]:
    """``‖v_t - v_{t-s}‖²``, ``‖v_{t+s} - v_t‖²`` and ``⟨v_t - v_{t-s}, v_{t+s} - v_t⟩``."""
    b, t, a = rows
    before = gram[t, t] + gram[b, b] - 2 * gram[t, b]
    after = gram[a, a] + gram[t, t] - 2 * gram[a, t]
    return before.clip(0), after.clip(0), gram[t, a] - gram[t, t] - gram[b, a] + gram[b, t]


def _inner(vectors: Float[Tensor, "step dim rank"]) -> Float[Tensor, "step_rank step_rank"]:
    """Inner products between all columns of all steps, in float64."""
    flat = vectors.transpose(1, 2).flatten(0, 1).double()
    return flat @ flat.T


def _blocks(
    rows: Float[Tensor, "step coordinate rank"], across: Float[Tensor, "step_rank step_rank"] | None
) -> Float[np.ndarray, "step step"]:
    """``sum((B_tᵀ B_u) ∘ across[t, u])`` over the ranks, for all pairs of steps, some steps at a time."""
    steps, _, rank = rows.shape
    flat = rows.transpose(1, 2).flatten(0, 1).double()  # [step·rank coordinate]
    sums = []
    for part in torch.arange(steps).tensor_split(1 + steps * steps * rank * rank // _AT_ONCE):
        chosen = slice(int(part[0]) * rank, (int(part[-1]) + 1) * rank)
        inner = flat[chosen] @ flat.T
        inner = inner if across is None else inner * across[chosen]
        sums.append(inner.reshape(len(part), rank, steps, rank).sum((1, 3)))
    return torch.cat(sums).numpy()
