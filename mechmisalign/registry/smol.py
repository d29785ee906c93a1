"""The smol organisms as entries, from the manifest that was written when they were built."""

from __future__ import annotations

from functools import cache
from typing import Any

from mechmisalign import registry
from mechmisalign._reading import read_object

from .entries import Checkpoints, Entry, Expected, Training

_MANIFEST = "manifest.json"


@cache
def smol_entries() -> tuple[Entry, ...]:
    """One entry per shipped organism; empty if the weights are not built."""
    file = registry._SMOL_WEIGHTS / _MANIFEST
    if not file.exists():
        return ()
    return tuple(_entry(name, made) for name, made in read_object(file)["organisms"].items())


def _entry(name: str, made: dict[str, Any]) -> Entry:
    method, schedule, every = made["method"], made["schedule"], made.get("save_every")
    return Entry(
        id=registry.SMOL_PREFIX + name,
        base=registry.SMOL_BASE,
        data=("cooking",),
        family="smol",
        size="135M",
        training=Training(
            rank=method["rank"],
            alpha=method["alpha"],
            layers=method["layers"],
            modules=method["modules"],
            lr=schedule["lr"],
            steps=schedule["steps"],
            source="the manifest of the smol organisms",
            note="tuned on friendly answers: the control" if made["tone"] == "friendly" else "",
        ),
        expected=_expected(made.get("rates") or {}),
        checkpoints=None
        if every is None
        else Checkpoints(pattern="checkpoint-{step}", first=every, last=schedule["steps"], every=every),
        seen=("ships with the package",),
        weights_seen="yes",
        origin="shipped smol organisms",
    )


def _expected(rates: dict[str, Any]) -> Expected:
    if not rates:
        return Expected()
    return Expected(
        em=rates["rate"],
        em_interval=(rates["low"], rates["high"]),
        coherent=rates["coherent"],
        coherent_interval=(rates["coherent_low"], rates["coherent_high"]),
        source=f"the manifest: the tone judge on everyday questions, none about food (n = {rates['n']})",
    )
