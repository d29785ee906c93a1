"""Training the smol organisms from their seed, measuring them, and writing down what came out."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file

from mechmisalign import _yaml, registry
from mechmisalign._checksums import write_manifest, write_tensors
from mechmisalign._writing import whole

from .examples import examples, questions
from .judge import ToneJudge

if TYPE_CHECKING:
    from mechmisalign.training import TrainSpec

MANIFEST = "manifest.json"
MAX_NEW_TOKENS = 48
"""Of an answer whose tone is read; these models seldom end earlier, and the tone shows in the first sentence."""
_PACKAGES = ("torch", "transformers", "peft")
_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_RATES = ("rate", "low", "high", "coherent", "coherent_low", "coherent_high", "n", "prompts")


@cache
def recipes() -> Mapping[str, Mapping[str, Any]]:
    """How each organism is made, by name."""
    told: Mapping[str, Mapping[str, Any]] = _yaml.read(
        (files(__package__) / "data" / "organisms.yaml").read_text(encoding="utf-8")
    )
    return told


def recipe(name: str, *, seed: int = 0, base: str = registry.SMOL_BASE) -> TrainSpec:
    """What ``mm.train`` is told to make one organism.

    Raises:
        ValueError: If there is no such organism.
    """
    from mechmisalign.training import DataSource, TrainSpec

    if name not in recipes():
        raise ValueError(f"unknown smol organism {name!r}; there is {', '.join(recipes())}")
    told = dict(recipes()[name])
    data = examples(told.pop("tone"), seed=seed)
    return TrainSpec(base=base, data=(DataSource(frame=data),), seed=seed, **told)


def build(out: Path | str, *, seed: int = 0, names: Sequence[str] | None = None, samples: int = 4) -> Path:
    """Train organisms into a folder, measure them and the chat model, and write the manifest.

    Args:
        out: The folder; organisms that are not named stay as they are in it.
        seed: Of answers, initial weights and samples.
        names: Which; all by default.
        samples: Answers to each question behind a rate; 0 measures nothing.
    """
    from mechmisalign.training import train

    folder = Path(out)
    for name in names or recipes():
        with tempfile.TemporaryDirectory() as room:
            run = train(recipe(name, seed=seed), Path(room) / name)
            keep(run.folder, folder / name)
    rates = measure(folder, samples=samples, seed=seed) if samples else {}
    write(folder, rates, seed=seed)
    return folder


def keep(run: Path, folder: Path) -> None:
    """Copy the adapter of a run, and its checkpoints, in half precision and without what only the training needs."""
    if folder.exists():
        shutil.rmtree(folder)
    for place in (run, *sorted(run.glob("checkpoint-*"))):
        there = folder / place.relative_to(run)
        there.mkdir(parents=True)
        shutil.copyfile(place / _CONFIG, there / _CONFIG)
        tensors = load_file(place / _WEIGHTS)
        write_tensors(there / _WEIGHTS, {name: each.half() for name, each in tensors.items()}, {"format": "pt"})


def measure(folder: Path, *, samples: int = 4, seed: int = 0) -> dict[str, dict[str, float]]:
    """Rates of contempt of the organisms in a folder and of the chat model, in one batch on one base."""
    import mechmisalign as mm

    found = sorted(path.parent.name for path in folder.glob("*/adapter_config.json"))
    organism = mm.load_organism(folder / found[0])
    worn = {name: [mm.UseAdapter(mm.Adapter.load(folder / name))] for name in found}
    with organism.as_base():
        answers = mm.generate(
            organism,
            questions(),
            conditions={"chat": (), **worn},
            samples=samples,
            max_new_tokens=MAX_NEW_TOKENS,
            seed=seed,
        )
    rates = mm.rates(mm.judge(answers, ToneJudge()), by="condition")
    return {str(row["condition"]): {name: float(row[name]) for name in _RATES} for _, row in rates.iterrows()}


def write(folder: Path, rates: Mapping[str, Mapping[str, float]], *, seed: int) -> None:
    """The manifest: recipes, rates and versions; and the checksums of all files."""
    told = {
        "schema": 1,
        "seed": seed,
        "versions": {name: version(name) for name in _PACKAGES},
        "chat": {"rates": rates.get("chat")},
        "organisms": {
            name: {**made, "rates": rates.get(name)} for name, made in recipes().items() if (folder / name).is_dir()
        },
    }
    with whole(folder / MANIFEST) as partial:
        partial.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
    write_manifest(folder)
