"""A watch on a fine-tune as it runs: how a few fixed prompts move along directions of traits, and an alarm.

After 2606.07631 (trait-space monitoring). Every so many optimizer steps a small panel of neutral prompts goes through
the model once, as far as the last layer that is read, and its mean projection on each direction is logged. The alarm is
calibrated on harmless fine-tunes for a whole run, see :mod:`mechmisalign.training.calibration`.

The watch leaves the run as it is: weights after training are the same to the last bit with it and without it.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from mechmisalign._artifacts import same_base
from mechmisalign._batching import Batch, batches_by_length, pad_id
from mechmisalign._blocks import block_hooks
from mechmisalign._placement import execution_device
from mechmisalign._writing import whole
from mechmisalign.conversations import Conversations, render_rows
from mechmisalign.directions import Direction, DirectionMismatchError

from .calibration import CalibrationError, HarmlessDrift

__all__ = ["Alarm", "TraitWatch"]

logger = logging.getLogger(__name__)

PanelSpan = Literal["prompt_last", "response"]
"""What is read of a panel: the token before a response would begin, or the tokens of the responses that it has."""

COLUMNS = ("step", "trait", "projection", "drift", "z", "alarm", "panel")
TOKEN_BUDGET = 4096


class Alarm(NamedTuple):
    """The first time that a trait left the range of harmless runs."""

    step: int
    trait: str
    z: float
    threshold: float


class _Enough(Exception):
    """Raised after the last block that is read, to skip the rest."""


class TraitWatch(TrainerCallback):  # type: ignore[misc]  # transformers brings no types
    """Follows a model along directions while transformers' ``Trainer`` trains it, and raises an alarm.

    Works with plain Hugging Face decoders, with or without PEFT, on one device, with their blocks on several
    (``device_map``), or under data parallelism (every process reads, so that all stop together; the first one writes
    and calls); not where each weight is spread over devices (FSDP, ZeRO-3).

    Args:
        directions: Traits by name, such as persona directions.
        prompts: The panel: texts, or a frame with ``prompt``, optionally ``system, history`` and ``response``. Neutral
            ones, which the training data do not hold; 16 to 128 do.
        tokenizer: The chat model's.
        layer: Where to read: one for all traits, or one for each.
        span: ``"prompt_last"``, or ``"response"`` where the panel has responses.
        every: Optimizer steps between two readings.
        calibration: From ``mechmisalign.training.calibration.calibrate``; without one there is a log and no alarm.
        stop: End the training at the alarm.
        on_alarm: Called with the :class:`Alarm`.
        path: CSV file that the log goes to as well, row by row. A resumed run needs it.

    Attributes:
        alarm: The first alarm; None while there is none.
        seconds: Time that the watch has taken so far.
        checks: Readings so far.
        share: That time over the time since training began, at the last reading; NaN before the first.

    Raises:
        ValueError: If a direction is zero at its layer, or the panel has no such span.

    Example:
        >>> watch = TraitWatch({"evil": direction}, prompts, tokenizer, layer=20)  # doctest: +SKIP
        >>> run = mm.train(spec, "runs/bad", callbacks=[watch])  # doctest: +SKIP
        >>> watch.log, watch.seconds  # doctest: +SKIP
    """

    def __init__(
        self,
        directions: Mapping[str, Direction],
        prompts: pd.DataFrame | Sequence[str],
        tokenizer: Any,
        *,
        layer: int | Mapping[str, int],
        span: PanelSpan = "prompt_last",
        every: int = 10,
        calibration: HarmlessDrift | None = None,
        stop: bool = False,
        on_alarm: Callable[[Alarm], object] | None = None,
        path: str | Path | None = None,
    ) -> None:
        if every < 1 or not directions:
            raise ValueError(f"every={every} and {len(directions)} directions; give one or more of each")
        self.every, self.stop, self.on_alarm = every, stop, on_alarm
        self.path = None if path is None else Path(path)
        self.calibration = calibration
        self._directions, self._tokenizer = dict(directions), tokenizer
        self._layers = {trait: layer if isinstance(layer, int) else layer[trait] for trait in directions}
        self._units = {trait: directions[trait].unit(at) for trait, at in self._layers.items()}
        self._panel = list(_panel(prompts, tokenizer, span))
        self.digest = _digest(self._panel, self._units, self._layers)
        self._rows: list[dict[str, Any]] = []
        self._start: dict[str, float] = {}
        self.alarm: Alarm | None = None
        self.seconds, self.checks, self.share = 0.0, 0, float("nan")
        self._begun, self._writes = 0.0, True

    @property
    def log(self) -> pd.DataFrame:
        """One row per reading and trait: ``step, trait, projection, drift, z, alarm, panel``.

        ``drift`` is the projection minus that before training; ``z`` is NaN without a calibration.
        """
        return pd.DataFrame(self._rows, columns=list(COLUMNS))

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:  # noqa: ARG002
        """Called by the Trainer before the first step: the panel is read before anything has been learned.

        Raises:
            CalibrationError: If the calibration is for another panel, or for shorter runs.
            DirectionMismatchError: If a direction belongs to another model.
            ValueError: If a run is resumed without the log of its beginning.
        """
        self._rows, self._start, self.alarm = [], {}, None
        self.seconds, self.checks, self.share, self._begun = 0.0, 0, float("nan"), time.perf_counter()
        self._check_calibration(int(state.max_steps))
        self._writes = bool(state.is_world_process_zero)
        if state.global_step:
            self._resume(int(state.global_step))
            return
        self._check_model(given["model"])
        if self.path is not None and self._writes:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(",".join(COLUMNS) + "\n")
        self._check(0, given["model"])

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> Any:  # noqa: ARG002
        """Called by the Trainer after each optimizer step."""
        if state.global_step % self.every:
            return control
        before = self.alarm
        self._check(int(state.global_step), given["model"])
        if self.alarm is not None and before is None and self._writes:
            logger.warning("step %d: %s is at z = %.1f (threshold %.1f)", *self.alarm)
            if self.on_alarm is not None:
                self.on_alarm(self.alarm)
        if self.alarm is not None and self.stop:
            control.should_training_stop = True
        return control

    def _check(self, step: int, model: nn.Module) -> None:
        begun = time.perf_counter()
        rows = []
        for trait, projection in self._read(model).items():
            drift = projection - self._start.setdefault(trait, projection)
            z = float("nan") if self.calibration is None or step == 0 else self.calibration.z(step, trait, drift)
            threshold = float("inf") if self.calibration is None else self.calibration.threshold
            if z > threshold and self.alarm is None:
                self.alarm = Alarm(step, trait, z, threshold)
            rows.append(
                dict(zip(COLUMNS, (step, trait, projection, drift, z, z > threshold, self.digest), strict=True))
            )
        self._rows += rows
        if self.path is not None and self._writes:
            pd.DataFrame(rows).to_csv(self.path, mode="a", header=False, index=False)
        self.checks += 1
        self.seconds += time.perf_counter() - begun
        self.share = self.seconds / (time.perf_counter() - self._begun)

    @torch.no_grad()
    def _read(self, model: nn.Module) -> dict[str, float]:
        """Mean over the panel of each prompt's mean projection."""
        sums = dict.fromkeys(self._units, 0.0)
        device, last = execution_device(model), max(self._layers.values())
        with _undisturbed(model):
            for batch in self._panel:
                weights = (batch.span / batch.span.sum(1, keepdim=True)).to(device)
                functions = {
                    layer: self._reader(layer, layer == last, weights, sums) for layer in set(self._layers.values())
                }
                with block_hooks(model, functions), suppress(_Enough):
                    model(input_ids=batch.ids.to(device), attention_mask=batch.mask.to(device), use_cache=False)
        return {trait: total / sum(len(batch.rows) for batch in self._panel) for trait, total in sums.items()}

    def _reader(self, layer: int, last: bool, weights: Tensor, sums: dict[str, float]) -> Callable[[Tensor], None]:
        def read(resid: Tensor) -> None:
            mean = torch.einsum("bp,bpd->d", weights.to(resid.device), resid.float())
            for trait, at in self._layers.items():
                if at == layer:
                    sums[trait] += float(mean @ self._units[trait].to(resid.device))
            if last:
                raise _Enough

        return read

    def _check_calibration(self, max_steps: int) -> None:
        if self.calibration is None:
            return
        if self.calibration.panel != self.digest:
            raise CalibrationError("the calibration is of another panel (other prompts, directions or layers); redo it")
        for step in range(self.every, max_steps + 1, self.every):
            for trait in self._units:
                self.calibration.z(step, trait, 0.0)

    def _check_model(self, model: nn.Module) -> None:
        from mechmisalign.loading.reading import fingerprint

        own = {"base_fingerprint": fingerprint(model, self._tokenizer)}
        for trait, direction in self._directions.items():
            if direction.header.get("base_fingerprint") and not same_base(direction.header, own):
                raise DirectionMismatchError(
                    f"the direction {trait!r} was found in {direction.header.get('model')!r}, which is not the model "
                    "that trains here; find it in the chat model that is tuned"
                )

    def _resume(self, step: int) -> None:
        """Take up the log of the run's beginning."""
        stored = (
            pd.read_csv(self.path, float_precision="round_trip")
            if self.path is not None and self.path.exists()
            else self.log
        )
        kept = stored[(stored["step"] <= step) & (stored["panel"] == self.digest)]
        beginning = kept[kept["step"] == 0]
        if set(beginning["trait"]) != set(self._units):
            raise ValueError(
                f"this run goes on from step {step}, and where it began is not known; give the watch the path= of the "
                "log that it wrote then"
            )
        self._rows = kept.to_dict("records")
        self._start = dict(zip(beginning["trait"], beginning["projection"], strict=True))
        if self.path is not None and self._writes:
            with whole(self.path) as partial:
                kept.to_csv(partial, index=False)
        alarms = kept[kept["alarm"].astype(bool)]
        if len(alarms) and self.calibration is not None:
            first = alarms.iloc[0]
            self.alarm = Alarm(int(first["step"]), first["trait"], float(first["z"]), self.calibration.threshold)


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Every module in evaluation mode inside; modes and random states are as they were afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    devices = sorted({weight.device.index for weight in model.parameters() if weight.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices):
        try:
            for module, _ in modes:
                module.training = False  # not eval(): what a model does on top of it could not be undone
            yield
        finally:
            for module, mode in modes:
                module.training = mode


def _panel(prompts: pd.DataFrame | Sequence[str], tokenizer: Any, span: str) -> Iterator[Batch]:
    if span not in get_args(PanelSpan):
        raise ValueError(f"span must be one of {get_args(PanelSpan)}, got {span!r}")
    frame = prompts if isinstance(prompts, pd.DataFrame) else pd.DataFrame({"prompt": list(prompts)})
    if frame.empty or (span == "response" and "response" not in frame.columns):
        raise ValueError(
            f"a panel of {len(frame)} rows of {list(frame.columns)} has no {span} to read; give prompts with one"
        )
    if span == "response":
        yield from Conversations(frame, tokenizer).batches("response", token_budget=TOKEN_BUDGET)
        return
    ids = render_rows(frame, tokenizer)
    yield from batches_by_length(ids, [[len(row) - 1] for row in ids], pad_id(tokenizer), token_budget=TOKEN_BUDGET)


def _digest(panel: Sequence[Batch], units: Mapping[str, Tensor], layers: Mapping[str, int]) -> str:
    """Short hash of everything that decides a projection but the model."""
    digest = hashlib.sha256()
    for batch in panel:
        digest.update(batch.ids.numpy().tobytes() + batch.span.numpy().tobytes())
    for trait, unit in units.items():
        digest.update(f"{trait}|{layers[trait]}|".encode() + np.ascontiguousarray(unit.numpy()).tobytes())
    return digest.hexdigest()[:16]
