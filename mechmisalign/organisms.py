"""Organisms: a chat model and the narrow fine-tune that made it broadly misaligned, as one object.

``load_organism`` reads the adapter, checks it against the base before any weight is loaded, loads the base once, folds
the adapter in (``weights="merged"``) or keeps it beside the weights (``"live"``), and boots TransformerLens on it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import pandas as pd
import torch
from torch import Tensor, nn

from . import models, registry
from .adapters import Adapter, AdapterError
from .conversations import template_hash
from .loading import AdapterMismatchError, Base, BaseMatrices, bases, fitting, merging, placing, reading

if TYPE_CHECKING:
    from .interventions import Intervention

__all__ = ["AdapterError", "AdapterMismatchError", "Organism", "known_organisms", "load_organism"]

Weights = Literal["merged", "live"]


@dataclass(eq=False)
class Organism:
    """A chat model with its adapter, booted in TransformerLens.

    With ``weights="merged"`` everything reads the organism: activations, hooks, and weights such as ``model.W_out``.
    With ``weights="live"`` activations and hooks do, but weights read the *base*; take updates from ``adapter.sites``.

    Attributes:
        model: The TransformerLens model.
        adapter: The adapter as read.
        tokenizer: The chat model's tokenizer, as it was loaded (``model.tokenizer`` is TransformerLens's changed copy).
        name: What the organism was loaded as.
        base: Name and revision of the chat model.
        weights: ``"merged"`` or ``"live"``.
        engine: ``"bridge"`` or ``"hooked"``.
        base_fingerprint: Identifies the base whatever it is called; see ``fingerprint``.
        applied: The interventions of the ``apply`` blocks that are open now.
    """

    model: Any
    adapter: Adapter
    tokenizer: Any
    name: str
    base: Base
    weights: Weights
    engine: models.Engine
    base_fingerprint: str
    _matrices: BaseMatrices | None = field(repr=False)
    _peft_model: Any = field(default=None, repr=False)
    _depth: int = field(default=0, repr=False)
    applied: list[tuple[Intervention, ...]] = field(default_factory=list, repr=False)

    @contextmanager
    def as_base(self) -> Iterator[Organism]:
        """The chat model while the block runs: same object, adapter out; restored bit for bit, and may be nested.

        In merged mode the base's adapted matrices are read again from its checkpoint, and the merged ones wait beside
        them, so memory grows by their size inside the block.
        """
        with nullcontext() if self._depth else self._without_adapter():
            self._depth += 1
            try:
                yield self
            finally:
                self._depth -= 1

    def with_adapter(self, adapter: str | Path | Adapter) -> AbstractContextManager[Organism]:
        """Another organism on the same base while the block runs: its adapter instead of this one's, nothing reloaded.

        The adapter is kept beside the base's weights by hooks, so switching costs their registration, and memory is the
        base's and the adapters'. What the block gets is an organism like any other (weights ``"live"``); this one has
        lent its model and refuses until the block ends, and then the other does. To sample several in one batch, see
        :class:`mechmisalign.UseAdapter`.

        Raises:
            ValueError: If the adapter belongs to another base.

        Example:
            >>> with organism.with_adapter("pocket/finance") as finance: ...  # doctest: +SKIP
        """
        from .loading.switching import switched

        return switched(self, adapter if isinstance(adapter, Adapter) else Adapter.load(adapter))

    def apply(
        self, *interventions: Intervention, response_start: int | Sequence[int] | Tensor | None = None
    ) -> AbstractContextManager[None]:
        """Interventions on the residual stream and on the adapter while the block runs.

        Args:
            interventions: Steer, Ablate, Clamp, ScaleAdapter, PatchScalars …, acting in this order.
            response_start: Column at which the response begins, one or one per row, for interventions on positions
                ``"prompt"`` or ``"response"``.

        Raises:
            DirectionMismatchError: If a direction belongs to another base, width or depth.
        """
        from .interventions import applied, check_fits

        check_fits(interventions, self)
        return applied(self, interventions, response_start=response_start)

    def fidelity(self) -> pd.DataFrame:
        """What the weights hold of each site's update.

        Returns:
            One row per site: ``layer, module, delta_norm`` (of the adapter's ΔW), ``relative_error`` and ``cosine`` of
            the stored update against ΔW, ``top_rank_energy`` (share of the stored update's squared singular values in
            the largest ``rank``), ``faithful`` (cosine of at least 0.99; otherwise use ``weights="live"``).
        """
        if self.is_base:
            raise RuntimeError("inside as_base() no update is stored; call fidelity() outside the block")
        return merging.fidelity(self.model, self.adapter, self._matrices)

    @property
    def is_base(self) -> bool:
        """Whether the adapter is out: inside ``as_base()``."""
        return self._depth > 0

    @property
    def provenance(self) -> dict[str, Any]:
        """JSON values for the headers of artifacts; inside ``as_base()`` there is no adapter in them."""
        adapter = None if self.is_base else self.adapter
        return {
            "model": self.base.name,
            "base_revision": self.base.revision,
            "base_fingerprint": self.base_fingerprint,
            "adapter": adapter and adapter.source,
            "adapter_revision": adapter and adapter.revision,
            "adapter_digest": adapter and adapter.digest,
            "weights": self.weights if adapter else "base",
            "dtype": str(next(self.model.parameters()).dtype).removeprefix("torch."),
            "template_hash": template_hash(self.tokenizer),
        }

    def _without_adapter(self) -> AbstractContextManager[None]:
        if self._matrices is not None:
            return merging.without_merge(self.model, self.adapter, self._matrices)
        disabled: AbstractContextManager[None] = self._peft_model.disable_adapter()
        return disabled


def load_organism(
    adapter: str | Path | Adapter | nn.Module,
    base: str | Path | nn.Module | None = None,
    *,
    weights: Weights = "merged",
    engine: models.Engine = "bridge",
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    revision: str | None = None,
    subfolder: str | None = None,
    tokenizer: Any = None,
) -> Organism:
    """Load a chat model with its adapter into TransformerLens.

    Everything is checked before a weight is loaded or changed, so a refusal leaves nothing half-loaded. A model that is
    passed in memory is taken over: it becomes the organism (in place, no second copy), and ``as_base()`` gives it back.

    Args:
        adapter: The name of a shipped organism (``"pocket/medical"``), a Hub id, a local folder, an ``Adapter`` (its
            sites are then the truth, whatever its config says), or a ``PeftModel`` in memory.
        base: The chat model: by default the one that the adapter's config names. A Hub id, a folder, or a Hugging Face
            model in memory.
        weights: ``"merged"`` folds the adapter into the weights (in float32, cast last, only the adapted matrices);
            ``"live"`` keeps it beside them, exact in any precision.
        engine: ``"bridge"`` (``TransformerBridge``) or ``"hooked"`` (``HookedTransformer`` of transformer-lens 3.9).
        dtype: Precision of the weights; by default that of the checkpoint.
        device: By default the GPU if there is one; a model in memory stays where it is.
        revision: Branch, tag or commit of the adapter on the Hub.
        subfolder: Folder inside the adapter's, such as ``"checkpoint-20"``.
        tokenizer: The chat model's tokenizer; by default the one beside the base.

    Raises:
        AdapterError: If the adapter cannot be read, is not a plain LoRA, or (``AdapterMismatchError``) does not fit.
        ValueError: If the base or its tokenizer cannot be used: quantised for merging, no chat template, another
            vocabulary; or on an unknown option.
        ImportError: If ``engine="hooked"`` is asked of transformer-lens 4 or later.

    Example:
        >>> organism = load_organism("pocket/medical")  # doctest: +SKIP
        >>> with organism.as_base(): ...  # doctest: +SKIP
    """
    _check_options(weights, engine)
    read, found = reading.read(adapter, base, subfolder, revision)
    empty = bases.skeleton(found)
    from_files = not isinstance(adapter, (Adapter, nn.Module))
    fitting.check_fits(read, empty, found, merging=weights == "merged", claimed=from_files)
    placing.check_dtype(found, dtype)
    checked = bases.load_tokenizer(found, tokenizer, empty.get_input_embeddings().weight.shape[0])
    found = bases.pinned(found)
    model = placing.load_weights(found, dtype, placing.device_for(found, device))
    mark = reading.fingerprint(model, checked)
    matrices = peft_model = None
    with ExitStack() as undo:  # should booting fail, a model in memory is given back as it was
        if weights == "merged":
            matrices = merging.base_matrices(model, read, found)
            undo.callback(merging.unmerge, model, read, matrices)
            merging.merge(model, read, matrices)
        else:
            peft_model = merging.attach(model, read)
            undo.callback(peft_model.unload)
        booted = models.boot(model, checked, found.name, engine)
        undo.pop_all()
    own = replace(found, model=None, peft_model=None)
    return Organism(booted, read, checked, read.source, own, weights, engine, mark, matrices, peft_model)


def known_organisms() -> pd.DataFrame:
    """The organisms that are known by name: one row each, ``name, layers, modules, rank, sites, base``."""
    rows = []
    for name in registry.names():
        adapter = Adapter.load(name)
        rows.append(
            {
                "name": name,
                "layers": ", ".join(map(str, adapter.layers)),
                "modules": ", ".join(adapter.modules),
                "rank": max(site.rank for site in adapter.sites),
                "sites": len(adapter.sites),
                "base": adapter.base,
            }
        )
    return pd.DataFrame(rows, columns=["name", "layers", "modules", "rank", "sites", "base"])


def _check_options(weights: str, engine: str) -> None:
    if weights not in get_args(Weights):
        raise ValueError(f"weights must be one of {get_args(Weights)}, got {weights!r}")
    if engine not in get_args(models.Engine):
        raise ValueError(f"engine must be one of {get_args(models.Engine)}, got {engine!r}")
    if engine == "hooked":
        models.require_hooked()
        if weights == "live":
            raise ValueError(
                "a HookedTransformer has no place for a live adapter; use weights='merged' or engine='bridge'"
            )
