"""What is wrong with a sweep's specification, said so that it can be mended."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import BaseModel

from mechmisalign._specs import Found, Location


class SweepError(ValueError):
    """A specification with an unknown key, a bad value, or names that lead nowhere."""


def model_finder(top: type[BaseModel], kinds: Mapping[str, type[BaseModel]]) -> Found:
    """Which model the key at a place belongs to.

    Args:
        top: The model of the whole.
        kinds: The models of interventions, by ``kind``.
    """

    def found(location: Location) -> tuple[type[BaseModel], Location]:
        if location[:1] == ("interventions",) and len(location) > 2 and location[2] in kinds:
            return kinds[str(location[2])], (*location[:2], *location[3:])  # pydantic puts the kind into the place
        if len(location) > 1:
            return _source(top, str(location[0])) or top, location
        return top, location

    return found


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
