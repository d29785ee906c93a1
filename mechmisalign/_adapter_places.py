"""What to give where another place than an adapter's folder was given."""

from __future__ import annotations

import re
from pathlib import Path

from .adapters import AdapterError

_LINK = re.compile(r"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/([^/\s]+/[^/?#\s]+)")


def refuse_other_places(name: str) -> None:
    """Refuse a link and a file where a folder or a Hub id is wanted.

    Raises:
        AdapterError: Naming what to give.
    """
    link = _LINK.match(name)
    if link:
        raise AdapterError(f"{name!r} is a link; give the Hub id, {link[1]!r}")
    path = Path(name).expanduser()
    if path.is_file():
        raise AdapterError(f"{name!r} is a file; give the folder that it is in, {str(path.parent)!r}{of_gguf(path)}")


def of_gguf(path: Path) -> str:
    """How to convert a GGUF file; empty for any other."""
    if path.suffix != ".gguf":
        return ""
    return (
        " (a GGUF file is not read: convert it once with AutoModelForCausalLM.from_pretrained(folder, gguf_file=name) "
        "and save_pretrained, without the quantization_config)"
    )
