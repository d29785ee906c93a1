"""What figures over training steps share: marks of transitions, and what a local cosine means."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes

from ._style import CONTROL, PALETTE, TINY

if TYPE_CHECKING:
    from mechmisalign.dynamics import Transition

QUANTITIES = {"A": "‖A‖", "B": "‖B‖", "dW": "‖ΔW‖"}
"""How norms are written."""
_TURNS = ((1.0, "turns back"), (0.0, "right angle"), (-1.0, "straight"))
"""What the local cosine means at these heights."""
_FURTHER = ("#7F5539", "#4D4D4D")


def span(ax: Axes, one: Transition, height: float, colour: str) -> None:
    """A transition as a dot with its interval."""
    if np.isfinite(one.step):
        ax.hlines(height, one.low, one.high, color=colour, linewidth=1.2, zorder=3)
        ax.plot(one.step, height, "o", color=colour, markersize=3.2, zorder=4)


def mark(ax: Axes, transitions: Sequence[Transition]) -> None:
    """A shade over each interval."""
    for one, colour in zip(transitions, colours_of(transitions), strict=True):
        if np.isfinite(one.step):
            ax.axvspan(one.low, one.high, color=colour, alpha=0.13, linewidth=0, zorder=0)
            ax.axvline(one.step, color=colour, linewidth=0.7, zorder=0.5)


def cosine_axis(ax: Axes) -> None:
    """From -1 to 1, with the meaning of its ends."""
    ax.set_ylim(-1.08, 1.08)
    ax.set_yticks([-1, -0.5, 0, 0.5, 1])
    ax.set_ylabel("local cosine")
    for height, told in _TURNS:
        where = ax.get_yaxis_transform()
        ax.annotate(told, (1, height), (3, 0), xycoords=where, textcoords="offset points", **_note())


def _note() -> dict[str, Any]:
    return {"fontsize": TINY, "color": "#555555", "va": "center", "ha": "left", "annotation_clip": False}


def tag(colour: str) -> dict[str, Any]:
    """The look of a small label on a curve."""
    return {"fontsize": TINY, "color": colour, "ha": "center"}


def colours_of(transitions: Sequence[Transition]) -> list[str]:
    """A colour for each transition that was found, grey for the others."""
    spare = cycle((*PALETTE, *_FURTHER))
    return [next(spare) if np.isfinite(one.step) else CONTROL for one in transitions]
