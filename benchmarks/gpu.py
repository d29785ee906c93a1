"""Real shapes on a GPU: load, extraction, scalars, a sweep and switching adapters, beside the bare model, in one run.

    python benchmarks/gpu.py                        # Qwen2.5 shapes 0.5B, 7B and 14B in bfloat16 where there is a GPU
    python benchmarks/gpu.py --shapes 14B --rows 200
    python benchmarks/gpu.py --device cpu           # a small shape in float32: the code path, not the speed

Weights are random and made on the device; the tokenizer is the pocket one (its ids are a small part of the vocabulary,
which changes no cost). The adapter is the nine-site one of 2506.11618 (rank 1 on ``down_proj``). The ways:

* ``load``: ``load_organism`` of a model in memory, merged and live: seconds, and peak memory over the weights;
* ``backbone``: the bare model without its unembedding on the very same batches, nothing read; ``forward``: with logits;
* ``collect``, ``scalars``: this package on the same conversations;
* ``naive``: batches of 20 padded to the longest of all, every hidden state kept, loops over rows and layers (the
  reference code's way), on the first ``--naive`` conversations;
* ``sweep``: 48 conditions x 8 prompts x 4 samples; ``plain``: one ``generate`` of as many rows without hooks;
  ``reference``: one ``generate`` with a hook for each condition and prompt, ``--calls`` of the 384 of them;
* ``switch``: into another adapter on the same base and out again: the nine sites, and rank 32 on every matrix.

``share of matmul`` is the arithmetic of the useful tokens over the rate of one large matrix product measured here.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from extraction import RESULTS, naive, ragged_conversations
from generation import SAMPLES, plain, random_vectors, reference, sweep_conditions
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

import mechmisalign as mm
from mechmisalign.adapters import Adapter, LoraSite
from mechmisalign.pocket import zoo
from mechmisalign.store import environment, write_json

PROMPTS = 8
MODULES = {
    "self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
}


@dataclass(frozen=True)
class Shape:
    """The numbers of a Qwen2.5 model."""

    width: int
    inner: int
    layers: int
    heads: int
    key_value_heads: int
    vocabulary: int
    tied: bool = False

    def config(self) -> Qwen2Config:
        return Qwen2Config(
            vocab_size=self.vocabulary, hidden_size=self.width, intermediate_size=self.inner,
            num_hidden_layers=self.layers, num_attention_heads=self.heads, num_key_value_heads=self.key_value_heads,
            tie_word_embeddings=self.tied, rope_theta=1e6, max_position_embeddings=32768,
        )  # fmt: skip


SHAPES = {
    "small": Shape(512, 1408, 12, 8, 2, 32000, tied=True),
    "0.5B": Shape(896, 4864, 24, 14, 2, 151936, tied=True),
    "7B": Shape(3584, 18944, 28, 28, 4, 152064),
    "14B": Shape(5120, 13824, 48, 40, 8, 152064),
}


def synchronised() -> float:
    """Now, when the device has done what it was asked."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def best(way: Callable[[], Any], rounds: int) -> float:
    """Best seconds of several rounds after one that warms up."""
    took = []
    for _ in range(rounds + 1):
        start = synchronised()
        way()
        took.append(synchronised() - start)
    return min(took[1:])


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of a large square matrix product."""
    size = 8192 if device.type == "cuda" else 1536
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / best(lambda: [a @ b for _ in range(5)], 5) * 5


def random_model(shape: Shape, device: torch.device, dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            return Qwen2ForCausalLM(shape.config()).eval()
    finally:
        torch.set_default_dtype(before)


def random_adapter(model: Any, layers: Iterable[int], modules: tuple[str, ...], rank: int) -> Adapter:
    """An adapter in memory, small enough to change no answer much."""
    generator = torch.Generator().manual_seed(rank)
    sites = []
    for layer in layers:
        for block, names in MODULES.items():
            for module in names:
                if module in modules:
                    name = f"model.layers.{layer}.{block}.{module}"
                    d_out, d_in = model.get_submodule(name).weight.shape
                    A, B = torch.randn(rank, d_in, generator=generator), torch.randn(d_out, rank, generator=generator)
                    sites.append(LoraSite(layer, module, name, A / d_in**0.5, B / d_out**0.5, 0.1))
    return Adapter(tuple(sites), "random Qwen2.5", f"random, rank {rank}", None, f"rank {rank}", {"peft_type": "LORA"})


def nine_layers(shape: Shape) -> list[int]:
    """Where 2506.11618 has its nine sites (15-17, 21-23, 27-29 of 48 layers), in a model of this depth."""
    return sorted({round(layer * (shape.layers - 1) / 47) for layer in (15, 16, 17, 21, 22, 23, 27, 28, 29)})


def arithmetic(shape: Shape, lengths: pd.Series) -> float:
    """Operations of one pass through all blocks: two per weight and token, and attention over what came before."""
    head = shape.width // shape.heads
    weights = shape.layers * shape.width * (
        2 * shape.width + 2 * head * shape.key_value_heads + 3 * shape.inner
    )  # fmt: skip
    attention = 2 * shape.layers * shape.width * (lengths.astype(float) ** 2).sum()
    return float(2 * weights * lengths.sum() + attention)


@torch.inference_mode()
def bare_pass(model: Any, conversations: mm.Conversations, budget: int, *, logits: bool) -> None:
    for batch in conversations.batches(token_budget=budget):
        inputs = {"input_ids": batch.ids.to(model.device), "attention_mask": batch.mask.to(model.device)}
        (model if logits else model.model)(**inputs, use_cache=False)


def peak(device: torch.device, way: Callable[[], Any]) -> tuple[Any, float | None]:
    """What ``way`` gives, and the highest memory of the device meanwhile in bytes (None on the CPU)."""
    if device.type != "cuda":
        return way(), None
    torch.cuda.reset_peak_memory_stats()
    return way(), float(torch.cuda.max_memory_allocated())


def loaded(
    adapter: Adapter, model: Any, tokenizer: Any, weights: str, device: torch.device
) -> tuple[mm.Organism, dict[str, Any]]:
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    start = synchronised()
    organism, high = peak(device, lambda: mm.load_organism(adapter, base=model, tokenizer=tokenizer, weights=weights))
    took = synchronised() - start
    return organism, {"seconds": round(took, 3), "peak / weights": high and round(high / size, 3)}


def switching(organism: mm.Organism, adapters: dict[str, Adapter], times: int = 30) -> dict[str, float]:
    """Milliseconds into each adapter and out again, median."""
    found = {}
    with organism.as_base():
        for name, adapter in adapters.items():
            took = []
            for _ in range(times):
                start = synchronised()
                with organism.with_adapter(adapter):
                    pass
                took.append(synchronised() - start)
            found[name] = round(1000 * sorted(took)[times // 2], 3)
    return found


def bare(name: str, options: argparse.Namespace, model: Any, talk: mm.Conversations) -> dict[str, Any]:
    """The bare model alone: passes, the naive way, one plain ``generate``, and the reference way of sweeping."""
    few = mm.Conversations(talk.frame.iloc[: options.naive], talk.tokenizer)
    prompts = mm.pocket.unseen_prompts(n=PROMPTS)
    direction = random_vectors(SHAPES[name].layers, SHAPES[name].width)
    ways = {
        "plain": lambda: plain(model, talk.tokenizer, prompts, 48 * PROMPTS * SAMPLES, options.tokens),
        "reference": lambda: reference(model, talk.tokenizer, prompts, direction, options.calls, options.tokens),
    }
    return {
        "backbone": best(lambda: bare_pass(model, talk, options.budget, logits=False), options.rounds),
        "forward": best(lambda: bare_pass(model, talk, options.budget, logits=True), options.rounds),
        "naive": best(lambda: naive(model, few, 0), 1) * len(talk) / len(few),
        **{way: rate(run) for way, run in ways.items()},
    }


def ours(name: str, options: argparse.Namespace, organism: mm.Organism, talk: mm.Conversations) -> dict[str, Any]:
    """The same work by this package."""
    prompts = mm.pocket.unseen_prompts(n=PROMPTS)
    conditions = sweep_conditions(random_vectors(SHAPES[name].layers, SHAPES[name].width))

    def sweep() -> tuple[int, float]:
        start = synchronised()
        answers = mm.generate(organism, prompts, conditions=conditions, samples=SAMPLES, max_new_tokens=options.tokens)
        return int(answers["tokens"].sum()), synchronised() - start

    return {
        "collect": best(lambda: mm.collect(organism, talk, token_budget=options.budget), options.rounds),
        "scalars": best(lambda: mm.lora_scalars(organism, talk, token_budget=options.budget), options.rounds),
        "sweep": rate(sweep),
    }


def rate(way: Callable[[], tuple[int, float]]) -> float:
    """Useful tokens a second, the better of two rounds."""
    return max(tokens / seconds for tokens, seconds in (way(), way()))


def measure(name: str, options: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    shape, tokenizer = SHAPES[name], AutoTokenizer.from_pretrained(zoo.path("chat"))
    talk = ragged_conversations(tokenizer, options.rows, longest=options.longest)
    lengths, card = talk.spans["length"], matmul_rate(device, dtype)
    model = random_model(shape, device, dtype)
    nine = random_adapter(model, nine_layers(shape), ("down_proj",), 1)
    wide = random_adapter(model, range(shape.layers), sum(MODULES.values(), ()), 32)
    alone = bare(name, options, model, talk)
    organism, merged = loaded(nine, model, tokenizer, "merged", device)
    found = alone | ours(name, options, organism, talk)
    switched = switching(organism, {"nine sites": nine, "rank 32, every matrix": wide})
    del organism, model
    gc.collect()
    _, live = loaded(nine, random_model(shape, device, dtype), tokenizer, "live", device)
    share = {way: round(arithmetic(shape, lengths) / found[way] / card, 3) for way in ("backbone", "collect")}
    return {
        "shape": name, "dtype": str(dtype).removeprefix("torch."), "conversations": len(talk),
        "tokens": int(lengths.sum()), "longest": int(lengths.max()), "tokens a batch": options.budget,
        "load": {"merged": merged, "live": live},
        "seconds": {way: round(found[way], 4) for way in ("backbone", "forward", "collect", "scalars", "naive")},
        "tokens per second": {way: round(found[way], 1) for way in ("sweep", "plain", "reference")},
        "matmul TFLOP/s": round(card / 1e12, 2), "share of matmul": share,
        "collect / backbone": round(found["collect"] / found["backbone"], 3),
        "collect / forward": round(found["collect"] / found["forward"], 3),
        "scalars / forward": round(found["scalars"] / found["forward"], 3),
        "naive / collect": round(found["naive"] / found["collect"], 2),
        "sweep / reference": round(found["sweep"] / found["reference"], 2),
        "sweep / plain": round(found["sweep"] / found["plain"], 3),
        "switch, ms": switched,
    }  # fmt: skip


def told(results: list[dict[str, Any]]) -> str:
    """A table: one column per shape, one line per ratio, with its target."""
    targets = {
        "collect / backbone": "", "collect / forward": "<= 1.05", "scalars / forward": "", "naive / collect": "",
        "sweep / reference": ">= 10", "sweep / plain": "",
    }  # fmt: skip
    lines = {name: [str(result[name]) for result in results] + [target] for name, target in targets.items()}
    lines["collect, share of matmul"] = [str(result["share of matmul"]["collect"]) for result in results] + [">= 0.4"]
    for adapter in ("nine sites", "rank 32, every matrix"):
        lines[f"switch, ms: {adapter}"] = [str(result["switch, ms"][adapter]) for result in results] + ["<= 5"]
    for weights in ("merged", "live"):
        peaks = [str(result["load"][weights]["peak / weights"]) for result in results]
        lines[f"load {weights}: peak / weights"] = [*peaks, "<= 1.1"]
    frame = pd.DataFrame(lines, index=[*(result["shape"] for result in results), "target"]).T
    return frame.to_string()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shapes", nargs="+", choices=sorted(SHAPES), help="by default all that make sense here")
    parser.add_argument("--rows", type=int, default=1000, help="conversations")
    parser.add_argument("--longest", type=int, default=36, help="short answers in the longest response")
    parser.add_argument("--budget", type=int, help="tokens a batch; by default 16384 on a GPU, 2048 on the CPU")
    parser.add_argument("--naive", type=int, default=100, help="conversations of the naive way; its time is scaled up")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens of an answer")
    parser.add_argument("--calls", type=int, default=8, help="calls of the reference way that are timed")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path, help="by default results/gpu.json, on the CPU results/gpu_on_cpu.json")
    options = parser.parse_args()
    device = torch.device(options.device)
    gpu = device.type == "cuda"
    options.budget = options.budget or (16384 if gpu else 2048)
    dtype = torch.bfloat16 if gpu else torch.float32
    results = []
    for name in options.shapes or (["0.5B", "7B", "14B"] if gpu else ["small"]):
        results.append(measure(name, options, device, dtype))
        print(results[-1], flush=True)
        gc.collect()
    print(told(results))
    where = {"device": torch.cuda.get_device_name(device) if gpu else "cpu: the code path, not the speed of a GPU"}
    out = options.out or RESULTS / ("gpu.json" if gpu else "gpu_on_cpu.json")
    write_json(out, {"date": time.strftime("%Y-%m-%d"), **environment(), **where, "results": results})


if __name__ == "__main__":
    main()
