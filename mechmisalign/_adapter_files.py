"""Reading a PEFT adapter: find its files, refuse what is not a plain LoRA, and resolve each site's scaling."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import registry
from ._adapter_config import check_settings
from ._adapter_places import of_gguf, refuse_other_places
from ._checksums import DamagedFileError, read_tensors
from ._hub import HubError, commit_of, fetch, is_hub_id
from ._pretrained import refuse_lfs_pointer
from ._saved_adapters import CONFIG_FILE as CONFIG_FILE
from ._saved_adapters import WEIGHTS_FILE as WEIGHTS_FILE
from ._saved_adapters import check_config
from ._wrapped_names import in_tower, unwrapped, wrapper_of
from .adapters import Adapter, AdapterError, LoraSite

logger = logging.getLogger(__name__)

PICKLED_FILE = "adapter_model.bin"
KEY_PREFIX = "base_model.model."

_KEY = re.compile(rf"{re.escape(KEY_PREFIX)}(?P<name>.+)\.lora_(?P<factor>[AB])\.weight")
_LAYER = re.compile(r"\.(?:layers|h|blocks|layer)\.(\d+)\.")

# Settings of LoraConfig that change the maths of a site or train something beside it.
_UNSUPPORTED = {
    "use_dora": "DoRA also rescales the columns of the matrix",
    "modules_to_save": "it replaces whole modules of the base",
    "trainable_token_indices": "it trains rows of the embedding",
    "lora_bias": "its sites have a bias",
    "target_parameters": "it adapts bare parameters (mixtures of experts)",
    "layer_replication": "it repeats layers of the base",
    "fan_in_fan_out": "its matrices are transposed (Conv1D)",
    "use_qalora": "QA-LoRA pools its inputs",
    "use_bdlora": "BD-LoRA has block-diagonal factors",
    "alora_invocation_tokens": "activated LoRA acts only after its invocation tokens",
    "arrow_config": "it routes between several adapters",
    "megatron_config": "its sites are Megatron's parallel layers",
    "velora_config": "VeLoRA is not understood",
    "monteclora_config": "MonteCLoRA samples its weights",
    "kasa_config": "KaSA truncates the base weights",
}
_PLAIN_INITS = (True, False, None, "gaussian", "orthogonal", "eva")  # the others change the base before training


def read_adapter(
    path_or_hub_id: str | Path, subfolder: str | None, revision: str | None, local_files_only: bool = False
) -> Adapter:
    """``Adapter.load``."""
    place = registry.place(path_or_hub_id, subfolder, revision, aloud=True)
    if place.entry is not None and place.entry.kind == "vector":
        raise AdapterError(
            f"{str(path_or_hub_id)!r} is a steering vector ({place.name}), no adapter: read it with "
            "mm.interop.read_steering_vector, and put it on its base with mm.Steer"
        )
    path_or_hub_id, subfolder, revision = place[:3]
    folder, commit = locate(path_or_hub_id, subfolder, revision, local_files_only)
    source = "/".join([str(path_or_hub_id), *([subfolder] if subfolder else [])])
    config = _read_config(folder, source)
    refuse_unsupported(config, source)
    metadata, tensors = _read_weights(folder, source)
    check_config(config, metadata, source)
    digest = hashlib.sha256((folder / WEIGHTS_FILE).read_bytes()).hexdigest()
    read = adapter_from_tensors(tensors, config, source=source, revision=commit, digest=digest)
    return replace(read, folder=folder)


def adapter_from_tensors(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], *, source: str, revision: str | None, digest: str
) -> Adapter:
    """An adapter from tensors named as PEFT saves them.

    Raises:
        AdapterError: On anything but complete, finite pairs of A and B whose rank is the config's.
    """
    refuse_unsupported(config, source)
    pairs = _paired(_of_language_model(tensors, source), source)
    wrapper = _wrapper(pairs, source)
    sites = [_site(name, pair["A"], pair["B"], config, source) for name, pair in pairs.items()]
    _refuse_shared_keys(sites, source)
    return Adapter(
        sites=tuple(
            replace(site, name=unwrapped(site.name, wrapper))
            for site in sorted(sites, key=lambda site: (site.layer, site.module, site.name))
        ),
        base=str(config.get("base_model_name_or_path") or ""),
        source=source,
        revision=revision,
        digest=digest,
        config=dict(config),
        wrapper=wrapper,
    )


def locate(
    path_or_hub_id: str | Path, subfolder: str | None, revision: str | None, local_files_only: bool = False
) -> tuple[Path, str | None]:
    """Local folder of an adapter, and its commit if it comes from the Hub."""
    name = str(path_or_hub_id)
    root = registry.folder(name) or Path(name).expanduser()
    commit = commit_of(root)
    if not root.is_dir():
        root, commit = _download(name, subfolder, revision, local_files_only)
    folder = root / subfolder if subfolder else root
    if not folder.is_dir():
        near = registry.suggestion(str(subfolder), _folders(root))
        raise AdapterError(f"{name!r} has no subfolder {subfolder!r}{near}")
    return folder, commit


def layer_of(name: str) -> int | None:
    """The block that a matrix is in, by its dotted name; None outside of the blocks."""
    match = _LAYER.search(f".{name}.")
    return int(match[1]) if match else None


def resolve_pattern(patterns: Mapping[str, float], name: str, default: float) -> float:
    """The value of the first pattern that matches the end of a module's name (``peft.utils.get_pattern_key``)."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default


def refuse_unsupported(config: Mapping[str, Any], source: str) -> None:
    """Refuse an adapter whose update is more, or other, than ``scaling · B A``.

    Raises:
        AdapterError: Naming the setting and its value.
    """
    kind = config.get("peft_type")
    if kind != "LORA":
        raise AdapterError(f"{source!r} is an adapter of type {kind!r}, a LoRA (peft_type 'LORA') is needed")
    if config.get("bias", "none") != "none":
        raise AdapterError(f"{source!r} has bias={config['bias']!r}: trained biases are not supported; use bias='none'")
    missing = {"r", "lora_alpha"} - config.keys()
    if missing:
        raise AdapterError(f"the config of {source!r} has no {sorted(missing)}; the scaling needs rank and alpha")
    check_settings(config, source)
    for setting, why in _UNSUPPORTED.items():
        if config.get(setting):
            raise AdapterError(
                f"{source!r} has {setting}={config[setting]!r}, which is not supported: {why}; "
                "a plain LoRA is expected (train it without, or merge it into a full model)"
            )
    if config.get("init_lora_weights", True) not in _PLAIN_INITS:
        raise AdapterError(
            f"{source!r} has init_lora_weights={config['init_lora_weights']!r}, which changes the base weights before "
            "training; convert it with save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        )


def _download(name: str, subfolder: str | None, revision: str | None, local_files_only: bool) -> tuple[Path, str]:
    if registry.is_reserved(name):
        raise AdapterError(f"no organism is named {name!r}{registry.suggestion(name)}")
    refuse_other_places(name)
    if not is_hub_id(name):
        raise AdapterError(f"there is no folder {name!r}{_neighbours(Path(name).expanduser())}")
    files = ["/".join([*([subfolder] if subfolder else []), file]) for file in (CONFIG_FILE, WEIGHTS_FILE)]
    try:
        return fetch(name, files, revision=revision, local_files_only=local_files_only)
    except HubError as error:
        raise AdapterError(
            f"{name!r} is no shipped organism and no folder, and {error}{_neighbours(Path(name))}"
        ) from error


def _neighbours(path: Path) -> str:
    """The nearest of the shipped names and of the folders beside a path that does not exist, or the shipped names."""
    beside = [str(path.parent / each) for each in _folders(path.parent)] if path.parent.is_dir() else []
    near = registry.nearest(str(path), [*beside, *registry.names()])
    near = near or registry.nearest(str(path), registry.known_names())
    return registry.suggestion(str(path), near or registry.names())


def _folders(parent: Path) -> list[str]:
    return sorted(each.name for each in parent.iterdir() if each.is_dir()) if parent.is_dir() else []


def _read_config(folder: Path, source: str) -> dict[str, Any]:
    refuse_lfs_pointer(folder / CONFIG_FILE)
    try:
        config = json.loads((folder / CONFIG_FILE).read_text())
    except FileNotFoundError:
        there = ", ".join(sorted(each.name for each in folder.iterdir())) or "nothing"
        full = "; this looks like a full model, not an adapter: mm.load_organism loads it, mm.extract_lora makes one"
        hint = full if (folder / "config.json").exists() else ""
        below = [str(each) for each in sorted(folder.iterdir()) if (each / CONFIG_FILE).exists()]
        hint += f"; give the folder of the adapter itself: {', '.join(below[:5])}" if below else ""
        hint += "".join(of_gguf(each) for each in sorted(folder.glob("*.gguf"))[:1])
        raise AdapterError(f"{source!r} has no {CONFIG_FILE} (it has: {there}){hint}") from None
    except json.JSONDecodeError as error:
        raise AdapterError(f"the {CONFIG_FILE} of {source!r} is not JSON: {error}; save the adapter again") from error
    if not isinstance(config, dict):
        raise AdapterError(f"the {CONFIG_FILE} of {source!r} holds a {type(config).__name__}, expected an object")
    return config


def _read_weights(folder: Path, source: str) -> tuple[dict[str, str], dict[str, Tensor]]:
    if not (folder / WEIGHTS_FILE).exists():
        pickled = (folder / PICKLED_FILE).exists()
        found = f"only a pickled {PICKLED_FILE}, which can run code when it is read" if pickled else "no weights"
        raise AdapterError(
            f"{source!r} has {found}; {WEIGHTS_FILE} is needed "
            "(save it again with safe_serialization=True, where you trust it)"
        )
    try:
        return read_tensors(folder / WEIGHTS_FILE)
    except DamagedFileError as error:
        raise AdapterError(f"the {WEIGHTS_FILE} of {source!r} cannot be read ({error}); copy it again") from error


def _of_language_model(tensors: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """Without the sites in a tower for images or sound: text never passes there, so there they change nothing."""
    kept = {key: tensor for key, tensor in tensors.items() if not in_tower(key)}
    if tensors and not kept:
        raise AdapterError(f"{source!r} adapts a tower for images or sound only; there is nothing that text passes")
    if len(kept) < len(tensors):
        logger.warning(
            "%s also adapts a tower for images or sound: those %d tensors are left out, text never passes there",
            source, len(tensors) - len(kept),
        )  # fmt: skip
    return kept


def _wrapper(names: Iterable[str], source: str) -> str:
    try:
        return wrapper_of(names)
    except ValueError as error:
        raise AdapterError(f"{source!r} cannot be read: {error}") from error


def _paired(tensors: Mapping[str, Tensor], source: str) -> dict[str, dict[str, Tensor]]:
    """Module name -> its A and B."""
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise AdapterError(f"{source!r} holds the unexpected key {key!r}: {_why_unexpected(key)}")
        if not torch.isfinite(tensor).all():
            raise AdapterError(f"{key!r} of {source!r} holds NaN or infinite values; the training run diverged")
        pairs.setdefault(match["name"], {})[match["factor"]] = tensor
    if not pairs:
        raise AdapterError(f"{source!r} holds no weights; pairs of lora_A and lora_B are expected")
    for name, pair in pairs.items():
        if len(pair) < 2:
            raise AdapterError(f"{source!r} has lora_{next(iter(pair))} of {name!r} without its partner; copy it again")
    return pairs


def _refuse_shared_keys(sites: Iterable[LoraSite], source: str) -> None:
    first: dict[tuple[int, str], str] = {}
    for site in sites:
        other = first.setdefault(site.key, site.name)
        if other != site.name:
            raise AdapterError(
                f"{source!r} adapts several matrices {site.module!r} in layer {site.layer} ({other!r} and "
                f"{site.name!r}), as adapters of mixtures of experts do; that is not supported: one is expected"
            )


def _why_unexpected(key: str) -> str:
    if "lora_magnitude_vector" in key:
        return "DoRA is not supported"
    if "lora_embedding" in key or "embed_tokens" in key or "lm_head" in key:
        return "a trained or resized vocabulary is not supported"
    if key.endswith(".bias"):
        return "trained biases are not supported"
    return f"only {KEY_PREFIX}<module>.lora_A.weight and .lora_B.weight are expected"


def _site(name: str, A: Tensor, B: Tensor, config: Mapping[str, Any], source: str) -> LoraSite:
    layer = layer_of(name)
    if layer is None:
        raise AdapterError(f"{source!r} adapts {name!r}, which is in no block; only matrices of blocks are supported")
    rank = int(resolve_pattern(config.get("rank_pattern") or {}, name, config["r"]))
    alpha = resolve_pattern(config.get("alpha_pattern") or {}, name, config["lora_alpha"])
    if A.ndim != 2 or B.ndim != 2 or not A.shape[0] == B.shape[1] == rank:
        raise AdapterError(
            f"{name!r} of {source!r} has A {list(A.shape)} and B {list(B.shape)}; "
            f"[{rank} d_in] and [d_out {rank}] are expected for the rank {rank} of its config"
        )
    scaling = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    return LoraSite(layer, name.rpartition(".")[2], name, A.float(), B.float(), float(scaling))
