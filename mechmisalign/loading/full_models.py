"""Full fine-tunes: a whole model instead of an adapter, beside the chat model that it was tuned from.

The fine-tune is what is loaded. Of the chat model only the files are kept in mind: inside ``as_base()`` its tensors are
read one by one and put where the fine-tune's are, so that one model object is both.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mechmisalign import models, registry
from mechmisalign._adapter_files import CONFIG_FILE as ADAPTER_CONFIG
from mechmisalign._hub import HubError, fetch, is_hub_id
from mechmisalign._pretrained import read_pretrained
from mechmisalign.adapters import Adapter, NoAdapterError
from mechmisalign.conversations import template_hash
from mechmisalign.deltas.files import CONFIG, Weights

from . import bases, origins, placing, planning, reading
from .alike import check_alike
from .bases import Base
from .swapping import NamedWeights, Swap, base_values, check_loaded, parameters_of
from .wrappers import text_model

if TYPE_CHECKING:
    from mechmisalign.organisms import Organism

logger = logging.getLogger(__name__)

_TOLD = 1024
"""Numbers of each tensor that its digest covers."""


@dataclass(frozen=True, eq=False)
class FullModel:
    """A full fine-tune: where it was read.

    Attributes:
        name: What it was loaded as.
        location: Its folder, in the Hub's cache for one from the Hub; empty for a model that lives only in memory.
        revision: Commit on the Hub.
        digest: SHA-256 over names, shapes, dtypes and the first 1024 numbers of every tensor.
        model: The Hugging Face model, if it was given in memory.
    """

    name: str
    location: str
    revision: str | None = None
    digest: str = ""
    model: Any = None


@dataclass(frozen=True, eq=False)
class Loaded:
    """A full fine-tune in memory, ready to be booted.

    Attributes:
        full: Where it comes from.
        model: The Hugging Face model.
        tokenizer: The chat model's.
        base: The chat model.
        fingerprint: Of the chat model.
        swap: Puts the chat model's weights in and out.
    """

    full: FullModel
    model: Any
    tokenizer: Any
    base: Base
    fingerprint: str
    swap: Swap


def find(
    given: str | Path | Adapter | nn.Module,
    base: str | Path | nn.Module | None,
    subfolder: str | None,
    revision: str | None,
    local_files_only: bool,
) -> tuple[FullModel, Base] | None:
    """The full model that was given and its base; None if an adapter was given (or nothing that is known).

    Raises:
        ValueError: If it is a full model, and its base is neither given nor certain.
        CheckpointError: If its weights cannot be read.
    """
    if isinstance(given, Adapter):
        return None
    if isinstance(given, nn.Module):
        return None if hasattr(given, "peft_config") or base is None else _in_memory(given, base)
    place = registry.place(given, subfolder, revision)
    folder = local_folder(place, local_files_only)
    if folder is None or (folder / ADAPTER_CONFIG).exists() or not (folder / CONFIG).exists():
        return None
    asked = base
    if base is None:
        found = origins.origin(str(given), folder, place)
        asked = origins.standing_for(found, str(given))
    weights = Weights.open(given, subfolder, revision, local_files_only=local_files_only)
    full = FullModel(weights.name, str(weights.folder), weights.revision, _digest(weights))
    return full, replace(_base(asked), local_files_only=local_files_only)


def load(
    full: FullModel,
    base: Base,
    *,
    dtype: torch.dtype | None,
    device: str | torch.device | None,
    device_map: placing.DeviceMap | None,
    tokenizer: Any,
) -> Loaded:
    """The fine-tune in memory, once; of the chat model headers, config, tokenizer and sixteen rows of its embedding.

    Raises:
        ValueError: If the two are no models of one architecture, one vocabulary and one set of tensors, or the chat
            model's tokenizer cannot be used.
    """
    own = Base(full.name, full.location, full.revision, full.model)
    empty, other = bases.skeleton(own), bases.skeleton(base)
    check_alike(empty, other, full.name, base.name)
    base = bases.pinned(base)
    checked = bases.load_tokenizer(base, tokenizer, empty.get_input_embeddings().weight.shape[0])
    if tokenizer is None:
        _warn_of_another_template(full, checked)
    placing.check_dtype(own, dtype)
    placing.check_places(own, device, device_map, "bridge")
    values = base_values(base, other, empty)
    placed: dict[str, Any] = {"dtype": dtype, "device": device, "device_map": device_map}
    planning.announce(stand_in(full, base.name), own, empty, merged=True, **placed)
    with bases.told(own):
        model = placing.load_weights(own, dtype, placing.device_for(own, device), device_map=device_map)
    files = None if full.model is not None else NamedWeights(Weights.open(full.location), full.name)
    if files is not None:
        check_loaded(model, files, full.name)
    embedding = next(key for key, (module, _) in parameters_of(model).items() if module is model.get_input_embeddings())
    mark = reading.fingerprint(model, checked, values[embedding])
    return Loaded(
        replace(full, model=None), model, checked, replace(base, model=None), mark, Swap(model, values, files)
    )


def beside(model: Any, chat: Organism, values: Mapping[str, Tensor], name: str) -> Loaded:
    """A model in memory as a full fine-tune of another organism's chat model.

    Args:
        model: A Hugging Face model.
        chat: The organism.
        values: The chat model's tensors, by the names of the model's parameters.
        name: What the fine-tune is called.
    """
    full = FullModel(name, "", None, _digest(dict(model.named_parameters())))
    return Loaded(full, model, chat.tokenizer, chat.base, chat.base_fingerprint, Swap(model, values, None))


def organism(loaded: Loaded) -> Organism:
    """A full fine-tune that is in memory, booted."""
    from mechmisalign.organisms import Organism

    booted = models.boot(loaded.model, loaded.tokenizer, loaded.base.name)
    return Organism(
        model=booted,
        adapter=None,
        tokenizer=loaded.tokenizer,
        name=loaded.full.name,
        base=replace(loaded.base, model=None),
        weights="full",
        engine="bridge",
        base_fingerprint=loaded.fingerprint,
        _matrices=None,
        _peft_model=loaded.swap,
        full=loaded.full,
    )


def check_options(weights: str | None, engine: str, quantization: Any) -> None:
    """Refuse options of ``load_organism`` that are for adapters.

    Raises:
        ValueError: If there are any.
    """
    if weights not in (None, "merged"):
        raise ValueError(
            f"a full fine-tune has nothing to keep beside its weights; weights={weights!r} is for adapters"
        )
    if engine != "bridge":
        raise ValueError(
            f"a full fine-tune needs engine='bridge', got {engine!r}: as_base() puts the chat model's tensors into the "
            "Hugging Face model, of which other engines hold a copy"
        )
    if quantization is not None:
        raise ValueError("a full fine-tune is loaded in 16 or 32 bits, as its base; leave quantization_config= out")


def stand_in(full: FullModel, base: str) -> Adapter:
    """An adapter without sites, where something is told apart by its adapter's source and digest."""
    return Adapter((), base, full.name, full.revision, full.digest, {})


def nothing_merged(organism: Organism) -> NoAdapterError:
    """What is said where the fidelity of a merge is asked of a full fine-tune."""
    return NoAdapterError(
        f"{organism.name!r} is a full fine-tune: its weights are used as they are stored, and there is nothing to "
        "merge; mm.weight_deltas tells how far they are from the base, and how near that is to rounding"
    )


def without_adapter(organism: Organism, purpose: str) -> NoAdapterError:
    """What is said where something needs the adapter of a full fine-tune."""
    place = organism.full.location if organism.full and organism.full.location else "FOLDER"
    return NoAdapterError(
        f"{purpose} needs an adapter, and {organism.name!r} is a full fine-tune, which has none. Take the "
        f"low-rank part of its weight difference, part = mm.extract_lora({place!r}, {organism.base.name!r}, rank=8), "
        "and wear it: with organism.with_adapter(part) as low_rank: ..."
    )


def local_folder(place: registry.Place, local_files_only: bool) -> Path | None:
    """The folder of a name: its own, or in the Hub's cache with the configs alone; None if there is none."""
    root = registry.folder(place.name) or Path(place.name).expanduser()
    if not root.is_dir():
        if place.entry is not None and place.entry.kind != "full" or not is_hub_id(place.name):
            return None
        before = f"{place.subfolder}/" if place.subfolder else ""
        names = [before + ADAPTER_CONFIG, before + CONFIG, "README.md"]
        try:
            root, _ = fetch(place.name, names, revision=place.revision, local_files_only=local_files_only)
        except HubError:
            return None  # what reads an adapter says why
    folder = root / place.subfolder if place.subfolder else root
    return folder if folder.is_dir() else None


def _base(base: str | Path | nn.Module | None) -> Base:
    return bases.find_base(base, Adapter((), "", "a full fine-tune", None, "", {}))


def _in_memory(model: nn.Module, base: str | Path | nn.Module) -> tuple[FullModel, Base]:
    text: Any = text_model(model)
    name = str(getattr(text.config, "_name_or_path", "") or "") or "full fine-tune in memory"
    return FullModel(name, "", None, _digest(dict(text.named_parameters())), text), _base(base)


@torch.no_grad()
def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for key in sorted(tensors):
        tensor = tensors[key].detach()
        digest.update(f"{key} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.reshape(-1)[:_TOLD].cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _warn_of_another_template(full: FullModel, tokenizer: Any) -> None:
    from transformers import AutoTokenizer

    if not full.location or not (Path(full.location) / "tokenizer_config.json").exists():
        return
    own = read_pretrained(AutoTokenizer, full.location)
    if own.chat_template is not None and template_hash(own) != template_hash(tokenizer):
        logger.warning(
            "%s was saved with another chat template than its base has; the base's is used for both: pass tokenizer= "
            "to use the fine-tune's own", full.name,
        )  # fmt: skip
