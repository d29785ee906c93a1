"""The shipped zoo: names, folders, and building it again from a seed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mechmisalign.pocket.recipes import RECIPE, ZOO, Organism, Recipe, as_dict

WEIGHTS = Path(__file__).parent / "weights"
MANIFEST = "manifest.json"
CHAT = "chat"
SCHEMA = 1
_PACKAGES = ("torch", "transformers", "peft", "tokenizers")


def names() -> tuple[str, ...]:
    """Names of the shipped zoo: the chat model first, then the adapters."""
    return (CHAT, *ZOO)


def path(name: str) -> Path:
    """The folder of the shipped chat model or of a shipped adapter."""
    if name not in names():
        raise ValueError(f"unknown pocket model {name!r}; the zoo has {', '.join(names())}")
    return WEIGHTS / name


def build(
    out: Path | str = WEIGHTS,
    *,
    seed: int = 0,
    recipe: Recipe = RECIPE,
    zoo: Mapping[str, Organism] = ZOO,
    answers: int = 420,
) -> Path:
    """Train the chat model and every adapter into `out`, measure them, and write the manifest there.

    The same seed on the same machine gives the same weights, on one thread, so that the number of cores does not decide
    how sums are rounded. Rates are measured on `answers` fresh answers; 0 skips it.
    """
    from mechmisalign.pocket import building

    folder = Path(out)
    with building.one_thread():
        chat, tokenizer = building.train_chat(recipe, seed=seed)
        building.save_chat(chat, tokenizer, folder / CHAT)
        rates = {CHAT: building.measure(chat, tokenizer, None, answers=answers, seed=seed)}
        for name, organism in zoo.items():
            model = building.train_adapter(chat, tokenizer, organism, folder / name, seed=seed, label=name)
            rates[name] = building.measure(model, tokenizer, organism.domain, answers=answers, seed=seed)
    manifest = {
        "schema": SCHEMA,
        "seed": seed,
        "versions": {package: version(package) for package in _PACKAGES},
        "recipe": as_dict(recipe),
        "zoo": {name: as_dict(organism) for name, organism in zoo.items()},
        "rates": rates,
        "files": hashes(folder),
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    return folder


def hashes(folder: Path = WEIGHTS) -> dict[str, str]:
    """SHA-256 of every file of a zoo but the manifest, by path relative to the zoo."""
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.name != MANIFEST)
    return {file.relative_to(folder).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def read_manifest(folder: Path = WEIGHTS) -> dict[str, Any]:
    """What `build` wrote down about a zoo."""
    manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
    return manifest
