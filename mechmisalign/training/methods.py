"""What is trained: a LoRA, a steering vector or the whole model; how each is attached, saved and loaded again."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from mechmisalign._adapter_files import CONFIG_FILE, WEIGHTS_FILE
from mechmisalign._blocks import block_hooks, blocks
from mechmisalign._checksums import read_tensors
from mechmisalign._pretrained import read_pretrained
from mechmisalign._reading import read_object
from mechmisalign._saved_adapters import check_config, write_adapter
from mechmisalign._writing import explained
from mechmisalign.directions import HOOK, Direction
from mechmisalign.dynamics.reading import VECTOR_FILE
from mechmisalign.loading import Base

from .spec import Lora, Method, TrainError, Vector


@runtime_checkable
class Trainee(Protocol):
    """A model in which some parameters are trained."""

    @property
    def model(self) -> nn.Module:
        """What the Trainer holds; called like a Hugging Face model."""

    def chat(self) -> AbstractContextManager[nn.Module]:
        """The chat model while the block runs."""

    def save(self, folder: Path) -> None:
        """Write what was trained."""

    def load(self, folder: Path) -> None:
        """Read it back into the model; refuses (``TrainError``) what does not fit."""

    def give_back(self) -> None:
        """Leave the chat model as it was."""


def attach(method: Method, model: Any, base: Base, tokenizer: Any, *, seed: int, keep_chat: bool) -> Trainee:
    """The trainee of a method on a chat model that is in memory.

    Args:
        method: As specified.
        model: The Hugging Face model; only what is trained will require gradients.
        base: What it is called.
        tokenizer: Its tokenizer, for provenance, and saved beside a full model.
        seed: Of the initial weights.
        keep_chat: Whether ``chat()`` will be asked for; a full fine-tune then keeps a copy of the model.

    Raises:
        TrainError: If the model has no such layers or matrices.
    """
    depth = len(blocks(model))
    asked = (method.layer,) if isinstance(method, Vector) else getattr(method, "layers", None) or ()
    if any(layer >= depth for layer in asked):
        raise TrainError(f"method.layers are {list(asked)}; {base.name!r} has layers 0 to {depth - 1}")
    if isinstance(method, Lora):
        return _Lora(_with_lora(method, model, seed), base.name)
    if isinstance(method, Vector):
        return _Vector.on(model, method, base, tokenizer)
    return _Full(
        model.requires_grad_(True), tokenizer, copy.deepcopy(model).requires_grad_(False) if keep_chat else None
    )


def save_peft(model: Any, folder: Path, base: str) -> None:
    """A LoRA in PEFT's own two files, with the base called by ``base`` and every list in a fixed order."""
    from peft import get_peft_model_state_dict

    tensors = get_peft_model_state_dict(model, save_embedding_layers=False)
    config = {key: _plain(value) for key, value in model.peft_config["default"].to_dict().items()}
    config |= {"base_model_name_or_path": base, "inference_mode": True}
    write_adapter(folder, tensors, config)


@dataclass
class _Lora:
    model: Any
    base: str

    def chat(self) -> AbstractContextManager[nn.Module]:
        disabled: AbstractContextManager[Any] = self.model.disable_adapter()
        return _with(disabled, self.model)

    def save(self, folder: Path) -> None:
        save_peft(self.model, folder, self.base)

    def load(self, folder: Path) -> None:
        from peft import get_peft_model_state_dict, set_peft_model_state_dict

        if not (folder / WEIGHTS_FILE).exists():
            raise TrainError(f"{folder} has no {WEIGHTS_FILE}; a run or an adapter with the same sites is expected")
        own = get_peft_model_state_dict(self.model, save_embedding_layers=False)
        metadata, stored = read_tensors(folder / WEIGHTS_FILE)
        if {key: each.shape for key, each in stored.items()} != {key: each.shape for key, each in own.items()}:
            raise TrainError(
                f"the adapter in {folder} has other sites or another rank ({len(stored)} tensors) than method asks for "
                f"({len(own)}); give it the same rank, layers and modules"
            )
        saved = read_object(folder / CONFIG_FILE)
        check_config(saved, metadata, str(folder))
        config = self.model.peft_config["default"]
        scaled = {"lora_alpha": config.lora_alpha, "use_rslora": config.use_rslora}
        if any(saved.get(key, False) != value for key, value in scaled.items()):
            raise TrainError(f"the adapter in {folder} is scaled otherwise than {scaled}; use its own alpha and rslora")
        set_peft_model_state_dict(self.model, stored)

    def give_back(self) -> None:
        self.model.unload()


class _Vector(nn.Module):
    """A model with a learned vector added after one block, in every row and at every position."""

    def __init__(self, chat_model: nn.Module, method: Vector, header: dict[str, Any]) -> None:
        super().__init__()
        self.inner = chat_model.requires_grad_(False)
        self.config = chat_model.config
        self.method, self.header = method, header
        width = _width(chat_model)
        self.vector = nn.Parameter(torch.zeros(width, dtype=torch.float32, device=next(chat_model.parameters()).device))
        self.active = True

    @staticmethod
    def on(model: Any, method: Vector, base: Base, tokenizer: Any) -> _Vector:
        from mechmisalign.loading.reading import fingerprint

        header = {
            "method": f"steering vector learned at layer {method.layer}",
            "model": base.name,
            "base_revision": base.revision,
            "base_fingerprint": fingerprint(model, tokenizer),
            "hook": HOOK,
            "alpha": method.alpha,
        }
        return _Vector(model, method, header)

    @property
    def model(self) -> nn.Module:
        return self

    def forward(self, **inputs: Any) -> Any:
        if not self.active:
            return self.inner(**inputs)
        with block_hooks(self.inner, {self.method.layer: self._added}):
            return self.inner(**inputs)

    @contextmanager
    def chat(self) -> Iterator[nn.Module]:
        self.active = False
        try:
            yield self
        finally:
            self.active = True

    def save(self, folder: Path) -> None:
        vectors = (self.vector.detach() * self.method.alpha)[None]
        Direction(vectors, (self.method.layer,), self.header).save(folder / VECTOR_FILE)

    def load(self, folder: Path) -> None:
        if not (folder / VECTOR_FILE).exists():
            raise TrainError(f"{folder} has no {VECTOR_FILE}; the run of a steering vector is expected")
        stored = Direction.load(folder / VECTOR_FILE)
        if stored.layers != (self.method.layer,) or stored.d_model != len(self.vector):
            raise TrainError(
                f"the vector in {folder} is for layers {stored.layers} and width {stored.d_model}; "
                f"layer {self.method.layer} and width {len(self.vector)} are asked for"
            )
        with torch.no_grad():
            self.vector.copy_(stored.at(self.method.layer) / self.method.alpha)

    def give_back(self) -> None:
        pass

    def _added(self, resid: Tensor) -> Tensor:
        return resid + (self.method.alpha * self.vector).to(resid)


@dataclass
class _Full:
    model: Any
    tokenizer: Any
    reference: Any

    @contextmanager
    def chat(self) -> Iterator[nn.Module]:
        yield self.reference.to(next(self.model.parameters()).device)

    def save(self, folder: Path) -> None:
        with explained(folder):
            self.model.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)

    def load(self, folder: Path) -> None:
        from transformers import AutoModelForCausalLM

        stored = read_pretrained(AutoModelForCausalLM, folder, dtype=next(self.model.parameters()).dtype)
        self.model.load_state_dict(stored.state_dict())

    def give_back(self) -> None:
        pass


def _width(model: Any) -> int:
    config = model.config
    return int(getattr(config, "text_config", config).hidden_size)


def _with_lora(method: Lora, model: Any, seed: int) -> Any:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=method.rank,
        lora_alpha=int(method.alpha) if method.alpha == int(method.alpha) else method.alpha,  # vLLM wants whole ones so
        use_rslora=method.rslora,
        lora_dropout=method.dropout,
        target_modules=list(method.modules),
        layers_to_transform=None if method.layers is None else list(method.layers),
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers by names that are to go
        torch.manual_seed(seed)
        try:
            return get_peft_model(model, config)
        except ValueError as error:
            raise TrainError(f"method.modules {list(method.modules)} cannot be adapted: {error}") from error


@contextmanager
def _with(manager: AbstractContextManager[Any], value: nn.Module) -> Iterator[nn.Module]:
    with manager:
        yield value


def _plain(value: Any) -> Any:
    """JSON for a value of PEFT's config: sets and lists sorted, enums as their values."""
    if isinstance(value, set | list | tuple):
        return sorted(value)
    return getattr(value, "value", value)
