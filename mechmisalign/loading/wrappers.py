"""The language model inside a multimodal wrapper (Gemma 3 from 4B is published as one), read as a plain text model.

Of a checkpoint only the language model's tensors are read, so no tower takes memory, none is hooked, and matrices have
the names of the text model. Without an image the wrapper computes just that (a test compares them).

TransformerLens is never given a wrapper: to boot one it looks for an image processor, and installs packages with pip
when it finds none.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn

from mechmisalign._wrapped_names import PLAIN, WRAPPERS

_KNOWN = ("gemma3",)
"""Kinds of wrapper (``model_type``) whose language model alone computes what the wrapper does without an image."""
_KEY_MAPPING = {f"^{re.escape(prefix)}": PLAIN for prefix in WRAPPERS} | {r"^language_model\.lm_head\.": "lm_head."}
_ELSEWHERE = [r"vision_tower", r"multi_modal_projector"]


def is_wrapper(config: Any) -> bool:
    """Whether a config is that of a language model beside something else."""
    return config.get_text_config(decoder=True) is not config


def text_config(config: Any) -> Any:
    """The config of the language model; a plain text model's own.

    Raises:
        ValueError: If it is a wrapper that is not known here.
    """
    if not is_wrapper(config):
        return config
    if config.model_type not in _KNOWN:
        raise ValueError(
            f"a model of type {config.model_type!r} wraps a language model beside other parts; of such, only "
            f"{list(_KNOWN)} are known here; pass base=, a text model with the same matrices"
        )
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    inner = config.get_text_config(decoder=True)
    inner.dtype = inner.dtype or config.dtype
    inner.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING[type(inner)].__name__]
    return inner


def text_model(model: nn.Module) -> nn.Module:
    """The language model of a model in memory as a text model of the same modules, without a copy; or the model itself.

    Raises:
        ValueError: If it is a wrapper that is not known here.
    """
    config: Any = getattr(model, "config", None)
    if config is None or not hasattr(config, "get_text_config") or not is_wrapper(config):
        return model
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        text: Any = AutoModelForCausalLM.from_config(text_config(config))
    wrapper: Any = model
    text.model, text.lm_head = wrapper.model.language_model, wrapper.lm_head
    text.generation_config = wrapper.generation_config
    text.config._name_or_path = config._name_or_path
    trained: nn.Module = text.train(model.training)
    return trained


def reader(config: Any) -> tuple[Any, dict[str, Any]]:
    """What reads a checkpoint of this config as a text model: a class, and arguments of its ``from_pretrained``.

    Raises:
        ValueError: If it is a wrapper that is not known here.
    """
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    if not is_wrapper(config):
        return AutoModelForCausalLM, {}
    inner = text_config(config)
    plain = MODEL_FOR_CAUSAL_LM_MAPPING[type(inner)]
    return _quiet(plain), {"config": inner, "key_mapping": dict(_KEY_MAPPING)}


def key_in_checkpoint(name: str, keys: Any) -> str | None:
    """The name of a tensor of the text model in a checkpoint, which may be a wrapper's; None if it is not there."""
    return next((key for key in (name, *_wrapped(name)) if key in keys), None)


def _wrapped(name: str) -> list[str]:
    return [prefix + name.removeprefix(PLAIN) for prefix in WRAPPERS if name.startswith(PLAIN)]


def _quiet(plain: type) -> Any:
    """The class of the text model, which does not report the towers' tensors as a surprise."""
    return type(plain.__name__, (plain,), {"_keys_to_ignore_on_load_unexpected": _ELSEWHERE})
