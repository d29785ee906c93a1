r"""Decomposition: an adapter taken apart, site by site and layer by layer.

A site reads scalars ``s = A x`` (one per rank) from its matrix's input and writes the contribution ``scaling · B s``.
Everything here follows from scalars and factors: with ``G = scaling² BᵀB`` the norm of a contribution is
:math:`\sqrt{s^\top G s}`, and its component along a unit vector ``v̂`` is ``(scaling · Bᵀ v̂) · s``. So a pass needs to
keep ``tokens x coordinates`` numbers, never a vector of width ``d_mlp`` or ``d_model`` per token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from .adapters import Adapter, LoraSite
from .directions import Direction
from .geometry.nulls import random_cosine

MEASURES = ("norm", "share", "projection", "cosine")


def anatomy(adapter: Adapter) -> pd.DataFrame:
    """What each site of an adapter is, from its own files alone.

    Returns:
        One row per site: ``layer, module, rank, scaling``; ``norm_A, norm_B`` (Frobenius norms of the factors, in the
        SVD gauge where the rank is more than one); ``norm_delta`` (of ``ΔW``); ``singular_values`` (of ``ΔW``, largest
        first); ``stable_rank`` (``‖ΔW‖² / σ₁²``, between 1 and the rank; 0 for a zero update); ``share`` (of the sum of
        ``‖ΔW‖²`` over all sites).
    """
    rows = []
    for site in adapter.sites:
        values = site.singular_values()
        energy = float(values.square().sum())
        raw = site.rank == 1
        rows.append(
            {
                "layer": site.layer,
                "module": site.module,
                "rank": site.rank,
                "scaling": site.scaling,
                "norm_A": float(site.A.double().norm()) if raw else site.rank**0.5,
                "norm_B": float(site.B.double().norm()) if raw else energy**0.5 / abs(site.scaling),
                "norm_delta": energy**0.5,
                "singular_values": tuple(values.tolist()),
                "stable_rank": energy / float(values[0]) ** 2 if energy else 0.0,
            }
        )
    table = pd.DataFrame(rows)
    total = float((table["norm_delta"] ** 2).sum())
    return table.assign(share=table["norm_delta"] ** 2 / total if total else 0.0)


def written(site: LoraSite, scalars: Float[Tensor, "token rank"]) -> Float[Tensor, "token d_out"]:
    """The contributions ``scaling · B (A x)`` themselves, from scalars in the gauge of ``site.gauged``."""
    return scalars @ (site.scaling * site.gauged.B).T.to(scalars)


@dataclass(frozen=True, eq=False)
class Contributions:
    """What each site writes at each token, kept as scalars and measured on demand.

    Sites that write to the residual stream also have a ``share`` (norm over the norm of the residual stream behind
    their block), a ``projection`` on the direction's unit vector of their layer, and a ``cosine`` with it. Elsewhere,
    and where the direction is zero, these are NaN.

    Attributes:
        scalars: One row per token (index ``conversation, position``), one column per coordinate.
        sites: The sites, in the order of the columns.
        resid_norm: Norm of the residual stream, one column per layer, under the same index.
        direction: What contributions are compared with; None for norms and shares only.
        residual: Whether outputs of attention and MLP go to the residual stream as they are (no norm behind them).
    """

    scalars: pd.DataFrame
    sites: tuple[LoraSite, ...]
    resid_norm: pd.DataFrame
    direction: Direction | None = None
    residual: bool = True

    def vectors(self, layer: int, module: str) -> Float[Tensor, "token d_out"]:
        """The contributions of one site, exactly: one row per token."""
        for site in self.sites:
            if site.key == (layer, module):
                return written(site, self._scalars_of(site))
        raise KeyError(f"no site {module!r} in layer {layer}; there are {[site.label for site in self.sites]}")

    def frame(self) -> pd.DataFrame:
        """One row per token and site: ``conversation, position, layer, module, norm, share, projection, cosine``."""
        return self._long((site.layer, site.module, [site]) for site in self.sites)

    def by_layer(self) -> pd.DataFrame:
        """As :meth:`frame`, with what all sites of a layer write to the residual stream summed as vectors."""
        return self._long((layer, "all", group) for layer, group in self._writers())

    def mean(self, labels: Sequence[object] | pd.Series | None = None, *, summed: bool = False) -> pd.DataFrame:
        """Means over tokens for each site.

        Args:
            labels: A label for each conversation (row of the frame that was read), to average apart.
            summed: Sum the sites of a layer first, as :meth:`by_layer` does.

        Returns:
            ``layer, module, norm, share, projection, cosine, tokens``, and ``label`` if labels were given.
        """
        rows = self.scalars.index.get_level_values("conversation")
        named = np.zeros(len(rows)) if labels is None else np.asarray(labels, dtype=object)[rows]
        groups = (
            ((layer, "all", group) for layer, group in self._writers())
            if summed
            else ((site.layer, site.module, [site]) for site in self.sites)
        )
        means = []
        for layer, module, group in groups:
            measures = pd.DataFrame(self._measures(group)).assign(label=named)
            grouped = measures.groupby("label", sort=False, observed=True)
            mean = grouped[list(MEASURES)].mean().assign(tokens=grouped.size()).reset_index()
            means.append(mean.assign(layer=layer, module=module))
        table = pd.concat(means, ignore_index=True)[["label", "layer", "module", *MEASURES, "tokens"]]
        return table.drop(columns="label") if labels is None else table

    def features(self, measure: str = "projection") -> pd.DataFrame:
        """One row per token, one column per site: features for a probe."""
        if measure not in MEASURES:
            raise ValueError(f"measure must be one of {MEASURES}, got {measure!r}")
        return pd.DataFrame(
            {site.label: self._measures([site])[measure] for site in self.sites}, index=self.scalars.index
        )

    def _long(self, groups: Iterator[tuple[int, str, list[LoraSite]]]) -> pd.DataFrame:
        index = self.scalars.index.to_frame(index=False)
        parts = [index.assign(layer=layer, module=module, **self._measures(group)) for layer, module, group in groups]
        columns = ["conversation", "position", "layer", "module", *MEASURES]
        return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=columns)

    def _writers(self) -> Iterator[tuple[int, list[LoraSite]]]:
        writers = [site for site in self.sites if site.writes_to_residual and self.residual]
        for layer in sorted({site.layer for site in writers}):
            yield layer, [site for site in writers if site.layer == layer]

    def _scalars_of(self, site: LoraSite) -> Tensor:
        return torch.from_numpy(self.scalars[list(site.coordinates)].to_numpy(np.float32, copy=True))

    def _measures(self, group: list[LoraSite]) -> dict[str, np.ndarray]:
        """Norm, share, projection and cosine of what the sites write together, ``[token]`` each, in float64."""
        s = torch.cat([self._scalars_of(site) for site in group], dim=1).double()
        W = torch.cat([site.scaling * site.gauged.B.double() for site in group], dim=1)
        norm = ((s @ (W.T @ W)) * s).sum(1).clamp_min(0).sqrt()
        nothing = torch.full_like(norm, torch.nan)
        share = projection = cosine = nothing
        layer = group[0].layer
        if self.residual and group[0].writes_to_residual:
            share = norm / torch.from_numpy(self.resid_norm[layer].to_numpy(np.float64, copy=True))
            if self.direction is not None and layer in self.direction.nonzero_layers:
                projection = s @ (W.T @ self.direction.unit(layer).double())
                cosine = projection / norm
        return {name: values.numpy() for name, values in zip(MEASURES, (norm, share, projection, cosine), strict=True)}


def written_cosines(adapter: Adapter, direction: Direction) -> pd.DataFrame:
    """Cosine between what each residual-writing site can write and the direction of its layer (2506.11618, appendix D).

    For rank 1 this is ``cos(B, v)``; for more, the cosine between ``v`` and the column space of B (that of its largest
    angle-minimising member, never negative).

    Returns:
        ``layer, module, cosine, random_low, random_high``: the last two hold 95 % of the cosines of random vectors.
    """
    rows = []
    for site in adapter.sites:
        if not site.writes_to_residual or site.layer not in direction.nonzero_layers:
            continue
        unit = direction.unit(site.layer).double()
        if site.rank == 1:
            column = site.B[:, 0].double()
            cosine = float(unit @ column / column.norm())
        else:
            cosine = float((torch.linalg.qr(site.B.double())[0].T @ unit).norm())
        _, low, high = random_cosine(site.d_out, site.rank)
        rows.append(
            {"layer": site.layer, "module": site.module, "cosine": cosine, "random_low": low, "random_high": high}
        )
    return pd.DataFrame(rows, columns=["layer", "module", "cosine", "random_low", "random_high"])
