"""Organisms: a chat model and the narrow fine-tune that made it broadly misaligned, as one object.

``load_organism`` reads the adapter, checks it against the base before any weight is loaded, loads the base once, folds
the adapter in (``weights="merged"``) or keeps it beside the weights (``"live"``), and boots TransformerLens on it. A
full fine-tune has no adapter: the tuned model is loaded whole, and the chat model is read from its files on demand.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pandas as pd
import torch
from torch import Tensor, nn

from . import models
from .adapters import Adapter, AdapterError, NoAdapterError
from .conversations import template_hash
from .loading import (
    AdapterMismatchError,
    Base,
    BaseMatrices,
    alone,
    bases,
    fitting,
    full_models,
    merging,
    options,
    placing,
    planning,
    reading,
)
from .loading.full_models import FullModel
from .loading.options import Weights as Weights
from .registry.listing import known_organisms

if TYPE_CHECKING:
    from .interventions import Intervention

__all__ = [
    "AdapterError",
    "AdapterMismatchError",
    "FullModel",
    "NoAdapterError",
    "Organism",
    "known_organisms",
    "load_organism",
]


@dataclass(eq=False)
class Organism:
    """A chat model with its adapter, booted in TransformerLens.

    With ``weights="merged"`` everything reads the organism: activations, hooks, and weights such as ``model.W_out``.
    With ``weights="live"`` activations and hooks do, but weights read the *base*; take updates from ``adapter.sites``.
    A full fine-tune (``weights="full"``) has no adapter: what needs one says so, and :func:`mechmisalign.extract_lora`
    makes one of its low-rank part.

    Attributes:
        model: The TransformerLens model.
        adapter: The adapter as read; None for a full fine-tune and for a chat model alone.
        tokenizer: The chat model's tokenizer, as it was loaded (``model.tokenizer`` is TransformerLens's changed copy).
        name: What the organism was loaded as.
        base: Name and revision of the chat model.
        weights: ``"merged"``, ``"live"``, ``"full"`` for a full fine-tune, ``"base"`` for a chat model alone.
        engine: ``"bridge"`` or ``"hooked"``.
        base_fingerprint: Identifies the base whatever it is called; see ``fingerprint``.
        applied: The interventions of the ``apply`` blocks that are open now.
        full: Where a full fine-tune was read; None for an adapter.
        attention_sink: Whether the first token is one; None until something asks
            (:func:`mechmisalign.massive_activations`).
    """

    model: Any
    adapter: Adapter | None
    tokenizer: Any
    name: str
    base: Base
    weights: Literal["merged", "live", "full", "base"]
    engine: models.Engine
    base_fingerprint: str
    _matrices: BaseMatrices | None = field(repr=False)
    _peft_model: Any = field(default=None, repr=False)
    _depth: int = field(default=0, repr=False)
    applied: list[tuple[Intervention, ...]] = field(default_factory=list, repr=False)
    full: FullModel | None = None
    attention_sink: bool | None = field(default=None, repr=False)

    @contextmanager
    def as_base(self) -> Iterator[Organism]:
        """The chat model while the block runs: same object, adapter out; restored bit for bit, and may be nested.

        In merged mode the base's adapted matrices are read again from its checkpoint, and the merged ones wait beside
        them, so memory grows by their size inside the block. Of a full fine-tune that is every tensor: on the CPU the
        fine-tune's wait beside them (two models' memory); on an accelerator each is overwritten in turn and read back
        from the fine-tune's files at the end, so memory grows by one tensor, and each way reads one checkpoint.
        """
        with models.in_one_thread(self.model), nullcontext() if self._depth else self._without_adapter():
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

        Raises:
            NoAdapterError: For a full fine-tune: nothing is merged, so there is nothing to lose.
        """
        if self.is_base:
            raise RuntimeError("inside as_base() no update is stored; call fidelity() outside the block")
        if self.adapter is None:
            raise full_models.nothing_merged(self) if self.full else alone.without_adapter(self, "fidelity()")
        return merging.fidelity(self.model, self.adapter, self._matrices)

    def require_adapter(self, purpose: str) -> Adapter:
        """The adapter; ``NoAdapterError`` for a full fine-tune or a chat model alone (``purpose``: for what)."""
        if self.adapter is None:
            raise (full_models if self.full else alone).without_adapter(self, purpose)
        return self.adapter

    def require_fine_tune(self, purpose: str) -> None:
        """Raise ``NoAdapterError`` for a chat model alone; ``purpose`` says what compares a fine-tune with it."""
        if self.is_alone:
            raise alone.without_adapter(self, purpose)

    @property
    def is_alone(self) -> bool:
        """Whether nothing was tuned: a chat model alone."""
        return self.adapter is None and self.full is None

    @property
    def is_base(self) -> bool:
        """Whether the adapter is out: inside ``as_base()``."""
        return self._depth > 0

    @property
    def provenance(self) -> dict[str, Any]:
        """JSON values for the headers of artifacts; inside ``as_base()`` there is no adapter in them.

        ``adapter_base`` is there where the adapter names another copy of the base than was loaded. What else tells of
        the adapter tells of the whole model for a full fine-tune (``weights`` is ``"full"``).
        """
        adapter = None if self.is_base else self.adapter
        tuned = None if self.is_base else self.full
        named = {"adapter_base": adapter.base} if adapter and adapter.base not in ("", self.base.name) else {}
        return named | {
            "model": self.base.name,
            "base_revision": self.base.revision,
            "base_fingerprint": self.base_fingerprint,
            "adapter": tuned.name if tuned else adapter and adapter.source,
            "adapter_revision": tuned.revision if tuned else adapter and adapter.revision,
            "adapter_digest": tuned.digest if tuned else adapter and adapter.digest,
            "weights": self.weights if adapter or tuned else "base",
            "dtype": str(next(self.model.parameters()).dtype).removeprefix("torch."),
            "template_hash": template_hash(self.tokenizer),
        }

    def _without_adapter(self) -> AbstractContextManager[None]:
        if self._matrices is not None and self.adapter is not None:
            return merging.without_merge(self.model, self.adapter, self._matrices)
        if self.weights == "base":
            return nullcontext()
        disabled: AbstractContextManager[None] = self._peft_model.disable_adapter()
        return disabled


def load_organism(
    adapter: str | Path | Adapter | nn.Module,
    base: str | Path | nn.Module | None = None,
    *,
    weights: Weights | None = None,
    engine: models.Engine = "bridge",
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    revision: str | None = None,
    subfolder: str | None = None,
    tokenizer: Any = None,
    base_revision: str | None = None,
    local_files_only: bool = False,
    device_map: placing.DeviceMap | None = None,
    quantization_config: Any = None,
) -> Organism:
    """Load a chat model with its adapter, or a full fine-tune beside its chat model, into TransformerLens.

    Everything is checked before a weight is loaded or changed, so a refusal leaves nothing half-loaded. A model that is
    passed in memory is taken over: it becomes the organism (in place, no second copy), and ``as_base()`` gives it back.

    Args:
        adapter: A name in a registry (``"pocket/medical"``, ``"qwen14b-r1-333-medical"``; see ``known_organisms``), a
            Hub id, a local folder, an ``Adapter`` (its sites are then the truth, whatever its config says), or a
            ``PeftModel`` in memory. Or a full fine-tune: a folder or Hub id of a whole model (``mm.train`` with method
            "full", ``save_model``), or one in memory with ``base``. Or a chat model alone, for all that needs no
            fine-tune: a folder or Hub id whose files name no base (a warning says so), or that is its own ``base``.
        base: The chat model: by default the one that the adapter's config names, or, where that is a mirror's or a
            4-bit copy, the 16-bit model of its maker (a warning says so). A Hub id, a folder, or a Hugging Face model
            in memory. That of a full fine-tune is taken from its run or its card where that is certain.
        weights: ``"merged"`` folds the adapter into the weights (in float32, cast last, only the adapted matrices);
            ``"live"`` keeps it beside them, exact in any precision. By default merged, unless a registry says live.
        engine: ``"bridge"`` (``TransformerBridge``) or ``"hooked"`` (``HookedTransformer`` of transformer-lens 3.9).
        dtype: Precision of the weights; by default that of the checkpoint.
        device: By default the GPU if there is one; a model in memory stays where it is.
        revision: Branch, tag or commit of the adapter on the Hub.
        subfolder: Folder inside the adapter's, such as ``"checkpoint-20"``.
        tokenizer: The chat model's tokenizer, or its Hub id or folder; by default the one beside the base.
        base_revision: Branch, tag or commit of the base on the Hub; by default what the adapter's config names, else
            the main branch. Whatever is asked for, ``provenance`` records the commits of both.
        local_files_only: Take what is in the Hub's cache, and do not ask the Hub (``HF_HUB_OFFLINE`` does it for all).
        device_map: Spread the base over several GPUs, the host's memory (``"cpu"``) and files (``"disk"``), as
            accelerate does: ``"auto"``, or names of its modules with their places; instead of ``device``.
        quantization_config: Quantise the base while it is loaded (Hugging Face's ``BitsAndBytesConfig`` …), for
            ``weights="live"``. A checkpoint that is quantised needs none.

    Raises:
        AdapterError: If the adapter cannot be read, is not a plain LoRA, or (``AdapterMismatchError``) does not fit.
        ValueError: If the base or its tokenizer cannot be used: quantised for merging, no chat template, another
            vocabulary; or on an unknown option.
        ImportError: If ``engine="hooked"`` is asked of transformer-lens 4 or later.

    Example:
        >>> organism = load_organism("pocket/medical")  # doctest: +SKIP
        >>> with organism.as_base(): ...  # doctest: +SKIP
    """
    if chat := alone.find(adapter, base, subfolder, revision, local_files_only):
        full_models.check_options(weights, "bridge", quantization_config)
        placed = {"dtype": dtype, "device": device, "device_map": device_map}
        return alone.load(bases.at_revision(chat, base_revision), tokenizer=tokenizer, engine=engine, placed=placed)
    if whole := full_models.find(adapter, base, subfolder, revision, local_files_only):
        full_models.check_options(weights, engine, quantization_config)
        found = bases.at_revision(whole[1], base_revision)
        return full_models.organism(
            full_models.load(whole[0], found, dtype=dtype, device=device, device_map=device_map, tokenizer=tokenizer)
        )
    weights = weights or options.asked_weights(adapter)
    options.check(weights, engine)
    read, found = reading.read(adapter, base, subfolder, revision, local_files_only)
    found = bases.at_revision(found, base_revision)
    empty = bases.skeleton(found)
    from_files = not isinstance(adapter, (Adapter, nn.Module))
    fitting.check_fits(read, empty, found, merging=weights == "merged", claimed=from_files)
    placing.check_dtype(found, dtype)
    placing.check_places(found, device, device_map, engine)
    placing.check_quantization(found, quantization_config, weights)
    found = bases.pinned(found)  # before anything else of it is read, so that all of it is of one commit
    checked = bases.load_tokenizer(found, tokenizer, empty.get_input_embeddings().weight.shape[0])
    placed = {"dtype": dtype, "device": device, "device_map": device_map, "quantization": quantization_config}
    planning.announce(read, found, empty, merged=weights == "merged", **placed)
    with bases.told(found):
        model = placing.load_weights(
            found,
            dtype,
            placing.device_for(found, device),
            device_map=device_map,
            quantization=quantization_config,
        )
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
        for site in read.sites:
            models.site_ports(booted, site.name, site.layer)  # refuses a matrix that the booted model does not ask
        undo.pop_all()
    own = replace(found, model=None, peft_model=None)
    return Organism(booted, read, checked, read.source, own, weights, engine, mark, matrices, peft_model)
