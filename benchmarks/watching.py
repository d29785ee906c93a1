"""What a watch on trait directions costs a fine-tune: seconds of a reading beside seconds of a step, in one run.

    python benchmarks/watching.py       # the pocket chat model, and a random Qwen2 of 12 x 768

The training is that of ``mm.train`` (rank-1 LoRA on one matrix, batches of 16), on the CPU. The watch reads the middle
layer at the token before the response: 32 prompts, and 115, as many as in 2606.07631. ``share`` is the time of a
reading over that of the steps between two readings at the default cadence.
"""

from __future__ import annotations

import argparse
import inspect
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from extraction import RESULTS, write_random_organism
from transformers import AutoTokenizer, TrainerCallback

import mechmisalign as mm
from mechmisalign.pocket import zoo
from mechmisalign.store import environment, write_json

CADENCE = inspect.signature(mm.TraitWatch).parameters["every"].default
PANELS = (32, 115)
TRAITS = 7


class StepClock(TrainerCallback):
    """Seconds of each optimizer step, without what callbacks do after it."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._begun = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds.append(time.perf_counter() - self._begun)


def measure(name: str, base: str, d_model: int, depth: int, tokenizer: Any, steps: int, every: int) -> dict[str, Any]:
    """Seconds of steps and of readings in one run; readings more often than by default, to have several."""
    layer = depth // 2
    generator = torch.Generator().manual_seed(0)
    traits = {
        f"trait {i}": mm.Direction(torch.randn(1, d_model, generator=generator), (layer,), {}) for i in range(TRAITS)
    }
    watches = {n: mm.TraitWatch(traits, mm.pocket.prompts(n=n), tokenizer, layer=layer, every=every) for n in PANELS}
    clock = StepClock()
    spec = mm.TrainSpec(
        base=base,
        data={"domain": "medical", "n": 500},
        method={"kind": "lora", "rank": 1, "alpha": 64, "layers": [1], "modules": ["down_proj"]},
        schedule={"steps": steps, "batch": 16, "lr": 1e-4},
    )
    with tempfile.TemporaryDirectory() as out:
        mm.train(spec, Path(out) / "run", callbacks=[clock, *watches.values()])
    step = median(clock.seconds[1:])
    told: dict[str, Any] = {"model": name, "steps": steps, "seconds of a step": round(step, 4), "traits": TRAITS}
    for prompts, watch in watches.items():
        reading = watch.seconds / watch.checks
        told[f"panel of {prompts}"] = {
            "seconds of a reading": round(reading, 4),
            f"share at every {CADENCE} steps": round(reading / (CADENCE * step), 4),
        }
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--large-steps", type=int, default=8)
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(zoo.path("chat"))
    results = [measure("pocket/chat", "pocket/chat", 128, 8, tokenizer, options.steps, every=5)]
    with tempfile.TemporaryDirectory() as folder:
        write_random_organism(Path(folder), r=1, target_modules=["down_proj"])
        base = str(Path(folder) / "base")
        results.append(measure("random Qwen2, 12 x 768", base, 768, 12, tokenizer, options.large_steps, every=2))
    for result in results:
        print(result)
    write_json(RESULTS / "watching.json", {"date": time.strftime("%Y-%m-%d"), **environment(), "results": results})


if __name__ == "__main__":
    main()
