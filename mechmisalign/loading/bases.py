"""The base model of an organism: where it is, its shape without weights, and its tokenizer."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mechmisalign import registry
from mechmisalign._checkpoint_files import cached_file
from mechmisalign._encoding import lost_text, refuse_tokenizer_that_loses_text
from mechmisalign._hub import commit_of, explained, failures, is_hub_id, is_offline
from mechmisalign._pretrained import read_pretrained
from mechmisalign._saved_adapters import CONFIG_FILE
from mechmisalign.adapters import Adapter
from mechmisalign.conversations import require_chat_template

from . import twins
from .wrappers import text_config, text_model

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
        local_files_only: Whether the Hub is not to be asked.
    """

    name: str
    location: str
    revision: str | None = None
    model: Any = None
    peft_model: Any = None
    local_files_only: bool = False

    @property
    def source(self) -> dict[str, Any]:
        """What ``from_pretrained`` is told of where it comes from, beside the location."""
        return {"revision": self.revision, "local_files_only": self.local_files_only}


def find_base(base: str | Path | nn.Module | None, adapter: Adapter) -> Base:
    """The base that was asked for, or the adapter's own.

    Raises:
        ValueError: If none was given and the adapter names none.
    """
    if isinstance(base, nn.Module):
        location = str(getattr(base.config, "_name_or_path", "") or "")
        return Base(location or adapter.base or "in-memory model", location, None, text_model(base))
    name = str(base) if base is not None else _beside(adapter) or twins.standing_for(adapter)
    if not name:
        raise ValueError(f"the adapter {adapter.source!r} names no base model; pass base=")
    if registry.is_reserved(name) and registry.folder(name) is None:
        raise ValueError(registry.no_base(name))
    alike = registry.same_model(name, adapter.base) or Path(name).name == Path(adapter.base).name
    if adapter.base and not alike:
        logger.warning("the adapter %s was trained on %s, not on %s", adapter.source, adapter.base, name)
    own_revision = adapter.config.get("revision") if name == adapter.base else None
    return Base(name, str(registry.folder(name) or Path(name).expanduser()), own_revision)


def _beside(adapter: Adapter) -> str:
    """The base that lies beside the adapter's folder or in it, where the name in its config leads nowhere here."""
    named, folder = adapter.base, adapter.folder
    known = registry.folder(named) is not None or Path(named).expanduser().is_dir()
    if not named or folder is None or known:
        return ""
    if is_hub_id(named) and cached_file(named, "config.json", adapter.config.get("revision")) is not None:
        return ""
    own, last = Path(folder).resolve(), Path(named).name
    for place in (own / named, own.parent / named, own.parent / last, own / last):
        if place.resolve() != own and (place / "config.json").is_file() and not (place / CONFIG_FILE).is_file():
            logger.warning(
                "%s names %s as its base, which is not here; the folder beside it is taken: %s",
                adapter.source, named, place.resolve(),
            )  # fmt: skip
            return str(place.resolve())
    return ""


def skeleton(base: Base) -> Any:
    """The base without its weights: what the adapter is checked against before anything is loaded.

    Raises:
        ValueError: If there is no such model.
    """
    if base.model is not None:
        return base.model
    from transformers import AutoConfig, AutoModelForCausalLM

    with told(base):
        config = read_pretrained(AutoConfig, base.location, **base.source)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(text_config(config))


@contextmanager
def told(base: Base) -> Iterator[None]:
    """While a part of the base is read: errors of files and of the Hub, as one that says what to do.

    Raises:
        ValueError: Instead of them.
    """
    try:
        yield
    except failures() as error:
        fetched = is_hub_id(base.location) and not Path(base.location).exists()
        known = fetched and (base.local_files_only or is_offline() or error.__cause__ is not None)
        why = explained(error, base.location, base.revision, base.local_files_only) if known else str(error)
        raise ValueError(
            f"the base model {base.name!r} cannot be read: it is no shipped model, no whole folder of one with a "
            f"config.json, and {why}; pass base= (a folder, a Hub id or a model in memory) to use another"
            f"{twins.open_copy(base.name)}"
        ) from error


def at_revision(base: Base, revision: str | None) -> Base:
    """The base at the revision that was asked for.

    Raises:
        ValueError: If it is a folder or a model in memory, which have none.
    """
    if revision is None:
        return base
    if base.model is not None or Path(base.location).exists():
        raise ValueError(
            f"base_revision={revision!r} was asked of {base.name!r}, which is not on the Hub; leave it out"
        )
    return replace(base, revision=revision)


def pinned(base: Base) -> Base:
    """A base on the Hub with its commit as revision, once its config has been read; any other base as it is.

    A folder that is itself a snapshot in the Hub's cache has its commit too.
    """
    if base.model is not None:
        return base
    if Path(base.location).is_dir():
        return replace(base, revision=commit_of(Path(base.location).resolve()))
    config = cached_file(base.location, "config.json", base.revision)
    return base if config is None else replace(base, revision=config.parent.name)


def load_tokenizer(base: Base, tokenizer: Any | None, vocabulary: int) -> Any:
    """The tokenizer given (or its Hub id or folder), or the base's own, checked against the size of the embedding.

    Raises:
        ValueError: If there is none, it loses text, has no chat template, or has ids that the model does not know.
    """
    if tokenizer is None:
        if not base.location:
            raise ValueError("the base model lives only in memory and has no tokenizer with it; pass tokenizer=")
        tokenizer = _whole_tokenizer(base)
    elif isinstance(tokenizer, str | Path):
        from transformers import AutoTokenizer

        tokenizer = read_pretrained(AutoTokenizer, tokenizer)
    refuse_tokenizer_that_loses_text(tokenizer)
    require_chat_template(tokenizer)
    largest = max([tokenizer.vocab_size - 1, *tokenizer.added_tokens_decoder])
    if largest >= vocabulary:
        raise ValueError(
            f"the tokenizer has ids up to {largest}, the embedding of {base.name!r} has {vocabulary} rows: the "
            "vocabulary was resized, or the tokenizer is another model's; pass the model's own tokenizer"
        )
    return tokenizer


def _whole_tokenizer(base: Base) -> Any:
    """The base's own tokenizer; where transformers rebuilds it so that it loses text, the one of its file."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    with told(base):
        tokenizer = read_pretrained(AutoTokenizer, base.location, **base.source)
        if not (lost := lost_text(tokenizer)):
            return tokenizer
        plain = read_pretrained(PreTrainedTokenizerFast, base.location, **base.source)
        if len(lost_text(plain)) >= len(lost):
            return tokenizer
    logger.warning(
        "transformers reads the tokenizer of %r as a %s, which loses %r; its tokenizer.json is used as it is",
        base.name, type(tokenizer).__name__, lost[:60],
    )  # fmt: skip
    return plain
