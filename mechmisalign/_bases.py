"""The base model of an organism: where it is, whether an adapter fits it, and its weights."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import registry
from .adapters import Adapter, AdapterError, LoraSite
from .conversations import require_chat_template

logger = logging.getLogger(__name__)

_WEIGHTS_FILE = "model.safetensors"
_INDEX_FILE = "model.safetensors.index.json"


class AdapterMismatchError(AdapterError):
    """An adapter does not belong to this base model."""


@dataclass(frozen=True, eq=False)
class Base:
    """A chat model that is not loaded yet, or one in memory.

    Attributes:
        name: What it is called in headers and messages.
        location: Folder or Hub id; empty for a model that lives only in memory.
        revision: Commit, branch or tag on the Hub.
        model: The Hugging Face model, if it is in memory.
        peft_model: The ``PeftModel`` around it, whose adapter is to be taken off.
    """

    name: str
    location: str
    revision: str | None = None
    model: Any = None
    peft_model: Any = None


def find_base(base: str | Path | nn.Module | None, adapter: Adapter) -> Base:
    """The base that was asked for, or the adapter's own.

    Raises:
        ValueError: If none was given and the adapter names none.
    """
    if isinstance(base, nn.Module):
        location = str(getattr(base.config, "_name_or_path", "") or "")
        return Base(location or adapter.base or "in-memory model", location, None, base)
    name = str(base) if base is not None else adapter.base
    if not name:
        raise ValueError(f"the adapter {adapter.source!r} names no base model; pass base=")
    if adapter.base and Path(name).name != Path(adapter.base).name:
        logger.warning("the adapter %s was trained on %s, not on %s", adapter.source, adapter.base, name)
    own_revision = adapter.config.get("revision") if name == adapter.base else None
    return Base(name, str(registry.folder(name) or Path(name).expanduser()), own_revision)


def skeleton(base: Base) -> Any:
    """The base without its weights: what the adapter is checked against before anything is loaded.

    Raises:
        ValueError: If there is no such model.
    """
    if base.model is not None:
        return base.model
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(base.location, revision=base.revision)
    except OSError as error:
        raise ValueError(
            f"the base model {base.name!r} cannot be read: it is no shipped model, no folder with a config.json, and "
            f"the Hub did not give it; pass base= (a folder, a Hub id or a model in memory). {error}"
        ) from error
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def pinned(base: Base) -> Base:
    """A base on the Hub with its commit as revision, once its config has been read; any other base as it is."""
    config = None if base.model is not None or Path(base.location).is_dir() else _cached_file(base, "config.json")
    return base if config is None else replace(base, revision=config.parent.name)


def load_weights(base: Base, dtype: torch.dtype | None, device: torch.device) -> Any:
    """The base with its weights, once, directly in the wanted dtype; one in memory is only moved."""
    if base.peft_model is not None:
        base.peft_model.unload()
    if base.model is not None:
        return base.model.to(device).eval()
    from transformers import AutoModelForCausalLM

    placement = {} if device.type == "cpu" else {"device_map": {"": device}}
    model: Any = AutoModelForCausalLM.from_pretrained(
        base.location, revision=base.revision, dtype=dtype or "auto", **placement
    )
    return model.eval()


def check_dtype(base: Base, dtype: torch.dtype | None) -> None:
    """Refuse to cast a model in memory, which would lose precision that its owner may want.

    Raises:
        ValueError: If another dtype is asked for than the model has.
    """
    if base.model is not None and dtype not in (None, own := next(base.model.parameters()).dtype):
        raise ValueError(f"the model in memory is {own}, dtype={dtype} was asked for; cast it first, or pass its name")


def load_tokenizer(base: Base, tokenizer: Any | None, vocabulary: int) -> Any:
    """The tokenizer given, or the base's own, checked against the size of the embedding.

    Raises:
        ValueError: If there is none, it has no chat template, or it has ids that the model does not know.
    """
    if tokenizer is None:
        if not base.location:
            raise ValueError("the base model lives only in memory and has no tokenizer with it; pass tokenizer=")
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(base.location, revision=base.revision)
    require_chat_template(tokenizer)
    largest = max([tokenizer.vocab_size - 1, *tokenizer.added_tokens_decoder])
    if largest >= vocabulary:
        raise ValueError(
            f"the tokenizer has ids up to {largest}, the embedding of {base.name!r} has {vocabulary} rows: the "
            "vocabulary was resized, or the tokenizer is another model's; pass the model's own tokenizer"
        )
    return tokenizer


def check_fits(adapter: Adapter, model: Any, base: Base, *, merging: bool, claimed: bool) -> None:
    """Refuse an adapter that this base cannot carry, before anything of either is changed.

    Args:
        adapter: The adapter.
        model: The base, with or without weights.
        base: What it is called.
        merging: Whether the adapter is to be folded into the weights.
        claimed: Whether the sites must be exactly those that the adapter's config claims.

    Raises:
        AdapterMismatchError: On matrices that the base lacks or has in another shape, and on missing or extra sites.
        ValueError: On a base that already carries an adapter or belongs to another organism, or is quantised.
    """
    if merging and getattr(model.config, "quantization_config", None):
        raise ValueError(
            f"{base.name!r} is quantised, and an update cannot be folded into quantised weights; pass the unquantised "
            "model as base=, or use weights='live'"
        )
    modules = dict(model.named_modules())
    if base.peft_model is not None:
        modules |= {name: module.base_layer for name, module in modules.items() if hasattr(module, "base_layer")}
    if any(hasattr(module, "original_component") or hasattr(module, "base_layer") for module in modules.values()):
        raise ValueError(
            f"{base.name!r} already carries an adapter or belongs to another organism; pass a freshly loaded model"
        )
    for site in adapter.sites:
        _check_site(site, modules.get(site.name), adapter, base)
    if claimed:
        _check_claims(adapter, modules)


def _check_site(site: LoraSite, module: nn.Module | None, adapter: Adapter, base: Base) -> None:
    about = f"the adapter {adapter.source!r} (trained on {adapter.base!r}) does not fit {base.name!r}"
    if module is None:
        raise AdapterMismatchError(f"{about}: there is no {site.name!r}; pass base=, the model that it was trained on")
    if not isinstance(module, nn.Linear):
        raise AdapterMismatchError(f"{about}: {site.name!r} is a {type(module).__name__}, a Linear is expected")
    if (module.out_features, module.in_features) != (site.d_out, site.d_in):
        raise AdapterMismatchError(
            f"{about}: {site.name!r} is {[module.out_features, module.in_features]} in the model and "
            f"{[site.d_out, site.d_in]} in the adapter; pass the model that it was trained on as base="
        )


def _check_claims(adapter: Adapter, modules: Mapping[str, nn.Module]) -> None:
    """The sites in the file are those that the config targets in this base, as PEFT matches them."""
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    targets = adapter.config.get("target_modules")
    if targets is None or targets == "all-linear":
        return
    chosen = ("exclude_modules", "layers_to_transform", "layers_pattern")
    config = LoraConfig(target_modules=targets, **{key: adapter.config.get(key) for key in chosen})
    linear = (name for name, module in modules.items() if isinstance(module, nn.Linear))
    claimed = {name for name in linear if check_target_module_exists(config, name)}
    found = {site.name for site in adapter.sites}
    if claimed - found:
        raise AdapterMismatchError(
            f"{adapter.source!r} lacks {_some(claimed - found)}, which its config targets in this base: the file is "
            "incomplete or the base another; copy the adapter again"
        )
    if found - claimed:
        raise AdapterMismatchError(
            f"{adapter.source!r} holds {_some(found - claimed)}, which its config does not target: PEFT would ignore "
            "it in silence; the config and the weights belong to different adapters"
        )


def _some(names: Iterable[str]) -> str:
    ordered = sorted(names)
    return ", ".join(ordered[:3]) + (f" and {len(ordered) - 3} more" if len(ordered) > 3 else "")


class BaseMatrices:
    """The base's own values of the adapted matrices, in their stored dtype.

    They are read again from the checkpoint when asked for, so that no second copy stays in memory; where the checkpoint
    has no such tensor, or another one (renamed on loading, or no file at all), the loaded values are kept.

    Args:
        base: Where the checkpoint is.
        loaded: The matrices as loaded, by the name of their module.
    """

    def __init__(self, base: Base, loaded: Mapping[str, Tensor]) -> None:
        self._files = {} if base.model is not None else _checkpoint_files(base)
        self._kept: dict[str, Tensor] = {}
        for name, values in loaded.items():
            if f"{name}.weight" not in self._files or not _same(self[name], values):
                self._kept[name] = values

    def keeps(self, name: str) -> bool:
        """Whether the loaded values themselves are kept, and must not be written to."""
        return name in self._kept

    def __getitem__(self, name: str) -> Tensor:
        if name in self._kept:
            return self._kept[name]
        from safetensors import safe_open

        key = f"{name}.weight"
        with safe_open(self._files[key], "pt") as file:
            stored: Tensor = file.get_tensor(key)
        return stored


def _same(stored: Tensor, loaded: Tensor) -> bool:
    """Whether a stored tensor is the loaded one, judged by a few rows (a renamed or transposed one differs in all)."""
    rows = slice(None, None, max(1, len(loaded) // 4))
    return stored.shape == loaded.shape and torch.equal(stored[rows].to(loaded), loaded[rows])


def _checkpoint_files(base: Base) -> dict[str, Path]:
    """Tensor name -> safetensors file, for a local folder or the Hub's cache; empty if there is no such file."""
    index = _cached_file(base, _INDEX_FILE)
    if index is not None:
        shards = json.loads(index.read_text())["weight_map"]
        found = {shard: _cached_file(base, shard) for shard in set(shards.values())}
        return {key: path for key, shard in shards.items() if (path := found[shard]) is not None}
    single = _cached_file(base, _WEIGHTS_FILE)
    if single is None:
        return {}
    from safetensors import safe_open

    with safe_open(single, "pt") as file:
        return dict.fromkeys(file.keys(), single)


def _cached_file(base: Base, name: str) -> Path | None:
    local = Path(base.location)
    if local.is_dir():
        return local / name if (local / name).exists() else None
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(base.location, name, revision=base.revision)
    return Path(cached) if isinstance(cached, str) else None
