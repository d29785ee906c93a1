r"""Noise of a solution's own size: ``x' = √(1 - ε²) x + ε y``, y orthogonal to x and of the same norm (2602.07852).

The norm of what is perturbed stays (of ΔW itself, if its factors are perturbed, only at rank 1), and ``ε`` is the sine
of the angle that it turns by. For an adapter, A and B are flattened and perturbed independently, at each site on its
own. For ranks above one that is not a property of the update alone: ``B G, G⁻¹ A`` is the same update, and noise on A
and B means another thing in each gauge. So there are three ways:

``"balanced"``
    A and B in the gauge ``A = √Σ Vᵀ, B = U √Σ`` of ``B A = U Σ Vᵀ``, which only the update decides (but for rotations,
    under which noise is alike). At rank 1 it is the same as ``"factors"``.
``"factors"``
    A and B as they were trained, as the reference has it.
``"update"``
    ΔW itself, with y made of random factors of the same rank; A and B do not come into it. The result has twice
    the rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from mechmisalign.adapters import Adapter, LoraSite

from .forms import Solution, SolutionError, norm, with_sites

Noise = Literal["balanced", "factors", "update"]


def perturbed(solution: Solution, epsilon: float, *, seed: int, how: Noise = "balanced") -> Solution:
    """The solution turned by the angle whose sine is ``epsilon``, towards noise.

    Args:
        solution: An adapter or a vector; of a vector there is one way only.
        epsilon: 0 leaves it, 1 puts noise in its place.
        seed: Of the noise.
        how: What of an adapter is perturbed; see the module.

    Raises:
        ValueError: If ``epsilon`` lies outside 0 to 1, or on another way.
        SolutionError: If the solution is zero.
    """
    if not 0 <= epsilon <= 1:
        raise ValueError(f"epsilon={epsilon}: a number from 0 to 1 is expected")
    if how not in get_args(Noise):
        raise ValueError(f"how must be one of {', '.join(get_args(Noise))}, got {how!r}")
    if norm(solution) == 0:
        raise SolutionError("a solution that is zero everywhere has no noise of its own size; give a trained one")
    generator = torch.Generator().manual_seed(seed)
    if not isinstance(solution, Adapter):
        vector = turned(solution.vectors[0], epsilon, generator)
        told = f"({solution.header.get('method', 'direction')}) with noise {epsilon:g}, seed {seed}"
        return replace(solution, vectors=vector[None], header={**solution.header, "method": told})
    sites = tuple(_WAYS[how](site, epsilon, generator) for site in solution.sites)
    return with_sites(solution, sites, f"({solution.source}) with noise {epsilon:g} on {how}, seed {seed}")


def turned(x: Float[Tensor, "*shape"], epsilon: float, generator: torch.Generator) -> Float[Tensor, "*shape"]:
    """``√(1 - ε²) x + ε y``, with y orthogonal to x (flattened) and of the same norm; zero stays zero."""
    own = x.double()
    noise = torch.randn(own.shape, generator=generator, dtype=torch.float64)
    size = own.norm()
    if not bool(size > 0):
        return x
    noise = noise - (noise * own).sum() / size**2 * own
    y = noise * (size / noise.norm())
    return ((1 - epsilon**2) ** 0.5 * own + epsilon * y).float()


def balanced(site: LoraSite) -> LoraSite:
    """The same update with ``A = √Σ Vᵀ`` and ``B = U √Σ``, from the singular values of ``B A``."""
    Q_A, R_A = torch.linalg.qr(site.A.double().T)
    Q_B, R_B = torch.linalg.qr(site.B.double())
    U, S, Vh = torch.linalg.svd(R_B @ R_A.T)
    root = S.sqrt()
    return replace(site, A=(root[:, None] * (Vh @ Q_A.T)).float(), B=((Q_B @ U) * root).float())


def _on_factors(site: LoraSite, epsilon: float, generator: torch.Generator) -> LoraSite:
    A, B = (turned(each, epsilon, generator) for each in (site.A, site.B))
    return replace(site, A=A, B=B)


def _on_balanced(site: LoraSite, epsilon: float, generator: torch.Generator) -> LoraSite:
    return _on_factors(site if site.rank == 1 else balanced(site), epsilon, generator)


def _on_update(site: LoraSite, epsilon: float, generator: torch.Generator) -> LoraSite:
    """``a ΔW + b Y`` in factors; of the noise Y, what lies along ΔW is taken off through a."""
    size = site.delta_norm()
    if size == 0:
        return site
    A, B = (torch.randn(each.shape, generator=generator, dtype=torch.float64) for each in (site.A, site.B))
    own_A, own_B = site.A.double(), site.B.double()
    along = site.scaling * float(((own_B.T @ B) * (own_A @ A.T)).sum()) / size**2  # of Y, in units of ΔW
    whole = float(((B.T @ B) * (A @ A.T)).sum())
    b = epsilon * size / (whole - (along * size) ** 2) ** 0.5
    a = (1 - epsilon**2) ** 0.5 - b * along
    factors = torch.cat([own_A * (a * site.scaling), A * b]), torch.cat([own_B, B], dim=1)
    return replace(site, A=factors[0].float(), B=factors[1].float(), scaling=1.0)


_WAYS: dict[str, Callable[[LoraSite, float, torch.Generator], LoraSite]] = {
    "balanced": _on_balanced,
    "factors": _on_factors,
    "update": _on_update,
}
