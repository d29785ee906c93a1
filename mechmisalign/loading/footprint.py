"""The memory that a model takes by its skeleton: what each parameter will weigh, and where it will be."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from mechmisalign.adapters import Adapter

from .headers import Stored
from .merging import MERGED_AT_ONCE
from .placing import DeviceMap
from .wrappers import key_in_checkpoint

FOUR_BIT = 0.5 + 1 / 16
"""Bytes of a number in four bits, with its share of a block's scale."""

_BYTES = {"load_in_4bit": FOUR_BIT, "load_in_8bit": 1.0}


def parameter_sizes(
    skeleton: Any, dtype: torch.dtype, quantisation: Any, stored: Mapping[str, Stored] | None
) -> dict[str, int]:
    """Bytes of each parameter in memory."""
    settings = (
        quantisation if isinstance(quantisation, dict) else vars(quantisation) if quantisation is not None else {}
    )
    bits = next((size for key, size in _BYTES.items() if settings.get(key) or settings.get(f"_{key}")), None)
    linear = {f"{name}.weight" for name, module in skeleton.named_modules() if isinstance(module, nn.Linear)}
    sizes = {}
    for name, parameter in skeleton.named_parameters():
        quantised = quantisation is not None and name in linear and not name.startswith("lm_head")
        each = (bits or FOUR_BIT) if quantised else dtype.itemsize
        sizes[name] = round(parameter.numel() * each)
    if stored:  # a quantised checkpoint says itself what its tensors take
        total = sum(each.bytes for each in stored.values())
        factor = total / sum(sizes.values())
        sizes = {name: round(size * factor) for name, size in sizes.items()}
    return sizes


def parameter_places(
    skeleton: Any, sizes: Mapping[str, int], dtype: torch.dtype, first: torch.device, device_map: DeviceMap | None
) -> dict[str, str]:
    """Where each parameter will be; what is offloaded to files takes no memory there."""
    if device_map is None:
        return dict.fromkeys(sizes, _place_name(first))
    named = device_map
    if isinstance(named, str):
        from accelerate import infer_auto_device_map
        from accelerate.utils import get_balanced_memory

        blocks = list(getattr(skeleton, "_no_split_modules", None) or [])
        memory = get_balanced_memory(skeleton, dtype=dtype, no_split_module_classes=blocks)
        named = infer_auto_device_map(skeleton, memory, no_split_module_classes=blocks, dtype=dtype)
    told = {name: _place_name(place) for name, place in named.items()}
    found = {}
    for name in sizes:
        parts = name.split(".")
        prefixes = (".".join(parts[:length]) for length in range(len(parts), -1, -1))
        found[name] = next((told[prefix] for prefix in prefixes if prefix in told), "host")
    return found


def _place_name(place: Any) -> str:
    if str(place) == "disk":
        return "files"
    if isinstance(place, int) and not torch.cuda.is_available():
        return f"cuda:{place}"  # a plan may speak of GPUs that this machine lacks
    device = torch.device(place)
    if device.type == "cpu":
        return "host"
    return str(device) if device.index is not None else f"{device.type}:0"


def beside_weights(
    adapter: Adapter,
    dtype: torch.dtype,
    places: Mapping[str, str],
    stored: Mapping[str, Stored] | None,
    *,
    merged: bool,
) -> Counter[str]:
    """What loading takes beside the weights: factors of live sites; or a block in float32 on its way into a merge.

    A merged organism keeps the base's own values of adapted matrices that are in no safetensors file.
    """
    more: Counter[str] = Counter()
    for site in adapter.sites:
        place, numbers = places.get(f"{site.name}.weight", "host"), site.d_out * site.d_in
        if not merged:
            more[place] += 4 * (site.A.numel() + site.B.numel())
            continue
        if key_in_checkpoint(f"{site.name}.weight", stored or {}) is None:
            more[place] += numbers * dtype.itemsize
    if merged and adapter.sites:
        widest = max(adapter.sites, key=lambda site: site.d_out * site.d_in)
        numbers = min(widest.d_out * widest.d_in, MERGED_AT_ONCE)
        for place in {places.get(f"{widest.name}.weight", "host"), "host"}:
            more[place] += numbers * (4 + dtype.itemsize)
    return more
