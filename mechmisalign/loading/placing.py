"""The weights of a base: read once, in the wanted dtype, onto the wanted device."""

from __future__ import annotations

from typing import Any

import torch

from .bases import Base


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


def device_for(base: Base, device: str | torch.device | None) -> torch.device:
    """The device that was asked for; else the one where a model in memory is; else the GPU if there is one."""
    if device is not None:
        return torch.device(device)
    if base.model is not None:
        return next(base.model.parameters()).device
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
