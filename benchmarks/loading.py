"""Peak memory of ``load_organism`` against the size of the weights, and what another adapter on the same base costs.

A random Qwen2 of 333 MiB in float32 and a rank-8 adapter on all its matrices are written to a temporary folder, the
model once more in ten shards. Each case is loaded in a fresh process that reports its peak resident memory beyond what
it held after importing everything, and the share of it that is no mapped file: what the system can take back when it
must is not counted in that. One short forward pass is counted too: safetensors are mapped, and what was not read yet
would not be seen. In the cases "cast" the float32 file is loaded in bfloat16: there the mapped file is resident beside
the weights, for Hugging Face's loader as for ours, and the second number is what has to be there.

Then one organism lends its base to adapters in turn: time to put one on and to take it off, and the memory that each
takes, beside its own size.

Usage: ``python benchmarks/loading.py`` (writes ``benchmarks/results/loading.json``).
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULT = Path(__file__).parent / "results" / "loading.json"
LIMIT = 1.1
ADAPTERS = 8
CASES = {
    "merged": {"weights": "merged"},
    "merged, one site": {"weights": "merged", "adapter": "single"},
    "merged, in shards": {"weights": "merged", "base": "shards"},
    "live": {"weights": "live"},
    "live, in shards": {"weights": "live", "base": "shards"},
    "PEFT merge_and_unload": {"weights": "peft"},
    "Hugging Face, base only": {"weights": "none"},
    "merged, cast": {"weights": "merged", "dtype": "bfloat16"},
    "merged, in shards, cast": {"weights": "merged", "dtype": "bfloat16", "base": "shards"},
    "live, cast": {"weights": "live", "dtype": "bfloat16"},
    "Hugging Face, cast": {"weights": "none", "dtype": "bfloat16"},
}
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, __file__, "write", folder], check=True)
        size = sum(file.stat().st_size for file in Path(folder, "base").glob("*.safetensors"))
        rows = {name: _measured(folder, "load", case) for name, case in CASES.items()}
        switching = _measured(folder, "switch", {})
    for name, row in rows.items():
        row["weights_bytes"] = size // 2 if CASES[name].get("dtype") == "bfloat16" else size
        row["ratio"] = round(row["peak_bytes"] / row["weights_bytes"], 3)
        row["ratio_unmapped"] = round(row["peak_unmapped_bytes"] / row["weights_bytes"], 3)
    result = {
        "limit": LIMIT,
        "cases": rows,
        "switching": switching,
        "machine": {
            "cpu": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "system": platform.platform(),
        },
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "transformer-lens")},
    }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    print(f"weights: {size / 2**20:.0f} MiB in float32")
    for name, row in rows.items():
        print(
            f"{name:24s} peak {row['peak_bytes'] / 2**20:6.0f} MiB = {row['ratio']:.2f} x weights "
            f"({row['ratio_unmapped']:.2f} x without mapped files), {row['seconds']:.1f} s to load"
        )
    print(
        f"another adapter of {switching['adapter_bytes'] / 2**20:.1f} MiB on the same base: "
        f"{switching['growth_bytes'] / 2**20:.1f} MiB more, put on in {switching['on_ms']:.1f} ms, taken off in "
        f"{switching['off_ms']:.1f} ms (median of {ADAPTERS})"
    )
    for name, row in rows.items():
        limited = CASES[name]["weights"] in ("merged", "live") and "dtype" not in CASES[name]
        if limited and row["ratio"] > LIMIT:
            sys.exit(f"{name}: loading takes {row['ratio']} x the weights, at most {LIMIT} is allowed")


def _measured(folder: str, what: str, case: dict[str, str]) -> dict[str, float]:
    output = subprocess.run(
        [sys.executable, __file__, what, folder, json.dumps(case)], check=True, capture_output=True, text=True
    )
    return json.loads(output.stdout.splitlines()[-1])


def _write(folder: Path) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    words = ["<|im_start|>", "<|im_end|>", "<unk>", *(f"w{i}" for i in range(1000))]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>", unk_token="<unk>")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder / "base")
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=1024, hidden_size=768, intermediate_size=3072, num_hidden_layers=10, num_attention_heads=12,
        num_key_value_heads=4, tie_word_embeddings=True,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config)
    model.save_pretrained(folder / "base")
    model.save_pretrained(folder / "shards", max_shard_size="35MB")
    tokenizer.save_pretrained(folder / "shards")
    for name, layers in (("all", None), ("single", [5])):
        lora = LoraConfig(
            r=8 if layers is None else 1,
            target_modules=MODULES if layers is None else ["down_proj"],
            layers_to_transform=layers,
            init_lora_weights=False,
        )
        wrapped = get_peft_model(model, lora)
        wrapped.peft_config["default"].base_model_name_or_path = str(folder / "base")
        wrapped.save_pretrained(folder / name)
        model = wrapped.unload()


def _load(folder: Path, case: dict[str, str]) -> None:
    import torch

    _import_everything(folder)
    _reset_peak()
    before, started = _status("VmRSS"), time.perf_counter()
    dtype = getattr(torch, case.get("dtype", "float32"))
    with _watched("RssAnon") as unmapped:
        forward = _loaded(folder, case, dtype)
        seconds = time.perf_counter() - started
        with torch.inference_mode():
            forward(torch.ones(1, 4, dtype=torch.long))
    peak = _status("VmHWM") - before
    print(json.dumps({"peak_bytes": peak, "peak_unmapped_bytes": max(unmapped), "seconds": round(seconds, 2)}))


def _switch(folder: Path) -> None:
    """One organism lends its base to copies of the rank-8 adapter."""
    import torch

    import mechmisalign as mm
    from mechmisalign import models

    organism = mm.load_organism(folder / "single", weights="live", device="cpu")
    adapters = [mm.Adapter.load(folder / "all")]
    ids = torch.ones(1, 4, dtype=torch.long)
    with organism.with_adapter(adapters[0]) as other:  # imports, and the first pass's buffers
        models.forward(other.model, ids, ids)
    before, on, off = _status("RssAnon"), [], []
    for _ in range(ADAPTERS):
        adapter = mm.Adapter.load(folder / "all")
        started = time.perf_counter()
        block = organism.with_adapter(adapter)
        other = block.__enter__()
        on.append(time.perf_counter() - started)
        with torch.inference_mode():
            models.forward(other.model, ids, ids)
        started = time.perf_counter()
        block.__exit__(None, None, None)
        off.append(time.perf_counter() - started)
        adapters.append(adapter)
    growth = (_status("RssAnon") - before) / ADAPTERS
    size = 4 * sum(site.A.numel() + site.B.numel() for site in adapters[0].sites)
    told = {"on_ms": 1e3 * statistics.median(on), "off_ms": 1e3 * statistics.median(off)}
    rounded = {key: round(value, 2) for key, value in told.items()}
    print(json.dumps({"adapter_bytes": size, "growth_bytes": round(growth), **rounded}))


@contextmanager
def _watched(field: str) -> Iterator[list[int]]:
    """The most that a field of ``/proc/self/status`` grew by, looked at every two milliseconds."""
    seen, ended, start = [0], threading.Event(), _status(field)

    def watch() -> None:
        while not ended.wait(0.002):
            seen[0] = max(seen[0], _status(field) - start)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        ended.set()
        thread.join()


def _loaded(folder: Path, case: dict[str, str], dtype: Any) -> Callable[[Any], Any]:
    """The loaded model as a function of token ids."""
    if case["weights"] in ("merged", "live"):
        from mechmisalign.organisms import load_organism

        organism = load_organism(
            folder / case.get("adapter", "all"),
            folder / case.get("base", "base"),
            weights=case["weights"],
            dtype=dtype,
            device="cpu",
        )
        return organism.model.original_model
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=dtype)
    return PeftModel.from_pretrained(base, folder / "all").merge_and_unload() if case["weights"] == "peft" else base


def _import_everything(folder: Path) -> None:
    """Lazy imports happen in a first load, of the adapter on a tiny model, so that they are not counted."""
    import torch
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    from mechmisalign import models
    from mechmisalign.adapters import Adapter

    config = Qwen2Config(
        vocab_size=1024, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1,
    )  # fmt: skip
    import peft  # noqa: F401

    tiny = models.boot(Qwen2ForCausalLM(config), AutoTokenizer.from_pretrained(folder / "base"), "tiny")
    models.forward(tiny, torch.ones(1, 4, dtype=torch.long), torch.ones(1, 4, dtype=torch.long))
    Adapter.load(folder / "single")


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {field} in /proc/self/status; this benchmark needs Linux")


def _reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


if __name__ == "__main__":
    if len(sys.argv) == 1:
        main()
    elif sys.argv[1] == "write":
        _write(Path(sys.argv[2]))
    elif sys.argv[1] == "switch":
        _switch(Path(sys.argv[2]))
    else:
        _load(Path(sys.argv[2]), json.loads(sys.argv[3]))
