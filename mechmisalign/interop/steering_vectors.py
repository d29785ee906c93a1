"""The trained steering vectors of ModelOrganismsForEM (2602.07852): ``steering_vector.pt`` in a repository or a folder.

A file holds ``{"steering_vector": float[d_model], "layer_idx": int, "alpha": float}``. The released code adds ``alpha ·
steering_vector`` to the output of ``mlp.down_proj`` of block ``layer_idx``, at every token, so the vector here is that
product. With nothing between ``down_proj`` and the residual sum (Qwen, Llama, Mistral) this is the residual stream
after that block; where the MLP has a norm behind it (Gemma 2 and 3, OLMo 2) it is not, and no direction here can say
it.

The file does not name its base. The published ones were trained by a hook that edits the first sequence of each batch
only, while sampling edits all; the header says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mechmisalign import registry
from mechmisalign._hub import commit_of, fetch_file, is_hub_id
from mechmisalign._writing import whole
from mechmisalign.directions import Direction

from ._reading import Model, imported, read_torch, vectors

FILE = "steering_vector.pt"
_FINAL = f"checkpoints/final/{FILE}"


def read_steering_vector(
    path_or_hub_id: str | Path,
    *,
    model: Model | None = None,
    checkpoint: int | None = None,
    revision: str | None = None,
    local_files_only: bool = False,
) -> Direction:
    """A direction of one layer from a published steering vector: ``alpha · steering_vector`` at layer ``layer_idx``.

    ``mm.Steer(direction)`` with strength 1 then does what the released code does with its multiplier 1.

    Args:
        path_or_hub_id: A file, a folder, a repository, or a registry name such as ``"qwen14b-vector-medical"``; of a
            folder or repository, the final vector.
        model: The base, for the header: a name, or ``organism.provenance``. The file does not tell it, a registry does.
        checkpoint: A step: ``checkpoints/checkpoint-<step>/``, or ``checkpoint-<step>/``, in the folder or repository.
        revision: Branch, tag or commit on the Hub.
        local_files_only: Take what is in the Hub's cache, and do not ask the Hub.

    Raises:
        UnsafeFileError: If the file holds anything but a tensor and numbers.
        FileNotFoundError: If a folder has no such vector.
        ValueError: If something else is in it than the three fields, or the Hub does not give it.

    Example:
        >>> vector = read_steering_vector("qwen14b-vector-medical")  # doctest: +SKIP
    """
    place = registry.place(path_or_hub_id, revision=revision)
    local = Path(place.name).expanduser()
    if local.exists() or not is_hub_id(place.name):
        path, source = _in_folder(local, checkpoint), {}
    else:
        path = _on_hub(place.name, checkpoint, place.revision, local_files_only)
        source = {"hub_repo": place.name, "hub_revision": commit_of(path)}
    if model is None and place.entry is not None:
        model = place.entry.base
    vector, layer, alpha = _fields(read_torch(path), path)
    told = {"alpha": alpha, "read_at": "mlp.down_proj", "trained_on": "the first sequence of each batch, as released"}
    return imported({layer: vector * alpha}, "trained steering vector", path, model, step=checkpoint, **told, **source)


def write_steering_vector(direction: Direction, path: str | Path, *, layer: int, alpha: float = 1.0) -> Path:
    """Write the vector of one layer as such a file, so that ``alpha · steering_vector`` is the vector.

    Raises:
        ValueError: If alpha is 0.
    """
    if alpha == 0:
        raise ValueError("alpha must not be 0: the vector is alpha times what is stored")
    stored = {"steering_vector": direction.at(layer) / alpha, "layer_idx": int(layer), "alpha": float(alpha)}
    with whole(Path(path)) as partial:
        torch.save(stored, partial)
    return Path(path)


def _places(checkpoint: int | None) -> tuple[str, ...]:
    if checkpoint is None:
        return _FINAL, FILE  # in the order in which the released code looks
    return f"checkpoints/checkpoint-{checkpoint}/{FILE}", f"checkpoint-{checkpoint}/{FILE}"


def _in_folder(local: Path, checkpoint: int | None) -> Path:
    if local.is_file():
        if checkpoint is not None:
            raise ValueError(f"{local} is a file and has no checkpoint {checkpoint}; give its folder")
        return local
    for place in _places(checkpoint):
        if (local / place).is_file():
            return local / place
    raise FileNotFoundError(
        f"{local} has none of {', '.join(_places(checkpoint))}; give a file, such a folder or a Hub id"
    )


def _on_hub(name: str, checkpoint: int | None, revision: str | None, local_files_only: bool) -> Path:
    from huggingface_hub.errors import EntryNotFoundError

    from mechmisalign._hub import HubError

    first, second = _places(checkpoint)
    try:
        return fetch_file(name, first, revision=revision, local_files_only=local_files_only)[0]
    except HubError as error:
        if not isinstance(error.__cause__, EntryNotFoundError):
            raise
    return fetch_file(name, second, revision=revision, local_files_only=local_files_only)[0]


def _fields(stored: Any, path: Path) -> tuple[torch.Tensor, int, float]:
    if not isinstance(stored, Mapping) or not {"steering_vector", "layer_idx"} <= stored.keys():
        held = sorted(map(str, stored)) if isinstance(stored, Mapping) else type(stored).__name__
        raise ValueError(f"{path} holds {held}; steering_vector, layer_idx and alpha are expected")
    layer, alpha = stored["layer_idx"], stored.get("alpha", 1.0)
    if isinstance(layer, bool) or not isinstance(layer, int) or layer < 0:
        raise ValueError(f"layer_idx of {path} is {layer!r}; a whole number from 0 is expected")
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)):
        raise ValueError(f"alpha of {path} is {alpha!r}; a number is expected")
    return vectors(stored["steering_vector"], 1, f"steering_vector of {path}"), layer, float(alpha)
