"""What a full fine-tune was tuned from, as its own files tell it: only where that is certain."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any, NamedTuple

from mechmisalign import _yaml, registry
from mechmisalign.adapters import Adapter
from mechmisalign.deltas.files import read_config
from mechmisalign.dynamics.reading import RUN_FILE

from . import twins

logger = logging.getLogger(__name__)

_CARD = "README.md"
_OTHER_RELATIONS = ("quantized", "merge", "adapter")


class NoOriginError(ValueError):
    """A full model whose files name nothing that it was tuned from."""


class Origin(NamedTuple):
    """A base, and who says so.

    Attributes:
        base: Its name.
        revision: Its commit, where that was recorded.
        told_by: The file.
    """

    base: str
    revision: str | None
    told_by: str


def origin(name: str, folder: Path, entry: registry.Place) -> Origin:
    """The base that a registry, a training run, or the model's card and config name.

    A card that names one base is believed unless the config says that another model was loaded. A config alone is
    believed only where it names a base that is known here, with the same depth: it tells where the weights were loaded
    from, and that may be a step in between.

    Raises:
        ValueError: If nothing tells it for certain (``NoOriginError`` if nothing speaks of one).
    """
    if entry.base is not None or (entry.entry is not None and entry.entry.base is not None):
        return Origin(entry.base or str(entry.entry and entry.entry.base), None, "the registry")
    if (trained := _run(folder)) is not None:
        return trained
    config = read_config(folder)
    card, loaded = _card(folder), str(config.get("_name_or_path") or "")
    own = {name.rstrip("/"), str(folder), ""}
    loaded = "" if loaded.rstrip("/") in own or loaded.startswith(".") else loaded
    if len(card) == 1 and card[0].rstrip("/") not in own and (not loaded or registry.same_model(card[0], loaded)):
        return Origin(card[0], None, f"its card ({_CARD})")
    if not card and loaded and _is_known(loaded, config):
        return Origin(loaded, None, "its config")
    named = [*card, *([f"{loaded} (config)"] if loaded else [])]
    told = (
        f"its files name {', '.join(map(repr, named))}, which is not certain" if named else "its files do not tell it"
    )
    unreadable = (folder / _CARD).exists() and not card and "base_model" in _card_text(folder)
    raise (ValueError if named or unreadable else NoOriginError)(
        f"{name!r} is a full model; what chat model was it tuned from? {told}: pass base=, that chat model (a folder "
        "or a Hub id)"
    )


def standing_for(found: Origin, name: str) -> str:
    """The base to load: a mirror's or a 4-bit copy is replaced by the 16-bit model of its maker, as for an adapter."""
    stub = Adapter((), found.base, name, None, "", {"revision": found.revision})
    chosen = twins.standing_for(stub)
    logger.info("%s was tuned from %s, as %s tells", name, found.base, found.told_by)
    return chosen


def _run(folder: Path) -> Origin | None:
    """The base of a run of ``mm.train``, also from one of its checkpoints."""
    for place in (folder, *([folder.resolve().parent] if folder.name.startswith("checkpoint-") else [])):
        try:
            header = json.loads((place / RUN_FILE).read_text(encoding="utf-8"))
            named, revision = str(header["spec"]["base"]), header.get("base_revision")
        except (OSError, ValueError, KeyError, TypeError):
            continue
        beside = (place / named).resolve()
        if (
            registry.folder(named) or not beside.is_dir()
        ):  # a folder is told relative to the specification's, not this one
            return Origin(named, revision, f"the run's {RUN_FILE}")
    return None


def _card(folder: Path) -> list[str]:
    """The bases that a card's front matter names; none for a quantised model, a merge or an adapter."""
    text = _card_text(folder)
    parts = text.split("---", 2)
    if len(parts) < 3 or parts[0].strip():
        return []
    try:
        front: Any = _yaml.read(parts[1])
    except ValueError:
        return []
    if not isinstance(front, dict) or front.get("base_model_relation") in _OTHER_RELATIONS:
        return []
    told = front.get("base_model") or []
    return [str(each) for each in (told if isinstance(told, list) else [told])]


def _card_text(folder: Path) -> str:
    try:
        return (folder / _CARD).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""


def _is_known(name: str, config: dict[str, Any]) -> bool:
    if registry.folder(name) is not None:
        return True
    depth = registry.known_base(name).n_layers
    own = config.get("num_hidden_layers") or (config.get("text_config") or {}).get("num_hidden_layers")
    return depth is not None and depth == own
