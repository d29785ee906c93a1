"""The one seam to TransformerLens: the rest of the code sees hook names, token ids and logits only.

Hooks are TransformerLens's own (``blocks.{i}.hook_resid_post`` is the residual stream after block ``i``, the layer
convention of the whole project). In a ``TransformerBridge`` the forward pass is the Hugging Face one inside it, so that
KV caches, masks and ``generate`` are the library's own; the hooks fire there too. A ``HookedTransformer``
(transformer-lens 3.9) answers to the same functions. Weights are never folded or centred: directions live in the
residual basis of the Hugging Face model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from . import _attention, _blocks, _hooked, _joint, _placement
from ._clock import Clock as Clock
from ._clock import Place as Place
from ._context import context_length, refuse_beyond
from ._matrices import Matrix as Matrix
from ._matrices import Port as Port
from ._placement import device_of as device_of
from ._placement import device_of_layer as device_of_layer
from ._pretrained import read_pretrained
from ._threads import in_one_thread as in_one_thread

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

        place, dtype = _placement.execution_device(model.get_input_embeddings()), next(model.parameters()).dtype
        with _placement.untold(model):  # it refuses a GPU beside offloaded blocks, untried; the passes are not its own
            booted = TransformerBridge.boot_transformers(
                name, hf_model=model, tokenizer=copied, dtype=dtype, device=place
            )
    _joint.mend(booted)
    return booted


def require_hooked() -> None:
    """Refuse ``engine="hooked"`` where it cannot be had.

    Raises:
        ImportError: If this transformer-lens has no ``HookedTransformer``; it says how to install one that has.
    """
    _hooked.hooked_transformer()


def matrix(model: Model, name: str, layer: int) -> Matrix:
    """The weight that the Hugging Face model calls ``name``, such as ``model.layers.3.mlp.down_proj``."""
    if is_hooked(model):
        return Matrix(*_hooked.parameter(model, layer, name.rpartition(".")[2]))
    component = hf_model(model).get_submodule(name)
    return Matrix(getattr(_placement.unwrapped(component), "weight", None), module=component)


def site_ports(model: Model, name: str, layer: int) -> tuple[Port, Port]:
    """Where the input and the output of the matrix pass that the Hugging Face model calls ``name``.

    Raises:
        ValueError: If TransformerLens has no hook points around that matrix.
    """
    if is_hooked(model):
        before, weight, after = _hooked.site_points(model, layer, name.rpartition(".")[2])
        return Port(before, weight), Port(after)
    component = hf_model(model).get_submodule(name)
    if not hasattr(component, "hook_in") or _joint.is_copied(hf_model(model), name):
        raise ValueError(
            f"TransformerBridge has no hook points around {name!r} (a fused matrix of a kind that is not known here), "
            "so an adapter on it can be neither read nor taken out"
        )
    return Port(component.hook_in.name), Port(component.hook_out.name)


@torch.no_grad()
def read_logits(
    model: Model, vectors: Float[Tensor, "row d_model"], *, final_norm: bool, ids: Sequence[int] | None = None
) -> Float[Tensor, "row vocab"]:
    """Vectors through the unembedding (TransformerLens's ``logit_readout``), on the CPU in float32.

    Args:
        model: A TransformerLens model.
        vectors: In the residual basis.
        final_norm: Apply the final norm first, as if each vector were the whole residual stream.
        ids: The token ids to keep; None for the whole vocabulary.
    """
    kept = None if ids is None else list(ids)
    try:
        from transformer_lens.tools.analysis import logit_readout
    except ImportError:  # transformer-lens 3.9 has no such tool
        moved = vectors.to(model.W_U)
        normed = model.ln_final(moved[None])[0] if final_norm else moved
        logits = normed @ model.W_U + model.b_U
        return (logits if kept is None else logits[:, kept]).float().cpu()
    with _placement.brought(model.ln_final, model.unembed):
        return logit_readout(model, vectors, apply_ln=final_norm, vocab=kept).values.float().cpu()


def final_rms_norm(model: Model) -> tuple[Float[Tensor, " d_model"], float]:
    """Weight and epsilon of the final norm.

    Raises:
        ValueError: If it is no plain RMS norm.
    """
    norm = model.ln_final
    if model.cfg.normalization_type not in ("RMS", "RMSPre") or getattr(model.cfg, "rmsnorm_uses_offset", False):
        raise ValueError(
            f"logit attribution knows plain RMS norms, not the final norm of this model "
            f"({model.cfg.normalization_type!r})"
        )
    weight = norm.w if is_hooked(model) else _placement.stored(norm)
    return weight.detach().float().cpu(), float(model.cfg.eps)


def is_hooked(model: Model) -> bool:
    """Whether this is a ``HookedTransformer``, which has no Hugging Face model inside."""
    return not hasattr(model, "original_model")


def has_post_norms(model: Model) -> bool:
    """Whether a norm stands between the matrices' outputs and the residual stream (Gemma 2 and 3, OLMo 2)."""
    return _hooked.has_post_norms(model) if is_hooked(model) else _blocks.has_post_norms(hf_model(model))


def n_layers(model: Model) -> int:
    """Number of transformer blocks."""
    return int(model.cfg.n_layers)


def d_model(model: Model) -> int:
    """Width of the residual stream."""
    return int(model.cfg.d_model)


def key_value_width(model: Model) -> int:
    """Numbers that one layer's cache keeps of one token, as keys (and as many as values)."""
    heads = getattr(model.cfg, "n_key_value_heads", None) or model.cfg.n_heads
    return int(heads * model.cfg.d_head)


def vocabulary(model: Model) -> int:
    """Number of logits."""
    return int(model.cfg.d_vocab)


def context(model: Model) -> int | None:
    """Positions that the model was made for; None where its config names none."""
    return context_length(model.cfg if is_hooked(model) else hf_model(model).config)


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
    with in_one_thread(model), model.hooks(fwd_hooks=wrapped):
        yield


def residual_hooks(model: Model, functions: Mapping[int, HookFunction]) -> Any:
    """``hooks`` on the residual stream after the given layers."""
    return hooks(model, {RESID_POST.format(layer=layer): function for layer, function in functions.items()})


def forward(
    model: Model, ids: Int[Tensor, "batch pos"], mask: Int[Tensor, "batch pos"]
) -> Float[Tensor, "batch pos vocab"]:
    """Logits of one uncached forward pass; ``mask`` is 1 on real tokens and always given.

    Raises:
        ValueError: If a row is longer than the model's context.
    """
    refuse_beyond(ids.shape[1], context(model), "a conversation")
    if is_hooked(model):
        return model(ids, attention_mask=mask, return_type="logits")
    return hf_logits(model, ids, mask)


def hf_logits(model: Model, ids: Tensor, mask: Tensor) -> Tensor:
    """What the Hugging Face model inside a bridge gives out, of any length; hooks fire."""
    with in_one_thread(model), _attention.fused(hf_model(model)):
        logits: Tensor = hf_model(model)(input_ids=ids, attention_mask=mask, use_cache=False).logits
    return logits.to(ids.device)


def attention_implementation(model: Model) -> str:
    """What Hugging Face calls the attention that :func:`forward` uses: ``"sdpa"`` or ``"eager"``."""
    return _attention.STEPWISE if is_hooked(model) else _attention.implementation(hf_model(model))


def cached_forward(
    model: Model, ids: Int[Tensor, "batch new"], mask: Int[Tensor, "batch pos"], cache: Any
) -> tuple[Float[Tensor, "batch vocab"], Any]:
    """Logits after the last of the new tokens, and the cache that now covers them; None starts one.

    ``mask`` covers everything so far; left padding is 0 and counts for no position.
    """
    if is_hooked(model):
        return _hooked.next_logits(model, ids, mask, cache)
    positions = (mask.cumsum(-1) - 1).clamp_min(0)[:, -ids.shape[1] :]
    with in_one_thread(model), _attention.fused(hf_model(model)):
        output = hf_model(model)(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
    return output.logits[:, -1].to(ids.device), output.past_key_values


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


@contextmanager
def clock(model: Model) -> Iterator[Clock]:
    """A ``Clock`` kept right by a pre-hook on the model's forward while the block runs."""
    ticking = Clock()

    def tick(_module: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
        cache = kwargs.get("past_kv_cache" if is_hooked(model) else "past_key_values")
        length = _hooked.cached_length if is_hooked(model) else _cached_length
        start = length(cache) if cache is not None else 0
        mask = kwargs.get("attention_mask")
        if is_hooked(model) and cache is not None and start:
            mask = cache.previous_attention_mask
        ticking.begin(start, None if mask is None else (mask.cumsum(-1) == 0).sum(-1))

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
    return read_pretrained(AutoTokenizer, folder)


def _ignoring_hook_point(function: HookFunction) -> Callable[..., Tensor | None]:
    def call(activation: Tensor, hook: Any) -> Tensor | None:  # noqa: ARG001 (TransformerLens passes the hook point)
        return function(activation)

    return call
