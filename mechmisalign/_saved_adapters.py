"""Adapters in PEFT's two files, with a checksum, and with what the config said when the weights were written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ._checksums import DamagedFileError, write_tensors
from ._reading import brief
from ._writing import whole

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_KEY = "mechmisalign_config"
"""Name of the config in the metadata of the weights."""

_FREE = ("base_model_name_or_path", "revision", "inference_mode", "task_type", "auto_mapping", "peft_version")
"""Settings that may be changed beside the weights: none of them decides what the adapter adds."""


def write_adapter(folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Write PEFT's two files, each whole or not at all."""
    plain = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    write_tensors(folder / WEIGHTS_FILE, plain, {"format": "pt", CONFIG_KEY: _deciding(config)})
    with whole(folder / CONFIG_FILE) as partial:
        partial.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def check_config(config: Mapping[str, Any], metadata: Mapping[str, str], source: str) -> None:
    """Compare a config with what it was when the weights were written, where these tell it.

    Raises:
        DamagedFileError: Naming a setting that differs.
    """
    if CONFIG_KEY not in metadata or metadata[CONFIG_KEY] == _deciding(config):
        return
    written: dict[str, Any] = json.loads(metadata[CONFIG_KEY])
    missing = object()
    names = sorted({*written, *config} - set(_FREE))
    name = next(name for name in names if written.get(name, missing) != config.get(name, missing))
    told = [brief(values[name]) if name in values else "missing" for values in (config, written)]
    raise DamagedFileError(
        f"the {CONFIG_FILE} of {source!r} is not what was written with its weights: {name!r} is {told[0]}, and was "
        f"{told[1]}; copy it again, or save the adapter anew (correction.save_adapter) after changing it"
    )


def _deciding(config: Mapping[str, Any]) -> str:
    return json.dumps({key: value for key, value in config.items() if key not in _FREE}, sort_keys=True)
