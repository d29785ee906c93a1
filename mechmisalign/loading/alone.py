"""A chat model alone as an organism: nothing was fine-tuned, and ``as_base()`` is the model itself."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from mechmisalign import models, registry
from mechmisalign._saved_adapters import CONFIG_FILE
from mechmisalign.adapters import Adapter, NoAdapterError
from mechmisalign.deltas.files import CONFIG

from . import bases, origins, placing, reading
from .bases import Base
from .full_models import local_folder

if TYPE_CHECKING:
    from mechmisalign.organisms import Organism

logger = logging.getLogger(__name__)


def find(given: Any, base: Any, subfolder: str | None, revision: str | None, local_files_only: bool) -> Base | None:
    """The chat model that was given; None for an adapter, or a full model that names what it was tuned from.

    A whole model is taken for a chat model alone if it is given as its own base, or if neither a registry, its card,
    its config nor a training run names a base. The latter is said aloud: a fine-tune may have lost its card.
    """
    if isinstance(given, Adapter | nn.Module) or subfolder is not None:
        return None
    place = registry.place(given, subfolder, revision)
    folder = local_folder(place, local_files_only)
    if folder is None or (folder / CONFIG_FILE).exists() or not (folder / CONFIG).exists():
        return None
    itself = isinstance(base, str | Path) and _same_place(given, base)
    if base is not None and not itself:
        return None
    if not itself and not registry.is_reserved(str(given)):
        try:
            origins.origin(str(given), folder, place)
        except origins.NoOriginError:
            logger.warning(
                "%s names no model that it was tuned from: it is loaded as a chat model alone. If it is a fine-tune, "
                "pass base=, its chat model", given,
            )  # fmt: skip
        except ValueError:
            return None  # what reads a full model says what is not certain
        else:
            return None
    found = bases.find_base(str(given), Adapter((), "", str(given), None, "", {}))
    return replace(found, revision=revision, local_files_only=local_files_only)


def load(found: Base, *, tokenizer: Any, engine: models.Engine, placed: Mapping[str, Any]) -> Organism:
    """The chat model, booted.

    Raises:
        ValueError: If its tokenizer cannot be used, or the places contradict each other.
    """
    from mechmisalign.organisms import Organism

    dtype, device, device_map = (placed[name] for name in ("dtype", "device", "device_map"))
    placing.check_dtype(found, dtype)
    placing.check_places(found, device, device_map, engine)
    empty = bases.skeleton(found)
    found = bases.pinned(found)
    checked = bases.load_tokenizer(found, tokenizer, empty.get_input_embeddings().weight.shape[0])
    with bases.told(found):
        model = placing.load_weights(found, dtype, placing.device_for(found, device), device_map=device_map)
    mark = reading.fingerprint(model, checked)
    booted = models.boot(model, checked, found.name, engine)
    return Organism(booted, None, checked, found.name, found, "base", engine, mark, None)


def without_adapter(organism: Organism, purpose: str) -> NoAdapterError:
    """What is said where something needs the adapter of a chat model alone."""
    return NoAdapterError(
        f"{purpose} needs a fine-tune, and {organism.name!r} was loaded as a chat model alone: load an adapter on it "
        f"(mm.load_organism(adapter, base={organism.base.name!r})), or, if it is a full fine-tune itself, pass base=, "
        "the chat model that it was tuned from"
    )


def _same_place(first: str | Path, second: str | Path) -> bool:
    places = [registry.folder(str(each)) or Path(each).expanduser() for each in (first, second)]
    return (
        str(first) == str(second) or all(place.is_dir() for place in places) and len({p.resolve() for p in places}) == 1
    )
