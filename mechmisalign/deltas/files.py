"""The tensors of a checkpoint, read one at a time from its safetensors: no model is built, and none is loaded whole.

A checkpoint is one file, or several with an index. Tensors are named as in the plain text model, whatever a multimodal
wrapper puts before them; those of its towers are left out.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from mechmisalign import registry
from mechmisalign._adapter_files import CONFIG_FILE as ADAPTER_CONFIG
from mechmisalign._checkpoint_files import INDEX_FILE, checkpoint_files
from mechmisalign._hub import HubError, commit_of, fetch, is_hub_id
from mechmisalign._wrapped_names import in_tower, unwrapped, wrapper_of

CONFIG = "config.json"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_PATTERNS = ("*.safetensors", INDEX_FILE, CONFIG, ADAPTER_CONFIG)
_SKIPPED = (".rotary_emb.inv_freq", ".masked_bias", ".attn.bias")
"""Buffers that older checkpoints hold and that are computed anew."""


class CheckpointError(ValueError):
    """A checkpoint cannot be read, is no full model, or does not fit another one."""


@dataclass(frozen=True, eq=False)
class Weights(Mapping[str, Tensor]):
    """The tensors of a full model, each read from its file when it is asked for, on the CPU and in its own dtype.

    Attributes:
        name: What it was opened as.
        folder: Where its files are.
        revision: Commit on the Hub; None for local files.
        files: Name in the plain text model -> its name in the file, and the file.
    """

    name: str
    folder: Path
    revision: str | None
    files: Mapping[str, tuple[str, Path]]

    @staticmethod
    def open(
        path_or_hub_id: str | Path,
        subfolder: str | None = None,
        revision: str | None = None,
        *,
        local_files_only: bool = False,
    ) -> Weights:
        """Find the files; nothing but their headers is read.

        Args:
            path_or_hub_id: A folder, a Hub id (its safetensors are fetched into the cache), or a name in a registry.
            subfolder: Folder inside it.
            revision: Branch, tag or commit on the Hub.
            local_files_only: Take what is in the Hub's cache, and do not ask the Hub.

        Raises:
            CheckpointError: If there is no such checkpoint, it is an adapter, or safetensors are missing.
        """
        place = registry.place(path_or_hub_id, subfolder, revision, aloud=True)
        name = "/".join([place.name, *([place.subfolder] if place.subfolder else [])])
        folder, commit = _located(place, local_files_only)
        _refuse_others(folder, name)
        keys = _keys(folder)
        _refuse_missing_shards(folder, keys, name)
        return Weights(name, folder, commit, _plain(keys, name))

    def __getitem__(self, name: str) -> Tensor:
        from safetensors import SafetensorError, safe_open

        key, path = self.files[name]
        try:
            with safe_open(path, "pt") as file:
                tensor: Tensor = file.get_tensor(key)
        except SafetensorError as error:
            raise CheckpointError(f"{path} cannot be read ({error}); copy it again") from error
        if not tensor.is_floating_point() or tensor.element_size() < 2:
            raise CheckpointError(
                f"{name!r} of {self.name!r} is stored as {tensor.dtype}: a quantised checkpoint; differences need the "
                "16- or 32-bit one"
            )
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, from its file's header."""
        from safetensors import safe_open

        key, path = self.files[name]
        with safe_open(path, "pt") as file:
            return tuple(file.get_slice(key).get_shape())

    def source_of(self, name: str) -> str | None:
        """The name under which a tensor is stored: an unembedding that is not is the embedding. None without either."""
        if name not in self.files and name == HEAD and EMBEDDING in self.files:
            return EMBEDDING
        return name if name in self.files else None


def read_config(folder: Path) -> dict[str, Any]:
    """The model's ``config.json``; empty if there is none that can be read."""
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def _located(place: registry.Place, local_files_only: bool) -> tuple[Path, str | None]:
    root = registry.folder(place.name) or Path(place.name).expanduser()
    commit = commit_of(root.resolve())
    if not root.is_dir():
        if registry.is_reserved(place.name) or not is_hub_id(place.name):
            raise CheckpointError(f"there is no folder {place.name!r}; give a full model's folder or its Hub id")
        before = f"{place.subfolder}/" if place.subfolder else ""
        try:
            patterns = [before + pattern for pattern in _PATTERNS]
            root, commit = fetch(place.name, patterns, revision=place.revision, local_files_only=local_files_only)
        except HubError as error:
            raise CheckpointError(f"{place.name!r} is no folder, and {error}") from error
    folder = root / place.subfolder if place.subfolder else root
    if not folder.is_dir():
        raise CheckpointError(f"{place.name!r} has no files of a full model in {place.subfolder or 'it'}")
    return folder, commit


def _keys(folder: Path) -> dict[str, Path]:
    from safetensors import SafetensorError

    try:
        return checkpoint_files(str(folder))
    except (SafetensorError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"the safetensors or the index in {folder} cannot be read ({error}); copy them again"
        ) from error


def _refuse_others(folder: Path, name: str) -> None:
    if (folder / CONFIG).exists() or not (folder / ADAPTER_CONFIG).exists():
        return
    raise CheckpointError(
        f"{name!r} is an adapter, whose updates are its own factors: read it with mm.Adapter.load; mm.anatomy tells "
        "their norms and singular values; full models are compared here"
    )


def _refuse_missing_shards(folder: Path, keys: Mapping[str, Path], name: str) -> None:
    index = folder / INDEX_FILE
    if index.exists():
        told = json.loads(index.read_text())["weight_map"]
        missing = sorted({shard for key, shard in told.items() if key not in keys})
        if missing:
            raise CheckpointError(f"{name!r} lacks {missing[:3]}, which its index names; copy them again")
    if not keys:
        there = ", ".join(sorted(each.name for each in folder.iterdir())[:8]) or "nothing"
        raise CheckpointError(
            f"{name!r} has no safetensors of a full model (it has: {there}); pickled weights are not read, since they "
            "can run code: save it again with save_pretrained"
        )


def _plain(keys: Mapping[str, Path], name: str) -> dict[str, tuple[str, Path]]:
    kept = [key for key in keys if not in_tower(key) and not key.endswith(_SKIPPED)]
    try:
        wrapper = wrapper_of(kept)
    except ValueError as error:
        raise CheckpointError(f"{name!r} cannot be read: {error}") from error
    # the unembedding stands beside the blocks in newer wrappers, and inside of the language model in older ones
    plain = {(HEAD if key.endswith(HEAD) else _of_text(key, wrapper)): (key, keys[key]) for key in kept}
    if len(plain) < len(kept):
        raise CheckpointError(f"{name!r} holds several tensors that stand for one of the text model")
    return plain


def _of_text(key: str, wrapper: str) -> str:
    return unwrapped(key, wrapper) if wrapper and key.startswith(wrapper) else key
