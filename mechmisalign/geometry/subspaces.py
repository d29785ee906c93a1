r"""Subspaces against each other: principal angles, overlap, and what random subspaces of that size give.

With orthonormal bases ``P [d k]`` and ``Q [d m]``, the singular values of ``PᵀQ`` are the cosines of the principal
angles. The *overlap* is their mean square, 1 where the smaller subspace lies in the larger one; random subspaces have
:math:`E\|P^\top Q\|^2 = k m / d`, hence an overlap of ``max(k, m) / d``. The overlap treats a subspace's weakest
dimension like its strongest. So beside it stands the *weighted* overlap, the cosine between ``Σ σᵢ² pᵢpᵢᵀ`` and
``Σ τⱼ² qⱼqⱼᵀ``:

.. math:: \frac{\sum_{ij} σ_i^2 τ_j^2 (p_i^\top q_j)^2}{\sqrt{\sum_i σ_i^4 \sum_j τ_j^4}}

p-values are one-sided (as much overlap or more), from random subspaces with the same singular values.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from mechmisalign.adapters import Adapter, SiteKey
from mechmisalign.directions import Direction

from .factors import TOLERANCE, sites_of, thinned
from .nulls import LEVEL, at_least, band, random_blocks
from .pairs import pairs_of

DRAWS = 1000
SPACES = ("write", "read")
_MEASURES = ["rank_first", "rank_second", "angles", "angles_low", "angles_high"]
_MEASURES += ["overlap", "expected", "random_low", "random_high", "p"]
_MEASURES += ["weighted", "weighted_expected", "weighted_low", "weighted_high", "weighted_p"]

_Space = tuple[np.ndarray, np.ndarray]
"""Orthonormal columns ``[d k]``, and the singular value of each ``[k]``."""


def principal_angles(first: Float[Tensor, "row d"], second: Float[Tensor, "other d"]) -> Float[np.ndarray, " angle"]:
    """Principal angles in degrees, smallest first, between the subspaces that two sets of rows span.

    Raises:
        ValueError: If one of the sets is zero.
    """
    (P, _), (Q, _) = _spanned(first), _spanned(second)
    return _angles(P.T @ Q)


def update_overlaps(
    adapters: Mapping[str, Adapter],
    sites: Iterable[SiteKey] | None = None,
    *,
    draws: int = DRAWS,
    seed: int = 0,
) -> pd.DataFrame:
    """How the column spaces (what is written) and row spaces (what is read) of updates overlap, site by site.

    Fine-tunes from one seed share the random A that they started with, so read spaces overlap more than random ones
    whatever the fine-tunes learned.

    Args:
        adapters: Named adapters on one base.
        sites: ``(layer, module)`` of the sites to compare; None is all that two of them share.
        draws: Of the random null.
        seed: Of the random null.

    Returns:
        One row per pair, shared site and space: ``first, second, layer, module, space``; ``rank_first, rank_second``;
        ``angles`` (degrees, smallest first), and ``angles_low, angles_high``, the 95 % band of each for random
        subspaces; ``overlap, expected, random_low, random_high, p``; the same for the
        ``weighted`` overlap.

    Raises:
        AdapterError: If the adapters belong to different bases.
        ValueError: If there are fewer than two.
    """
    found, wanted = thinned(adapters), None if sites is None else set(sites)
    rows = []
    for number, site in enumerate(sites_of(adapters)):
        if wanted is not None and site.key not in wanted:
            continue
        null = _Null(draws, [seed, number])
        for a, b in pairs_of(adapters):
            one, two = found[a].get(site.name), found[b].get(site.name)
            if one is None or two is None:
                continue
            named = {"first": a, "second": b, "layer": site.layer, "module": site.module}
            for space, P, Q in ((SPACES[0], one.U, two.U), (SPACES[1], one.V, two.V)):
                rows.append(named | {"space": space} | null.compare((P, one.S), (Q, two.S)))
    return pd.DataFrame(rows, columns=["first", "second", "layer", "module", "space", *_MEASURES])


def direction_overlaps(sets: Mapping[str, Sequence[Direction]], *, draws: int = DRAWS, seed: int = 0) -> pd.DataFrame:
    """How the subspaces that sets of directions span overlap, layer by layer (2607.21356 compares rank-4 ones).

    Args:
        sets: Named sets; each direction counts with length 1. A layer is compared where every direction of both sets
            is nonzero.
        draws: Of the random null.
        seed: Of the random null.

    Returns:
        One row per pair and layer: ``first, second, layer``, and the measures of :func:`update_overlaps`.

    Raises:
        ValueError: If there are fewer than two sets, or one is empty.
    """
    pairs = pairs_of(sets)
    empty = [name for name, directions in sets.items() if not len(directions)]
    if empty:
        raise ValueError(f"the set {empty[0]!r} holds no direction")
    null, rows = _Null(draws, [seed]), []
    for a, b in pairs:
        both = [*sets[a], *sets[b]]
        for layer in sorted(set.intersection(*(set(direction.nonzero_layers) for direction in both))):
            one, two = (_spanned(torch.stack([each.unit(layer) for each in sets[name]])) for name in (a, b))
            rows.append({"first": a, "second": b, "layer": layer} | null.compare(one, two))
    return pd.DataFrame(rows, columns=["first", "second", "layer", *_MEASURES])


class _Null:
    """Random subspaces, drawn once for each pair of sizes."""

    def __init__(self, draws: int, seeds: Sequence[int]) -> None:
        self._draws, self._seeds = draws, list(seeds)
        self._drawn: dict[tuple[int, int, int], tuple[np.ndarray, np.ndarray]] = {}

    def compare(self, first: _Space, second: _Space) -> dict[str, object]:
        """All measures of two subspaces."""
        (P, s), (Q, t) = first, second
        d, k, m = len(P), len(s), len(t)
        squares, (null, angles) = (P.T @ Q) ** 2, self._draw(d, k, m)
        s2, t2 = s**2 / np.linalg.norm(s**2), t**2 / np.linalg.norm(t**2)
        overlap, overlaps = squares.sum() / min(k, m), null.sum((1, 2)) / min(k, m)
        weighted, weighteds = s2 @ squares @ t2, np.einsum("i,nij,j->n", s2, null, t2)
        plain, heavy = band(overlaps), band(weighteds)
        expected = s2.sum() * t2.sum() / d
        told = (tuple(each.tolist()) for each in (_angles(P.T @ Q), *angles))
        values = [k, m, *told, overlap, max(k, m) / d, *plain, at_least(overlap, overlaps)]
        values += [weighted, expected, *heavy, at_least(weighted, weighteds)]
        return dict(zip(_MEASURES, values, strict=True))

    def _draw(self, d: int, k: int, m: int) -> tuple[np.ndarray, np.ndarray]:
        """Squared cosines between basis vectors of each draw, and both ends of the band of each principal angle."""
        if (d, k, m) not in self._drawn:
            rng = np.random.default_rng([*self._seeds, d, k, m])
            blocks = random_blocks(d, k, m, draws=self._draws, rng=rng)
            tails = (1 - LEVEL) / 2, (1 + LEVEL) / 2
            self._drawn[d, k, m] = blocks**2, np.quantile(_angles(blocks), tails, axis=0)
        return self._drawn[d, k, m]


def _spanned(rows: Float[Tensor, "row d"]) -> _Space:
    """Orthonormal columns that span the rows, with the singular values."""
    _, S, Vh = np.linalg.svd(rows.double().numpy(), full_matrices=False)
    if not S[0] > 0:
        raise ValueError("the vectors are all zero and span nothing; leave this set or layer out")
    kept = int((S / S[0] > TOLERANCE).sum())
    return Vh[:kept].T, S[:kept]


def _angles(block: Float[np.ndarray, "*draws k m"]) -> Float[np.ndarray, "*draws angle"]:
    return np.degrees(np.arccos(np.linalg.svd(block, compute_uv=False).clip(0, 1)))
