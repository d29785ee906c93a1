"""The weights of one model in the place of another's, for a while: how a full fine-tune becomes its chat model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mechmisalign import _placement
from mechmisalign.deltas.files import CheckpointError, Weights

from .bases import Base


class Swap:
    """Answers to what a live organism asks of its ``PeftModel``: the chat model's weights for a while.

    On the CPU the fine-tune's tensors wait beside the chat model's. Elsewhere each is overwritten and read back from
    the fine-tune's files when the block ends, so that memory grows by one tensor; without files it waits there too.

    Args:
        model: The Hugging Face model, before it is booted.
        values: The chat model's tensors, by the name of the parameter.
        files: The fine-tune's own tensors, by the same names; None if there are no files.
    """

    def __init__(self, model: nn.Module, values: Mapping[str, Tensor], files: Mapping[str, Tensor] | None) -> None:
        self._places = dict(parameters_of(model))
        self._values, self._files = values, files

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """The chat model while the block runs; afterwards the fine-tune, bit for bit."""
        waiting: dict[str, tuple[Tensor | None, torch.dtype]] = {}
        try:
            for key, (module, leaf) in self._places.items():
                own = _placement.stored(module, leaf)
                reread = self._files is not None and not _waits(own)
                waiting[key] = (None if reread else own), own.dtype
                dtype = own.dtype
                del own  # else its memory is held while the next one comes
                _placement.put(module, self._values[key].to(dtype), leaf)
            yield
        finally:
            for key, (kept, dtype) in waiting.items():
                module, leaf = self._places[key]
                again = kept if kept is not None or self._files is None else self._files[key].to(dtype)
                if again is not None:
                    _placement.put(module, again, leaf)

    def other_than_files(self) -> list[str]:
        """Names of parameters that are not, bit for bit, what the fine-tune's files hold in the model's precision."""
        if self._files is None:
            return []
        own = {key: _placement.stored(*place) for key, place in self._places.items()}
        return [key for key, held in own.items() if not torch.equal(self._files[key].to(held.dtype), held.cpu())]


def _waits(own: Tensor) -> bool:
    """Whether there is room for a tensor to wait beside the one in its place: on the host."""
    return own.device.type == "cpu"


def base_values(base: Base, other: Any, empty: Any) -> Mapping[str, Tensor]:
    """The chat model's tensors, each read when it is asked for."""
    if base.model is not None:
        return {key: value.detach() for key, value in other.named_parameters(remove_duplicate=False)}
    weights = Weights.open(base.location, None, base.revision, local_files_only=base.local_files_only)
    named = NamedWeights(weights, base.name)
    for key, parameter in empty.named_parameters():
        source = weights.source_of(key)
        if source is None or weights.shape(source) != tuple(parameter.shape):
            named[key]  # says that it is not there
            raise CheckpointError(
                f"{key!r} is {list(weights.shape(str(source)))} in the files of {base.name!r}, "
                f"{list(parameter.shape)} in the fine-tune; give the base that was tuned"
            )
    return named


def check_loaded(model: Any, files: Mapping[str, Tensor], name: str) -> None:
    """What was loaded is what the files hold, so that it can be read from there again; nothing is a random start."""
    for key, (module, leaf) in parameters_of(model).items():
        own, stored = _placement.stored(module, leaf), files[key]
        if stored.shape != own.shape:
            raise CheckpointError(
                f"{key!r} of {name!r} is {list(stored.shape)} in its files, {list(own.shape)} in memory"
            )
        rows = slice(None, None, max(1, len(own) // 4))
        if not torch.equal(stored[rows].to(own), own[rows]):
            raise CheckpointError(
                f"{key!r} of {name!r} is not what its file holds: transformers changes this architecture's weights as "
                "it loads them, and such a full fine-tune cannot be loaded here"
            )


def parameters_of(model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """Name -> where each parameter lives, one that is shared once."""
    found = {}
    for key, _ in model.named_parameters():
        owner, _, leaf = key.rpartition(".")
        found[key] = (model.get_submodule(owner), leaf)
    return found


class NamedWeights(Mapping[str, Tensor]):
    """A checkpoint's tensors by the names of a model's parameters; an unembedding that is not stored is tied."""

    def __init__(self, weights: Weights, name: str) -> None:
        self._weights, self._name = weights, name

    def __getitem__(self, key: str) -> Tensor:
        source = self._weights.source_of(key)
        if source is None:
            raise CheckpointError(
                f"{self._name!r} has no tensor {key!r} in its files: they are incomplete, or store this architecture "
                "otherwise than transformers holds it, which full fine-tunes cannot be loaded from here"
            )
        return self._weights[source]

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)
