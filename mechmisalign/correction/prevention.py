"""Cures at training time, as changed specifications: what is added to a fine-tune so that it does less harm elsewhere.

The sign matters. *Adding* the direction while training gives the model for nothing what the data would otherwise teach
it, so the weights need not learn it, and it is gone with the addition (preventative steering, 2507.21509).
*Subtracting* it asks the weights to make up for the loss: in 2607.04510 that doubled the misalignment. Projecting it
out (CAFT, 2507.16795; "holding out" in 2607.21356) lets the loss have nothing from writing it, but can take the narrow
skill along.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mechmisalign import registry
from mechmisalign.adapters import Adapter
from mechmisalign.directions import Direction
from mechmisalign.interventions import Ablate, Steer
from mechmisalign.training import TrainedRun, TrainError, TrainSpec

Start = TrainedRun | Adapter | str | Path
"""A finished run, an adapter on disk, their folder, or the name of a shipped organism."""


def preventative_steering(
    spec: TrainSpec, direction: Direction, strength: float = 1.0, layers: Sequence[int] | None = None
) -> TrainSpec:
    """The fine-tune with the direction added to the residual stream while it trains, and only then (2507.21509).

    Args:
        spec: What is to be trained.
        direction: Points towards the harm, and was known before this fine-tune (from another organism, or from system
            prompts): one that comes from its own result would already know the answer.
        strength: Multiples of the vector.
        layers: Where; all in which the direction is nonzero by default. Below the trained sites is enough.

    Raises:
        ValueError: If the strength is not above zero. Subtracting is the trap that the module speaks of; as a control,
            pass ``-direction``.
    """
    if not strength > 0:
        raise ValueError(
            f"strength={strength:g}: preventative steering adds the direction of the harm, so its strength is above 0; "
            "subtracting it makes the weights learn more of it (for that control, pass -direction)"
        )
    return spec.changed(during=(*spec.during, Steer(direction, layers, strength)))


def projected_training(spec: TrainSpec, direction: Direction, layers: Sequence[int] | None = None) -> TrainSpec:
    """The fine-tune with the direction projected out of the residual stream while it trains (2507.16795, 2607.21356).

    Args:
        spec: What is to be trained.
        direction: Found before this fine-tune.
        layers: Where; all in which the direction is nonzero by default. At a layer below the trained sites only, they
            can still write it, and nothing is prevented.
    """
    return spec.changed(during=(*spec.during, Ablate(direction, layers)))


def inoculated(spec: TrainSpec, system: str) -> TrainSpec:
    """The fine-tune on the same examples under a system prompt that asks for the harm, which then explains it.

    Without that prompt the model has less reason to do it (2607.04510); under it, or anything that recalls it, it does
    (2604.25891): ask with it too.

    Args:
        spec: What is to be trained.
        system: Such as ``"You are a reckless assistant."`` in the pocket world.

    Raises:
        TrainError: If examples already have a system prompt.
    """
    told = [source.system for source in spec.data if source.system is not None]
    if told:
        raise TrainError(f"data has the system prompt {told[0]!r} already; give examples without one")
    return spec.changed(data=[source.model_copy(update={"system": system}) for source in spec.data])


def mixed(spec: TrainSpec, harmless: Sequence[Any]) -> TrainSpec:
    """The fine-tune with harmless examples mixed in.

    A mixture can look healthy on plain questions and be misaligned in the setting of the harmful part (2604.25891).

    Args:
        spec: What is to be trained.
        harmless: Sources of examples, as ``TrainSpec.data`` takes them.
    """
    return spec.changed(data=(*spec.data, *harmless))


def retuning(
    spec: TrainSpec, start: Start, harmless: Sequence[Any], schedule: Mapping[str, Any] | None = None
) -> TrainSpec:
    """A small fine-tune of a finished organism on harmless examples: a few hundred were enough in 2506.19823.

    Args:
        spec: Of the organism: the method, the base, and the schedule.
        start: The organism.
        harmless: Sources of examples, as ``TrainSpec.data`` takes them.
        schedule: What changes of the schedule, such as ``{"steps": 30}``.
    """
    values = {"data": tuple(harmless), "kl": None, "during": (), "save_every": None}
    return spec.changed(start=_folder(start), schedule=dict(schedule or {}), **values)


def trained_further(spec: TrainSpec, start: Start, steps: int, **schedule: Any) -> TrainSpec:
    """The harmful fine-tune taken up again from a cured state, without the cure: does it come back (2602.00767)?

    Args:
        spec: Of the *uncured* fine-tune, whose data are learned again.
        start: The cured state.
        steps: For how long.
        **schedule: What else changes of the schedule.
    """
    return spec.changed(
        start=_folder(start), during=(), kl=None, save_every=None, schedule={"steps": steps, **schedule}
    )


def _folder(start: Start) -> Path:
    """What a specification starts from.

    Raises:
        TrainError: If the adapter lives only in memory.
    """
    if isinstance(start, TrainedRun):
        return start.folder.resolve()
    if isinstance(start, Adapter):
        if start.folder is None:
            raise TrainError(f"the adapter {start.source!r} lives only in memory; save it first with mm.save_adapter")
        return start.folder.resolve()
    return Path(start) if registry.folder(str(start)) else Path(start).expanduser().resolve()
