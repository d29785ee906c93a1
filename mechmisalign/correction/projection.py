"""A direction projected out of what an adapter writes.

A site that writes to the residual stream adds ``scaling · B (A x)``. With the unit vector v̂ of its layer,
``B' = (I - v̂ v̂ᵀ) B`` makes it write the same without its component along v̂, exactly, and nothing else changes
(2506.11618, section 3.5 and appendix D). The norm of B is not restored: the reference code stretches each column back
to its old length, which makes what is left of the update stronger than it was trained.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace

import pandas as pd
import torch
from jaxtyping import Float64
from torch import Tensor

from mechmisalign import models
from mechmisalign._blocks import has_post_norms
from mechmisalign._layers import layer_numbers
from mechmisalign.adapters import RESIDUAL_WRITERS, Adapter, AdapterError, LoraSite
from mechmisalign.directions import Direction
from mechmisalign.loading import bases
from mechmisalign.organisms import Organism


def project_out(
    adapter: Adapter | Organism,
    direction: Direction,
    layers: Sequence[int] | None = None,
    *,
    restore_column_norms: bool = False,
) -> Adapter:
    """The adapter with a direction projected out of everything that it writes to the residual stream.

    Each site uses the vector of its own layer; for one vector everywhere, pass ``direction.everywhere(layer)``. Sites
    that write elsewhere (queries, the MLP's inside …) stay as they are. The chat model's own weights still write the
    direction: for a model that cannot, see :func:`corrected_model`.

    Args:
        adapter: The adapter, or an organism, whose base is then compared by fingerprint instead of by name.
        direction: What to remove.
        layers: Layers whose sites are edited; all by default.
        restore_column_norms: Stretch each column of B back to its old length, as the reference code of 2506.11618 does.
            What is left of the update is then stronger than it was trained; it is for comparison.

    Returns:
        An adapter in memory on the same base, with the same ranks and scalings; ``save_adapter`` writes it.

    Raises:
        DirectionMismatchError: If the direction belongs to another base, width or depth.
        AdapterError: If no site writes to the residual stream there, the direction is zero at one of these sites, or a
            norm stands between the matrices and the stream (Gemma 2 and 3), so that B is not what is written.

    Example:
        >>> cured = project_out(Adapter.load("pocket/medical"), direction)  # doctest: +SKIP
        >>> removed_share(Adapter.load("pocket/medical"), direction)["removed"]  # doctest: +SKIP
    """
    own = adapter.require_adapter("taking a direction out of an adapter") if isinstance(adapter, Organism) else adapter
    _refuse_unfit(adapter, direction)
    chosen = {site.name for site in _writers(own, direction, layers)}
    sites = tuple(
        _without(site, unit_vector(direction, site.layer), restore_column_norms) if site.name in chosen else site
        for site in own.sites
    )
    source = f"{own.source} without ({direction.header.get('method', 'direction')})"
    return replace(own, sites=sites, source=source, revision=None, digest=sites_digest(sites), folder=None)


def removed_share(
    adapter: Adapter | Organism, direction: Direction, layers: Sequence[int] | None = None
) -> pd.DataFrame:
    """How much of each update :func:`project_out` takes away.

    What is removed is orthogonal to what is left, so ``‖ΔW‖² = ‖v̂ᵀΔW‖² + ‖ΔW'‖²``. A share near 1 means that the edit
    is close to taking the site out altogether, and says little about the direction.

    Returns:
        One row per edited site: ``layer, module, delta_norm``, ``left_norm`` (of ΔW'), ``removed``: the share of the
        squared norm, 0 to 1, and ``chance``: what a random direction takes on average, 1 / d_model.

    Raises:
        AdapterError: As :func:`project_out`.
    """
    own = adapter.require_adapter("taking a direction out of an adapter") if isinstance(adapter, Organism) else adapter
    rows = []
    for site in _writers(own, direction, layers):
        left, norm = _without(site, unit_vector(direction, site.layer), False).delta_norm(), site.delta_norm()
        removed = 1 - (left / norm) ** 2 if norm else 0.0
        told = {"layer": site.layer, "module": site.module, "delta_norm": norm, "left_norm": left}
        rows.append(told | {"removed": min(max(removed, 0.0), 1.0), "chance": 1 / site.d_out})
    return pd.DataFrame(rows)


def unit_vector(direction: Direction, layer: int) -> Float64[Tensor, " d_model"]:
    """The unit vector of a layer in float64: ``Direction.unit`` rounds to float32, which an exact projection shows."""
    direction.unit(layer)  # refuses zero
    vector = direction.at(layer).double()
    return vector / vector.norm()


def sites_digest(sites: Sequence[LoraSite]) -> str:
    """SHA-256 of the sites of an adapter that lives only in memory."""
    digest = hashlib.sha256()
    for site in sites:
        digest.update(f"{site.name} {site.scaling!r}".encode())
        for factor in (site.A, site.B):
            digest.update(factor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _without(site: LoraSite, unit: Float64[Tensor, " d_model"], restore_norms: bool) -> LoraSite:
    B = site.B.double()
    left = B - torch.outer(unit, unit @ B)
    if restore_norms:
        left = left * (B.norm(dim=0) / left.norm(dim=0).clamp_min(1e-30))
    return replace(site, B=left.float())


def _writers(adapter: Adapter, direction: Direction, layers: Sequence[int] | None) -> tuple[LoraSite, ...]:
    """The sites that are edited; where the direction has no vector, leaving one out in silence would be half a cure."""
    within = set(adapter.layers if layers is None else layer_numbers(layers))
    unknown = sorted(within - set(adapter.layers))
    if unknown:
        raise AdapterError(
            f"no site in layers {unknown}; {adapter.source!r} has sites in layers {list(adapter.layers)}"
        )
    writers = tuple(site for site in adapter.sites if site.writes_to_residual and site.layer in within)
    if not writers:
        raise AdapterError(
            f"nothing of {adapter.source!r} writes to the residual stream in layers {sorted(within)}: its modules are "
            f"{list(adapter.modules)}, and only {RESIDUAL_WRITERS} do; ablate at inference, or edit the whole model"
        )
    bare = sorted({site.layer for site in writers} - set(direction.nonzero_layers))
    if bare:
        raise AdapterError(
            f"the direction has no vector, or a zero one, at layers {bare}, where {adapter.source!r} writes; it is "
            f"nonzero at {list(direction.nonzero_layers)}: pass layers= among these, or one vector with "
            "direction.everywhere(…)"
        )
    return writers


def _refuse_unfit(adapter: Adapter | Organism, direction: Direction) -> None:
    if isinstance(adapter, Organism):
        model = adapter.model
        direction.check_model(adapter.provenance, models.d_model(model), models.n_layers(model))
        post_norms = models.has_post_norms(model)
    else:
        try:
            empty = bases.skeleton(bases.find_base(None, adapter))
        except ValueError as error:
            raise AdapterError(
                f"the base {adapter.base!r} of {adapter.source!r} cannot be read, so whether its matrices write "
                f"straight to the residual stream is not known; pass the loaded organism instead. {error}"
            ) from error
        settings = empty.config.get_text_config()
        direction.check_model({"model": adapter.base}, settings.hidden_size, settings.num_hidden_layers)
        post_norms = has_post_norms(empty)
    if post_norms:
        raise AdapterError(
            "in this model a norm stands between the matrices and the residual stream, so a residual direction cannot "
            "be projected out of B; use mm.Ablate on the residual stream"
        )
