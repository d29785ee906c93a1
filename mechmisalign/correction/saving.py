"""Corrected adapters and models as ordinary folders: PEFT and transformers read them without this package.

Each gets a model card (``README.md``) that says what it was made from, what was done to it with which direction, what
was measured, and how to load it.
"""

from __future__ import annotations

import math
import os
import shutil
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mechmisalign._adapter_files import KEY_PREFIX, resolve_pattern
from mechmisalign._saved_adapters import write_adapter
from mechmisalign._writing import PARTIAL, explained, flush, flush_folder, whole
from mechmisalign.adapters import Adapter, AdapterError, LoraSite
from mechmisalign.directions import Direction

from .cards import LOADING, MEASURED, Card, adapter_card, markdown_table, model_card

if TYPE_CHECKING:
    from collections.abc import Iterator

    import pandas as pd

CARD_FILE = "README.md"
MEASURED_FILE = "measured.csv"


class FolderTakenError(ValueError):
    """A folder holds something already, and nothing is overwritten."""


_OF_SITES = ("exclude_modules", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern")
"""Settings of PEFT that the sites themselves decide."""


def save_adapter(
    adapter: Adapter,
    folder: str | Path,
    *,
    edit: str = "",
    direction: Direction | None = None,
    measured: pd.DataFrame | None = None,
) -> Path:
    """Write an adapter as PEFT does, with a model card: ``PeftModel.from_pretrained`` and ``mm.load_organism`` read it.

    The sites decide: rank, alpha and targets are written so that PEFT resolves exactly their ranks and scalings,
    whatever the config that came with the adapter says; a pattern is written only for sites that differ from the rest.
    Factors are float32, and come back bit for bit.

    Args:
        adapter: Read or edited (``project_out`` …).
        folder: Where; it must not exist, or be empty. It is there whole, or not at all.
        edit: What was done, for the card.
        direction: The direction that it was done with; the card tells where it comes from, and its hash.
        measured: A table for the card (``cure_table`` …), also written as ``measured.csv``.

    Returns:
        The folder.

    Raises:
        FolderTakenError: If the folder holds something.
        AdapterError: If a scaling cannot be written as an alpha.
    """
    card = Card(edit or "saved as it was", adapter.base, adapter.source, adapter.digest, direction, measured)
    config = peft_config(adapter)
    tensors = {
        f"{KEY_PREFIX}{adapter.peft_name(site.name)}.lora_{name}.weight": factor.detach().float().cpu().contiguous()
        for site in adapter.sites
        for name, factor in (("A", site.A), ("B", site.B))
    }
    with whole_folder(Path(folder)) as place:
        write_adapter(place, tensors, config)
        _write_card(place, adapter_card(card, adapter, Path(folder)), measured)
    return Path(folder)


def save_model(
    model: Any,
    tokenizer: Any,
    folder: str | Path,
    *,
    edit: str = "",
    source: str = "",
    base: str | None = None,
    direction: Direction | None = None,
    measured: pd.DataFrame | None = None,
) -> Path:
    """Write a Hugging Face model with its tokenizer and a model card: any tool that reads such folders loads it.

    Nothing of this package is needed to read it: no code of its own, plain safetensors.

    Args:
        model: As :func:`corrected_model` gives it.
        tokenizer: Its tokenizer.
        folder: Where; it must not exist, or be empty.
        edit: What was done, for the card.
        source: What it was made from, for the card: the organism's name.
        base: What the card calls the chat model; by default what the model's config does.
        direction: As for :func:`save_adapter`.
        measured: As for :func:`save_adapter`.

    Returns:
        The folder.

    Raises:
        FolderTakenError: If the folder holds something.
    """
    named = base or str(getattr(model.config, "_name_or_path", "") or "")
    card = Card(edit or "saved as it was", named, source or named, None, direction, measured)
    with whole_folder(Path(folder)) as place:
        model.save_pretrained(place)
        tokenizer.save_pretrained(place)
        _write_card(place, model_card(card, Path(folder)), measured)
    return Path(folder)


def add_measured(folder: str | Path, measured: pd.DataFrame) -> None:
    """Put a table of results into a card that is there already: for what was measured on the saved files themselves.

    Raises:
        FileNotFoundError: If the folder has no card of :func:`save_adapter` or :func:`save_model`.
        ValueError: If the card holds results already.
    """
    card = Path(folder) / CARD_FILE
    text = card.read_text(encoding="utf-8") if card.exists() else ""
    if LOADING not in text:
        raise FileNotFoundError(f"{folder} has no card; write the folder with save_adapter or save_model first")
    if MEASURED in text:
        raise ValueError(f"the card in {folder} holds results already; remove them, or save to a new folder")
    before, after = text.split(LOADING, 1)
    told = "\n".join([MEASURED, "", *markdown_table(measured), "", LOADING])
    _write_card(Path(folder), f"{before}{told}{after}", measured)


def peft_config(adapter: Adapter) -> dict[str, Any]:
    """``adapter_config.json`` for the sites as they are.

    Raises:
        AdapterError: If a scaling cannot be written as an alpha.
    """
    rslora = bool(adapter.config.get("use_rslora"))
    alphas = {site.name: _alpha(site, adapter, rslora) for site in adapter.sites}
    rank = Counter(site.rank for site in adapter.sites).most_common(1)[0][0]
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    kept = {key: value for key, value in adapter.config.items() if key not in _OF_SITES}
    return {
        "bias": "none",
        "task_type": "CAUSAL_LM",
        **kept,
        **_targets(adapter),
        "peft_type": "LORA",
        "base_model_name_or_path": adapter.base,
        "inference_mode": True,
        "use_rslora": rslora,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {
            _exactly(adapter.peft_name(site.name)): site.rank for site in adapter.sites if site.rank != rank
        },
        "alpha_pattern": {_exactly(adapter.peft_name(name)): own for name, own in alphas.items() if own != alpha},
    }


def _targets(adapter: Adapter) -> dict[str, Any]:
    """Leaf names and layers where the sites are all of these modules in all of these layers, else full names.

    In a multimodal wrapper leaf names would name matrices of its towers too.
    """
    sites = adapter.sites
    layers, modules = sorted({site.layer for site in sites}), sorted({site.module for site in sites})
    plain = not adapter.wrapper and all(site.name.startswith(f"model.layers.{site.layer}.") for site in sites)
    if plain and len(sites) == len(layers) * len(modules):
        return {"target_modules": modules, "layers_to_transform": layers}
    return {"target_modules": sorted(adapter.peft_name(site.name) for site in sites), "layers_to_transform": None}


def _exactly(name: str) -> str:
    """A pattern for one module alone: PEFT reads patterns as regular expressions over the end of a name."""
    return name.replace(".", r"\.")


def _alpha(site: LoraSite, adapter: Adapter, rslora: bool) -> int | float:
    """The alpha that gives this scaling to the last bit: the config's own if it does."""
    divisor = math.sqrt(site.rank) if rslora else site.rank
    config, name = adapter.config, adapter.peft_name(site.name)
    own = resolve_pattern(config.get("alpha_pattern") or {}, name, config.get("lora_alpha", float("nan")))
    product = site.scaling * divisor
    near = (own, float(round(product)), product, math.nextafter(product, math.inf), math.nextafter(product, -math.inf))
    for alpha in near:
        if alpha / divisor == site.scaling:
            return int(alpha) if float(alpha).is_integer() else alpha
    raise AdapterError(
        f"no alpha gives {site.label} the scaling {site.scaling!r} at rank {site.rank}; use a scaling that is alpha / "
        f"{'the square root of ' if rslora else ''}the rank for some alpha"
    )


def refuse_taken(folder: Path) -> None:
    """Refuse a folder that holds something.

    Raises:
        FolderTakenError: If it does.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FolderTakenError(f"{folder} is there already and not empty; nothing is overwritten, give a new folder")


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A place to write to, which becomes ``folder`` in one move when the block ends, and is removed if it fails."""
    refuse_taken(folder)
    target = Path(os.path.realpath(folder))
    partial = target.with_name(f".{target.name[:100]}.{os.getpid()}{PARTIAL}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with explained(folder):
            partial.mkdir(parents=True)
            yield partial
            for path in partial.rglob("*"):
                if path.is_file():
                    flush(path)
            if target.exists():
                target.rmdir()
            partial.replace(target)
            flush_folder(target.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_card(place: Path, text: str, measured: pd.DataFrame | None) -> None:
    with whole(place / CARD_FILE) as partial:
        partial.write_text(text, encoding="utf-8")
    if measured is not None:
        with whole(place / MEASURED_FILE) as partial:
            measured.to_csv(partial, index=False)
