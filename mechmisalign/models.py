"""The one seam to TransformerLens: the rest of the code sees hook names, token ids and logits only.

Hooks are TransformerLens's own (``blocks.{i}.hook_resid_post`` is the residual stream after block ``i``, the layer
convention of the whole project). In a ``TransformerBridge`` the forward pass is the Hugging Face one inside it, so that
KV caches, masks and ``generate`` are the library's own; the hooks fire there too. A ``HookedTransformer``
(transformer-lens 3.9) answers to the same functions. Weights are never folded or centred: directions live in the
residual basis of the Hugging Face model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from . import _hooked

Engine = Literal["bridge", "hooked"]
Model = Any
"""A TransformerLens model (``TransformerBridge`` or ``HookedTransformer``); loosely typed, as torch's modules are."""

RESID_POST = "blocks.{layer}.hook_resid_post"

HookFunction = Callable[[Tensor], Tensor | None]


def boot(model: Any, tokenizer: Any, name: str, engine: Engine = "bridge") -> Model:
    """A Hugging Face model as a TransformerLens model, on its device and in its dtype.

    TransformerLens writes padding and BOS tokens into the tokenizer that it is given, and reloads some from disk: it
    gets a copy of its own, from a temporary folder, so a tokenizer that lives only in memory is fine.

    Args:
        model: A causal language model, with or without a live adapter. A bridge wraps it in place (and switches it to
            eager attention); a ``HookedTransformer`` copies its weights.
        tokenizer: Its tokenizer; left as it is.
        name: What TransformerLens calls the model.
        engine: ``"bridge"``, or ``"hooked"`` where transformer-lens 3.9 is installed.

    Raises:
        ValueError: On another engine, or an architecture that the engine does not know.
        ImportError: If ``"hooked"`` is asked of transformer-lens 4 or later.
    """
    if engine not in get_args(Engine):
        raise ValueError(f"engine must be one of {get_args(Engine)}, got {engine!r}")
    with TemporaryDirectory() as folder:
        copied = _copied(tokenizer, Path(folder))
        if engine == "hooked":
            return _hooked.boot(model, copied, name, Path(folder))
        from transformer_lens.model_bridge import TransformerBridge

        first = next(model.parameters())
        return TransformerBridge.boot_transformers(
            name, hf_model=model, tokenizer=copied, dtype=first.dtype, device=first.device
        )


def require_hooked() -> None:
    """Refuse ``engine="hooked"`` where it cannot be had.

    Raises:
        ImportError: If this transformer-lens has no ``HookedTransformer``; it says how to install one that has.
    """
    _hooked.hooked_transformer()


@dataclass(frozen=True)
class Matrix:
    """One weight matrix inside a TransformerLens model.

    Attributes:
        parameter: Where it lives, in the engine's own layout.
        layout: How the engine lays out ``"d_out d_in"`` (einops); None: as ``torch.nn.Linear`` does.
    """

    parameter: nn.Parameter
    layout: str | None = None

    def read(self) -> Float[Tensor, "d_out d_in"]:
        """The matrix as ``torch.nn.Linear`` lays it out (it may share memory with the parameter)."""
        data = self.parameter.data
        return data if self.layout is None else _hooked.as_linear(data, self.layout)

    def own(self, matrix: Float[Tensor, "d_out d_in"]) -> Tensor:
        """A matrix in the parameter's own layout, dtype and device."""
        moved = matrix.to(self.parameter)
        return moved if self.layout is None else _hooked.as_own(moved, self.layout, self.parameter.shape)


def matrix(model: Model, name: str, layer: int) -> Matrix:
    """The weight that the Hugging Face model calls ``name``, such as ``model.layers.3.mlp.down_proj``."""
    if is_hooked(model):
        return Matrix(*_hooked.parameter(model, layer, name.rpartition(".")[2]))
    component = hf_model(model).get_submodule(name)
    return Matrix(getattr(component, "original_component", component).weight)


def is_hooked(model: Model) -> bool:
    """Whether this is a ``HookedTransformer``, which has no Hugging Face model inside."""
    return not hasattr(model, "original_model")


def n_layers(model: Model) -> int:
    """Number of transformer blocks."""
    return int(model.cfg.n_layers)


def d_model(model: Model) -> int:
    """Width of the residual stream."""
    return int(model.cfg.d_model)


def device_of(model: Model) -> torch.device:
    """Device of the embedding, where token ids must be."""
    return next(model.parameters()).device


def hf_model(model: Model) -> Model:
    """The Hugging Face model inside a bridge; its ``generate`` and its cache fire the same hooks.

    Raises:
        TypeError: For a ``HookedTransformer``.
    """
    if is_hooked(model):
        raise TypeError("a HookedTransformer has no Hugging Face model inside; load the organism with engine='bridge'")
    return model.original_model


@contextmanager
def hooks(model: Model, functions: Mapping[str, HookFunction]) -> Iterator[None]:
    """Attach ``functions[name](activation) -> replacement or None`` while the block runs; always detached after it."""
    wrapped = [(name, _ignoring_hook_point(function)) for name, function in functions.items()]
    with model.hooks(fwd_hooks=wrapped):
        yield


def residual_hooks(model: Model, functions: Mapping[int, HookFunction]) -> Any:
    """``hooks`` on the residual stream after the given layers."""
    return hooks(model, {RESID_POST.format(layer=layer): function for layer, function in functions.items()})


def forward(
    model: Model, ids: Int[Tensor, "batch pos"], mask: Int[Tensor, "batch pos"]
) -> Float[Tensor, "batch pos vocab"]:
    """Logits of one uncached forward pass; ``mask`` is 1 on real tokens and always given."""
    if is_hooked(model):
        return model(ids, attention_mask=mask, return_type="logits")
    return hf_model(model)(input_ids=ids, attention_mask=mask, use_cache=False).logits


class _LastLayerReached(Exception):
    """Raised inside the last hook that is needed, to skip the blocks and the unembedding behind it."""


def run_until(
    model: Model,
    ids: Int[Tensor, "batch pos"],
    mask: Int[Tensor, "batch pos"],
    functions: Mapping[int, HookFunction],
) -> None:
    """Forward pass with residual hooks that ends after the last hooked layer: no later block, no unembedding."""
    last = max(functions)

    def then_stop(resid: Tensor) -> None:
        functions[last](resid)
        raise _LastLayerReached

    with residual_hooks(model, {**functions, last: then_stop}), suppress(_LastLayerReached):
        forward(model, ids, mask)


def end_ids(model: Model, tokenizer: Any) -> list[int]:
    """Every token id that ends an answer: the generation config's, and the tokenizer's own."""
    config = getattr(model if is_hooked(model) else hf_model(model), "generation_config", None)
    ends = getattr(config, "eos_token_id", None)
    named = ends if isinstance(ends, list) else [ends]
    return sorted({int(end) for end in [*named, tokenizer.eos_token_id] if end is not None})


class Decoder:
    """Token-by-token decoding with the model's own KV cache; rows may leave on the way.

    Args:
        model: A TransformerLens model.
    """

    def __init__(self, model: Model) -> None:
        self._model = model
        self._cache: Any = None

    def next_logits(
        self, ids: Int[Tensor, "batch new"], mask: Int[Tensor, "batch pos"]
    ) -> Float[Tensor, "batch vocab"]:
        """Logits after the last of the new tokens; ``mask`` covers everything so far (left padding is 0)."""
        if is_hooked(self._model):
            logits, self._cache = _hooked.next_logits(self._model, ids, mask, self._cache)
            return logits
        positions = (mask.cumsum(-1) - 1).clamp_min(0)[:, -ids.shape[1] :]
        output = hf_model(self._model)(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self._cache = output.past_key_values
        return output.logits[:, -1]

    def keep(self, rows: Int[Tensor, " kept"]) -> None:
        """Go on with these rows only."""
        if is_hooked(self._model):
            _hooked.keep(self._cache, rows)
        else:
            self._cache.batch_select_indices(rows)


class Clock:
    """Says which absolute columns of the sequence the current forward pass covers, also under a KV cache."""

    def __init__(self) -> None:
        self.start = 0

    def columns(self, length: int, device: torch.device) -> Int[Tensor, " pos"]:
        """Absolute column of each of the ``length`` tokens that are passing now."""
        return torch.arange(self.start, self.start + length, device=device)


@contextmanager
def clock(model: Model) -> Iterator[Clock]:
    """A ``Clock`` kept right by a pre-hook on the model's forward while the block runs."""
    ticking = Clock()

    def tick(_module: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
        cache = kwargs.get("past_kv_cache" if is_hooked(model) else "past_key_values")
        length = _hooked.cached_length if is_hooked(model) else _cached_length
        ticking.start = length(cache) if cache is not None else 0

    handle = (model if is_hooked(model) else hf_model(model)).register_forward_pre_hook(tick, with_kwargs=True)
    try:
        yield ticking
    finally:
        handle.remove()


def _cached_length(cache: Any) -> int:
    return int(cache.get_seq_length())


def _copied(tokenizer: Any, folder: Path) -> Any:
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def _ignoring_hook_point(function: HookFunction) -> Callable[..., Tensor | None]:
    def call(activation: Tensor, hook: Any) -> Tensor | None:  # noqa: ARG001 (TransformerLens passes the hook point)
        return function(activation)

    return call
