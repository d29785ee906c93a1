"""What ``load_organism`` is given, as an adapter and an unloaded base; and what identifies a chat model."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mechmisalign import _placement, registry
from mechmisalign._adapter_files import adapter_from_tensors
from mechmisalign.adapters import Adapter

from . import bases
from .bases import Base


def read(
    adapter: str | Path | Adapter | nn.Module,
    base: str | Path | nn.Module | None,
    subfolder: str | None,
    revision: str | None,
    local_files_only: bool = False,
) -> tuple[Adapter, Base]:
    """The adapter, and the base that it is for: the one that was asked for, or the adapter's own.

    Raises:
        AdapterError: If the adapter cannot be read.
        ValueError: If there is no base, or two.
    """
    if isinstance(adapter, nn.Module):
        if base is not None:
            raise ValueError("a PeftModel holds its own base; leave base= out")
        return _from_peft(adapter)
    own = (
        adapter
        if isinstance(adapter, Adapter)
        else Adapter.load(adapter, subfolder=subfolder, revision=revision, local_files_only=local_files_only)
    )
    if base is None and not isinstance(adapter, Adapter):
        base = registry.place(adapter).base
    return own, replace(bases.find_base(base, own), local_files_only=local_files_only)


def _from_peft(peft_model: Any) -> tuple[Adapter, Base]:
    """The adapter of a ``PeftModel`` in memory, and the base under it; neither is changed yet."""
    from peft import get_peft_model_state_dict

    if not hasattr(peft_model, "peft_config"):
        raise TypeError(
            f"adapter is a {type(peft_model).__name__}; expected a name, a folder, an Adapter or a PeftModel "
            "(a base model is passed as base=)"
        )
    active = list(peft_model.active_adapters)
    if len(active) != 1 or any(getattr(module, "merged_adapters", None) for module in peft_model.modules()):
        raise ValueError(f"the PeftModel has active adapters {active}; exactly one, not merged, is expected")
    config = {key: getattr(value, "value", value) for key, value in peft_model.peft_config[active[0]].to_dict().items()}
    tensors = get_peft_model_state_dict(peft_model, adapter_name=active[0], save_embedding_layers=False)
    detached = {key: tensor.detach().cpu().clone() for key, tensor in tensors.items()}
    digest = hashlib.sha256()
    for key in sorted(detached):
        digest.update(key.encode() + detached[key].float().numpy().tobytes())
    own = adapter_from_tensors(detached, config, source="PeftModel in memory", revision=None, digest=digest.hexdigest())
    return own, replace(bases.find_base(peft_model.get_base_model(), own), peft_model=peft_model)


@torch.no_grad()
def fingerprint(model: Any, tokenizer: Any, embedding: Tensor | None = None) -> str:
    """Identifies a chat model by what it is, not by its name.

    A short hash over the model's shape, the first rows of its embedding in bfloat16 (so that it is the same in float32
    and bfloat16) and the tokenizer's vocabulary. An adapter on matrices inside the blocks does not change it; for a
    full fine-tune, ``embedding`` is that of its chat model.
    """
    settings = ("model_type", "num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size")
    digest = hashlib.sha256(repr([getattr(model.config, name, None) for name in settings]).encode())
    whole = _placement.stored(model.get_input_embeddings()) if embedding is None else embedding
    rows = whole[:16].to("cpu", torch.bfloat16)
    digest.update(rows.contiguous().view(torch.int16).numpy().tobytes())
    digest.update(repr(sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])).encode())
    return digest.hexdigest()[:16]
