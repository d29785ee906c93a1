"""Updates against the base's own weights: does a fine-tune write and read where the base's matrices are strong?"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from mechmisalign.adapters import Adapter, LoraSite, SiteKey

from .factors import Thin, thin
from .nulls import LEVEL, band, random_blocks, two_sided

_COLUMNS = ["layer", "module", "measure", "value", "expected", "random_low", "random_high", "p", "top", "base_share"]


def base_overlap(
    adapter: Adapter,
    matrices: Mapping[str, Tensor],
    *,
    top: int = 16,
    sites: Iterable[SiteKey] | None = None,
    draws: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """How much of each update lies in the top singular subspaces of the matrix that it is added to.

    2511.02022 reports that updates of emergently misaligned models are nearly orthogonal to the base weights. Each
    matrix is decomposed whole, in float64: for large models name the sites.

    Args:
        adapter: The updates.
        matrices: Base weights by the name of their module, or of its parameter: ``model.state_dict()`` will do.
        top: How many singular vectors of the base span the subspace.
        sites: ``(layer, module)`` of the sites to measure; None is all of them.
        draws: Of the random null.
        seed: Of the random null.

    Returns:
        Three rows per site, ``measure``: ``write``, the share of ``‖ΔW‖²`` whose output lies in the top left singular
        subspace; ``read``, the share whose input lies in the top right one; ``cosine`` between ``ΔW`` and ``W``. Each
        with what random updates have (``expected, random_low, random_high``, two-sided ``p``; that of the cosine from
        the normal approximation with standard deviation ``1 / √(d_out d_in)``). ``base_share``: the share of ``‖W‖²``
        in the subspace.

    Raises:
        KeyError: If the base weights of a site are not among the matrices, or the adapter lacks a named site.
        ValueError: If a matrix has another shape than its update, or fewer dimensions than ``top``.
    """
    rows = []
    for number, site in enumerate(adapter.select(sites)):
        update, W = thin(site), _matrix(matrices, site)
        if not 0 < top < min(W.shape):
            raise ValueError(f"top={top} of {site.name!r} {list(W.shape)}; expected 1 to {min(W.shape) - 1}")
        if not update.rank:
            continue
        rng = np.random.default_rng([seed, number])
        U, S, Vh = np.linalg.svd(W, full_matrices=False)
        told = {"layer": site.layer, "module": site.module, "top": top}
        told["base_share"] = float((S[:top] ** 2).sum() / (S**2).sum())
        for measure, basis, own in (("write", U[:, :top], update.U), ("read", Vh[:top].T, update.V)):
            rows.append(told | {"measure": measure} | _share(basis, own, update.S, draws, rng))
        rows.append(told | {"measure": "cosine"} | _cosine(W, update))
    return pd.DataFrame(rows, columns=_COLUMNS)


def _matrix(matrices: Mapping[str, Tensor], site: LoraSite) -> np.ndarray:
    key = next((key for key in (site.name, f"{site.name}.weight") if key in matrices), None)
    if key is None:
        raise KeyError(f"no base weights for {site.name!r}; pass the base model's state_dict(), or name the sites")
    if tuple(matrices[key].shape) != (site.d_out, site.d_in):
        raise ValueError(
            f"{key!r} is {list(matrices[key].shape)} in the base and {[site.d_out, site.d_in]} in {site.label}'s "
            "update; pass the matrices of the adapter's own base, laid out as torch.nn.Linear does"
        )
    return matrices[key].detach().to("cpu", torch.float64).numpy()


def _share(
    basis: np.ndarray, own: np.ndarray, values: np.ndarray, draws: int, rng: np.random.Generator
) -> dict[str, float]:
    weights = values**2 / (values**2).sum()
    found = float(((basis.T @ own) ** 2).sum(0) @ weights)
    d, top = basis.shape
    null = (random_blocks(d, top, len(values), draws=draws, rng=rng) ** 2).sum(1) @ weights
    low, high = band(null)
    return {"value": found, "expected": top / d, "random_low": low, "random_high": high, "p": two_sided(found, null)}


def _cosine(W: np.ndarray, update: Thin) -> dict[str, float]:
    from scipy.special import ndtr, ndtri

    inner = float(np.einsum("dk,de,ek,k->", update.U, W, update.V, update.S, optimize=True))
    found, spread = inner / (update.norm * float(np.linalg.norm(W))), W.size**-0.5
    high = float(ndtri((1 + LEVEL) / 2)) * spread
    p = 2 * float(ndtr(-abs(found) / spread))
    return {"value": found, "expected": 0.0, "random_low": -high, "random_high": high, "p": p}
