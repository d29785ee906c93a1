"""YAML as people mean it: ``on`` is a word, ``1e-3`` is a number, and a key that stands twice is an error.

Aliases and merge keys (``<<``) are read; a document that grows without measure through them is refused.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from ._reading import brief, read_text

_LARGEST, _GROWTH = 100_000, 10
"""How many values a document may have with its aliases written out: so many, or so many times those that it writes."""

_BOOL, _FLOAT = "tag:yaml.org,2002:bool", "tag:yaml.org,2002:float"


class _Loader(yaml.SafeLoader):  # type: ignore[misc]  # yaml brings no types
    """Safe, with the booleans and numbers of YAML 1.2 (in 1.1, which PyYAML reads, ``on`` is true)."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in rules if tag not in (_BOOL, _FLOAT)]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_BOOL, re.compile(r"(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_Loader.add_implicit_resolver(
    _FLOAT,
    re.compile(r"(?:[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$"),
    list("-+.0123456789"),
)


def read(text: str) -> Any:
    """The value of a YAML document.

    Raises:
        ValueError: If it is no YAML, a key stands twice, or its aliases make it much larger than it is written.
    """
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _size(node, {})
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        raise ValueError(f"this YAML cannot be read: {_shortened(error)}") from None
    except RecursionError:
        raise ValueError("this YAML cannot be read: it is nested too deeply") from None


def read_file(path: str | Path) -> Any:
    """The value of a YAML file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: As ``read``, or if the file is no text.
    """
    return read(read_text(path))


def read_mapping(path: str | Path, keys: str) -> dict[str, Any]:
    """The mapping that a YAML file holds, its keys as text.

    Args:
        path: The file.
        keys: Which keys are expected, for the message.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: As ``read_file``, or if it holds something else.
    """
    value = read_file(path)
    if not isinstance(value, dict):
        raise ValueError(f"{brief(value)} is no mapping with {keys}")
    return {str(key): each for key, each in value.items()}


def _size(node: yaml.Node, known: dict[int, int | None]) -> int:
    """Nodes below this one with each alias written out; refuses keys that stand twice, loops, and too many.

    Raises:
        yaml.YAMLError: With the place.
    """
    if id(node) in known:
        size = known[id(node)]
        if size is None:
            raise yaml.constructor.ConstructorError(
                None, None, "an alias stands inside of what it names", node.start_mark
            )
        return size
    known[id(node)] = None
    if isinstance(node, yaml.MappingNode):
        _refuse_twice(node)
    parts = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else node.value
    size = 1 if isinstance(node, yaml.ScalarNode) else 1 + sum(_size(part, known) for part in parts)
    known[id(node)] = size
    if size > max(_LARGEST, _GROWTH * len(known)):
        raise yaml.constructor.ConstructorError(
            None,
            None,
            f"its aliases stand for more than {_LARGEST:,} values; write less, or without aliases",
            node.start_mark,
        )
    return size


def _refuse_twice(node: yaml.MappingNode) -> None:
    seen: set[str] = set()
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode) and key.value in seen:
            raise yaml.constructor.ConstructorError(
                None, None, f"the key {brief(key.value)} stands twice", key.start_mark
            )
        seen.add(key.value if isinstance(key, yaml.ScalarNode) else "")


def _shortened(error: yaml.YAMLError) -> str:
    """What is wrong, where, and at most that one line."""
    mark = getattr(error, "problem_mark", None)
    problem = brief(Exception(getattr(error, "problem", None) or error), 160)
    if mark is None:
        return problem
    line = "" if mark.buffer is None else mark.buffer.rstrip("\0").split("\n")[mark.line : mark.line + 1]
    shown = f", at {brief(line[0].strip())}" if line and line[0].strip() else ""
    return f"{problem} (line {mark.line + 1}, column {mark.column + 1}{shown})"
