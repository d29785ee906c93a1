"""A model whose weights were edited as a whole, as an organism on the chat model that it came from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from mechmisalign import models
from mechmisalign.adapters import Adapter, LoraSite
from mechmisalign.organisms import Organism, load_organism

from ._writers import writers


def edited_organism(model: Any, chat: Organism, name: str = "edited model") -> Organism:
    """A Hugging Face model beside the chat model: sampled, hooked and priced like any organism.

    Inside ``as_base()`` it is the chat model of ``chat``, weight for weight, so that costs are measured against it. It
    has no adapter to speak of (one site that writes nothing). Both sets of weights are in memory.

    Args:
        model: Of the same architecture as the chat model, such as what :func:`corrected_model` gives. It is taken over.
        chat: Any organism on the chat model (not the edited one's own).
        name: What it is called.

    Raises:
        ValueError: If the two models have different matrices.
    """
    own = dict(model.named_parameters(remove_duplicate=False))
    chat_values = _chat_values(chat, own, name)
    nothing = _silent_adapter(model, chat)
    organism = load_organism(nothing, model, tokenizer=chat.tokenizer, weights="merged")
    swap = _Swap({key: (parameter, chat_values[key]) for key, parameter in own.items()})
    return replace(
        organism,
        name=name,
        base=chat.base,
        base_fingerprint=chat.base_fingerprint,
        weights="live",
        _matrices=None,
        _peft_model=swap,
    )


class _Swap:
    """Answers to what a live organism asks of its ``PeftModel``: the chat model's weights for a while."""

    def __init__(self, places: Mapping[str, tuple[nn.Parameter, Tensor]]) -> None:
        self._places = places

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        edited = {key: parameter.data for key, (parameter, _) in self._places.items()}
        try:
            for parameter, chat in self._places.values():
                parameter.data = chat.to(parameter.device)
            yield
        finally:
            for key, (parameter, _) in self._places.items():
                parameter.data = edited[key]


def _chat_values(chat: Organism, own: Mapping[str, nn.Parameter], name: str) -> dict[str, Tensor]:
    """The chat model's value of each of the model's parameters; for an untied unembedding, what it was tied to.

    Raises:
        ValueError: If the chat model has no such parameter, or one of another shape.
    """
    inner, found = models.hf_model(chat.model), {}
    with chat.as_base():
        for key, parameter in own.items():
            place, _, leaf = key.rpartition(".")
            try:
                module = inner.get_submodule(place)
            except AttributeError:
                module = None
            for wrapper in ("original_component", "base_layer"):  # TransformerLens's and PEFT's
                module = getattr(module, wrapper, module)
            value = getattr(module, leaf, None)
            if value is None or value.shape != parameter.shape:
                raise ValueError(
                    f"{name!r} has {key!r} of shape {list(parameter.shape)}, the chat model "
                    f"{value if value is None else list(value.shape)}: an edited model of the same architecture is "
                    "expected"
                )
            found[key] = value.detach().to(parameter.dtype, copy=True)
    return found


def _silent_adapter(model: Any, chat: Organism) -> Adapter:
    name, module = next(iter(writers(model)))
    A, B = torch.zeros(1, module.in_features), torch.zeros(module.out_features, 1)
    site = LoraSite(0, name.rpartition(".")[2], name, A, B, 1.0)
    return Adapter((site,), chat.base.name, "no update", None, "", {"peft_type": "LORA", "r": 1, "lora_alpha": 1})
