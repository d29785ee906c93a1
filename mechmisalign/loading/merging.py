"""Folding an adapter into the weights, taking it out again for a while, and what low precision leaves of it.

A merge computes ``W + scaling · B A`` in float32 and casts last. In bfloat16 that rounds away much of a small update:
:func:`fidelity` compares what is stored with what was meant.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from mechmisalign import _placement, models
from mechmisalign._checkpoint_files import checkpoint_files
from mechmisalign.adapters import Adapter, LoraSite

from .bases import Base
from .wrappers import key_in_checkpoint

logger = logging.getLogger(__name__)

FAITHFUL_COSINE = 0.99
"""Below this cosine between stored and meant update, weights="merged" is not the organism."""

_ITERATIONS = 4
MERGED_AT_ONCE = 2**20
"""Numbers of an update that are in float32 at a time."""


class BaseMatrices:
    """The base's own values of the adapted matrices, in their stored dtype.

    They are read again from the checkpoint when asked for, so that no second copy stays in memory; where the checkpoint
    has no such tensor, or another one (renamed on loading, or no file at all), the loaded values are kept.

    Args:
        base: Where the checkpoint is.
        loaded: The matrices as loaded, by the name of their module.
    """

    def __init__(self, base: Base, loaded: Mapping[str, Tensor]) -> None:
        self._files = {} if base.model is not None else checkpoint_files(base.location, base.revision)
        self._kept: dict[str, Tensor] = {}
        for name, values in loaded.items():
            if self._key(name) is None or not _same(self[name], values):
                self._kept[name] = values

    def keeps(self, name: str) -> bool:
        """Whether the loaded values themselves are kept, and must not be written to."""
        return name in self._kept

    def __getitem__(self, name: str) -> Tensor:
        if name in self._kept:
            return self._kept[name]
        from safetensors import safe_open

        key = self._key(name)
        if key is None:
            raise KeyError(f"the checkpoint has no {name!r}")
        with safe_open(self._files[key], "pt") as file:
            stored: Tensor = file.get_tensor(key)
        return stored

    def _key(self, name: str) -> str | None:
        return key_in_checkpoint(f"{name}.weight", self._files)


def _same(stored: Tensor, loaded: Tensor) -> bool:
    """Whether a stored tensor is the loaded one, judged by a few rows (a renamed or transposed one differs in all)."""
    rows = slice(None, None, max(1, len(loaded) // 4))
    return stored.shape == loaded.shape and torch.equal(stored[rows].to(loaded), loaded[rows])


def base_matrices(model: Any, adapter: Adapter, base: Base) -> BaseMatrices:
    """The matrices that the adapter is about to change, from a freshly loaded Hugging Face model."""
    return BaseMatrices(base, _Loaded(model, [site.name for site in adapter.sites]))


class _Loaded(Mapping[str, Tensor]):
    """The matrices of a Hugging Face model, looked up one by one: an offloaded one is read from where it waits."""

    def __init__(self, model: Any, names: list[str]) -> None:
        self._model, self._names = model, names

    def __getitem__(self, name: str) -> Tensor:
        return _placement.stored(self._model.get_submodule(name))

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


@torch.no_grad()
def merge(model: Any, adapter: Adapter, matrices: BaseMatrices) -> None:
    """Fold the adapter into a Hugging Face model, site by site; nothing but the adapted matrices is touched."""
    for site in adapter.sites:
        module = model.get_submodule(site.name)
        weight = _placement.stored(module)
        own = matrices[site.name]  # what was cast on loading is read again, so that it is rounded once
        before = weight if own.dtype == weight.dtype else own
        # in place where it may be: pages of a mapped checkpoint are replaced one by one, nothing is held twice
        elsewhere = matrices.keeps(site.name) or _placement.is_offloaded(module)
        merged = torch.empty_like(weight) if elsewhere else weight
        step = max(1, MERGED_AT_ONCE // site.d_in)
        for rows in (slice(start, start + step) for start in range(0, site.d_out, step)):
            part = replace(site, B=site.B[rows]).delta().to(weight.device)
            merged[rows] = part.add_(before[rows].to(weight.device))
        if elsewhere:
            _placement.put(module, merged)


def unmerge(model: Any, adapter: Adapter, matrices: BaseMatrices) -> None:
    """Put the base's own matrices back into a Hugging Face model."""
    for site in adapter.sites:
        module = model.get_submodule(site.name)
        _placement.put(module, matrices[site.name].to(module.weight.dtype))


@torch.no_grad()
def attach(model: Any, adapter: Adapter) -> Any:
    """Put the adapter beside the weights of a Hugging Face model, as PEFT does; returns the ``PeftModel`` around it."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        target_modules=[site.name for site in adapter.sites],
        rank_pattern={re.escape(site.name): site.rank for site in adapter.sites},
        task_type="CAUSAL_LM",
        inference_mode=True,
    )
    peft_model = get_peft_model(model, config)
    for site in adapter.sites:
        layer = model.get_submodule(site.name)
        for factors, values in ((layer.lora_A, site.A), (layer.lora_B, site.B)):
            factor = factors["default"]
            if factor.weight.is_meta:  # PEFT follows the weights, also to where offloaded ones are not
                factor.to_empty(device=_placement.execution_device(layer.base_layer))
            factor.weight.copy_(values)
        layer.scaling["default"] = site.scaling
    return peft_model.eval()


@contextmanager
def without_merge(model: Any, adapter: Adapter, matrices: BaseMatrices) -> Iterator[None]:
    """The base's own matrices in a TransformerLens model while the block runs; then the merged ones are put back."""
    places = [models.matrix(model, site.name, site.layer) for site in adapter.sites]
    own = [place.own(matrices[site.name]) for place, site in zip(places, adapter.sites, strict=True)]
    merged = [place.held for place in places]
    try:
        for place, values in zip(places, own, strict=True):
            place.put(values)
        yield
    finally:
        for place, values in zip(places, merged, strict=True):
            place.put(values)


@torch.no_grad()
def fidelity(model: Any, adapter: Adapter, matrices: BaseMatrices | None) -> pd.DataFrame:
    """One row per site: what is stored of its update.

    Args:
        model: A TransformerLens model with the adapter merged.
        adapter: The adapter.
        matrices: The base's own values; None for a live adapter, which is exact.
    """
    rows = []
    for site in adapter.sites:
        kept: Mapping[str, float]
        if matrices is None:
            kept = {"relative_error": 0.0, "cosine": 1.0, "top_rank_energy": 1.0}
        else:
            merged = models.matrix(model, site.name, site.layer).read()
            stored = merged.float() - matrices[site.name].to(merged).float()
            kept = _compare(stored, site)
        rows.append({"layer": site.layer, "module": site.module, "delta_norm": site.delta_norm(), **kept})
    frame = pd.DataFrame(rows)
    frame["faithful"] = frame["cosine"] >= FAITHFUL_COSINE
    lost = frame[~frame["faithful"]]
    if len(lost):
        logger.warning(
            "%d of %d merged updates are not faithful (lowest cosine %.3f): %s rounds them away; use weights='live'",
            len(lost), len(frame), lost["cosine"].min(), next(model.parameters()).dtype,
        )  # fmt: skip
    return frame


def _compare(stored: Float[Tensor, "d_out d_in"], site: LoraSite) -> Mapping[str, float]:
    meant, stored = site.delta().to(stored.device).double(), stored.double()
    size, length = float(meant.norm()), float(stored.norm())
    if size == 0.0 or length == 0.0:
        same = float(size == length)
        error = float((stored - meant).norm()) / size if size else 0.0 if same else float("inf")
        return {"relative_error": error, "cosine": same, "top_rank_energy": same}
    return {
        "relative_error": float((stored - meant).norm()) / size,
        "cosine": float((stored * meant).sum()) / (size * length),
        "top_rank_energy": _energy_in_top(stored, site),
    }


def _energy_in_top(stored: Float[Tensor, "d_out d_in"], site: LoraSite) -> float:
    """Share of the squared singular values in the largest ``rank``, by subspace iteration from the columns of B.

    The update that was meant is nearly the answer, so a few iterations do, without a full SVD and without randomness.
    """
    basis = torch.linalg.qr(site.B.to(stored))[0]
    for _ in range(_ITERATIONS):
        basis = torch.linalg.qr(stored @ (stored.T @ basis))[0]
    return float((basis.T @ stored).square().sum() / stored.square().sum())
