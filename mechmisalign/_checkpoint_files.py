"""The files of a checkpoint: which tensor is in which of them, in a folder or in the Hub's cache."""

from __future__ import annotations

import json
from pathlib import Path

from ._pretrained import refuse_lfs_pointer

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


def checkpoint_files(location: str, revision: str | None = None) -> dict[str, Path]:
    """Tensor name -> safetensors file, for a local folder or the Hub's cache; empty if there is no such file."""
    index = cached_file(location, INDEX_FILE, revision)
    if index is not None:
        shards = json.loads(index.read_text())["weight_map"]
        found = {shard: cached_file(location, shard, revision) for shard in set(shards.values())}
        return {key: path for key, shard in shards.items() if (path := found[shard]) is not None}
    single = cached_file(location, WEIGHTS_FILE, revision)
    if single is None:
        return {}
    from safetensors import safe_open

    with safe_open(single, "pt") as file:
        return dict.fromkeys(file.keys(), single)


def cached_file(location: str, name: str, revision: str | None = None) -> Path | None:
    """One file of a local folder or of the Hub's cache; None if it is not there."""
    local = Path(location)
    if local.is_dir():
        refuse_lfs_pointer(local / name)
        return local / name if (local / name).exists() else None
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(location, name, revision=revision)
    return Path(cached) if isinstance(cached, str) else None
