"""The base model of an organism: where it is, its shape without weights, and its tokenizer."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mechmisalign import registry
from mechmisalign.adapters import Adapter
from mechmisalign.conversations import require_chat_template

from .checkpoints import cached_file

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Base:
    """A chat model that is not loaded yet, or one in memory.

    Attributes:
        name: What it is called in headers and messages.
        location: Folder or Hub id; empty for a model that lives only in memory.
        revision: Commit, branch or tag on the Hub.
        model: The Hugging Face model, if it is in memory.
        peft_model: The ``PeftModel`` around it, whose adapter is to be taken off.
    """

    name: str
    location: str
    revision: str | None = None
    model: Any = None
    peft_model: Any = None


def find_base(base: str | Path | nn.Module | None, adapter: Adapter) -> Base:
    """The base that was asked for, or the adapter's own.

    Raises:
        ValueError: If none was given and the adapter names none.
    """
    if isinstance(base, nn.Module):
        location = str(getattr(base.config, "_name_or_path", "") or "")
        return Base(location or adapter.base or "in-memory model", location, None, base)
    name = str(base) if base is not None else adapter.base
    if not name:
        raise ValueError(f"the adapter {adapter.source!r} names no base model; pass base=")
    if adapter.base and Path(name).name != Path(adapter.base).name:
        logger.warning("the adapter %s was trained on %s, not on %s", adapter.source, adapter.base, name)
    own_revision = adapter.config.get("revision") if name == adapter.base else None
    return Base(name, str(registry.folder(name) or Path(name).expanduser()), own_revision)


def skeleton(base: Base) -> Any:
    """The base without its weights: what the adapter is checked against before anything is loaded.

    Raises:
        ValueError: If there is no such model.
    """
    if base.model is not None:
        return base.model
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(base.location, revision=base.revision)
    except OSError as error:
        raise ValueError(
            f"the base model {base.name!r} cannot be read: it is no shipped model, no folder with a config.json, and "
            f"the Hub did not give it; pass base= (a folder, a Hub id or a model in memory). {error}"
        ) from error
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def pinned(base: Base) -> Base:
    """A base on the Hub with its commit as revision, once its config has been read; any other base as it is."""
    config = (
        None
        if base.model is not None or Path(base.location).is_dir()
        else cached_file(base.location, "config.json", base.revision)
    )
    return base if config is None else replace(base, revision=config.parent.name)


def load_tokenizer(base: Base, tokenizer: Any | None, vocabulary: int) -> Any:
    """The tokenizer given, or the base's own, checked against the size of the embedding.

    Raises:
        ValueError: If there is none, it has no chat template, or it has ids that the model does not know.
    """
    if tokenizer is None:
        if not base.location:
            raise ValueError("the base model lives only in memory and has no tokenizer with it; pass tokenizer=")
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(base.location, revision=base.revision)
    require_chat_template(tokenizer)
    largest = max([tokenizer.vocab_size - 1, *tokenizer.added_tokens_decoder])
    if largest >= vocabulary:
        raise ValueError(
            f"the tokenizer has ids up to {largest}, the embedding of {base.name!r} has {vocabulary} rows: the "
            "vocabulary was resized, or the tokenizer is another model's; pass the model's own tokenizer"
        )
    return tokenizer
