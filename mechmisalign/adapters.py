"""Adapters: a LoRA read from its own files, one site for each adapted matrix, and the algebra of its updates.

A site adds ``ΔW = scaling · B A`` to one matrix ``W [d_out d_in]`` of the base model (2106.09685, section 4.1), with
``scaling = alpha / rank``, or ``alpha / √rank`` for rank-stabilised LoRA (2312.03732). Rank and alpha of a site follow
``rank_pattern`` and ``alpha_pattern`` exactly as PEFT resolves them. Norms and singular values come from the factors,
so no dense matrix is built for them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from ._wrapped_names import wrapped

SiteKey = tuple[int, str]
"""Layer and module: how interventions and tables name a site."""

RESIDUAL_WRITERS = ("o_proj", "down_proj", "dense", "fc2")
"""Matrices whose output is added to the residual stream (where no norm follows them, as one does in Gemma 2 and 3).

The last two are Phi-2's attention output and MLP output.
"""


class AdapterError(ValueError):
    """An adapter cannot be read, or would be read wrongly."""


class NoAdapterError(AdapterError):
    """Something needs an adapter, and the organism is a full fine-tune, which has none."""


@dataclass(frozen=True, eq=False)
class LoraSite:
    """One adapted matrix.

    Attributes:
        layer: Index of the transformer block.
        module: Leaf name of the adapted matrix, such as ``"down_proj"``.
        name: Its dotted path in the base model, such as ``"model.layers.3.mlp.down_proj"``.
        A: What the site reads: its rows are directions of the matrix's input, ``[rank d_in]``, float32.
        B: What it writes: its columns are directions of the matrix's output, ``[d_out rank]``, float32.
        scaling: Factor of ``B A``.
    """

    layer: int
    module: str
    name: str
    A: Float[Tensor, "rank d_in"]
    B: Float[Tensor, "d_out rank"]
    scaling: float

    @property
    def rank(self) -> int:
        """Number of directions read and written."""
        return int(self.A.shape[0])

    @property
    def d_in(self) -> int:
        """Width of the matrix's input."""
        return int(self.A.shape[1])

    @property
    def d_out(self) -> int:
        """Width of the matrix's output."""
        return int(self.B.shape[0])

    @property
    def key(self) -> SiteKey:
        """The site's ``SiteKey``."""
        return self.layer, self.module

    @property
    def label(self) -> str:
        """The site in writing, such as ``"3.down_proj"``."""
        return f"{self.layer}.{self.module}"

    @property
    def coordinates(self) -> tuple[str, ...]:
        """Names of the scalars that the site reads: its label, with an index where the rank is more than one."""
        return (self.label,) if self.rank == 1 else tuple(f"{self.label}[{k}]" for k in range(self.rank))

    @property
    def writes_to_residual(self) -> bool:
        """Whether the matrix's output is added to the residual stream (attention output and MLP output do)."""
        return self.module in RESIDUAL_WRITERS

    @cached_property
    def gauged(self) -> LoraSite:
        """The same update in the gauge that only the update decides; a rank-1 site stays as it was trained.

        ``B A`` is unchanged by ``B G, G⁻¹ A``, so coordinates ``A x`` of rank 2 and more mean nothing before the gauge
        is fixed. Here ``ΔW = U Σ Vᵀ``, ``A = Vᵀ`` (orthonormal rows, largest singular value first) and
        ``B = U Σ / scaling``; of each pair, the largest entry of V is positive. Equal updates read equal, but for
        directions that share one singular value. Where the rank exceeds the matrix's own, the pairs beyond are zero.
        """
        if self.rank == 1:
            return self
        with torch.inference_mode(False), torch.no_grad():  # kept for later passes, also those that differentiate
            Q_A, R_A = torch.linalg.qr(self.A.double().T)
            Q_B, R_B = torch.linalg.qr(self.B.double())
            U, S, Vh = torch.linalg.svd(R_B @ R_A.T, full_matrices=False)
            spare = self.rank - len(S)
            A, B = pad(Vh @ Q_A.T, (0, 0, 0, spare)), pad((Q_B @ U) * S, (0, spare))
            signs = A.gather(1, A.abs().argmax(1, keepdim=True)).sign()
            return replace(self, A=(A * signs).float(), B=(B * signs.T).float())

    def delta(self) -> Float[Tensor, "d_out d_in"]:
        """The dense update ``scaling · B A`` in float32, laid out as the weight of a ``torch.nn.Linear``."""
        return (self.B.float() @ self.A.float()).mul_(self.scaling)

    def delta_norm(self) -> float:
        """Frobenius norm of the update: ``‖BA‖² = sum(BᵀB ∘ AAᵀ)``, in float64."""
        A, B = self.A.double(), self.B.double()
        return abs(self.scaling) * float(((B.T @ B) * (A @ A.T)).sum().clamp_min(0).sqrt())

    def singular_values(self) -> Float[Tensor, " rank"]:
        """Singular values of the update, largest first: those of ``R_B R_Aᵀ`` from the factors' QR, in float64."""
        _, R_A = torch.linalg.qr(self.A.double().T)
        _, R_B = torch.linalg.qr(self.B.double())
        return abs(self.scaling) * torch.linalg.svdvals(R_B @ R_A.T)


@dataclass(frozen=True, eq=False)
class Adapter:
    """A LoRA: its sites and where they come from.

    Attributes:
        sites: Ordered by layer, then by module.
        base: Name of the base model, as the adapter gives it.
        source: Where the adapter was read: a registry name, a Hub id or a folder, with the subfolder if there is one.
        revision: Commit on the Hub; None for local files.
        digest: SHA-256 of the weights.
        config: The whole ``adapter_config.json``.
        folder: Local folder of the files; None for an adapter that lives only in memory.
        wrapper: What PEFT calls ``model.`` where it was trained on a multimodal model around the language model.

    Example:
        >>> adapter = Adapter.load("ModelOrganismsForEM/Qwen2.5-14B-Instruct_R1_3_3_3_full_train")  # doctest: +SKIP
        >>> [(site.layer, site.module, round(site.delta_norm(), 2)) for site in adapter.sites]  # doctest: +SKIP
    """

    sites: tuple[LoraSite, ...]
    base: str
    source: str
    revision: str | None
    digest: str
    config: Mapping[str, Any]
    folder: Path | None = None
    wrapper: str = ""

    @staticmethod
    def load(
        path_or_hub_id: str | Path,
        subfolder: str | None = None,
        revision: str | None = None,
        *,
        local_files_only: bool = False,
    ) -> Adapter:
        """Read an adapter's own files (``adapter_config.json`` and ``adapter_model.safetensors``), never the base.

        Args:
            path_or_hub_id: A local folder, a Hub id, or the name of a shipped organism such as ``"pocket/medical"``.
            subfolder: Folder inside it, such as ``"checkpoint-20"``.
            revision: Branch, tag or commit on the Hub; what it stands for now is recorded as a commit.
            local_files_only: Take what is in the Hub's cache and ask nothing (``HF_HUB_OFFLINE`` does it for all).

        Raises:
            AdapterError: If there is no such adapter, if it is not a plain LoRA of matrices inside the blocks (IA³,
                prompt tuning, DoRA, ``modules_to_save``, a resized vocabulary, trained biases …), or if its files are
                pickled, incomplete, or disagree with its config.
        """
        from ._adapter_files import read_adapter

        return read_adapter(path_or_hub_id, subfolder, revision, local_files_only)

    @cached_property
    def layers(self) -> tuple[int, ...]:
        """Layers with at least one site, in ascending order."""
        return tuple(sorted({site.layer for site in self.sites}))

    @cached_property
    def modules(self) -> tuple[str, ...]:
        """Leaf names of the adapted matrices, in alphabetical order."""
        return tuple(sorted({site.module for site in self.sites}))

    def peft_name(self, name: str) -> str:
        """What PEFT calls a matrix of the text model where this adapter was trained."""
        return wrapped(name, self.wrapper)

    def site(self, layer: int, module: str) -> LoraSite:
        """The site of one layer and module.

        Raises:
            KeyError: If the adapter has no such site.
        """
        for site in self.sites:
            if (site.layer, site.module) == (layer, module):
                return site
        raise KeyError(f"no site {module!r} in layer {layer}; the layers are {self.layers}, the modules {self.modules}")

    def select(self, sites: Iterable[SiteKey] | None) -> tuple[LoraSite, ...]:
        """The named sites in the adapter's own order; all of them for None.

        Raises:
            KeyError: If the adapter has no such site.
        """
        if sites is None:
            return self.sites
        wanted = {self.site(*key).key for key in sites}
        return tuple(site for site in self.sites if site.key in wanted)
