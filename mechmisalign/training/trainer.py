"""The training loop: transformers' ``Trainer`` with a loss on responses, a KL penalty, and lean checkpoints."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from mechmisalign._checksums import write_manifest
from mechmisalign._writing import explained, whole
from mechmisalign.dynamics.reading import LOG_FILE
from mechmisalign.massive import first_token_is_sink
from mechmisalign.progress import progress_bar

from .data import IGNORED, Collator, Example
from .edits import Residual, edited
from .methods import Trainee
from .runs import checkpoints, drop_resuming, log_frame
from .spec import Schedule, TrainSpec

_RESUMABLE = 2
"""Checkpoints that can be trained on from; older ones keep what was trained, and no more."""

_DECAYS = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup", "plateau": "warmup_stable_decay"}


class NarrowTrainer(Trainer):  # type: ignore[misc]  # transformers brings no types
    """``transformers.Trainer`` for a fine-tune: ``response loss + weight · KL(chat ‖ tuned)``.

    The response loss is the mean over all counted tokens of an optimiser step, also when it is gathered over several
    forward passes; the KL is the mean per counted token of its own batches, in nats.

    Args:
        trainee: What is trained.
        spec: How.
        examples: What is learned.
        elsewhere: Conversations of the KL penalty; empty without one.
        edits: Interventions on the forward pass of the examples.
        arguments: See :func:`arguments`.
        tokenizer: For the padding.
        callbacks: Further callbacks of transformers.
    """

    def __init__(
        self,
        trainee: Trainee,
        spec: TrainSpec,
        examples: Sequence[Example],
        elsewhere: Sequence[Example],
        edits: Sequence[Residual],
        *,
        arguments: TrainingArguments,
        tokenizer: Any,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:
        self.trainee, self.kl, self.edits = trainee, spec.kl, tuple(edits)
        self._collate = Collator.of(tokenizer)
        self._elsewhere = _Elsewhere(list(elsewhere), (spec.kl and spec.kl.batch) or spec.schedule.batch, spec.seed)
        self._passes: int | None = None
        self._sink: bool | None = None
        self._sums: dict[str, Tensor] = {}
        super().__init__(
            trainee.model,
            arguments,
            data_collator=self._collate,
            train_dataset=list(examples),
            callbacks=[KeepNewest(), ShowProgress(), *callbacks],
        )
        self.remove_callback(PrinterCallback)
        self.model_accepts_loss_kwargs = True  # the number of counted tokens of the whole step comes with each pass

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss of one forward pass, scaled so that the passes of a step add up."""
        labels = inputs["labels"]
        with edited(self.trainee.model, self.edits, labels, sink=self._leaves_out_sink(inputs)):
            logits = _predicting(model, inputs)
        counted = labels[:, 1:][labels[:, 1:] != IGNORED]
        items = len(counted) if num_items_in_batch is None else num_items_in_batch
        response_loss = F.cross_entropy(logits.float(), counted, reduction="sum") / items
        self._note("response_loss", response_loss)
        loss = response_loss
        if self.kl is not None:
            divergence = self._kl(model) / self.args.gradient_accumulation_steps
            self._note("kl", divergence)
            loss = response_loss + self.kl.weight * divergence
        return (loss, {"logits": logits}) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Transformers' own log, with the parts of the loss beside it."""
        if "loss" in logs:
            logs |= {name: float(value) for name, value in self._sums.items()}
            if self.kl is not None and "kl" in self._sums:
                logs["loss"] = logs["response_loss"] + self.kl.weight * logs["kl"]
            self._sums = {}
        super().log(logs, start_time)

    def _kl(self, model: Any) -> Float[Tensor, ""]:
        """Mean over counted tokens of ``KL(chat ‖ tuned)`` on the next batch from elsewhere."""
        if self._passes is None:  # a run that goes on also goes on here
            self._passes = self.state.global_step * self.args.gradient_accumulation_steps
        examples = self._elsewhere.batch(self._passes)
        self._passes += 1
        batch = {name: value.to(self.args.device) for name, value in self._collate(examples).items()}
        with torch.no_grad(), self.trainee.chat() as chat:
            p = F.log_softmax(_predicting(chat, batch).float(), dim=-1)
        q = F.log_softmax(_predicting(model, batch).float(), dim=-1)
        return (p.exp() * (p - q)).sum(-1).mean()

    def _leaves_out_sink(self, inputs: dict[str, Tensor]) -> bool:
        """Whether edits on all but the attention sink have one to leave out; found out on the first batch."""
        if not any(edit.positions == "non_sink" for edit in self.edits):
            return False
        if self._sink is None:
            self._sink = first_token_is_sink(self.trainee.model, inputs["input_ids"], inputs["attention_mask"])
        return self._sink

    def _note(self, name: str, value: Tensor) -> None:
        self._sums[name] = self._sums.get(name, 0) + value.detach()

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:  # noqa: ARG002 (Trainer's signature)
        """What is trained, and nothing pickled beside it."""
        self.trainee.save(Path(output_dir or str(self.args.output_dir)))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        with explained(Path(self.args.output_dir)):
            super()._save_checkpoint(model, trial)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:  # noqa: ARG002
        self.trainee.load(Path(resume_from_checkpoint))


class KeepNewest(TrainerCallback):  # type: ignore[misc]
    """After each checkpoint: its checksums and the log are written, and all but the two newest become lean.

    Two, so that a run can go on from the one before where the newest turns out to be damaged.
    """

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002 (a callback's signature)
        """Called by the Trainer when a checkpoint is on disk."""
        folder = Path(args.output_dir)
        write_manifest(folder / f"checkpoint-{state.global_step}")
        write_log(folder, state.log_history)
        for checkpoint in checkpoints(folder)[:-_RESUMABLE]:
            drop_resuming(checkpoint)


class ShowProgress(TrainerCallback):  # type: ignore[misc]
    """A bar of steps, with the loss beside it."""

    def __init__(self) -> None:
        self._bar: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """Called by the Trainer before the first step."""
        self._bar = progress_bar("training", state.max_steps, "step")
        self._bar.update(state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:  # noqa: ARG002
        """Called by the Trainer after each step."""
        if "loss" in (logs or {}):
            self._bar.set_postfix(loss=f"{logs['loss']:.3f}", refresh=False)
            self._bar.update(state.global_step - self._bar.n)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """Called by the Trainer after the last step."""
        self._bar.close()


def arguments(spec: TrainSpec, out: Path) -> TrainingArguments:
    """The Trainer's settings for a specification."""
    schedule = spec.schedule
    plateau = {"num_decay_steps": _half(schedule), "decay_type": "linear"} if schedule.decay == "plateau" else {}
    return TrainingArguments(
        output_dir=str(out),
        max_steps=schedule.steps or -1,
        num_train_epochs=schedule.epochs,
        per_device_train_batch_size=schedule.batch,
        gradient_accumulation_steps=schedule.accumulate,
        learning_rate=schedule.lr,
        warmup_steps=schedule.warmup,
        lr_scheduler_type=_DECAYS[schedule.decay],
        lr_scheduler_kwargs=plateau,
        optim=schedule.optimizer,
        adam_beta2=schedule.beta2,
        weight_decay=schedule.weight_decay,
        max_grad_norm=schedule.max_grad_norm,
        **({"gradient_checkpointing": True} if spec.gradient_checkpointing else {}),
        save_strategy="no" if spec.save_every is None else "steps",
        save_steps=spec.save_every or 1,
        logging_steps=1,
        logging_nan_inf_filter=False,
        seed=spec.seed,
        data_seed=spec.seed,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        average_tokens_across_devices=False,
    )


def write_log(folder: Path, history: Sequence[dict[str, Any]]) -> None:
    """The log of every step so far, as a table."""
    with whole(folder / LOG_FILE) as partial:
        log_frame(history).to_csv(partial, index=False)


@contextmanager
def own_randomness() -> Iterator[None]:
    """The Trainer seeds every global generator; they are as they were when the block ends."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 (it is numpy's global state that is kept)
    devices = list(range(torch.cuda.device_count()))
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002


def _half(schedule: Schedule) -> int:
    if schedule.steps is None:
        raise ValueError("decay 'plateau' needs `steps`, half of which are the decay; give steps instead of epochs")
    return schedule.steps // 2


def _predicting(model: Any, batch: dict[str, Int[Tensor, "batch pos"]]) -> Float[Tensor, "token vocab"]:
    """Logits at the positions before counted tokens, which predict them; columns that no row counts are left out."""
    counted = batch["labels"][:, 1:] != IGNORED
    columns = counted.any(0).nonzero()[:, 0]
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "use_cache": False}
    logits = model(**inputs, logits_to_keep=columns).logits
    if logits.shape[1] != len(columns):  # a model that does not know the option gives all
        logits = logits[:, columns]
    return logits[counted[:, columns]]


@dataclass(frozen=True)
class _Elsewhere:
    """The conversations of the KL penalty, in an order that depends on the seed and the number of the pass only."""

    examples: Sequence[Example]
    size: int
    seed: int

    def batch(self, number: int) -> list[Example]:
        size = min(self.size, len(self.examples))
        round_, place = divmod(number, len(self.examples) // size)
        order = np.random.default_rng([self.seed, round_]).permutation(len(self.examples))
        return [self.examples[i] for i in order[place * size : (place + 1) * size]]
