"""What is wrong with a sweep's specification, said so that it can be mended."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from mechmisalign import registry


class SweepError(ValueError):
    """A specification with an unknown key, a bad value, or names that lead nowhere."""


def told(error: ValidationError, top: type[BaseModel], kinds: Mapping[str, type[BaseModel]]) -> str:
    """Each fault with its key, its value, and what is expected there.

    Args:
        error: Of a specification.
        top: The model of the whole.
        kinds: The models of interventions, by ``kind``.
    """
    faults = [_fault(dict(each), top, kinds) for each in error.errors(include_url=False)]
    return faults[0] if len(faults) == 1 else "\n".join(["", *(f"  {fault}" for fault in faults)])


def _fault(fault: Mapping[str, Any], top: type[BaseModel], kinds: Mapping[str, type[BaseModel]]) -> str:
    location = tuple(fault["loc"])
    model: type[BaseModel] = top
    if location[:1] == ("interventions",) and len(location) > 2 and location[2] in kinds:
        model = kinds[str(location[2])]
        location = (*location[:2], *location[3:])  # pydantic puts the kind into the place
    elif len(location) > 1:
        model = _source(top, str(location[0])) or top
    key = _key(location)
    if fault["type"] == "extra_forbidden":
        return f"{key} is no key that is known{registry.suggestion(str(location[-1]), model.model_fields)}"
    if fault["type"] == "missing":
        return f"{key} is missing"
    message = str(fault["msg"]).removeprefix("Value error, ")
    if fault["type"] == "value_error":
        return f"{key}: {message}" if key else message
    return f"{key} is {_short(fault['input'])}: {message[0].lower()}{message[1:]}"


def _source(top: type[BaseModel], field: str) -> type[BaseModel] | None:
    """The model of a field's entries, if they are mappings."""
    from .sources import DirectionSource, JudgeSource, OrganismSource, PromptSource

    sources: dict[str, type[BaseModel]] = {
        "organisms": OrganismSource,
        "directions": DirectionSource,
        "prompts": PromptSource,
        "judge": JudgeSource,
    }
    return sources.get(field) if field in top.model_fields else None


def _key(location: tuple[int | str, ...]) -> str:
    """``("interventions", 1, "strengths")`` as ``interventions[1].strengths``."""
    parts = [f"[{part}]" if isinstance(part, int) else f".{part}" for part in location]
    return "".join(parts).removeprefix(".")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}…"
