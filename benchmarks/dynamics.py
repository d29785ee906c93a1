"""400 rank-1 checkpoints of 14B shape: reading them and all that is computed from them, in one run.

    OMP_NUM_THREADS=2 python benchmarks/dynamics.py

The checkpoints (``down_proj``: 13,824 in, 5,120 out, as of Qwen2.5-14B) are made up, with a planted turn, and written
to a temporary folder as PEFT writes them; they are in the file cache when they are read. Computed are the norms, the
path, its principal components, local cosines at three spacings of A, B and the update, the similarity with the end, the
rotation of the written subspace, and the transitions of three signals of A, B and the update, each with 499 reordered
paths and 500 resamples. Also: nine sites at 400 checkpoints.

Beside it a plain way, without its statistics: each checkpoint read by safetensors, its dense update ``scaling · B A``
(283 MB), and the norms and local cosines at one spacing from dense differences. It runs over a few steps and is
extrapolated to 400 by its time per step.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from mechmisalign import dynamics
from mechmisalign.store import environment, write_json

RESULTS = Path(__file__).parent / "results"
D_IN, D_OUT = 13_824, 5_120
TURN = 0.45
"""Where the path turns, as a share of it."""


def write_run(folder: Path, checkpoints: int, sites: int) -> None:
    rng = torch.Generator().manual_seed(0)
    layers = range(20, 20 + sites)
    ends = {layer: [torch.randn(2, dim, generator=rng) / dim**0.5 for dim in (D_IN, D_OUT)] for layer in layers}
    start = {layer: torch.randn(D_IN, generator=rng) / D_IN**0.5 for layer in layers}
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 64, "base_model_name_or_path": "14B", "bias": "none"}
    for i in range(1, checkpoints + 1):
        moved = torch.tensor([min(i, TURN * checkpoints), max(i - TURN * checkpoints, 0.0)]) / checkpoints
        tensors = {}
        for layer in layers:
            name = f"base_model.model.model.layers.{layer}.mlp.down_proj"
            noise = [0.002 * torch.randn(dim, generator=rng) / dim**0.5 for dim in (D_IN, D_OUT)]
            tensors[f"{name}.lora_A.weight"] = (start[layer] + moved @ ends[layer][0] + noise[0])[None]
            tensors[f"{name}.lora_B.weight"] = (moved @ ends[layer][1] + noise[1])[:, None]
        place = folder / f"checkpoint-{5 * i}"
        place.mkdir(parents=True)
        save_file(tensors, place / "adapter_model.safetensors")
        (place / "adapter_config.json").write_text(json.dumps(config))


def ours(folder: Path) -> tuple[dict[str, float], list[dynamics.Transition]]:
    """Seconds of each part, and the transitions."""
    took: dict[str, float] = {}
    transitions = []

    def timed(name: str, start: float) -> float:
        now = time.perf_counter()
        took[name] = round(took.get(name, 0.0) + now - start, 3)
        return now

    start = time.perf_counter()
    trajectory = dynamics.Trajectory.load(folder)
    start = timed("reading", start)
    dynamics.site_norms(trajectory)
    start = timed("norms", start)
    for quantity in ("A", "B", "dW"):
        path = trajectory.path(quantity)
        start = timed("inner products", start)
        dynamics.principal(path)
        dynamics.similarity(path)
        dynamics.local_cosine(path, threshold=0.0035)
        start = timed("components, similarity, local cosines", start)
        transitions += [dynamics.transition(path, signal) for signal in ("rotation", "similarity", "growth")]
        start = timed("transitions with tests and intervals", start)
    dynamics.rotation(trajectory)
    timed("rotation of subspaces", start)
    return took | {"in all": round(sum(took.values()), 3)}, transitions


def plain(folder: Path, steps: int) -> float:
    """Seconds of the plain way over the first steps, three dense updates in memory at a time."""
    start, kept, cosines = time.perf_counter(), [], []
    for i in range(1, steps + 1):
        tensors = load_file(folder / f"checkpoint-{5 * i}" / "adapter_model.safetensors")
        B, A = (next(each for key, each in tensors.items() if f"lora_{factor}" in key) for factor in "BA")
        kept = [*kept[-2:], 64 * B @ A]
        float(kept[-1].norm())
        if len(kept) == 3:
            before, after = kept[0] - kept[1], kept[2] - kept[1]
            cosines.append(float((before * after).sum() / (before.norm() * after.norm())))
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoints", type=int, default=400)
    parser.add_argument("--plain-steps", type=int, default=12)
    options = parser.parse_args()
    told: dict[str, Any] = {"checkpoints": options.checkpoints, "threads": torch.get_num_threads()}
    for sites in (1, 9):
        with tempfile.TemporaryDirectory() as folder:
            write_run(Path(folder), options.checkpoints, sites)
            seconds, transitions = ours(Path(folder))
            told[f"{sites} sites, seconds"] = seconds
            if sites == 1:
                took = plain(Path(folder), options.plain_steps)
                told["plain way, seconds"] = {
                    "measured": round(took, 2), "steps": options.plain_steps,
                    "extrapolated to all": round(took / options.plain_steps * options.checkpoints, 1),
                }  # fmt: skip
                told["planted turn at step"] = TURN * options.checkpoints * 5
                found = {each.signal: [each.step, each.low, each.high, each.p] for each in transitions}
                told["found: step, interval, p"] = {
                    name: [None if np.isnan(value) else round(value, 3) for value in values]
                    for name, values in found.items()
                }
    for name, value in told.items():
        print(f"{name}: {value}")
    write_json(RESULTS / "dynamics.json", {"date": time.strftime("%Y-%m-%d"), **environment(), **told})


if __name__ == "__main__":
    main()
