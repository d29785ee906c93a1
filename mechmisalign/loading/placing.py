"""The weights of a base: read once, in the wanted dtype, onto the wanted device or spread over several."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch

from mechmisalign import _placement
from mechmisalign._pretrained import read_pretrained

from .bases import Base
from .headers import stored_dtype, stored_tensors
from .wrappers import reader

DeviceMap = str | Mapping[str, int | str | torch.device]
"""Where modules go: ``"auto"`` and the like, or names of modules with a GPU's number, ``"cpu"`` or ``"disk"``."""

STRATEGIES = ("auto", "balanced", "balanced_low_0", "sequential")


def load_weights(
    base: Base,
    dtype: torch.dtype | None,
    device: torch.device,
    *,
    device_map: DeviceMap | None = None,
    quantization: Any = None,
) -> Any:
    """The base with its weights, once, directly in the wanted dtype; one in memory is only moved.

    Without a dtype it is that of the checkpoint's tensors, whatever the config says; a quantised checkpoint decides
    itself.
    """
    if base.peft_model is not None:
        base.peft_model.unload()
    if base.model is not None:
        moves = not _placement.is_spread(base.model) and device != next(base.model.parameters()).device
        return (base.model.to(device) if moves else base.model).eval()
    from transformers import AutoConfig

    config = read_pretrained(AutoConfig, base.location, **base.source)
    read, extra = reader(config)
    quantised = quantization is not None or getattr(config, "quantization_config", None) is not None
    wanted = dtype or (None if quantised else stored_dtype(stored_tensors(base))) or "auto"
    if quantization is not None:
        extra = {**extra, "quantization_config": quantization}
    if device_map is not None:
        return _spread(read, base, device_map, {**extra, "dtype": wanted}).eval()
    placement = {} if device.type == "cpu" and not quantised else {"device_map": {"": device}}
    model: Any = read_pretrained(read, base.location, **base.source, **extra, dtype=wanted, **placement)
    return model.eval()


def _spread(read: Any, base: Base, device_map: DeviceMap, options: Mapping[str, Any]) -> Any:
    """The model over several devices; what must be written anew to be offloaded goes with the model."""
    folder = tempfile.mkdtemp(prefix="mechmisalign-offload-")
    places = device_map if isinstance(device_map, str) else dict(device_map)
    with ExitStack() as undo:
        undo.callback(shutil.rmtree, folder, ignore_errors=True)
        model = read_pretrained(read, base.location, **base.source, **options, device_map=places, offload_folder=folder)
        undo.pop_all()
    weakref.finalize(model, shutil.rmtree, folder, ignore_errors=True)
    return model


def check_places(base: Base, device: str | torch.device | None, device_map: DeviceMap | None, engine: str) -> None:
    """Refuse places that contradict each other.

    Raises:
        ValueError: On a device beside a device map, an unknown strategy, or either for a model that has its place.
    """
    if device_map is None:
        if device is not None and base.model is not None and _placement.is_spread(base.model):
            raise ValueError(f"the model in memory is spread over devices, device={device} was asked for; leave it out")
        return
    if device is not None:
        raise ValueError(f"device={device} and device_map={device_map!r} were given; give one of them")
    if isinstance(device_map, str) and device_map not in STRATEGIES:
        raise ValueError(
            f"device_map must be one of {STRATEGIES} or name modules, as {{'model.layers.0': 0, …}}, got {device_map!r}"
        )
    if base.model is not None:
        raise ValueError("the model in memory has its place already; give device_map= where it is loaded")
    if engine == "hooked":
        raise ValueError("a HookedTransformer is on one device; use engine='bridge' for a device_map")


def check_quantization(base: Base, quantization: Any, weights: str) -> None:
    """Refuse to quantise what is to be merged into, or is loaded already.

    Raises:
        ValueError: If so.
    """
    if quantization is None:
        return
    if weights == "merged":
        raise ValueError(
            "an update cannot be folded into quantised weights; use weights='live' with quantization_config="
        )
    if base.model is not None:
        raise ValueError("the model in memory is loaded already; give quantization_config= where it is loaded")


def check_dtype(base: Base, dtype: torch.dtype | None) -> None:
    """Refuse to cast a model in memory, which would lose precision that its owner may want.

    Raises:
        ValueError: If another dtype is asked for than the model has.
    """
    if base.model is not None and dtype not in (None, own := next(base.model.parameters()).dtype):
        raise ValueError(f"the model in memory is {own}, dtype={dtype} was asked for; cast it first, or pass its name")


def device_for(base: Base, device: str | torch.device | None) -> torch.device:
    """The device that was asked for; else the one where a model in memory is; else the GPU if there is one."""
    if device is not None:
        return torch.device(device)
    if base.model is not None:
        return _placement.execution_device(base.model.get_input_embeddings())
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
