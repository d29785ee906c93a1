"""Base models and their copies: who made a model, and which 16-bit model a quantised or mirrored name stands for.

Adapters are often trained on copies, ``unsloth/Qwen2.5-14B-Instruct`` or ``unsloth/…-unsloth-bnb-4bit``. The copy in
16 bit holds the maker's weights (for Qwen2.5-14B-Instruct all 579 tensors were found to be equal); the one in 4 bit is
made from them. ``data/bases.yaml`` lists bases and copies whose names differ by more than their owner; the rule does
the rest: take off what says 4 bit, and give the name to its maker.
"""

from __future__ import annotations

import re
from functools import cache
from importlib.resources import files
from typing import Any, NamedTuple

from mechmisalign import _yaml

_MIRROR = "unsloth"
_FOUR_BIT = re.compile(r"(-unsloth)?-bnb-4bit$", re.IGNORECASE)
_OTHER_FORMAT = re.compile(r"gguf|fp8|awq|gptq|mlx|int[48]|nf4|[48]bit", re.IGNORECASE)
_SIZED = re.compile(r"(?P<family>.+?)-(?P<size>\d+(?:\.\d+)?[bm])(?![a-z0-9])", re.IGNORECASE)


class Twin(NamedTuple):
    """What a copy of a base model stands for.

    Attributes:
        name: The maker's 16-bit repository.
        mirror: The 16-bit copy of the same weights, which needs no licence; None if the asked name is no copy of it.
        four_bit: Whether the asked name is a 4-bit copy.
        gated: Whether the maker asks for a licence to be accepted first.
    """

    name: str
    mirror: str | None
    four_bit: bool
    gated: bool


class KnownBase(NamedTuple):
    """What is known of a base model: its family and size as in its name, and its depth."""

    name: str
    family: str
    size: str
    n_layers: int | None


def twin(name: str) -> Twin | None:
    """The maker's model for a mirrored or a 4-bit name; None for any other name, or if the maker is not known.

    Example:
        >>> twin("unsloth/qwen2.5-14b-instruct-unsloth-bnb-4bit").name
        'Qwen/Qwen2.5-14B-Instruct'
    """
    owner, _, own = name.rpartition("/")
    plain = _FOUR_BIT.sub("", own)
    if owner.lower() != _MIRROR and plain == own:
        return None
    maker = _made_by(plain, mirrored=owner.lower() == _MIRROR)
    if maker is None:
        return None
    held = _data()
    spelt = maker.partition("/")[2] if maker.partition("/")[2].lower() == plain.lower() else plain
    mirror = f"{_MIRROR}/{spelt}" if owner.lower() == _MIRROR else None
    return Twin(maker, mirror, plain != own, maker.partition("/")[0] in held["gated"])


def same_model(first: str, second: str) -> bool:
    """Whether two names are of one base: the same, or copies of one."""
    return first == second or _canonical(first) == _canonical(second)


def open_copy(name: str) -> str | None:
    """A 16-bit copy without a licence to accept, of a maker's model that asks for one; None if it asks for none."""
    owner, _, own = name.partition("/")
    held = _data()
    listed = name in held["bases"] or name in held["renamed"].values()
    return f"{_MIRROR}/{own}" if owner in held["gated"] and listed else None


def known_base(name: str) -> KnownBase:
    """Family, size and depth of a base model, by its name; empty where the name does not tell."""
    made = twin(name)
    canonical = made.name if made else name
    own = canonical.rstrip("/").rpartition("/")[2]
    depth = next((n for known, n in _data()["bases"].items() if known.lower() == canonical.lower()), None)
    match = _SIZED.match(own)
    if match is None:
        return KnownBase(canonical, "", "", depth)
    return KnownBase(canonical, match["family"], match["size"].upper(), depth)


def _canonical(name: str) -> str:
    made = twin(name)
    return (made.name if made else name).lower()


def _made_by(plain: str, *, mirrored: bool) -> str | None:
    """The maker's repository of a model, by its name without owner; of an unknown name only if it was mirrored."""
    held, low = _data(), plain.lower()
    for copy, maker in held["renamed"].items():
        if copy.lower() == low:
            return str(maker)
    for known in held["bases"]:
        if known.partition("/")[2].lower() == low:
            return str(known)
    if not mirrored or _OTHER_FORMAT.search(plain):
        return None
    for start, maker in held["makers"].items():
        if low.startswith(start.lower()):
            return f"{maker}/{plain}"
    return None


@cache
def _data() -> dict[str, Any]:
    held: dict[str, Any] = _yaml.read((files(__package__) / "data" / "bases.yaml").read_text(encoding="utf-8"))
    return held
