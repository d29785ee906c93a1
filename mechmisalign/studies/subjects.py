"""Whom a study is about, found and checked from configs alone: no weight is loaded."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mechmisalign import models, registry
from mechmisalign._pretrained import read_pretrained
from mechmisalign.loading import bases, full_models, reading
from mechmisalign.loading.bases import Base
from mechmisalign.loading.wrappers import text_config
from mechmisalign.organisms import Organism

from .plan import Plan, StudySettings


@dataclass(frozen=True)
class Subject:
    """An organism that is perhaps not loaded yet.

    Attributes:
        name: What it is called.
        base: Name of its chat model.
        location: Folder or Hub id of that; empty if it lives only in memory.
        n_layers: How many blocks it has.
        sites: How many matrices its adapter changes; 0 without an adapter.
    """

    name: str
    base: str
    location: str
    n_layers: int
    sites: int = 0


def subject_of(organism: Organism | str | Path, base: str | Path | None = None) -> Subject:
    """The subject of an organism, or of what ``load_organism`` takes.

    Raises:
        ValueError: If the adapter or its base cannot be read.
    """
    if isinstance(organism, Organism):
        if organism.adapter is None and organism.full is None:
            organism.require_adapter("a study")
        sites = len(organism.adapter.sites) if organism.adapter else 0
        n_layers = models.n_layers(organism.model)
        return Subject(organism.name, organism.base.name, organism.base.location, n_layers, sites)
    name, found, sites = _read(organism, base)
    return Subject(name, found.name, found.location, _n_layers(found), sites)


def check(plan: Plan, subject: Subject) -> None:
    """Refuse now what would fail when half of a study is done.

    Raises:
        ValueError: Naming the setting, its value and what is expected; a peer that cannot be read, or is on another
            base.
    """
    check_settings(plan.settings, subject.n_layers)
    for name in plan.peers:
        base = plan.bases.get(name)
        _, found, _ = _read(name, base)
        if base is None and not _same_base(found, subject):
            raise ValueError(
                f"the peer {name!r} is on {found.name!r}, the organism on {subject.base!r}: a direction is carried to "
                f"organisms on one chat model only; if they are the same model, write {name}@{subject.location}"
            )


def check_settings(settings: StudySettings, n_layers: int) -> None:
    """The settings alone.

    Raises:
        ValueError: Naming the one that is wrong.
    """
    layers = settings.layers
    if layers is not None and (not layers or not all(0 <= layer < n_layers for layer in layers)):
        raise ValueError(f"layers {list(layers)}: one or more of 0 to {n_layers - 1} are expected, the model's blocks")
    if not settings.strengths or not all(math.isfinite(each) and each > 0 for each in settings.strengths):
        raise ValueError(f"strengths {list(settings.strengths)}: one or more positive numbers are expected")
    counts: Mapping[str, Any] = {name: getattr(settings, name) for name in _COUNTS}
    for name, value in counts.items():
        if value is not None and value < 1:
            raise ValueError(f"{name}={value}: at least 1 is expected")


_COUNTS = ("samples", "pool_samples", "sweep_samples", "controls", "max_new_tokens", "most_layers", "most_prompts")


def _read(organism: str | Path, base: str | Path | None) -> tuple[str, Base, int]:
    whole = full_models.find(organism, base, None, None, False)
    if whole is not None:
        return whole[0].name, whole[1], 0
    adapter, found = reading.read(organism, base, None, None)
    return adapter.source, found, len(adapter.sites)


def _n_layers(base: Base) -> int:
    from transformers import AutoConfig

    with bases.told(base):
        config = read_pretrained(AutoConfig, base.location, **base.source)
    return int(text_config(config).num_hidden_layers)


def _same_base(found: Base, subject: Subject) -> bool:
    if found.name == subject.base or registry.same_model(found.name, subject.base):
        return True
    places = [Path(each) for each in (found.location, subject.location)]
    return all(place.is_dir() for place in places) and places[0].resolve() == places[1].resolve()
