"""Names of matrices in models that wrap a language model beside towers for images or sound.

The text model inside such a wrapper is what is read, so a site is named as in the plain text model
(``model.layers.3.mlp.down_proj``), whatever PEFT called it where the adapter was trained.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

PLAIN = "model."
WRAPPERS = ("model.language_model.", "language_model.model.")
"""What stands before ``layers`` in a wrapper, in newer and in older transformers, where a text model has ``model.``."""

_TOWER = re.compile(
    r"(^|\.)(vision_tower|vision_model|visual|vision_encoder|multi_modal_projector|mm_projector|audio_tower|embed_vision|"
    r"embed_audio)\."
)


def in_tower(name: str) -> bool:
    """Whether a module is outside of the language model, where text never passes."""
    return _TOWER.search(name) is not None


def wrapper_of(names: Iterable[str]) -> str:
    """The prefix that these names have in place of ``model.``; empty if they are those of a plain text model.

    Raises:
        ValueError: If they have several.
    """
    in_blocks = (name for name in names if ".layers." in name)
    found = {next((prefix for prefix in WRAPPERS if name.startswith(prefix)), "") for name in in_blocks}
    if len(found) > 1:
        raise ValueError(f"its matrices are named in several ways, below {sorted(found)}")
    return next(iter(found), "")


def unwrapped(name: str, wrapper: str) -> str:
    """The name in the plain text model."""
    return PLAIN + name.removeprefix(wrapper) if wrapper else name


def wrapped(name: str, wrapper: str) -> str:
    """The name in the wrapper, of a matrix of the plain text model."""
    return wrapper + name.removeprefix(PLAIN) if wrapper and name.startswith(PLAIN) else name
