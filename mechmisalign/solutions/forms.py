"""What a solution is: an adapter or a learned steering vector, its norm, and its kin of other norms and directions.

The effective norm of an adapter is that of its updates, ``‖ΔW‖_F``: over all sites (:func:`norm`), site by site
(:func:`norms_by_site`), or averaged over the adapted matrices (:func:`mean_norm`, as the code of 2602.07852 has it).
Norms can be compared between solutions of one form: vectors of one layer, or adapters of the same matrices.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch

from mechmisalign.adapters import Adapter, LoraSite
from mechmisalign.correction.projection import sites_digest
from mechmisalign.directions import Direction, random_direction
from mechmisalign.interventions import Steer, UseAdapter

Solution = Adapter | Direction
"""What training found: an adapter, or a steering vector of one layer."""
Worn = tuple[UseAdapter | Steer, ...]
"""Interventions that make the chat model wear a solution."""


class SolutionError(ValueError):
    """A solution cannot be measured, or not be compared with another."""


def worn(solution: Solution, scale: float = 1.0) -> Worn:
    """The solution as a condition of the chat model (inside ``organism.as_base()``).

    Args:
        solution: An adapter, or a direction of one layer.
        scale: Factor of what was trained; negative ones turn it round.

    Raises:
        SolutionError: If a direction has several layers.
    """
    if isinstance(solution, Adapter):
        return (UseAdapter(solution, scale),)
    return (Steer(solution, layers=[_layer(solution)], strength=scale),)


def norm(solution: Solution) -> float:
    """Frobenius norm of all updates together, ``√(Σ‖ΔW‖²)``; Euclidean norm of a vector.

    Raises:
        SolutionError: If a direction has several layers.
    """
    return math.sqrt(sum(value**2 for value in norms_by_site(solution).values()))


def mean_norm(solution: Solution) -> float:
    """Mean of ``‖ΔW‖_F`` over the adapted matrices (2602.07852); the norm itself of a vector."""
    found = norms_by_site(solution)
    return sum(found.values()) / len(found)


def norms_by_site(solution: Solution) -> dict[str, float]:
    """``‖ΔW‖_F`` of each adapted matrix by its label, such as ``"3.down_proj"``; of a vector, one of ``"3.vector"``."""
    if isinstance(solution, Adapter):
        return {site.label: site.delta_norm() for site in solution.sites}
    layer = _layer(solution)
    return {f"{layer}.vector": solution.norm(layer)}


def random_like(solution: Solution, *, seed: int) -> Solution:
    """The control: a random vector, or random A and B at every site, whose norm at each site is the solution's.

    Args:
        solution: What it is to resemble.
        seed: Of the draw.
    """
    if isinstance(solution, Direction):
        _layer(solution)
        return random_direction(solution, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    sites = tuple(_random_site(site, generator) for site in solution.sites)
    return with_sites(solution, sites, f"random, norms of ({solution.source}), seed {seed}")


def with_sites(adapter: Adapter, sites: tuple[LoraSite, ...], source: str) -> Adapter:
    """An adapter in memory with other factors, ranks included, in the same matrices."""
    return replace(adapter, sites=sites, source=source, revision=None, digest=sites_digest(sites), folder=None)


def check_comparable(solutions: Mapping[str, Solution]) -> None:
    """Refuse solutions whose norms mean different things.

    Raises:
        SolutionError: If there is none, one is zero, or their forms differ.
    """
    if not solutions:
        raise SolutionError("no solution to measure; give a mapping of names to adapters or directions")
    forms = {name: frozenset(norms_by_site(each)) for name, each in solutions.items()}
    first, form = next(iter(forms.items()))
    for name, other in forms.items():
        if other != form:
            raise SolutionError(
                f"{first!r} changes {_told(form)} and {name!r} {_told(other)}, so their norms cannot be compared; give "
                "solutions of one form: vectors of one layer, or adapters of the same matrices"
            )
        if norm(solutions[name]) == 0:
            raise SolutionError(f"{name!r} is zero everywhere, so it has no norm to scale; give a trained solution")


def _layer(direction: Direction) -> int:
    if len(direction.layers) != 1:
        raise SolutionError(
            f"a direction of layers {list(direction.layers)}; a learned vector has one. Take one layer of it: "
            "direction.everywhere(layer, [layer])"
        )
    return direction.layers[0]


def _random_site(site: LoraSite, generator: torch.Generator) -> LoraSite:
    A, B = (torch.randn(each.shape, generator=generator, dtype=torch.float64) for each in (site.A, site.B))
    A = A * (site.A.double().norm() / A.norm())
    drawn = replace(site, A=A.float(), B=B.float())
    return replace(drawn, B=(B * (site.delta_norm() / drawn.delta_norm())).float())


def _told(form: Iterable[str]) -> str:
    labels = sorted(form)
    return ", ".join(labels[:3]) + (f" and {len(labels) - 3} more" if len(labels) > 3 else "")
