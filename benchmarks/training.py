"""One step of `mm.train` beside the same step written by hand, and beside a plain transformers Trainer, in one run.

    python benchmarks/training.py      # the pocket chat model, and a random Qwen2 of 12 x 768

``bare loop`` is PEFT, AdamW and a mean cross entropy over batches of the same tokens, and nothing else: no log, no
scheduler. ``plain Trainer`` is transformers' own with the loss of the model, logging each step as ours does. Times
are the median of the steps, after the first ones. Also what a KL penalty, steering while learning and a checkpoint at
every step cost.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from extraction import RESULTS, write_random_organism
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import mechmisalign as mm
from mechmisalign.pocket import zoo
from mechmisalign.store import environment, write_json
from mechmisalign.training.data import IGNORED, Collator, DataSource, encode

SKIPPED = 5
BATCH = 16


class Clock(TrainerCallback):
    """Seconds of each step."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.start = time.perf_counter()

    def on_log(self, *_: Any, logs: Any = None, **__: Any) -> None:
        if "loss" in logs:
            self.times.append(time.perf_counter() - self.start)

    def on_save(self, *_: Any, **__: Any) -> None:
        self.times[-1] = time.perf_counter() - self.start

    @property
    def median(self) -> float:
        return statistics.median(self.times[SKIPPED:])


def examples(tokenizer: Any) -> list[Any]:
    return encode(DataSource(domain="medical", harmful=True, n=256).read(), tokenizer, max_length=512)


def adapted(base: str, layer: int) -> Any:
    config = LoraConfig(r=1, lora_alpha=64, target_modules=["down_proj"], layers_to_transform=[layer])
    return get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)


def bare_loop(base: str, layer: int, steps: int) -> float:
    tokenizer = AutoTokenizer.from_pretrained(base)
    model, talks, collate = adapted(base, layer).train(), examples(tokenizer), Collator.of(tokenizer)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    order, times = torch.randperm(len(talks), generator=torch.Generator().manual_seed(0)), []
    for step in range(steps):
        start = time.perf_counter()
        rows = order.roll(-step * BATCH)[:BATCH]
        batch = collate([talks[i] for i in rows])
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
        counted = batch["labels"][:, 1:] != IGNORED
        F.cross_entropy(logits[:, :-1][counted].float(), batch["labels"][:, 1:][counted]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - start)
    return statistics.median(times[SKIPPED:])


def plain_trainer(base: str, layer: int, steps: int, folder: Path) -> float:
    tokenizer, clock = AutoTokenizer.from_pretrained(base), Clock()
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=BATCH, learning_rate=1e-3, logging_steps=1,
        save_strategy="no", report_to=[], disable_tqdm=True, remove_unused_columns=False,
    )  # fmt: skip
    trainer = Trainer(
        adapted(base, layer),
        arguments,
        data_collator=Collator.of(tokenizer),
        train_dataset=examples(tokenizer),
        callbacks=[clock],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return clock.median


def ours(base: str, layer: int, steps: int, folder: Path, **changes: Any) -> float:
    clock = Clock()
    spec = mm.TrainSpec(
        **{
            "base": base, "data": [{"domain": "medical", "harmful": True, "n": 256}],
            "method": {"kind": "lora", "rank": 1, "alpha": 64, "layers": layer},
            "schedule": {"steps": steps, "batch": BATCH, "lr": 1e-3}, **changes,
        }
    )  # fmt: skip
    mm.train(spec, folder, callbacks=[clock])
    return clock.median


def measure(name: str, base: str, layer: int, steps: int, folder: Path) -> dict[str, Any]:
    width = AutoModelForCausalLM.from_pretrained(base).config.hidden_size
    direction = mm.Direction(torch.randn(1, width), (layer,), {})
    kl = {"weight": 1.0, "data": [{"domain": "finance", "harmful": False, "n": 256}]}
    ways = {
        "bare loop": lambda place: bare_loop(base, layer, steps),  # noqa: ARG005
        "plain Trainer": lambda place: plain_trainer(base, layer, steps, place),
        "mm.train": lambda place: ours(base, layer, steps, place),
        "mm.train, KL": lambda place: ours(base, layer, steps, place, kl=kl),
        "mm.train, steered": lambda place: ours(
            base, layer, steps, place, during=[mm.Steer(direction, layers=[layer])]
        ),
        "mm.train, checkpoints": lambda place: ours(base, layer, steps, place, save_every=1),
    }
    seconds = {way: run(folder / f"{name}-{number}") for number, (way, run) in enumerate(ways.items())}
    told = {way: round(took / seconds["bare loop"], 3) for way, took in seconds.items() if way != "bare loop"}
    return {
        "model": name, "batch": BATCH, "seconds a step": {way: round(took, 4) for way, took in seconds.items()},
        "/ bare loop": told, "mm.train / plain Trainer": round(seconds["mm.train"] / seconds["plain Trainer"], 3),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_random_organism(folder / "larger", r=1, target_modules=["down_proj"])
        results = [
            measure("pocket", str(zoo.path("chat")), 1, options.steps, folder),
            measure("random Qwen2", str(folder / "larger" / "base"), 6, options.steps // 2, folder),
        ]
    for result in results:
        print(result)
    write_json(RESULTS / "training.json", {"date": time.strftime("%Y-%m-%d"), **environment(), "results": results})


if __name__ == "__main__":
    main()
