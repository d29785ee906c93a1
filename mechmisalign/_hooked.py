"""``HookedTransformer`` of transformer-lens 3.9: booting it with given weights, its weight layouts, its KV cache."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

_LAYOUTS = {
    "q_proj": ("attn.W_Q", "(head d_head) d_in -> head d_in d_head"),
    "k_proj": ("attn.W_K", "(head d_head) d_in -> head d_in d_head"),
    "v_proj": ("attn.W_V", "(head d_head) d_in -> head d_in d_head"),
    "o_proj": ("attn.W_O", "d_out (head d_head) -> head d_head d_out"),
    "gate_proj": ("mlp.W_gate", "d_out d_in -> d_in d_out"),
    "up_proj": ("mlp.W_in", "d_out d_in -> d_in d_out"),
    "down_proj": ("mlp.W_out", "d_out d_in -> d_in d_out"),
}
# Where the input and the output of each matrix pass.
_POINTS = {
    "q_proj": ("ln1.hook_normalized", "attn.hook_q"),
    "k_proj": ("ln1.hook_normalized", "attn.hook_k"),
    "v_proj": ("ln1.hook_normalized", "attn.hook_v"),
    "o_proj": ("attn.hook_z", "hook_attn_out"),
    "gate_proj": ("ln2.hook_normalized", "mlp.hook_pre"),
    "up_proj": ("ln2.hook_normalized", "mlp.hook_pre_linear"),
    "down_proj": ("mlp.hook_post", "hook_mlp_out"),
}
_GROUPED = ("attn.W_K", "attn.W_V")  # stored as _W_K and _W_V where several queries share a key

# Largest difference of a probe's logits from the Hugging Face model's, as a share of the largest logit.
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}


def boot(model: Any, tokenizer: Any, name: str, folder: Path) -> Any:
    """A ``HookedTransformer`` with a copy of the model's weights, neither folded nor centred.

    Args:
        model: A Hugging Face causal language model.
        tokenizer: Its tokenizer, which TransformerLens may change.
        name: What TransformerLens calls the model.
        folder: A folder for scratch files.

    Raises:
        ImportError: If this transformer-lens has no ``HookedTransformer``.
        ValueError: If it does not know the architecture, or computes other logits than the Hugging Face model.
    """
    HookedTransformer = hooked_transformer()
    from transformer_lens import loading_from_pretrained as loading

    first = next(model.parameters())
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    try:
        settings = loading.get_pretrained_model_config(str(folder), device=first.device, dtype=first.dtype)
    except (NotImplementedError, AttributeError) as error:  # the latter of configs that have changed since
        raise ValueError(
            f"transformer-lens has no HookedTransformer for {type(model).__name__} ({error}); use engine='bridge'"
        ) from error
    settings.model_name, settings.tokenizer_name = name, None
    hooked: Any = HookedTransformer(settings, tokenizer=tokenizer)
    weights = loading.get_pretrained_state_dict(str(folder), settings, hf_model=model, dtype=first.dtype)
    hooked.load_and_process_state_dict(
        weights, fold_ln=False, center_writing_weights=False, center_unembed=False, fold_value_biases=False
    )
    hooked.generation_config = getattr(model, "generation_config", None)
    hooked.eval()
    _refuse_other_logits(hooked, model)
    return hooked


def parameter(model: Any, layer: int, module: str) -> tuple[nn.Parameter, str]:
    """Where a matrix lives, and its layout."""
    path, layout = _LAYOUTS[_known(module)]
    grouped = path in _GROUPED and model.cfg.n_key_value_heads is not None
    path = path.replace("W_", "_W_") if grouped else path
    return model.get_parameter(f"blocks.{layer}.{path}"), layout


def site_points(model: Any, layer: int, module: str) -> tuple[str, Tensor | None, str]:
    """Hook points before and behind a matrix; between them, the weight of the norm that ``hook_normalized`` lacks."""
    before, after = _POINTS[_known(module)]
    block = f"blocks.{layer}."
    weight = model.get_parameter(f"{block}{before.partition('.')[0]}.w") if before.startswith("ln") else None
    return block + before, weight, block + after


def has_post_norms(model: Any) -> bool:
    """Whether a norm stands between the matrices' outputs and the residual stream."""
    return any(f"blocks.0.{norm}.hook_normalized" in model.hook_dict for norm in ("ln1_post", "ln2_post"))


def _known(module: str) -> str:
    if module not in _LAYOUTS:
        raise ValueError(
            f"a HookedTransformer has no matrix {module!r} as such (it knows {sorted(_LAYOUTS)}); use engine='bridge'"
        )
    return module


def as_linear(data: Tensor, layout: str) -> Float[Tensor, "d_out d_in"]:
    """From the layout of TransformerLens to that of ``torch.nn.Linear``."""
    linear, own = layout.split(" -> ")
    return rearrange(data, f"{own} -> {linear}")


def as_own(matrix: Float[Tensor, "d_out d_in"], layout: str, shape: torch.Size) -> Tensor:
    """From the layout of ``torch.nn.Linear`` to that of TransformerLens."""
    sizes = {"head": shape[0]} if "head" in layout else {}
    return rearrange(matrix, layout, **sizes).contiguous()


def next_logits(
    model: Any, ids: Int[Tensor, "batch new"], mask: Int[Tensor, "batch pos"], cache: Any
) -> tuple[Float[Tensor, "batch vocab"], Any]:
    """Logits after the last of the new tokens, and the cache that now covers them."""
    if cache is None:
        from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache

        cache = TransformerLensKeyValueCache.init_cache(model.cfg, ids.device, len(ids))
    new = mask[:, -ids.shape[1] :]
    return model(ids, attention_mask=new, past_kv_cache=cache, return_type="logits")[:, -1], cache


def keep(cache: Any, rows: Int[Tensor, " kept"]) -> None:
    """Drop the other rows from a cache."""
    cache.previous_attention_mask = cache.previous_attention_mask[rows]
    for entry in cache.entries:
        entry.past_keys, entry.past_values = entry.past_keys[rows], entry.past_values[rows]


def cached_length(cache: Any) -> int:
    """Columns that a cache covers."""
    return int(cache.previous_attention_mask.shape[1])


def hooked_transformer() -> Any:
    """The class ``HookedTransformer``.

    Raises:
        ImportError: If this transformer-lens has none.
    """
    import transformer_lens

    try:
        return transformer_lens.HookedTransformer
    except (AttributeError, ImportError) as error:
        raise ImportError(
            f"engine='hooked' needs HookedTransformer, which transformer-lens {_version()} no longer has; use "
            "engine='bridge', or install it in an environment of its own: pip install 'transformer-lens>=3.9,<4'"
        ) from error


def _version() -> str:
    from importlib.metadata import version

    return version("transformer-lens")


@torch.inference_mode()
def _refuse_other_logits(hooked: Any, model: Any) -> None:
    """TransformerLens derives some settings from names; a wrong one would be silent without this probe."""
    device = next(model.parameters()).device
    ids = torch.arange(1, 17, device=device)[None] % model.config.vocab_size
    mask = torch.ones_like(ids)
    expected = model(input_ids=ids, attention_mask=mask).logits.float()
    found = hooked(ids, attention_mask=mask, return_type="logits").float()
    difference = float((found - expected).abs().max() / expected.abs().max())
    tolerance = _TOLERANCE.get(hooked.cfg.dtype, 0.1)
    if not difference <= tolerance:
        raise ValueError(
            f"the HookedTransformer computes other logits than the Hugging Face model (largest difference "
            f"{difference:.2g} of the largest logit, at most {tolerance:g} expected); use engine='bridge'"
        )
