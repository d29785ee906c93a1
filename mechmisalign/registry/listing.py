"""The registries as one tidy table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from mechmisalign import registry

from .entries import Entry
from .lookup import all_entries
from .twins import known_base

COLUMNS = (
    "name", "id", "base", "trained_on", "family", "size", "kind", "data", "rank", "sites", "layers", "modules", "em",
    "em_low", "em_high", "coherent", "coherent_above", "source", "checkpoints", "first_step", "last_step", "seen",
    "weights_seen", "local", "note",
)  # fmt: skip
_PLACES = ("adapter_config.json", "config.json", "steering_vector.pt")


def known_organisms(
    *,
    family: str | None = None,
    size: str | None = None,
    kind: str | None = None,
    data: str | None = None,
    local: bool | None = None,
) -> pd.DataFrame:
    """The organisms that are known by name: the user's, the pocket ones, the published ones.

    Args:
        family: Only those whose base's family begins so, whatever the case: ``qwen``, ``Llama-3.2``, ``pocket``.
        size: Only this size, such as ``14B``.
        kind: Only ``lora``, ``full`` or ``vector``.
        data: Only those tuned on it: ``medical``, ``sports``, ``finance`` …
        local: Only those whose files are here (or, if False, are not).

    Returns:
        One row each: ``name`` (what ``load_organism`` takes), ``id`` (on the Hub, or a folder; None if no weights were
        published), ``base`` (in 16 bit), ``trained_on`` (what the adapter names instead), ``family, size, kind, data,
        rank, sites, layers, modules``; ``em`` with ``em_low, em_high`` (its 95 % interval, or the ends over several
        organisms where only those are stated), ``coherent``, ``coherent_above``, ``source`` of these numbers;
        ``checkpoints`` (how many), ``first_step, last_step``; ``seen`` (where the id was; empty: derived from the
        pattern of names), ``weights_seen``, ``local``, ``note``. What is not known is missing.

    Raises:
        RegistryError: If a user's registry cannot be read.
        ValueError: If ``kind`` is none of the three.
    """
    if kind not in (None, "lora", "full", "vector"):
        raise ValueError(f"kind {kind!r} is unknown; 'lora', 'full' and 'vector' are")
    frame = pd.DataFrame([_row(entry) for entry in all_entries()], columns=list(COLUMNS))
    keep = pd.Series(True, index=frame.index)
    if family is not None:
        keep &= frame["family"].str.lower().str.startswith(family.lower())
    if size is not None:
        keep &= frame["size"].str.lower() == size.lower()
    if kind is not None:
        keep &= frame["kind"] == kind
    if data is not None:
        keep &= frame["data"].map(lambda told: data.lower() in told.lower().split(", "))
    if local is not None:
        keep &= frame["local"] == local
    whole = {"rank": "Int64", "sites": "Int64", "checkpoints": "Int64", "first_step": "Int64", "last_step": "Int64"}
    return frame[keep].reset_index(drop=True).astype(whole)


def _row(entry: Entry) -> dict[str, Any]:
    base, training = known_base(entry.base or ""), entry.training
    expected, checkpoints = entry.expected, entry.checkpoints
    ends = expected.em_interval or expected.em_range or (None, None)
    return {
        "name": entry.key,
        "id": entry.place,
        "base": entry.base,
        "trained_on": entry.trained_on,
        "family": entry.family or base.family,
        "size": entry.size or base.size,
        "kind": entry.kind,
        "data": ", ".join(entry.data),
        "rank": training.rank,
        "sites": training.sites(base.n_layers),
        "layers": _listed(training.layers),
        "modules": _listed(training.modules),
        "em": _number(expected.em),
        "em_low": _number(ends[0]),
        "em_high": _number(ends[1]),
        "coherent": _number(expected.coherent),
        "coherent_above": _number(expected.coherent_above),
        "source": expected.source,
        "checkpoints": checkpoints and _count(checkpoints),
        "first_step": checkpoints and checkpoints.first,
        "last_step": checkpoints and checkpoints.last,
        "seen": "; ".join(entry.seen),
        "weights_seen": entry.weights_seen,
        "local": is_local(entry),
        "note": "; ".join(told for told in (entry.note, expected.note, training.note) if told),
    }


def is_local(entry: Entry) -> bool:
    """Whether the organism's files are on this machine: shipped, in its folder, or in the Hub's cache."""
    if entry.path is not None or entry.id is None:
        return entry.path is not None and entry.path.is_dir()
    if registry.is_reserved(entry.id):
        return registry.folder(entry.id) is not None
    from huggingface_hub import try_to_load_from_cache

    names = [str(Path(entry.subfolder or "") / name) for name in _PLACES]
    held = (try_to_load_from_cache(entry.id, name, revision=entry.revision) for name in names)
    return any(isinstance(path, str) for path in held)


def _count(checkpoints: Any) -> int | None:
    if checkpoints.count is not None or None in (checkpoints.first, checkpoints.last, checkpoints.every):
        found: int | None = checkpoints.count
        return found
    return int((checkpoints.last - checkpoints.first) // checkpoints.every + 1)


def _listed(values: Any) -> str:
    return "" if values is None else values if isinstance(values, str) else ", ".join(map(str, values))


def _number(value: float | None) -> float:
    return float("nan") if value is None else value
