"""The settings of an adapter's config, by type and size; keys that are not known here are left alone."""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictStr, ValidationError

from .adapters import AdapterError

Rank = Annotated[int, Field(strict=True, ge=1, le=2**16)]
Alpha = Annotated[float, Field(strict=True, gt=0, le=1e6, allow_inf_nan=False)]
Layer = Annotated[int, Field(strict=True, ge=0, le=2**16)]

_LONGEST_PATTERN = 4000
_MANY = 16  # a repeat of more than this counts as one without bound
_WIDE = 5  # so many of them in a row try some millions of splits of a module's name


class LoraSettings(BaseModel):
    """What decides the sites of a LoRA and their scaling."""

    model_config = ConfigDict(extra="allow", frozen=True)

    r: Rank
    lora_alpha: Alpha
    use_rslora: StrictBool | None = None
    rank_pattern: dict[StrictStr, Rank] | None = None
    alpha_pattern: dict[StrictStr, Alpha] | None = None
    target_modules: StrictStr | list[StrictStr] | None = None
    exclude_modules: StrictStr | list[StrictStr] | None = None
    layers_to_transform: Layer | list[Layer] | None = None
    layers_pattern: StrictStr | list[StrictStr] | None = None
    base_model_name_or_path: StrictStr | None = None


def check_settings(config: Mapping[str, Any], source: str) -> None:
    """Refuse settings of a wrong type or an absurd size, and patterns that could be matched without end.

    Raises:
        AdapterError: Naming the setting and its value.
    """
    try:
        settings = LoraSettings.model_validate(dict(config))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"][:2])
        raise AdapterError(
            f"the config of {source!r} has {place}={str(first['input'])[:60]!r}: {first['msg']}; save the adapter again"
        ) from error
    patterns = [*(settings.rank_pattern or {}), *(settings.alpha_pattern or {})]
    for each in (settings.target_modules, settings.exclude_modules, settings.layers_pattern):
        patterns += [each] if isinstance(each, str) else []
    patterns += settings.layers_pattern if isinstance(settings.layers_pattern, list) else []
    for pattern in patterns:
        _check_pattern(pattern, source)


def _check_pattern(pattern: str, source: str) -> None:
    shown = f"the config of {source!r} has the pattern {pattern[:60]!r}"
    remedy = "name the modules in a list instead"
    if len(pattern) > _LONGEST_PATTERN:
        raise AdapterError(f"{shown} of {len(pattern)} characters, at most {_LONGEST_PATTERN} are read; {remedy}")
    try:
        parsed = importlib.import_module("re._parser").parse(pattern)
        wide = _wide_repeats(parsed, inside=False)
    except (re.error, RecursionError, OverflowError) as error:
        raise AdapterError(f"{shown}, which is no regular expression ({error}); {remedy}") from error
    if wide > _WIDE:
        raise AdapterError(f"{shown}, whose repeats could be matched without end on some name; {remedy}")


def _wide_repeats(parsed: Any, *, inside: bool) -> int:
    """How many unbounded repeats follow each other; more than allowed where one repeat or a choice is in another."""
    return sum(_cost(str(operation), argument, inside=inside) for operation, argument in parsed)


def _cost(operation: str, argument: Any, *, inside: bool) -> int:
    if operation in ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT"):
        low, high, body = argument
        many = int(high) > 1
        if many and inside and int(low) != int(high):
            return _WIDE + 1
        return _wide_repeats(body, inside=inside or many) + (int(high) > _MANY)
    if operation == "BRANCH":
        ways = [_wide_repeats(way, inside=inside) for way in argument[1]]
        return _WIDE + 1 if inside else max(ways)
    if operation in ("GROUPREF", "GROUPREF_EXISTS"):
        return _WIDE + 1
    bodies = argument if isinstance(argument, tuple) else (argument,)
    return sum(_wide_repeats(body, inside=inside) for body in bodies if type(body).__name__ == "SubPattern")
