"""What a load will take, told before it begins: bytes to download, memory by place, what to do where it is short."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from dataclasses import dataclass

logger = logging.getLogger(__name__)

TOLD_FROM = 4 * 2**30
"""Weights of so many bytes are told of before they are loaded."""

DISK = "disk for downloads"

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


class DoesNotFitError(ValueError):
    """The weights do not fit into the free memory of a device."""


@dataclass(frozen=True)
class LoadingPlan:
    """What ``load_organism`` would take with the same arguments.

    Attributes:
        organism: What is loaded.
        base: The chat model that it is loaded with.
        weights: Bytes of the weights in memory, by the precision that they are held in.
        adapter: Bytes of the adapter's factors, which are in the host's memory, and beside live weights once more.
        download: Bytes that are not in the cache yet; None where that is not known (offline, the Hub does not tell).
        peak: Most bytes that are needed at once, by place: ``"host"``, ``"cuda:0"`` …, and the disk for downloads.
            Files that are mapped while they are cast or copied to a GPU do not count: the system takes their pages back
            when it must.
        free: Bytes that are free there now; a place of which that is not known is left out.
        advice: What to do where it does not fit; empty if it does.
    """

    organism: str
    base: str
    weights: Mapping[str, int]
    adapter: int
    download: int | None
    peak: Mapping[str, int]
    free: Mapping[str, int]
    advice: tuple[str, ...] = ()

    @property
    def short(self) -> dict[str, int]:
        """Bytes that are missing, by place."""
        return {
            place: need - self.free[place] for place, need in self.peak.items() if need > self.free.get(place, need)
        }

    @property
    def fits(self) -> bool:
        """Whether there is room everywhere, as far as that is known."""
        return not self.short

    def __str__(self) -> str:
        """The plan as a few lines of text."""
        held = ", ".join(f"{told_bytes(size)} in {dtype}" for dtype, size in self.weights.items())
        asked = "not known (the network may not be asked, or does not tell)"
        fetched = asked if self.download is None else told_bytes(self.download) if self.download else "nothing"
        lines = [
            f"{self.organism} on {self.base}",
            f"  weights   {held}",
            f"  adapter   {told_bytes(self.adapter)}",
            f"  download  {fetched}",
        ]
        for place, need in self.peak.items():
            room = f"{told_bytes(self.free[place])} free" if place in self.free else "free memory not known"
            mark = "  <- does not fit" if place in self.short else ""
            lines.append(f"  {place:9s} {told_bytes(need)} at most, {room}{mark}")
        return "\n".join([*lines, *(f"  to do: {each}" for each in self.advice)])


def tell(plan: LoadingPlan) -> None:
    """Tell of a big load on standard error, and refuse one that a GPU has no room for.

    What is short in the host's memory is only warned of: mapped files and swap may still carry it.

    Raises:
        DoesNotFitError: If a device other than the host lacks the room.
    """
    if plan.fits:
        _write(f"loading {plan}")
        return
    if set(plan.short) - {"host", DISK}:
        raise DoesNotFitError(f"the weights do not fit:\n{plan}")
    logger.warning("this load may not fit:\n%s", plan)


def told_bytes(size: int) -> str:
    """Bytes for people: ``27.5 GiB``."""
    value, unit = float(size), 0
    while value >= 1024 and unit < len(_UNITS) - 1:
        value, unit = value / 1024, unit + 1
    return f"{value:.0f} {_UNITS[unit]}" if unit == 0 or value >= 100 else f"{value:.1f} {_UNITS[unit]}"


def _write(text: str) -> None:
    from tqdm.auto import tqdm

    tqdm.write(text, file=sys.stderr)
