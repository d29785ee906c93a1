"""Specifications that people write: the value or the YAML that is wrong, told so that it can be mended."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pydantic import BaseModel, ValidationError

from . import registry

Location = tuple[int | str, ...]

Found = Callable[[Location], tuple[type[BaseModel], Location]]
"""Takes the place of a fault as pydantic has it; gives the model whose key it is, and the place as people write it."""


def told(error: ValidationError, found: Found) -> str:
    """Each fault with its key, its value, and what is expected there."""
    faults = [_fault(dict(each), found) for each in error.errors(include_url=False)]
    return faults[0] if len(faults) == 1 else "\n".join(["", *(f"  {fault}" for fault in faults)])


def _fault(fault: dict[str, Any], found: Found) -> str:
    model, location = found(tuple(fault["loc"]))
    key = _key(location)
    if fault["type"] == "extra_forbidden":
        return f"{key} is no key that is known{registry.suggestion(str(location[-1]), model.model_fields)}"
    if fault["type"] == "missing":
        return f"{key} is missing"
    message = str(fault["msg"]).removeprefix("Value error, ")
    if fault["type"] == "value_error":
        return f"{key}: {message}" if key else message
    return f"{key} is {_short(fault['input'])}: {message[0].lower()}{message[1:]}"


def _key(location: Location) -> str:
    """``("interventions", 1, "strengths")`` as ``interventions[1].strengths``."""
    parts = [f"[{part}]" if isinstance(part, int) else f".{part}" for part in location]
    return "".join(parts).removeprefix(".")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}…"
