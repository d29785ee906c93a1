r"""Singular values of one weight difference, what a random matrix would have, and what rounding leaves.

Let ``ΔW`` be ``n x m`` with ``n <= m``. Of a small one all squared singular values are the eigenvalues of ``ΔW ΔWᵀ`` in
float64; of a large one the leading ones come from a random subspace that is multiplied with ``ΔW ΔWᵀ`` again and again
(0909.4061, algorithm 4.4), which finds a little less than there is, never more. The Frobenius norm is always summed
exactly, in float64.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

EXACT = 1024
"""Up to this smaller dimension the spectrum is computed whole."""
_OVERSAMPLED = 32
_ITERATIONS = 6
_PIECE = 2**22
"""Numbers that are turned into float64 at once."""
_POINTS = 20001


def squared_norm(values: Tensor) -> float:
    """Sum of squares, in float64."""
    return sum(float(piece.double().square().sum()) for piece in _pieces(values))


def leading_squares(delta: Float[Tensor, "d_out d_in"], count: int, *, seed: int = 0) -> Float[Tensor, " k"]:
    """The largest squared singular values, largest first, in float64: ``count`` of them, or all that there are."""
    wide = delta if delta.shape[0] <= delta.shape[1] else delta.T
    if _is_small(delta, count):
        gram = _gram(wide)
    else:
        reduced = _range(wide, count, seed).T @ wide
        gram = _gram(reduced)
    return torch.linalg.eigvalsh(gram).flip(0).clamp_min(0)[:count].cpu()


def leading_factors(
    delta: Float[Tensor, "d_out d_in"], rank: int, *, seed: int = 0
) -> tuple[Float[Tensor, "rank d_in"], Float[Tensor, "d_out rank"]]:
    """``A, B`` of the best approximation ``B A`` of this rank, each with the square roots of the singular values.

    The product is a projection of ``ΔW`` onto its leading left or right singular vectors, so that it is as exact as
    they are orthonormal. Float32, on the CPU.
    """
    transposed = delta.shape[0] > delta.shape[1]
    wide = (delta.T if transposed else delta).double() if _is_small(delta, rank) else (delta.T if transposed else delta)
    basis = None if _is_small(delta, rank) else _range(wide, rank, seed)
    reduced = wide if basis is None else basis.T @ wide
    vectors = torch.linalg.eigh(_gram(reduced))[1].flip(1)[:, :rank].to(reduced)
    left = vectors if basis is None else basis @ vectors  # [n rank]
    right = left.T @ wide  # [rank m]: singular values times right singular vectors
    roots = right.double().norm(dim=1).sqrt()
    scale = torch.where(roots > 0, 1 / roots.clamp_min(1e-30), torch.zeros_like(roots))
    small, large = (left.double() * roots).float().cpu(), (right.double() * scale[:, None]).float().cpu()
    return (small.T.contiguous(), large.T.contiguous()) if transposed else (large, small)


def random_shares(shape: tuple[int, int], ranks: Sequence[int]) -> list[float]:
    """Share of the squared norm in the largest singular values of a matrix of independent Gaussian numbers.

    The eigenvalues of such a matrix follow the Marchenko-Pastur law; the i-th largest of n is put at its quantile
    ``1 - (i - 1/2) / n``. The scale cancels out, so norm-matching changes nothing.
    """
    n, m = sorted(shape)
    ratio = n / m
    low, high = (1 - ratio**0.5) ** 2, (1 + ratio**0.5) ** 2
    angle = np.linspace(0, np.pi, _POINTS)  # substitution that takes the square roots at both ends away
    x = (low + high) / 2 - (high - low) / 2 * np.cos(angle)
    density = (high - low) ** 2 / 4 * np.sin(angle) ** 2 / np.where(x > 0, x, np.inf)
    if low == 0.0:
        density[0] = density[1]
    heights = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    places = np.interp((np.arange(n) + 0.5) / n, heights / heights[-1], x)[::-1]
    held = np.cumsum(places) / places.sum()
    return [min(1.0, float(held[min(rank, n) - 1])) for rank in ranks]


def rounding_power(stored: Tensor) -> float:
    """What rounding to the stored precision adds to a squared norm: the sum of ``ulp² / 12`` over the numbers.

    An ulp is the distance of a number to the next one; a true value lies anywhere within half of one around the stored
    one. Float32 numbers that all fit in bfloat16 count as bfloat16.
    """
    info = torch.finfo(_precision(stored))
    smallest = info.smallest_normal * info.eps
    total = 0.0
    for piece in _pieces(stored):
        exponent = torch.frexp(piece.float()).exponent.double() - 1
        ulp = torch.exp2(exponent).mul_(info.eps).clamp_min_(smallest)
        total += float(torch.where(piece == 0, smallest, ulp).square().sum()) / 12
    return total


def _precision(stored: Tensor) -> torch.dtype:
    if stored.dtype != torch.float32:
        return stored.dtype
    halves = all(bool((piece.contiguous().view(torch.int32) & 0xFFFF == 0).all()) for piece in _pieces(stored))
    return torch.bfloat16 if halves else torch.float32


def _is_small(delta: Tensor, count: int) -> bool:
    return min(delta.shape) <= max(EXACT, count + _OVERSAMPLED)


def _gram(wide: Float[Tensor, "n m"]) -> Float[Tensor, "n n"]:
    """``X Xᵀ`` in float64, a few columns at a time."""
    n, m = wide.shape
    gram = torch.zeros(n, n, dtype=torch.float64, device=wide.device)
    step = max(1, _PIECE // n)
    for start in range(0, m, step):
        part = wide[:, start : start + step].double()
        gram.addmm_(part, part.T)
    return gram


def _range(wide: Float[Tensor, "n m"], count: int, seed: int) -> Float[Tensor, "n k"]:
    """An orthonormal basis that holds nearly all of the leading left singular vectors."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(wide.shape[1], count + _OVERSAMPLED, generator=generator, dtype=torch.float32, device="cpu")
    basis = torch.linalg.qr(wide @ start.to(wide))[0]
    for _ in range(_ITERATIONS):
        basis = torch.linalg.qr(wide @ torch.linalg.qr(wide.T @ basis)[0])[0]
    return basis


def _pieces(values: Tensor) -> Iterator[Tensor]:
    flat = values.reshape(-1)
    for start in range(0, len(flat), _PIECE):
        yield flat[start : start + _PIECE]
