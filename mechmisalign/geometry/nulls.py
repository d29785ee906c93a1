r"""What chance gives: cosines of random vectors, and random subspaces, without drawing anything of full width.

Cosines between an orthonormal frame of ``k`` vectors and a random one of ``m`` in ``d`` dimensions are a ``k x m``
block of a random orthogonal matrix. With ``G`` Gaussian ``[d m]``, ``Q = G L⁻ᵀ`` (``L Lᵀ = GᵀG``) is such a frame; its
first ``k`` rows need only those rows of ``G``, and a Wishart matrix with ``d - k`` degrees of freedom for the rest of
``GᵀG``, which Bartlett's decomposition draws as an ``m x m`` triangle. So a draw costs the same for any width.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float
from scipy import special

LEVEL = 0.95
"""Of all bands."""


def random_cosine(width: int, rank: int = 1) -> tuple[float, float, float]:
    """Cosine of a random vector with a line (rank 1, signed) or a subspace (never negative).

    Returns:
        Expected ``|cosine|``, and the ends of the band that holds 95 % of the cosines. The squared cosine follows a
        Beta distribution with ``rank / 2`` and ``(width - rank) / 2``.

    Raises:
        ValueError: If the subspace does not fit into the space.
    """
    if not 1 <= rank < width:
        raise ValueError(f"a subspace of rank {rank} in {width} dimensions; a rank from 1 to {width - 1} is expected")
    half = rank / 2, (width - rank) / 2
    mean = np.exp(special.betaln(half[0] + 0.5, half[1]) - special.betaln(*half))
    if rank == 1:
        high = float(np.sqrt(special.betaincinv(*half, LEVEL)))
        return float(mean), -high, high
    low, high = np.sqrt(special.betaincinv(*half, np.array([(1 - LEVEL) / 2, (1 + LEVEL) / 2])))
    return float(mean), float(low), float(high)


def random_blocks(
    width: int, k: int, m: int, *, draws: int, rng: np.random.Generator
) -> Float[np.ndarray, "draws k m"]:
    """Inner products of a fixed orthonormal frame of ``k`` vectors with ``draws`` random ones of ``m``.

    Raises:
        ValueError: If a frame has more vectors than the space has dimensions.
    """
    if max(k, m) > width:
        raise ValueError(f"{max(k, m)} orthonormal vectors do not fit into {width} dimensions")
    if width - k < m:  # too few rows left for the triangle: draw the whole frame
        Q, R = np.linalg.qr(rng.standard_normal((draws, width, m)))
        signs = np.sign(np.diagonal(R, axis1=1, axis2=2))
        return (Q * signs[:, None])[:, :k]
    top = rng.standard_normal((draws, k, m))
    rest = np.tril(rng.standard_normal((draws, m, m)), -1)
    degrees = width - k - np.arange(m)
    rest[:, np.arange(m), np.arange(m)] = np.sqrt(rng.chisquare(degrees, (draws, m)))
    gram = top.swapaxes(1, 2) @ top + rest @ rest.swapaxes(1, 2)
    return np.linalg.solve(np.linalg.cholesky(gram), top.swapaxes(1, 2)).swapaxes(1, 2)


def band(null: Float[np.ndarray, " draws"]) -> tuple[float, float]:
    """The ends of the central 95 % of the draws."""
    low, high = np.quantile(null, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def at_least(value: float, null: Float[np.ndarray, " draws"]) -> float:
    """Monte-Carlo p-value of a value so large: ``(1 + draws that reach it) / (1 + draws)``, so never 0."""
    return float((1 + np.sum(null >= value * (1 - 1e-12))) / (1 + len(null)))


def two_sided(value: float, null: Float[np.ndarray, " draws"]) -> float:
    """Twice the smaller of both one-sided Monte-Carlo p-values, at most 1."""
    tails = at_least(value, null), float((1 + np.sum(null <= value)) / (1 + len(null)))
    return min(1.0, 2 * min(tails))
