"""Layers as people name them: one number, or several as a list, a range, a numpy array, a pandas column, a tensor."""

from __future__ import annotations

from collections.abc import Iterable
from operator import index
from typing import Any, SupportsIndex

Layers = SupportsIndex | Iterable[SupportsIndex]
"""One layer or several."""


def layer_numbers(layers: Layers | Any, what: str = "layers") -> tuple[int, ...]:
    """The layers as plain whole numbers, in the order given.

    Raises:
        ValueError: If there is none, or one is no whole number (``True`` and ``2.0`` are none).
    """
    several: Any = layers
    given = [layers] if isinstance(layers, (str, bytes)) or _is_single(layers) else list(several)
    if not given:
        raise ValueError(f"{what} is empty; name at least one layer, or leave it out for the default")
    return tuple(_whole(one, what) for one in given)


def _is_single(value: Any) -> bool:
    return not hasattr(value, "__iter__") or getattr(value, "ndim", None) == 0


def _whole(value: Any, what: str) -> int:
    if not (isinstance(value, bool) or str(getattr(value, "dtype", "")).endswith("bool")):
        try:
            return index(value)
        except TypeError:
            pass
    raise ValueError(f"{what} are whole numbers, got {value!r}; name one such as 3")
