"""A study that is taken up with more samples: what was asked is kept, what was estimated from it is computed anew.

Only the numbers of samples may grow. Answers of the organisms themselves stay, and are added to; those that were
sampled along a direction or by a choice that may change, and all tables, are set aside under ``earlier/``. Directions
stay where only ``samples`` grew and no answer of the chat model, of which there are then more, is in their pools.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from mechmisalign._parts import Parts
from mechmisalign._tables import read_parquet
from mechmisalign._writing import RunFolderError, claimed
from mechmisalign.store import MANIFEST, read_manifest, write_json

from . import steps

GROWING = ("samples", "pool_samples")
EARLIER = "earlier"
_KEPT = ("chat", "organism", "checkpoints", "adapter_scaling", "site_effects", "pool_")
"""Beginnings of the names of stages that depend on no direction."""
_ALONG = ("steering_sweep", "steering_confirmed", "single_layer_search", "ablation")
"""Stages that depend on directions, and on no choice that more ``samples`` could change."""
_COSTS = ("loss_", "accuracy_")
_KEYS = ["condition", "prompt_id", "sample"]


def extend(out: Path, identity: Mapping[str, Any]) -> None:
    """Prepare a run folder for the same run with more samples; do nothing with any other.

    Raises:
        RunFolderError: If a number of samples is smaller than it was.
    """
    if not (out / MANIFEST).exists():
        return
    manifest = read_manifest(out)
    there = dict(manifest.get("identity", {}))
    old, new = dict(there.get("settings") or {}), dict(identity["settings"])
    grown = [name for name in GROWING if old.get(name) != new.get(name)]
    same = {**there, "settings": {**old, **{name: new[name] for name in grown}}} == _as_stored(identity)
    if not grown or not same:
        return
    for name in grown:
        if not isinstance(old.get(name), int) or old[name] > new[name]:
            raise RunFolderError(
                f"{out} was run with {name}={old.get(name)}, now it is {new[name]}: samples may grow, not shrink; give "
                "at least as many, or choose another folder"
            )
    with claimed(out):
        _set_aside(out, _KEPT + _ALONG if grown == ["samples"] and _pools_are_its_own(out) else _KEPT)
        write_json(out / MANIFEST, {**manifest, "identity": _as_stored(identity)})


def aligned(run: Path, parts: Parts, wanted: pd.DataFrame) -> None:
    """Give the stored answers of a run that was extended the keys that they have among the wanted ones."""
    if not (run / EARLIER).exists():
        return
    stored = parts.read()
    if not len(stored):
        return
    places = pd.Series(wanted.index, index=pd.MultiIndex.from_frame(wanted[_KEYS]))
    keys = places.reindex(pd.MultiIndex.from_frame(stored[_KEYS])).to_numpy()
    if (keys == stored.index.to_numpy()).all():
        return
    known = ~pd.isna(keys)
    parts.folder.rename(_free(run) / parts.folder.name)
    parts.add(stored[known].set_axis(pd.Index(keys[known].astype("int64"))))


def _pools_are_its_own(out: Path) -> bool:
    """Whether every organism has mean differences, and from its own answers alone."""
    pools = sorted((out / "tables").glob("pool_*.parquet"))
    folders = [out / "directions" / path.stem.removeprefix("pool_") for path in pools]
    file = f"{steps.slug(steps.MEAN_DIFFERENCE)}.safetensors"
    return (
        bool(pools)
        and all((folder / file).exists() for folder in folders)
        and all((read_parquet(path)["source"] == "organism").all() for path in pools)
    )


def _set_aside(out: Path, kept: Sequence[str]) -> None:
    aside = _free(out)
    directions = () if "steering_sweep" in kept else ("directions",)
    for name in ("tables", "cured", *directions):
        if (out / name).exists():
            (out / name).rename(aside / name)
    (aside / "rows").mkdir()
    for folder in sorted((out / "rows").iterdir()) if (out / "rows").exists() else ():
        stage = folder.name
        for beginning in _COSTS:
            stage = stage.removeprefix(beginning)
        if not any(stage == name or (name.endswith("_") and stage.startswith(name)) for name in kept):
            folder.rename(aside / "rows" / folder.name)


def _free(out: Path) -> Path:
    """A new folder for what is set aside."""
    number = 1 + sum(1 for _ in (out / EARLIER).glob("*"))
    folder = out / EARLIER / str(number)
    folder.mkdir(parents=True)
    return folder


def _as_stored(identity: Mapping[str, Any]) -> dict[str, Any]:
    read: dict[str, Any] = json.loads(json.dumps(dict(identity)))
    return read
