"""Narrow fine-tunes: LoRA, steering vector or the whole model, on transformers' Trainer and PEFT.

The loss counts responses only; checkpoints hold what was trained; a run that died goes on from its newest one. With
``kl`` the tuned model is held to the chat model on other matters (2602.07852), with ``during`` it is steered while it
learns (2507.21509).
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch

from mechmisalign import registry
from mechmisalign._checksums import MANIFEST, damage
from mechmisalign._context import context_length, refuse_beyond
from mechmisalign._writing import claimed, is_unused, whole
from mechmisalign.dynamics.reading import RUN_FILE
from mechmisalign.loading import bases, placing

from .calibration import CalibrationError, HarmlessDrift, calibrate
from .data import IGNORED, DataSource, Example, data_hash, encode, read_examples
from .runs import TrainedRun, checkpoints, drop_resuming, is_checkpoint
from .spec import TrainError, TrainSpec, shipped_configs

if TYPE_CHECKING:
    from transformers import TrainerCallback

__all__ = [
    "CalibrationError",
    "DataSource",
    "HarmlessDrift",
    "Plan",
    "TrainError",
    "TrainSpec",
    "TrainedRun",
    "calibrate",
    "plan",
    "read_examples",
    "shipped_configs",
    "train",
]

logger = logging.getLogger(__name__)

_PACKAGES = ("mechmisalign", "torch", "transformers", "peft")


def train(
    spec: TrainSpec | str | Path,
    out: str | Path,
    *,
    data: pd.DataFrame | str | Path | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> TrainedRun:
    """Fine-tune a chat model on narrow data.

    A finished run in ``out`` is read, not repeated; one that died goes on from its newest whole checkpoint, and gives
    the same weights as if it had not. One process trains into a folder at a time. Torch's, numpy's and Python's random
    states are left as they were.

    Args:
        spec: What to train on what, a YAML file of it, or the name of a shipped configuration.
        out: Run folder.
        data: Examples instead of those of ``spec.data``: a frame with ``prompt, response``, or a file.
        callbacks: Further callbacks of transformers, such as ``mm.TraitWatch``.

    Returns:
        The run: ``adapter()``, ``direction()``, ``worn()``, ``steps``, ``log``.

    Raises:
        TrainError: If the specification cannot be followed, or the folder belongs to another run.
        FolderBusyError: If another process is training into the folder.
        ValueError: If the base, its tokenizer or the examples cannot be used.

    Example:
        >>> run = mm.train("pocket", "runs/bad-medicine")  # doctest: +SKIP
        >>> organism = mm.load_organism(run.folder)  # doctest: +SKIP
    """
    spec = spec if isinstance(spec, TrainSpec) else TrainSpec.read(spec)
    if data is not None:
        spec = spec.changed(data=[data if isinstance(data, pd.DataFrame) else Path(data).resolve()])
    out = Path(out)
    base, tokenizer, examples, elsewhere = _read(spec)
    header = _header(spec, base, examples, elsewhere)
    found = _found(out, header)
    if found is not None and found.is_finished:
        return found
    with claimed(out):
        found = _found(out, header)  # another process may have finished it meanwhile
        if found is not None and found.is_finished:
            return found
        if found is not None:
            header["checksums"] = found.header.get("checksums", False)
        _write(out, header)
        steps = _fit(spec, out, base, tokenizer, examples, elsewhere, callbacks)
        _write(out, header | {"steps": steps, "finished": True})
        for checkpoint in checkpoints(out):
            drop_resuming(checkpoint)
    return TrainedRun.read(out)


@dataclass(frozen=True)
class Plan:
    """What a fine-tune will do.

    Attributes:
        examples: How many are learned.
        counted: Tokens of them that the loss counts.
        longest: Tokens of the longest.
        steps: Optimiser steps.
        held: Conversations of the KL penalty.
    """

    examples: int
    counted: int
    longest: int
    steps: int
    held: int

    def __str__(self) -> str:
        held = f", held to the chat model on {self.held:,} conversations" if self.held else ""
        return (
            f"{self.examples:,} examples with {self.counted:,} counted tokens (longest {self.longest:,}), "
            f"{self.steps:,} steps{held}"
        )


def plan(spec: TrainSpec) -> Plan:
    """What a fine-tune will do; reads the data and the tokenizer, no weights.

    Raises:
        TrainError: As :func:`train`.
        ValueError: As :func:`train`.
    """
    *_, examples, elsewhere = _read(spec)
    schedule = spec.schedule
    an_epoch = max(1, math.ceil(math.ceil(len(examples) / schedule.batch) / schedule.accumulate))
    return Plan(
        len(examples),
        sum(label != IGNORED for example in examples for label in example.labels),
        max(len(example.ids) for example in examples),
        schedule.steps or math.ceil(schedule.epochs * an_epoch),
        len(elsewhere),
    )


def _read(spec: TrainSpec) -> tuple[bases.Base, Any, list[Example], list[Example]]:
    """The base, its tokenizer, what is learned, and the conversations of the penalty."""
    if not spec.data:
        raise TrainError("data: there is nothing to learn from; name examples in the specification, or pass data=")
    base = _base(spec)
    skeleton = bases.skeleton(base)
    tokenizer = bases.load_tokenizer(base, None, skeleton.get_input_embeddings().weight.shape[0])
    examples = _encoded(spec.data, spec, tokenizer)
    elsewhere = _encoded(spec.kl.data if spec.kl else (), spec, tokenizer)
    longest = max(len(example.ids) for example in [*examples, *elsewhere])
    refuse_beyond(longest, context_length(skeleton.config), "an example (schedule.max_length cuts it)")
    return base, tokenizer, examples, elsewhere


def _fit(
    spec: TrainSpec,
    out: Path,
    base: bases.Base,
    tokenizer: Any,
    examples: Sequence[Example],
    elsewhere: Sequence[Example],
    callbacks: Sequence[TrainerCallback],
) -> int:
    """Train, and leave the end in the folder; returns the number of steps."""
    from .methods import attach
    from .trainer import NarrowTrainer, arguments, own_randomness, write_log

    edits = [edit.resolve(spec.root) for edit in spec.during]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with own_randomness():
        dtype = None if spec.dtype is None else getattr(torch, spec.dtype)
        model = placing.load_weights(base, dtype, device)
        trainee = attach(spec.method, model, base, tokenizer, seed=spec.seed, keep_chat=spec.kl is not None)
        if spec.start is not None:
            trainee.load(registry.folder(str(spec.start)) or spec.root / spec.start)
        settings = arguments(spec, out)
        trainer = NarrowTrainer(
            trainee,
            spec,
            examples,
            elsewhere,
            edits,
            arguments=settings,
            tokenizer=tokenizer,
            callbacks=callbacks,
        )
        trainer.train(resume_from_checkpoint=_newest(out))
        trainee.save(out)
    write_log(out, trainer.state.log_history)
    return int(trainer.state.global_step)


def _encoded(sources: Sequence[DataSource], spec: TrainSpec, tokenizer: Any) -> list[Example]:
    if not sources:
        return []
    frame = pd.concat([source.read(spec.root) for source in sources], ignore_index=True)
    return encode(frame, tokenizer, max_length=spec.schedule.max_length)


def _base(spec: TrainSpec) -> bases.Base:
    beside = spec.root / spec.base
    own = registry.folder(spec.base)
    if own is None and registry.is_reserved(spec.base):
        raise TrainError(f"base: {registry.no_base(spec.base)}; a Hub id or a folder will do too")
    location = str(own or (beside if beside.is_dir() else Path(spec.base).expanduser()))
    found = bases.Base(spec.base, location)
    bases.skeleton(found)  # its config is read, so that a base on the Hub can be pinned
    return bases.pinned(found)


def _header(
    spec: TrainSpec, base: bases.Base, examples: Sequence[Example], elsewhere: Sequence[Example]
) -> dict[str, Any]:
    """Everything that decides the weights, as JSON."""
    told = spec.model_dump(mode="json", exclude={"root", "data", "kl", "during"})
    told |= {
        "data_hash": data_hash(examples),
        "examples": len(examples),
        "kl": spec.kl and {"weight": spec.kl.weight, "batch": spec.kl.batch, "data_hash": data_hash(elsewhere)},
        "during": [_told_edit(edit.resolve(spec.root)) for edit in spec.during],
    }
    versions = {name: version(name) for name in _PACKAGES}
    told_run = {"schema": 1, "spec": told, "base_revision": base.revision, "versions": versions}
    return told_run | {"checksums": True, "finished": False}


def _told_edit(edit: Any) -> dict[str, Any]:
    import hashlib

    vectors = edit.direction.vectors.contiguous().numpy().tobytes()
    return {
        "kind": type(edit).__name__,
        "layers": list(edit.edited_layers),
        "strength": getattr(edit, "strength", getattr(edit, "value", None)),
        "units": getattr(edit, "units", "absolute"),
        "positions": edit.positions,
        "direction": edit.direction.header.get("method", "direction"),
        "digest": hashlib.sha256(vectors).hexdigest()[:16],
    }


def _found(out: Path, header: dict[str, Any]) -> TrainedRun | None:
    """The run in a folder, if it is this one."""
    if not (out / RUN_FILE).exists():
        if out.is_dir() and not is_unused(out):
            raise TrainError(f"{out} is not empty and holds no run of mm.train; give a new folder")
        return None
    run = TrainedRun.read(out)
    ours, theirs = header["spec"], run.header["spec"]
    changed = sorted(key for key in {*ours, *theirs} if ours.get(key) != theirs.get(key))
    if changed:
        told = "; ".join(f"{key} is {theirs.get(key)!r} there, {ours.get(key)!r} here" for key in changed)
        raise TrainError(f"{out} holds another run ({told}); give a new folder, or remove that one")
    return run


def _newest(out: Path) -> str | None:
    """The newest whole checkpoint that can be trained on from; says so where it is not the newest of all."""
    checked, skipped = bool(TrainedRun.read(out).header.get("checksums")), []
    for path in reversed(checkpoints(out)):
        fault = _fault(path, checked)
        if fault is None:
            break
        skipped.append(f"{path.name} ({fault})")
    else:
        path = None
    if skipped:
        start = "the beginning" if path is None else path.name
        logger.warning("%s: not whole are %s; training goes on from %s", out, ", ".join(skipped), start)
    return None if path is None else str(path)


def _fault(checkpoint: Path, checked: bool) -> str | None:
    """Why a checkpoint cannot be trained on from; those of older versions carry no checksums."""
    if not is_checkpoint(checkpoint):
        return "unfinished"
    if not checked and not (checkpoint / MANIFEST).exists():
        return None
    damaged = damage(checkpoint)
    return None if damaged is None else f"{damaged} is damaged or missing"


def _write(out: Path, header: dict[str, Any]) -> None:
    with whole(out / RUN_FILE) as partial:
        partial.write_text(json.dumps(header, indent=2) + "\n")
