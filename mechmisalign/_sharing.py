"""What is pushed to the Hub: the files of one thing, chosen by name, and its card.

Never a whole folder: safetensors, configuration, tokenizer, card and results. No pickle, no log, no data; paths of this
machine are cut down to their last name.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import registry
from ._adapter_files import CONFIG_FILE, WEIGHTS_FILE
from ._artifacts import read_artifact
from ._hub import is_hub_id
from .adapters import Adapter
from .correction import cards
from .correction.saving import CARD_FILE, MEASURED_FILE, save_adapter
from .directions import DIRECTION_FILE, Direction
from .monitoring import Monitor
from .monitoring.monitor import MONITOR_FILE
from .probes import Probe
from .probes.monitor import PROBE_FILE

if TYPE_CHECKING:
    import pandas as pd

Artifact = Direction | Probe | Monitor

_ARTIFACTS: Mapping[str, tuple[type[Any], str]] = {
    "direction": (Direction, DIRECTION_FILE),
    "probe": (Probe, PROBE_FILE),
    "monitor": (Monitor, MONITOR_FILE),
}
_OF_ADAPTER = (CONFIG_FILE, WEIGHTS_FILE, CARD_FILE, MEASURED_FILE)
_OF_MODEL = (
    "config.json",
    "generation_config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "tokenizer*.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    CARD_FILE,
    MEASURED_FILE,
)


def stage(
    thing: Artifact | Adapter | str | Path,
    staged: Path,
    name: str,
    base: str | None,
    note: str,
    measured: pd.DataFrame | None,
) -> None:
    """Write what is to be pushed."""
    if isinstance(thing, (Direction, Probe, Monitor)):
        _stage_artifact(thing, staged, name, base, note, measured)
    elif isinstance(thing, Adapter):
        _stage_adapter(save_adapter(thing, staged.parent / "saved" / staged.name), staged, name, base, measured)
    else:
        folder = registry.folder(str(thing)) or Path(thing).expanduser()
        if (folder / CONFIG_FILE).is_file():
            _stage_adapter(folder, staged, name, base, measured)
        elif (folder / "config.json").is_file():
            _stage_model(folder, staged, name, base, measured)
        else:
            _stage_artifact(_artifact(folder), staged, name, base, note, measured)


def _artifact(path: Path) -> Artifact:
    """The direction, probe or monitor of a file, or of a folder with one."""
    inside = [path / file for _, file in _ARTIFACTS.values() if (path / file).is_file()]
    found = path if path.is_file() else (inside[0] if len(inside) == 1 else None)
    if found is None or found.suffix != ".safetensors":
        raise ValueError(
            f"{path} cannot be pushed; expected a direction, probe or monitor (a .safetensors file of this package), "
            f"or the folder of an adapter ({CONFIG_FILE}) or a model (config.json)"
        )
    kind = str(read_artifact(found)[0].get("kind"))
    if kind not in _ARTIFACTS:
        raise ValueError(f"{found} is of the kind {kind!r}; one of {', '.join(_ARTIFACTS)} is expected")
    loaded: Artifact = _ARTIFACTS[kind][0].load(found)
    return loaded


def _stage_artifact(
    thing: Artifact, staged: Path, name: str, base: str | None, note: str, measured: pd.DataFrame | None
) -> None:
    kind = next(kind for kind, (own, _) in _ARTIFACTS.items() if isinstance(thing, own))
    shared = replace(thing, header=_without_paths(thing.header))
    path = shared.save(staged / _ARTIFACTS[kind][1])
    header, _ = read_artifact(path)
    named = _base_on_hub(base, str(thing.header.get("model") or ""))
    card = cards.artifact_card(kind, header, name, base=named, note=note, measured=measured)
    _write(staged, card, measured)


def _stage_adapter(folder: Path, staged: Path, name: str, base: str | None, measured: pd.DataFrame | None) -> None:
    adapter = Adapter.load(folder)
    config = json.loads((folder / CONFIG_FILE).read_text())
    config["base_model_name_or_path"] = own = _shareable_base(base, adapter.base, folder)
    card = _card_of(folder)
    if cards.LOADING not in card:
        plain = cards.Card("saved as it was", own, adapter.source, adapter.digest, None, None)
        card = cards.adapter_card(plain, adapter, staged)
    _copy(folder, staged, _OF_ADAPTER)
    (staged / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    load = cards.adapter_loading(own, name)
    _write(staged, cards.on_hub(card, name, own, _base_on_hub(base, own), load, measured), measured)


def _stage_model(folder: Path, staged: Path, name: str, base: str | None, measured: pd.DataFrame | None) -> None:
    card = _card_of(folder)
    if cards.LOADING not in card:
        raise ValueError(f"{folder} has no card of this package; write it with save_model, which says what was done")
    _copy(folder, staged, _OF_MODEL)
    config = _without_paths(json.loads((folder / "config.json").read_text()))
    (staged / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    own = base or cards.base_of(card)
    load = cards.model_loading(name)
    _write(staged, cards.on_hub(card, name, own, _base_on_hub(base, own), load, measured), measured)


def _card_of(folder: Path) -> str:
    """The card in a folder; empty if there is none."""
    path = folder / CARD_FILE
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def _copy(folder: Path, staged: Path, patterns: tuple[str, ...]) -> None:
    staged.mkdir(parents=True)
    for path in {path for pattern in patterns for path in folder.glob(pattern)}:
        if path.suffix == ".safetensors":  # read from where it is: a model may not fit on the disk twice
            (staged / path.name).symlink_to(path.resolve())
        else:
            shutil.copyfile(path, staged / path.name)


def _write(staged: Path, card: str, measured: pd.DataFrame | None) -> None:
    (staged / CARD_FILE).write_text(card, encoding="utf-8")
    if measured is not None:
        measured.to_csv(staged / MEASURED_FILE, index=False)


def _base_on_hub(base: str | None, own: str) -> str:
    """The base for the metadata: a Hub id, or nothing."""
    named = base or own
    return named if is_hub_id(named) and not registry.is_reserved(named) and not Path(named).exists() else ""


def _shareable_base(base: str | None, own: str, folder: Path) -> str:
    """What an adapter's config is to call its base, so that others can load it.

    Raises:
        ValueError: If that is a path of this machine.
    """
    named = base or own
    if registry.is_reserved(named) or (is_hub_id(named) and not Path(named).exists()):
        return named
    raise ValueError(
        f"the adapter in {folder} names the base {named!r}, which nobody else can load; pass base=, its Hub id"
    )


def _without_paths(header: Mapping[str, Any]) -> dict[str, Any]:
    """The header with paths of this machine cut down to their last name."""
    return {key: _without_path(value) for key, value in header.items()}


def _without_path(value: Any) -> Any:
    if isinstance(value, Mapping):
        return _without_paths(value)
    if isinstance(value, (list, tuple)):
        return [_without_path(each) for each in value]
    return cards.without_path(value) if isinstance(value, str) else value
