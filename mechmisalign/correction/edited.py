"""A model whose weights were edited as a whole, as an organism on the chat model that it came from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from mechmisalign import models
from mechmisalign.loading import full_models
from mechmisalign.organisms import Organism


def edited_organism(model: Any, chat: Organism, name: str = "edited model") -> Organism:
    """A Hugging Face model beside the chat model: sampled, hooked and priced like any organism.

    Inside ``as_base()`` it is the chat model of ``chat``, weight for weight, so that costs are measured against it. It
    is a full fine-tune: it has no adapter. Both sets of weights are in memory.

    Args:
        model: Of the same architecture as the chat model, such as what :func:`corrected_model` gives. It is taken over.
        chat: Any organism on the chat model (not the edited one's own).
        name: What it is called.

    Raises:
        ValueError: If the two models have different matrices.
    """
    values = _chat_values(chat, dict(model.named_parameters()), name)
    return full_models.organism(full_models.beside(model.eval(), chat, values, name))


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
