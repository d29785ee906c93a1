"""From the arguments of ``load_organism`` to a :class:`LoadingPlan`: nothing but configs and headers is read."""

from __future__ import annotations

import gc
import json
import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mechmisalign import registry
from mechmisalign._adapter_files import CONFIG_FILE, WEIGHTS_FILE
from mechmisalign._checkpoint_files import cached_file
from mechmisalign._hub import fetch_file, is_hub_id, is_offline
from mechmisalign._placement import free_bytes
from mechmisalign.adapters import Adapter

from . import bases, options, placing, reading
from .bases import Base
from .downloads import bytes_to_download, file_sizes
from .footprint import FOUR_BIT, beside_weights, parameter_places, parameter_sizes
from .headers import stored_dtype, stored_tensors
from .plan import DISK, TOLD_FROM, LoadingPlan, tell, told_bytes

if TYPE_CHECKING:
    from .placing import DeviceMap


def loading_plan(
    adapter: str | Path | Adapter | nn.Module,
    base: str | Path | nn.Module | None = None,
    *,
    weights: str | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    device_map: DeviceMap | None = None,
    quantization_config: Any = None,
    revision: str | None = None,
    subfolder: str | None = None,
    base_revision: str | None = None,
    local_files_only: bool = False,
) -> LoadingPlan:
    """What :func:`mechmisalign.load_organism` would take with these arguments; no weights are fetched or read.

    Of a local folder nothing is asked on the network. Of a Hub id only the configs are fetched, and the Hub is asked
    for the sizes of its files and for the headers of its tensors; offline, what is not in the cache is not known.

    Args:
        adapter: As for ``load_organism``.
        base: As there.
        weights: ``"merged"`` or ``"live"``; by default what a registry says, else merged.
        dtype: Precision of the weights; by default that of the checkpoint.
        device: By default the GPU if there is one.
        device_map: Instead of a device.
        quantization_config: As for ``load_organism``.
        revision: Of the adapter.
        subfolder: Inside the adapter's repository.
        base_revision: Of the base.
        local_files_only: Do not ask the Hub.

    Raises:
        AdapterError: If the adapter cannot be read.
        ValueError: If the base cannot be found, or the places contradict each other.

    Example:
        >>> print(loading_plan("pocket/medical"))  # doctest: +SKIP
    """
    told, found, missing = _described(adapter, base, subfolder, revision, local_files_only)
    found = bases.at_revision(found, base_revision)
    placing.check_places(found, device, device_map, "bridge")
    empty = bases.skeleton(found)
    weights = weights or options.asked_weights(adapter)
    options.check(weights, "bridge")
    planned = plan_of(
        told, bases.pinned(found), empty, merged=weights == "merged", dtype=dtype, device=device,
        device_map=device_map, quantization=quantization_config,
    )  # fmt: skip
    if missing:
        download = None if planned.download is None else planned.download + missing
        planned = replace(planned, adapter=missing, download=download)
    return planned


def announce(adapter: Adapter, base: Base, skeleton: Any, **settings: Any) -> None:
    """Tell of a load that is big, before it begins; ``settings`` as for :func:`plan_of`.

    Raises:
        DoesNotFitError: If a GPU has no room for it.
    """
    if base.model is None and 2 * sum(each.numel() for each in skeleton.parameters()) >= TOLD_FROM:
        gc.collect()  # modules and their hooks refer to each other: an organism that nobody has any more is still there
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        tell(plan_of(adapter, base, skeleton, **settings))


def plan_of(
    adapter: Adapter,
    base: Base,
    skeleton: Any,
    *,
    merged: bool,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    device_map: DeviceMap | None = None,
    quantization: Any = None,
) -> LoadingPlan:
    """The plan for a base whose skeleton is known."""
    tensors = stored_tensors(base)
    own = getattr(skeleton.config, "quantization_config", None)
    held_in = dtype or stored_dtype(tensors) or _config_dtype(skeleton)
    quantised = quantization if own is None else own
    sizes = parameter_sizes(skeleton, held_in, quantised, None if own is None else tensors)
    first = placing.device_for(base, device)
    places = parameter_places(skeleton, sizes, held_in, first, device_map)
    factors = sum(site.A.numel() + site.B.numel() for site in adapter.sites) * 4
    peak: Counter[str] = Counter({"host": factors})
    for name, size in sizes.items():
        peak[places[name]] += size
    for place, more in beside_weights(adapter, held_in, places, tensors, merged=merged).items():
        peak[place] += more
    download = 0 if base.model is not None else bytes_to_download(base)
    if download:
        peak[DISK] = download
    kind = str(held_in).removeprefix("torch.") if quantised is None else "quantised"
    needs = {place: size for place, size in sorted(peak.items()) if size}
    planned = LoadingPlan(
        adapter.source, base.name, {kind: sum(sizes.values())}, factors, download, needs, _free(needs)
    )
    return replace(planned, advice=_advice(planned, held_in, device_map, sizes))


def _described(
    adapter: Any, base: Any, subfolder: str | None, revision: str | None, local_files_only: bool
) -> tuple[Adapter, Base, int]:
    """The adapter and its base; of an adapter that is not here only its config, and the bytes that are missing."""
    if isinstance(adapter, (Adapter, nn.Module)):
        return *reading.read(adapter, base, subfolder, revision, local_files_only), 0
    place = registry.place(adapter, subfolder, revision)
    name, commit = str(place.name), place.revision
    inside = f"{place.subfolder}/" if place.subfolder else ""
    folder = registry.folder(name) or Path(name).expanduser()
    if _is_whole(folder / inside) or (place.entry is not None and place.entry.kind == "full"):
        whole = Base(str(adapter), str(folder / inside if folder.is_dir() else name), commit)
        return Adapter((), whole.name, whole.name, None, "", {}), replace(whole, local_files_only=local_files_only), 0
    asked = is_hub_id(name) and not registry.is_reserved(name) and not local_files_only and not is_offline()
    here = folder.is_dir() or not asked
    if here or cached_file(name, inside + WEIGHTS_FILE, commit) is not None:
        return *reading.read(adapter, base, subfolder, revision, local_files_only), 0
    config, told = fetch_file(name, inside + CONFIG_FILE, revision=commit)
    settings = json.loads(config.read_text())
    bare = Adapter((), str(settings.get("base_model_name_or_path") or ""), str(adapter), told, "", settings)
    sizes = file_sizes(name, commit, [inside + WEIGHTS_FILE])
    return *reading.read(bare, base or place.base, None, None), sizes[inside + WEIGHTS_FILE]


def _is_whole(folder: Path) -> bool:
    """Whether a folder holds a whole model: a full fine-tune, whose chat model is read on demand."""
    return (folder / "config.json").exists() and not (folder / CONFIG_FILE).exists()


def _config_dtype(skeleton: Any) -> torch.dtype:
    told = getattr(skeleton.config, "dtype", None)
    return told if isinstance(told, torch.dtype) else torch.float32


def _free(places: Mapping[str, int]) -> dict[str, int]:
    """Free bytes of those places that can be asked."""
    from huggingface_hub import constants

    free = {}
    for place in places:
        if place == "host":
            free[place] = free_bytes(torch.device("cpu"))
        elif place == DISK:
            cache = Path(constants.HF_HUB_CACHE)
            free[place] = shutil.disk_usage(next(each for each in (cache, *cache.parents) if each.exists())).free
        elif place.startswith("cuda") and torch.cuda.is_available():
            free[place] = free_bytes(torch.device(place))
    return free


def _advice(
    plan: LoadingPlan, dtype: torch.dtype, device_map: DeviceMap | None, sizes: Mapping[str, int]
) -> tuple[str, ...]:
    """What to do where it is short, the mildest first."""
    if plan.fits:
        return ()
    todo = []
    total = sum(sizes.values())
    if DISK in plan.short:
        todo.append(
            f"make room for {told_bytes(plan.short[DISK])} on the disk of the Hub's cache, or set HF_HOME to another"
        )
    if set(plan.short) <= {DISK}:
        return tuple(todo)
    if "quantised" not in plan.weights and dtype.itemsize > 2:
        todo.append(f"dtype=torch.bfloat16 takes {told_bytes(total * 2 // dtype.itemsize)} instead")
    if device_map is None:
        spread = "other GPUs, the host's memory and files" if set(plan.short) - {"host"} else "files, slowly"
        todo.append(f"device_map='auto' uses {spread} too")
    if "quantised" not in plan.weights:
        small = told_bytes(round(total / dtype.itemsize * FOUR_BIT))
        todo.append(
            f"weights='live' on a base in 4 bit (quantization_config=) takes about {small}, and computes roughly"
        )
    return tuple(todo)
