"""The one way to ``from_pretrained``: no code of a stranger, no adapter that lies about, no pointer for a file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

_POINTER = b"version https://git-lfs"
_ADAPTER = "adapter_config.json"
_SUFFIXES = (".safetensors", ".json", ".bin", ".model", ".jinja", ".gguf", ".pt", ".npz", ".parquet")


def read_pretrained(reader: Any, location: str | Path, **options: Any) -> Any:
    """``reader.from_pretrained(location)`` for a config, a tokenizer or a model, without running code from there.

    Raises:
        ValueError: If a file is a pointer of Git LFS, or adapter files lie beside the model, which transformers would
            put on it in silence.
    """
    folder = Path(location)
    if folder.is_dir():
        for path in _files(folder):
            refuse_lfs_pointer(path)
        if hasattr(reader, "_model_mapping") or hasattr(reader, "base_model_prefix"):
            _refuse_adapter((folder / _ADAPTER).exists(), location)
    loaded = reader.from_pretrained(location, trust_remote_code=False, **options)
    _refuse_adapter(bool(getattr(loaded, "_hf_peft_config_loaded", False)), location)
    return loaded


def refuse_lfs_pointer(path: str | Path) -> None:
    """Refuse a file that a clone without git-lfs left.

    Raises:
        ValueError: Naming the file.
    """
    found = Path(path)
    if not found.is_file():
        return
    with found.open("rb") as file:
        begins = file.read(len(_POINTER))
    if begins == _POINTER:
        raise ValueError(
            f"{found} is a pointer of Git LFS, not the file itself; run 'git lfs pull' in its clone, or fetch it "
            "from the Hub"
        )


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.iterdir()) if path.suffix in _SUFFIXES)


def _refuse_adapter(found: bool, location: str | Path) -> None:
    if found:
        raise ValueError(
            f"beside the model in {str(location)!r} lie the files of an adapter ({_ADAPTER}), which transformers would "
            "put on it in silence; move them to a folder of their own"
        )
