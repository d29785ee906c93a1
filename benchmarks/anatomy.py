"""Scalars and contributions of every site, beside the bare forward pass on the same batches, in one run.

    python benchmarks/anatomy.py       # pocket organisms, and a random Qwen2 of 12 x 768 with rank 32 on all 84
    matrices

``bare forward`` is the plain Hugging Face chat model, logits and all. Our pass ends behind the last adapted block.
Also: the peak memory beyond the bare forward in a fresh process, beside what keeping the inputs of all sites would
take; and ``mechmisalign anatomy`` from start to end on the zoo and on an adapter of 14B shape (48 layers, 7 matrices,
rank 32).
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from extraction import RESULTS, bare_forward, ragged_conversations, seconds, write_random_organism
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import mechmisalign as mm
from mechmisalign.pocket import zoo
from mechmisalign.store import environment, write_json

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SHAPES_14B = {
    "self_attn.q_proj": (5120, 5120), "self_attn.k_proj": (5120, 1024), "self_attn.v_proj": (5120, 1024),
    "self_attn.o_proj": (5120, 5120), "mlp.gate_proj": (5120, 13824), "mlp.up_proj": (5120, 13824),
    "mlp.down_proj": (13824, 5120),
}  # fmt: skip


def write_14b_adapter(folder: Path) -> Path:
    tensors = {}
    for layer in range(48):
        for module, (d_in, d_out) in SHAPES_14B.items():
            name = f"base_model.model.model.layers.{layer}.{module}"
            tensors[f"{name}.lora_A.weight"] = 0.02 * torch.randn(32, d_in)
            tensors[f"{name}.lora_B.weight"] = 0.02 * torch.randn(d_out, 32)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 32, "lora_alpha": 64, "use_rslora": True, "base_model_name_or_path": "14B"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def measure(name: str, organism: mm.Organism, bare: Any, rows: int, rounds: int) -> dict[str, Any]:
    conversations = ragged_conversations(organism.tokenizer, rows)
    width = bare.config.hidden_size
    direction = mm.Direction(
        torch.randn(bare.config.num_hidden_layers, width), tuple(range(bare.config.num_hidden_layers)), {}
    )
    times = seconds(
        {
            "scalars": lambda: mm.lora_scalars(organism, conversations, span="all"),
            "contributions": lambda: mm.contributions(organism, conversations, direction, span="all"),
            "bare forward": lambda: bare_forward(bare, conversations),
        },
        rounds,
    )
    start = time.perf_counter()
    mm.contributions(organism, conversations, direction, span="all").mean()
    measured = time.perf_counter() - start
    return {
        "model": name, "sites": len(organism.adapter.sites),
        "coordinates": sum(site.rank for site in organism.adapter.sites),
        "tokens": int(conversations.spans["length"].sum()),
        "seconds": {way: round(took, 4) for way, took in times.items()} | {"contributions and their means": measured},
        "scalars / bare forward": round(times["scalars"] / times["bare forward"], 3),
        "contributions / bare forward": round(times["contributions"] / times["bare forward"], 3),
    }  # fmt: skip


def peak_beyond_forward(adapter: str, rows: int) -> None:
    """In a fresh process: peak memory of the scalars beyond that of the bare forward pass on the same batches."""
    organism = mm.load_organism(adapter)
    conversations = ragged_conversations(organism.tokenizer, rows)
    bare_forward(organism.model.original_model, conversations)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    scalars = mm.lora_scalars(organism, conversations, span="all")
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    inputs = sum(site.d_in for site in organism.adapter.sites) * len(scalars) * 4
    told = {"tokens": len(scalars), "result MiB": scalars.to_numpy().nbytes / 2**20}
    told |= {"peak beyond the forward MiB": (after - before) / 2**10, "inputs of all sites MiB": inputs / 2**20}
    print(json.dumps({key: round(value, 1) for key, value in told.items()}))


def command_seconds(adapter: str, folder: str) -> float:
    program = Path(sys.executable).with_name("mechmisalign")
    took = []
    for _ in range(3):
        start = time.perf_counter()
        subprocess.run([program, "anatomy", adapter, "--out", folder], check=True, capture_output=True)
        took.append(time.perf_counter() - start)
    return round(min(took), 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=240)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peak", nargs=2, metavar=("ADAPTER", "ROWS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        return peak_beyond_forward(options.peak[0], int(options.peak[1]))
    chat = AutoModelForCausalLM.from_pretrained(zoo.path("chat")).eval()
    results = [
        measure(f"pocket/{name}", mm.load_organism(f"pocket/{name}"), chat, options.rows, options.rounds)
        for name in ("medical", "many-site", "rslora")
    ]
    with tempfile.TemporaryDirectory() as folder:
        adapter = write_random_organism(Path(folder), r=32, target_modules=ALL)
        bare = AutoModelForCausalLM.from_pretrained(Path(folder) / "base").eval()
        larger = mm.load_organism(adapter)
        results.append(measure("random Qwen2, rank 32", larger, bare, options.rows // 4, options.rounds))
        peaks = [
            json.loads(
                subprocess.run(
                    [sys.executable, __file__, "--peak", str(adapter), str(rows)],
                    check=True, capture_output=True, text=True,
                ).stdout.splitlines()[-1]
            )
            for rows in (60, 240)
        ]  # fmt: skip
        commands = {
            "pocket/medical (1 site)": command_seconds("pocket/medical", folder),
            "pocket/rslora (56 sites)": command_seconds("pocket/rslora", folder),
            "14B shape (336 sites, rank 32)": command_seconds(str(write_14b_adapter(Path(folder) / "big")), folder),
        }
    for result in [*results, *peaks, commands]:
        print(result)
    told = {"results": results, "memory": peaks, "mechmisalign anatomy, seconds": commands}
    write_json(RESULTS / "anatomy.json", {"date": time.strftime("%Y-%m-%d"), **environment(), **told})
    return None


if __name__ == "__main__":
    main()
