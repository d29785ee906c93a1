"""Reading checkpoints: many small files of one shape, so one is checked in full and the others against it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from mechmisalign import registry
from mechmisalign._adapter_files import CONFIG_FILE, KEY_PREFIX, WEIGHTS_FILE, locate, read_adapter
from mechmisalign._checksums import DamagedFileError, read_tensors
from mechmisalign._hub import HubError, asking, fetch
from mechmisalign._reading import read_object
from mechmisalign.adapters import Adapter, AdapterError, SiteKey
from mechmisalign.directions import Direction

from .trajectory import LOG_COLUMNS, SiteTrajectory, Trajectory, TrajectoryError, check_steps, no_log

VECTOR_FILE = "steering_vector.safetensors"
LOG_FILE = "log.csv"
STATE_FILE = "trainer_state.json"
RUN_FILE = "train.json"

_FILES = (CONFIG_FILE, WEIGHTS_FILE, VECTOR_FILE, STATE_FILE, LOG_FILE, RUN_FILE)
_FOLDER = re.compile(r"checkpoint-(\d+)")
_BRANCH = re.compile(r"(?:checkpoint|step)[-_]?(\d+)")
_HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+")
_DECIDES = ("peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "base_model_name_or_path")
"""What of a config has to be the same at every step."""


def load(
    path_or_hub_id: str | Path,
    subfolder: str | None,
    revision: str | None,
    *,
    sites: Iterable[SiteKey] | None,
    every: int,
    end: int | None,
    local_files_only: bool = False,
) -> Trajectory:
    """``Trajectory.load``."""
    if every < 1:
        raise ValueError(f"every must be at least 1, got {every}")
    root, found = _found(str(path_or_hub_id), subfolder, revision, local_files_only)
    file = WEIGHTS_FILE if any((folder / WEIGHTS_FILE).exists() for folder in found.values()) else VECTOR_FILE
    without = sorted(step for step, folder in found.items() if not (folder / file).exists())
    if 0 < len(without) < len(found):
        raise TrajectoryError(f"step {without[0]} has no {file}, other steps have; copy it again, or remove its folder")
    found = {} if without else found
    last = _last_step(root, found, file) if end is None else end
    if last is not None and root is not None and (root / file).exists():
        found[last] = root
    steps = sorted(found)[::-1][::every][::-1]
    if len(steps) < 3:
        where = "/".join([str(path_or_hub_id), *([subfolder] if subfolder else [])])
        raise TrajectoryError(
            f"{where!r} has {len(steps)} checkpoints to follow (steps {steps}); three folders checkpoint-<step> with "
            f"{WEIGHTS_FILE} or {VECTOR_FILE} are needed at least"
        )
    check_steps(steps)
    folders, log = [found[step] for step in steps], read_log(root, list(found.values()))
    if file == VECTOR_FILE:
        pairs = [(step, Direction.load(folder / file)) for step, folder in zip(steps, folders, strict=True)]
        return Trajectory.of(pairs, log)
    like, stacked = _stacked(steps, folders, sites)
    return Trajectory(tuple(steps), stacked, like, no_log(log))


def read_log(root: Path | None, folders: Sequence[Path]) -> pd.DataFrame | None:
    """The log of ``mm.train``, or the history of the Trainer; None if there is neither."""
    if root is not None and (root / LOG_FILE).exists():
        return pd.read_csv(root / LOG_FILE, float_precision="round_trip")
    places = [*([root] if root is not None else []), *reversed(folders)]
    state = next((place / STATE_FILE for place in places if (place / STATE_FILE).exists()), None)
    if state is None:
        return None
    history = [entry for entry in read_object(state).get("log_history", ()) if "loss" in entry]
    told = pd.DataFrame(history).rename(columns={"learning_rate": "lr"})
    return told.reindex(columns=list(LOG_COLUMNS))


def _found(
    name: str, subfolder: str | None, revision: str | None, local_files_only: bool
) -> tuple[Path | None, dict[int, Path]]:
    """The folder of the checkpoints, and each by its step."""
    name, subfolder, revision = registry.place(name, subfolder, revision)[:3]
    root = registry.folder(name) or Path(name).expanduser()
    if root.is_dir() or registry.is_reserved(name) or not _HUB_ID.fullmatch(name):
        folder, _ = locate(name, subfolder, revision)
        return folder, _checkpoints(folder)
    return _on_hub(name, subfolder, revision, local_files_only)


def _checkpoints(folder: Path) -> dict[int, Path]:
    return {int(match[1]): each for each in folder.iterdir() if (match := _FOLDER.fullmatch(each.name))}


def _on_hub(
    name: str, subfolder: str | None, revision: str | None, local_files_only: bool
) -> tuple[Path | None, dict[int, Path]]:
    """Checkpoint folders of a repository, or its branches that are called after a step."""
    start = f"{subfolder}/" if subfolder else ""
    patterns = [f"{start}{place}{file}" for file in _FILES for place in ("", "checkpoint-*/", "*/checkpoint-*/")]
    try:
        root = fetch(name, patterns, revision=revision, local_files_only=local_files_only)[0] / start
        held = {each.parent for each in root.rglob("checkpoint-*") if _FOLDER.fullmatch(each.name)}
        if len(held) > 1:
            told = sorted(str(each.relative_to(root)) for each in held)
            raise TrajectoryError(f"{name!r} has checkpoints in several folders, {told}; choose one with subfolder=")
        if held:
            folder = held.pop()
            return folder, _checkpoints(folder)
        branches = [] if local_files_only else _branches(name)
        steps = {int(match[1]): each for each in branches if (match := _BRANCH.fullmatch(each))}
        return None, {step: locate(name, subfolder, branch)[0] for step, branch in steps.items()}
    except HubError as error:
        raise AdapterError(f"{name!r} is no folder, and {error}") from error


def _branches(name: str) -> list[str]:
    from huggingface_hub import HfApi

    with asking(name):
        return [branch.name for branch in HfApi().list_repo_refs(name).branches]


def _last_step(root: Path | None, found: dict[int, Path], file: str) -> int | None:
    """The step of the end in the folder itself, where something tells it."""
    if root is None or not (root / file).exists():
        return None
    for name, key in ((RUN_FILE, "steps"), (STATE_FILE, "global_step")):
        if (root / name).exists():
            told = read_object(root / name).get(key)
            if told is not None:
                return int(told)
    if (root / LOG_FILE).exists():
        return int(pd.read_csv(root / LOG_FILE)["step"].iloc[-1])
    if found and (found[max(found)] / file).read_bytes() == (root / file).read_bytes():
        return max(found)
    return None


def _stacked(
    steps: Sequence[int], folders: Sequence[Path], sites: Iterable[SiteKey] | None
) -> tuple[Adapter, tuple[SiteTrajectory, ...]]:
    """The last adapter, and the chosen sites over all steps."""
    like = read_adapter(folders[-1], None, None)
    chosen = like.select(sites)
    told = (folders[-1] / CONFIG_FILE).read_bytes()
    keys = {f"{KEY_PREFIX}{like.peft_name(site.name)}.lora_{factor}.weight" for site in like.sites for factor in "AB"}
    rows = []
    for step, folder in zip(steps, folders, strict=True):
        _check_config(folder, told, like.config, step, steps[-1])
        rows.append(_tensors(folder, step, keys, steps[-1]))
    stacked = []
    for site in chosen:
        name = f"{KEY_PREFIX}{like.peft_name(site.name)}"
        A, B = (_stack(rows, f"{name}.lora_{factor}.weight", steps) for factor in "AB")
        stacked.append(SiteTrajectory(site.layer, site.module, site.name, A, B, site.scaling))
    return like, tuple(stacked)


def _check_config(folder: Path, told: bytes, config: Any, step: int, last: int) -> None:
    """Refuse a checkpoint whose config means another adapter than the last one's."""
    path = folder / CONFIG_FILE
    if path.exists() and path.read_bytes() == told:
        return
    own = read_adapter(folder, None, None).config  # tells what is wrong with a broken one
    for key in _DECIDES:
        if (own.get(key) or None) != (config.get(key) or None):
            raise TrajectoryError(
                f"step {step} has {key}={own.get(key)!r}, the last step ({last}) has {config.get(key)!r}; "
                "checkpoints of one run are expected"
            )


def _tensors(folder: Path, step: int, keys: set[str], last: int) -> dict[str, Tensor]:
    try:
        _, tensors = read_tensors(folder / WEIGHTS_FILE)
    except (DamagedFileError, OSError):
        read_adapter(folder, None, None)  # tells what is wrong with it
        raise
    if tensors.keys() != keys:
        odd = sorted(tensors.keys() ^ keys)[0]
        raise TrajectoryError(
            f"only one of step {step} and the last step ({last}) has {odd!r}; checkpoints of one run are expected"
        )
    return tensors


def _stack(rows: Sequence[dict[str, Tensor]], key: str, steps: Sequence[int]) -> Tensor:
    """One factor over all steps, float32.

    Raises:
        TrajectoryError: If a shape differs, or a value is not finite.
    """
    for step, row in zip(steps, rows, strict=True):
        if row[key].shape != rows[-1][key].shape:
            raise TrajectoryError(
                f"{key!r} is {list(row[key].shape)} at step {step} and {list(rows[-1][key].shape)} at the last step; "
                "checkpoints of one run are expected"
            )
    stacked = torch.stack([row[key] for row in rows]).float()
    finite = torch.isfinite(stacked).flatten(1).all(1)
    if not finite.all():
        step = steps[int((~finite).nonzero()[0])]
        raise TrajectoryError(f"{key!r} holds NaN or infinite values at step {step}; the training run diverged")
    return stacked
