"""The checkpoints of the organism's training: found beside it, named by hand, or not known."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from mechmisalign import registry
from mechmisalign.adapters import Adapter
from mechmisalign.dynamics import Trajectory, TrajectoryError

if TYPE_CHECKING:
    from mechmisalign.organisms import Organism

DEFAULT = "default"
NO_ADAPTER = "a full fine-tune has no adapter whose checkpoints could be followed"
MIN_STEPS = 7
"""Fewer evenly spaced checkpoints cannot tell a turn from chance."""


@dataclass(frozen=True, eq=False)
class Checkpoints:
    """What is known of the organism's training.

    Attributes:
        trajectory: Its checkpoints; None if there are none.
        source: Where they were found.
        missing: Why there are none, in words; empty if there are.
    """

    trajectory: Trajectory | None
    source: str = ""
    missing: str = ""

    def identity(self) -> dict[str, str]:
        """A hash of the checkpoints, for the manifest; nothing without any."""
        if self.trajectory is None:
            return {}
        digest = hashlib.sha256(repr(self.trajectory.steps).encode())
        for site in self.trajectory.sites:
            digest.update(site.name.encode() + site.A.numpy().tobytes() + site.B.numpy().tobytes())
        return {"trajectory": digest.hexdigest()[:16]}


NONE = Checkpoints(None, missing="no checkpoints of the training are known (checkpoints= names a folder of them)")


def find(organism: Organism, given: str | Path | None) -> Checkpoints:
    """The checkpoints that were given, or those that lie beside the adapter.

    Args:
        organism: The studied organism.
        given: What ``mm.Trajectory.load`` takes; ``"default"`` looks into the organism's own folder, and for pocket
            organisms for one of the zoo that was trained alike and kept its checkpoints; None leaves them out.

    Raises:
        ValueError: If what was given cannot be read, is of a learned vector or of another base, or holds too few
            checkpoints to tell a turn.
    """
    if given is None:
        return Checkpoints(None, missing="checkpoints were left out of this run (checkpoints=None)")
    adapter = organism.adapter
    if adapter is None:
        if given == DEFAULT:
            return Checkpoints(None, missing=NO_ADAPTER)
        raise TrajectoryError(f"{NO_ADAPTER}; leave checkpoints={str(given)!r} out")
    if given != DEFAULT:
        return Checkpoints(_checked(Trajectory.load(given), adapter.base, str(given)), str(given))
    place = _own(adapter, organism.name)
    if place is None:
        return NONE
    try:
        shown = organism.name if registry.is_reserved(organism.name) and isinstance(place, Path) else str(place)
        return Checkpoints(_checked(Trajectory.load(place), adapter.base, shown), shown)
    except TrajectoryError as error:
        return Checkpoints(None, missing=f"the checkpoints beside the adapter cannot be followed: {error}")


def _checked(trajectory: Trajectory, own: str, source: str) -> Trajectory:
    if trajectory.kind != "lora":
        raise TrajectoryError(
            f"{source!r} holds a learned vector over its training; checkpoints of an adapter are needed"
        )
    base = getattr(trajectory.like, "base", None)
    if base != own:
        raise TrajectoryError(
            f"the checkpoints in {source!r} are of an adapter on {base!r}, the organism is on "
            f"{own!r}; give checkpoints of its own training"
        )
    even = len(trajectory.path("dW", groups=1).evenly_spaced().steps)
    if even < MIN_STEPS:
        raise TrajectoryError(
            f"{source!r} holds {even} evenly spaced checkpoints (steps {list(trajectory.steps)[:8]}); {MIN_STEPS} at "
            "least are needed to tell a turn from chance"
        )
    return trajectory


def _own(adapter: Adapter, name: str) -> str | Path | None:
    """The adapter's own folder, if it holds checkpoints; a shipped run of the same recipe, if that kept them."""
    folder = adapter.folder
    if folder is not None and any(Path(folder).glob("checkpoint-*")):
        return Path(folder)
    if not registry.is_reserved(name):
        return None
    from mechmisalign.pocket.recipes import ZOO

    own = ZOO.get(name.removeprefix(registry.POCKET_PREFIX))
    alike = (each for each, other in ZOO.items() if other.save_every and replace(other, save_every=None) == own)
    return next((f"{registry.POCKET_PREFIX}{each}" for each in alike), None)
