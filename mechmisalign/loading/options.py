"""How an organism is to be held: its options, and who may choose them."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

from mechmisalign import models, registry

Weights = Literal["merged", "live"]


def asked_weights(adapter: object) -> Weights:
    """How a registry wants an organism loaded; merged, if it does not say."""
    asked = registry.place(adapter).weights if isinstance(adapter, (str, Path)) else None
    return "live" if asked == "live" else "merged"


def check(weights: str, engine: str) -> None:
    """Refuse unknown options, and an engine that cannot be had.

    Raises:
        ValueError: On an option that is none, or a live adapter for a ``HookedTransformer``.
        ImportError: If ``engine="hooked"`` is asked of transformer-lens 4 or later.
    """
    if weights not in get_args(Weights):
        raise ValueError(f"weights must be one of {get_args(Weights)}, got {weights!r}")
    if engine not in get_args(models.Engine):
        raise ValueError(f"engine must be one of {get_args(models.Engine)}, got {engine!r}")
    if engine == "hooked":
        models.require_hooked()
        if weights == "live":
            raise ValueError(
                "a HookedTransformer has no place for a live adapter; use weights='merged' or engine='bridge'"
            )
