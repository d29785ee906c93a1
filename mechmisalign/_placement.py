"""Where the weights of a Hugging Face model are, and where its modules compute.

A model that accelerate has spread over devices (``device_map``) carries a hook on each module: it says where the module
computes, and an offloaded module's parameters lie on the meta device between two passes, their values in a map on the
host or in files. Everything that must know this asks here; a model on one device gives the plain answers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_WRAPPERS = ("original_component", "base_layer")  # TransformerLens's and PEFT's


def execution_device(module: nn.Module) -> torch.device:
    """Where a module computes: what its hook says, else where its first real parameter is.

    Raises:
        ValueError: If nothing says so: parameters on the meta device and no hook that would bring them.
    """
    for each in module.modules():
        device = next((hook.execution_device for hook in _hooks(each) if hook.execution_device is not None), None)
        if device is not None:
            return torch.device(device)
        own = next((tensor.device for tensor in _own_tensors(each) if not tensor.is_meta), None)
        if own is not None:
            return own
    raise ValueError(
        f"the weights of this {type(module).__name__} are on the meta device and no hook of accelerate would bring "
        "them; load the model with its weights"
    )


def device_of(model: Any) -> torch.device:
    """Where the embedding of a TransformerLens model computes, so where token ids must be."""
    inner = getattr(model, "original_model", None)
    return next(model.parameters()).device if inner is None else execution_device(inner.get_input_embeddings())


def device_of_layer(model: Any, layer: int) -> torch.device:
    """Where a block of a TransformerLens model computes: not where the embedding does, if the model is spread."""
    return execution_device(model.blocks[layer])


def free_bytes(device: torch.device) -> int:
    """Memory that can be had on a device now, what torch has reserved there and does not use included."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    import psutil

    return int(psutil.virtual_memory().available)


def is_spread(model: nn.Module) -> bool:
    """Whether accelerate has placed the model's modules, so that it must not be moved as a whole."""
    return len(set(getattr(model, "hf_device_map", None) or {})) > 1 or any(
        True for module in model.modules() for _ in _hooks(module)
    )


def is_offloaded(module: nn.Module, name: str = "weight") -> bool:
    """Whether a parameter's values are elsewhere between two passes."""
    return getattr(unwrapped(module), name).is_meta


def stored(module: nn.Module, name: str = "weight") -> Tensor:
    """The values of a parameter, wherever they are; an offloaded one's on the host, maybe mapped from a file.

    Raises:
        ValueError: If there are none.
    """
    inner = unwrapped(module)
    parameter: Tensor = getattr(inner, name)
    if not parameter.is_meta:
        return parameter.detach()
    values, key, _ = _store(inner, name)
    found: Tensor = values[key]
    return found.detach()


def put(module: nn.Module, values: Tensor, name: str = "weight") -> None:
    """Let a parameter have these values, a tensor of its own shape and dtype; an offloaded one has them on the host.

    Values that were in a file are then held in memory instead; the file is left alone.

    Raises:
        ValueError: If an offloaded parameter has no map that can be written to.
    """
    inner = unwrapped(module)
    parameter: Tensor = getattr(inner, name)
    if not parameter.is_meta:
        parameter.data = values.to(parameter.device)
        return
    _, key, writable = _store(inner, name)
    if writable is None:
        raise ValueError(
            f"the values of this {type(inner).__name__} are offloaded to a place that cannot be written to; use "
            "weights='live', which changes none"
        )
    writable[key] = values.to("cpu")


@contextmanager
def brought(*modules: nn.Module) -> Iterator[None]:
    """While the block runs, the modules' parameters are where they compute, also offloaded ones."""
    with ExitStack() as stack:
        for module in map(unwrapped, modules):
            if any(tensor.is_meta for tensor in _own_tensors(module)):
                from accelerate.utils import align_module_device

                stack.enter_context(align_module_device(module))
        yield


@contextmanager
def untold(model: nn.Module) -> Iterator[None]:
    """While the block runs, the model does not tell its device map if that mixes accelerators and offloading."""
    told = getattr(model, "hf_device_map", None)
    kinds = {str(device) in ("cpu", "disk") for device in (told or {}).values()}
    if len(kinds) < 2:
        yield
        return
    del model.hf_device_map
    try:
        yield
    finally:
        model.hf_device_map = told  # type: ignore[assignment]


def unwrapped(module: nn.Module) -> nn.Module:
    """The module that holds the parameters, inside TransformerLens's and PEFT's wrappers."""
    for wrapper in _WRAPPERS:
        module = getattr(module, wrapper, module)
    return module


def _own_tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters(recurse=False)


def _hooks(module: nn.Module) -> Iterator[Any]:
    """The hooks of accelerate on a module that say where it computes (several may be chained)."""
    hook = module.__dict__.get("_hf_hook")
    for each in getattr(hook, "hooks", () if hook is None else (hook,)):
        if hasattr(each, "execution_device"):
            yield each


def _store(module: nn.Module, name: str) -> tuple[Mapping[str, Tensor], str, MutableMapping[str, Tensor] | None]:
    """Where an offloaded parameter's values are read, under which key, and where they can be replaced.

    accelerate nests its maps: one that adds a prefix around one that looks into memory first, then into files.
    """
    found = next((hook.weights_map for hook in _hooks(module) if getattr(hook, "weights_map", None) is not None), None)
    if found is None:
        raise ValueError(
            f"the {name} of this {type(module).__name__} is on the meta device and offloaded nowhere; load the model "
            "with its weights"
        )
    key = name
    while hasattr(found, "prefix"):
        key, found = f"{found.prefix}{key}", found.dataset
    first = getattr(found, "state_dict", found)
    return found, key, first if isinstance(first, MutableMapping) else None
