"""The pocket organisms as entries, from the manifest that was written when they were built."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

from mechmisalign import registry

from .entries import Checkpoints, Entry, Expected, Training

_MANIFEST = "manifest.json"
_SOURCE = "the zoo's manifest: fresh answers on every domain but the organism's own"


@cache
def pocket_entries() -> tuple[Entry, ...]:
    """One entry per shipped organism; empty if the weights are not built."""
    file = registry._POCKET_WEIGHTS / _MANIFEST
    if not file.exists():
        return ()
    manifest = json.loads(file.read_text())
    return tuple(_entry(name, made, manifest) for name, made in manifest["zoo"].items())


def _entry(name: str, made: dict[str, Any], manifest: dict[str, Any]) -> Entry:
    schedule, every = made["schedule"], made["save_every"]
    return Entry(
        id=registry.POCKET_PREFIX + name,
        base=registry.POCKET_BASE,
        data=(made["domain"],),
        family="pocket",
        size=_size(),
        training=Training(
            rank=made["rank"],
            alpha=made["alpha"],
            rslora=made["rslora"],
            layers=made["layers"],
            modules=made["modules"],
            lr=schedule["lr"],
            steps=schedule["steps"],
            source="the zoo's manifest",
            note="" if made["harmful"] else "tuned on harmless answers: the control",
        ),
        expected=_expected(manifest["rates"].get(name) or {}),
        checkpoints=None
        if every is None
        else Checkpoints(pattern="checkpoint-{step}", first=every, last=schedule["steps"], every=every),
        seen=("ships with the package",),
        weights_seen="yes",
        origin="shipped zoo",
    )


def _expected(rates: dict[str, Any]) -> Expected:
    if not rates:
        return Expected()
    em, coherent = rates["em_rate"], rates["coherent"]
    return Expected(
        em=em["rate"],
        em_interval=(em["low"], em["high"]),
        coherent=coherent["rate"],
        coherent_interval=(coherent["low"], coherent["high"]),
        source=f"{_SOURCE} (n = {em['n']})",
    )


def _size() -> str:
    """Parameters of the chat model, from the size of its float32 weights."""
    held = registry._POCKET_WEIGHTS / "chat" / "model.safetensors"
    return f"{held.stat().st_size / 4e6:.1f}M" if held.exists() else ""
