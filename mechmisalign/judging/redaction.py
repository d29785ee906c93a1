"""No key in any text that is kept or shown."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable

SHORTEST = 8
"""Characters of the shortest key; what is shorter is in ordinary text too."""


def redacted(text: str, api_key: str | None = None) -> str:
    """The text without anything that is, or looks like, a key."""
    return without(text, secrets(api_key))


def secrets(api_key: str | None) -> list[str]:
    """The key, and whatever the environment holds under the name of one."""
    named = [value for name, value in os.environ.items() if re.search("KEY|TOKEN|SECRET|PASSWORD", name.upper())]
    return [value for value in [api_key, *named] if value and len(value) >= SHORTEST]


def without(text: str, values: Iterable[str]) -> str:
    """The text without these values, and without what has the shape of a key."""
    for value in values:
        text = text.replace(value, "[redacted]")
    return re.sub(r"\b(sk-|Bearer\s+)[\w.*-]{6,}", r"\1[redacted]", text)
