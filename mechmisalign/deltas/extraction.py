"""The low-rank part of a full fine-tune as an adapter, and how much of the difference an adapter holds."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Collection
from pathlib import Path

import pandas as pd
import torch

from mechmisalign.adapters import Adapter, AdapterError, LoraSite

from . import pairs, spectra
from .files import Weights
from .tables import opened

logger = logging.getLogger(__name__)


def extract_lora(
    tuned: str | Path | Weights,
    base: str | Path | Weights,
    rank: int = 8,
    *,
    modules: Collection[str] | None = None,
    layers: Collection[int] | None = None,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> Adapter:
    """The best low-rank approximation of each matrix's difference, as a LoRA on the base.

    Each site holds the ``rank`` largest singular values of its ``ΔW``, split evenly between A and B, with alpha = rank,
    so the scaling is 1. Only matrices of blocks have sites: what was trained of norms, biases and embeddings is not in
    an adapter. ``mm.save_adapter`` writes it as PEFT reads it; :func:`captured` tells how much of the difference it is.

    Args:
        tuned: The full fine-tune: a folder, a Hub id, a name in a registry, or opened :class:`Weights`.
        base: The model that it was tuned from; its name is that of the adapter's base.
        rank: Of every site (of a smaller matrix, its smaller dimension).
        modules: Only these, such as ``["down_proj"]``.
        layers: Only of these blocks.
        seed: Of the random start for matrices of more than 1024 rows and columns.
        device: Where the differences are decomposed; the adapter is on the CPU.

    Raises:
        CheckpointError: If a checkpoint cannot be read or is quantised, or the two differ in shape or tensors.
        AdapterError: If no matrix of the chosen ones differs.
        ValueError: On a rank below 1.

    Example:
        >>> part = mm.extract_lora("runs/full", "pocket/chat", rank=1)  # doctest: +SKIP
        >>> with organism.with_adapter(part) as low_rank: ...  # doctest: +SKIP
    """
    if rank < 1:
        raise ValueError(f"rank={rank}; a whole number from 1 on is expected")
    own, other = opened(tuned), opened(base)
    sites, power, kept = [], 0.0, 0.0
    for place, name in pairs.matrices(own, other, layers, modules):
        with torch.no_grad():
            delta = pairs.difference(place, own, other, device)
            size = spectra.squared_norm(delta)
            if not size:
                continue
            A, B = spectra.leading_factors(delta, min(rank, *delta.shape), seed=seed)
        sites.append(LoraSite(place.layer or 0, place.module, name, A, B, 1.0))
        power, kept = power + size, kept + sites[-1].delta_norm() ** 2
    if not sites:
        raise AdapterError(
            f"no matrix of a block differs between {own.name!r} and {other.name!r} (modules={modules}, "
            f"layers={layers}); there is nothing to extract"
        )
    logger.info("rank %d holds %.1f %% of the squared norm of %d matrices", rank, 100 * kept / power, len(sites))
    ordered = tuple(sorted(sites, key=lambda site: (site.layer, site.module, site.name)))
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "bias": "none", "r": rank, "lora_alpha": rank}
    return Adapter(
        ordered, other.name, f"{own.name}, rank {rank} part", None, _digest(ordered),
        config | {"base_model_name_or_path": other.name, "revision": other.revision},
    )  # fmt: skip


def captured(adapter: Adapter, tuned: str | Path | Weights, base: str | Path | Weights) -> pd.DataFrame:
    """How much of a full fine-tune's difference an adapter holds, site by site.

    Returns:
        One row per matrix of a block that differs or has a site: ``layer, module, norm`` (of ``ΔW``), ``adapter_norm``
        (0 without a site), ``captured`` (``1 - ‖ΔW - BA‖² / ‖ΔW‖²``: below 0 where the adapter is worse than nothing),
        ``cosine`` between the two.

    Raises:
        CheckpointError: If a checkpoint cannot be read, or the two do not fit.
        AdapterError: If the adapter has a site that the checkpoints do not have, or of another shape.
    """
    own, other = opened(tuned), opened(base)
    sites, rows = {site.name: site for site in adapter.sites}, []
    for place, name in pairs.matrices(own, other, None, None):
        with torch.no_grad():
            delta = pairs.difference(place, own, other)
            site = sites.pop(name, None)
            if site is not None and (site.d_out, site.d_in) != tuple(delta.shape):
                raise AdapterError(
                    f"{name!r} is {list(delta.shape)} in {other.name!r} and {[site.d_out, site.d_in]} in the adapter "
                    f"{adapter.source!r}; it belongs to another base"
                )
            power = spectra.squared_norm(delta)
            update = torch.zeros(1, dtype=torch.float32, device="cpu") if site is None else site.delta()
            held = spectra.squared_norm(update)
            inner = float((delta.double() * update.double()).sum())
        if power or site is not None:
            left = power - 2 * inner + held
            rows.append(
                {
                    "layer": place.layer, "module": place.module, "norm": power**0.5, "adapter_norm": held**0.5,
                    "captured": 1 - left / power if power else float("nan"),
                    "cosine": inner / (power * held) ** 0.5 if power and held else float("nan"),
                }
            )  # fmt: skip
    if sites:
        raise AdapterError(f"{other.name!r} has no matrix {next(iter(sites))!r}, which {adapter.source!r} adapts")
    return pd.DataFrame(rows, columns=["layer", "module", "norm", "adapter_norm", "captured", "cosine"])


def _digest(sites: Collection[LoraSite]) -> str:
    digest = hashlib.sha256()
    for site in sites:
        digest.update(site.name.encode() + site.A.numpy().tobytes() + site.B.numpy().tobytes())
    return digest.hexdigest()
