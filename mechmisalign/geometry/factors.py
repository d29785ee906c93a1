"""Updates as thin singular value decompositions of their sites, which is all that the comparisons need."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float

from mechmisalign.adapters import Adapter, AdapterError, LoraSite
from mechmisalign.combining import one_base

TOLERANCE = 1e-6
"""Singular values below this share of the largest are rounding of float32 factors."""


@dataclass(frozen=True, eq=False)
class Thin:
    """``U diag(S) Vᵀ`` without its zero singular values.

    Attributes:
        U: Orthonormal columns, ``[d_out k]``, float64: what the update writes.
        S: Singular values, largest first.
        V: Orthonormal columns, ``[d_in k]``: what it reads.
    """

    U: Float[np.ndarray, "d_out k"]
    S: Float[np.ndarray, " k"]
    V: Float[np.ndarray, "d_in k"]

    @property
    def norm(self) -> float:
        """Frobenius norm."""
        return float(np.linalg.norm(self.S))

    @property
    def rank(self) -> int:
        """Number of singular values that are not zero."""
        return len(self.S)

    @property
    def shape(self) -> tuple[int, int]:
        """``d_out, d_in``."""
        return len(self.U), len(self.V)


def thin(site: LoraSite) -> Thin:
    """The decomposition of ``scaling · B A`` from the factors, in float64."""
    Q_A, R_A = torch.linalg.qr(site.A.double().T)
    Q_B, R_B = torch.linalg.qr(site.B.double())
    U, S, Vh = torch.linalg.svd(site.scaling * (R_B @ R_A.T), full_matrices=False)
    kept = int((S / S[0] > TOLERANCE).sum()) if bool(S[0] > 0) else 0
    return Thin((Q_B @ U)[:, :kept].numpy(), S[:kept].numpy(), (Q_A @ Vh.T)[:, :kept].numpy())


def thinned(adapters: Mapping[str, Adapter]) -> dict[str, dict[str, Thin]]:
    """Name -> site name -> its decomposition; zero updates are left out.

    Raises:
        AdapterError: If the adapters belong to different bases, or to different shapes of one matrix.
    """
    one_base(adapters.values())
    found = {
        name: {site.name: each for site in adapter.sites if (each := thin(site)).rank}
        for name, adapter in adapters.items()
    }
    shapes: dict[str, tuple[int, int]] = {}
    for sites in found.values():
        for site, each in sites.items():
            if shapes.setdefault(site, each.shape) != each.shape:
                raise AdapterError(f"{site!r} has the shapes {shapes[site]} and {each.shape}; one base has one shape")
    return found


def sites_of(adapters: Mapping[str, Adapter]) -> list[LoraSite]:
    """One site of each adapted matrix, ordered by layer and module."""
    known = {site.name: site for adapter in adapters.values() for site in adapter.sites}
    return sorted(known.values(), key=lambda site: (site.layer, site.module, site.name))


def inner(first: Thin, second: Thin) -> float:
    """``<ΔW₁, ΔW₂>``: the trace of ``ΔW₁ᵀ ΔW₂``."""
    return float(first.S @ ((first.U.T @ second.U) * (first.V.T @ second.V)) @ second.S)
