r"""Cosines between updates of weights, from their factors alone.

``<ΔW₁, ΔW₂> = tr(ΔW₁ᵀ ΔW₂)`` needs inner products of columns of B and of rows of A only, so no dense matrix is built
(2511.02022 finds cosines of 0.25 to 0.35 between fine-tunes of different domains).

The random null turns what one of them writes and reads at each site at random, and keeps its singular values: its
cosines have mean 0 and, at one site, the standard deviation :math:`1 / \sqrt{d_{out} d_{in}}`. Fine-tunes that started
from one seed share the random A that they started with, which alone lifts them above this null. So compare with a
harmless fine-tune of the same recipe as well, or train from other seeds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Float

from mechmisalign.adapters import Adapter, LoraSite

from .factors import Thin, inner, sites_of, thinned
from .nulls import band, random_blocks, two_sided
from .pairs import pairs_of

DRAWS = 1000
_OVERALL = ["first", "second", "sites", "cosine", "random_low", "random_high", "p", "shared_first", "shared_second"]
_OVERALL += ["whole", "whole_low", "whole_high"]
_BY_SITE = ["first", "second", "layer", "module", "cosine", "random_low", "random_high", "p"]


def update_cosines(adapters: Mapping[str, Adapter], *, draws: int = DRAWS, seed: int = 0) -> pd.DataFrame:
    """Cosine between whole updates of each pair of adapters, over the sites that both have.

    Args:
        adapters: Named adapters on one base.
        draws: Of the random null.
        seed: Of the random null.

    Returns:
        One row per pair: ``first, second``; ``sites``, how many both have; ``cosine`` over these, with the 95 % band
        ``random_low, random_high`` and the two-sided p-value ``p`` of random updates with the same singular values;
        ``shared_first, shared_second``: the share of each one's ``‖ΔW‖²`` that lies in shared sites; ``whole``: the
        cosine where a site that one of them lacks counts as zero, with its band ``whole_low, whole_high``. NaN where
        nothing is shared.

    Raises:
        AdapterError: If the adapters belong to different bases.
        ValueError: If there are fewer than two.
    """
    found = thinned(adapters)
    total = {name: sum(each.norm**2 for each in sites.values()) for name, sites in found.items()}
    met: dict[tuple[str, str], list[_Met]] = {pair: [] for pair in pairs_of(adapters)}
    for each in _meetings(adapters, found, draws, seed):
        met[each.pair].append(each)
    rows = [_overall(pair, each, total) for pair, each in met.items()]
    return pd.DataFrame(rows, columns=_OVERALL)


def site_update_cosines(adapters: Mapping[str, Adapter], *, draws: int = DRAWS, seed: int = 0) -> pd.DataFrame:
    """Cosine between updates of one matrix, for each pair of adapters and each site that both have.

    Args:
        adapters: Named adapters on one base.
        draws: Of the random null.
        seed: Of the random null.

    Returns:
        ``first, second, layer, module, cosine, random_low, random_high, p``, as in :func:`update_cosines`.

    Raises:
        AdapterError: If the adapters belong to different bases.
        ValueError: If there are fewer than two.
    """
    rows = []
    for met in _meetings(adapters, thinned(adapters), draws, seed):
        size = met.norms[0] * met.norms[1]
        low, high = band(met.null / size)
        rows.append(
            {"first": met.pair[0], "second": met.pair[1], "layer": met.site.layer, "module": met.site.module}
            | {"cosine": met.inner / size, "random_low": low, "random_high": high}
            | {"p": two_sided(met.inner, met.null)}
        )
    return pd.DataFrame(rows, columns=_BY_SITE)


@dataclass(frozen=True, eq=False)
class _Met:
    """Two updates of one matrix: their inner product, and what it is when one of them is turned at random."""

    pair: tuple[str, str]
    site: LoraSite
    inner: float
    norms: tuple[float, float]
    null: Float[np.ndarray, " draws"]


def _meetings(
    adapters: Mapping[str, Adapter], found: Mapping[str, Mapping[str, Thin]], draws: int, seed: int
) -> Iterator[_Met]:
    pairs = pairs_of(adapters)
    for number, site in enumerate(sites_of(adapters)):
        turned: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = {}  # for the ranks of this site's pairs
        for pair in pairs:
            first, second = (found[name].get(site.name) for name in pair)
            if first is None or second is None:
                continue
            ranks = first.rank, second.rank
            if ranks not in turned:
                rng = np.random.default_rng([seed, number, *ranks])  # sites are turned independently of each other
                written, read = (random_blocks(d, *ranks, draws=draws, rng=rng) for d in first.shape)
                turned[ranks] = written, read
            null = np.einsum("i,nij,nij,j->n", first.S, *turned[ranks], second.S, optimize=True)
            yield _Met(pair, site, inner(first, second), (first.norm, second.norm), null)


def _overall(pair: tuple[str, str], met: list[_Met], total: Mapping[str, float]) -> dict[str, object]:
    row: dict[str, object] = {"first": pair[0], "second": pair[1], "sites": len(met)}
    if not met:
        nothing = dict.fromkeys(("cosine", "random_low", "random_high", "p"), np.nan)
        whole = dict.fromkeys(("whole", "whole_low", "whole_high"), np.nan)
        return row | nothing | {"shared_first": 0.0, "shared_second": 0.0} | whole
    inner_all, null = sum(each.inner for each in met), np.sum([each.null for each in met], axis=0)
    shared = [sum(each.norms[i] ** 2 for each in met) for i in (0, 1)]
    size = float(np.sqrt(shared[0] * shared[1]))
    low, high = band(null / size)
    row |= {"cosine": inner_all / size, "random_low": low, "random_high": high, "p": two_sided(inner_all, null)}
    row |= {"shared_first": shared[0] / total[pair[0]], "shared_second": shared[1] / total[pair[1]]}
    everything = float(np.sqrt(total[pair[0]] * total[pair[1]]))
    parts = inner_all / everything, low * size / everything, high * size / everything
    return row | dict(zip(("whole", "whole_low", "whole_high"), parts, strict=True))
