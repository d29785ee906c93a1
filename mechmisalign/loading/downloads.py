"""How much of a base is still to be fetched: sizes of files as the Hub tells them, less what is in the cache."""

from __future__ import annotations

import re
from pathlib import Path

from mechmisalign._checkpoint_files import cached_file
from mechmisalign._hub import HubError, asking, is_hub_id, is_offline
from mechmisalign.adapters import AdapterError

from .bases import Base
from .headers import stored_tensors

_WEIGHTS = re.compile(r"(?:model|pytorch_model)(?:-\d+-of-\d+)?\.(safetensors|bin)")


def bytes_to_download(base: Base) -> int | None:
    """Bytes of the base's weights that are not in the cache; None if that is not known."""
    if Path(base.location).exists() or not is_hub_id(base.location):
        return 0
    if base.local_files_only or is_offline():
        return 0 if stored_tensors(base) else None
    try:
        sizes = file_sizes(base.location, base.revision, None)
    except HubError:
        return 0 if stored_tensors(base) else None
    kinds = {match[1] for name in sizes if (match := _WEIGHTS.fullmatch(name))}
    kind = "safetensors" if "safetensors" in kinds else "bin"
    return sum(
        size
        for name, size in sizes.items()
        if (match := _WEIGHTS.fullmatch(name))
        and match[1] == kind
        and cached_file(base.location, name, base.revision) is None
    )


def file_sizes(name: str, revision: str | None, paths: list[str] | None) -> dict[str, int]:
    """Sizes of a repository's files, as the Hub tells them.

    Raises:
        HubError: If it does not.
        AdapterError: If one of the named files is not there.
    """
    from huggingface_hub import HfApi

    with asking(name, revision):
        told = HfApi().model_info(name, revision=revision, files_metadata=True)
    sizes = {each.rfilename: int(each.size or 0) for each in told.siblings or []}
    for path in paths or []:
        if path not in sizes:
            raise AdapterError(f"{name!r} has no {path}; it has {sorted(sizes)[:8]}")
    return sizes
