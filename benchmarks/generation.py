"""A sweep of 48 conditions x 8 prompts x 4 samples, beside the reference way and a plain ``generate``, in one run.

    python benchmarks/generation.py

On the pocket organism and on a random Qwen2 of 40 M parameters (which hardly ever ends an answer, so every row is
decoded to the last token). The ways, in useful tokens (those of the answers) a second:

* ``sweep``: this package, all conditions in one call: steering and ablation in every layer, at several strengths;
* ``decoding``: the same without its prefill, and again under 48 conditions that do nothing: what the hooks cost;
* ``plain generate``: the bare Hugging Face model, as many rows in one batch, no hook;
* ``reference way``: the bare model with a hook, one ``generate`` call for each condition and prompt (four rows); some
  of the 384 calls are timed.

And the memory of a sweep of 10,000 rows: the resident size after each tenth of it.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import torch
from extraction import RESULTS
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

import mechmisalign as mm
from mechmisalign import models
from mechmisalign.conversations import render_prompts
from mechmisalign.decoding import left_padded
from mechmisalign.directions import Direction
from mechmisalign.generation import answer_rows, generate_rows
from mechmisalign.pocket import zoo
from mechmisalign.store import environment, write_json

PROMPTS, SAMPLES = 8, 4
MAX_NEW_TOKENS = 64


def forty_million(folder: Path) -> tuple[mm.Organism, Any]:
    """A random Qwen2 of 40 M parameters with the pocket tokenizer and a rank-1 adapter, and the plain model."""
    from peft import LoraConfig, get_peft_model

    config = Qwen2Config(
        vocab_size=32000, hidden_size=512, intermediate_size=1408, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    Qwen2ForCausalLM(config).save_pretrained(folder / "base")
    AutoTokenizer.from_pretrained(zoo.path("chat")).save_pretrained(folder / "base")
    adapted = LoraConfig(init_lora_weights=False, r=1, target_modules=["down_proj"], layers_to_transform=[4])
    get_peft_model(AutoModelForCausalLM.from_pretrained(folder / "base"), adapted).save_pretrained(folder / "adapter")
    return mm.load_organism(folder / "adapter"), AutoModelForCausalLM.from_pretrained(folder / "base").eval()


def random_vectors(layers: int, width: int) -> Direction:
    vectors = torch.randn(layers, width, generator=torch.Generator().manual_seed(0)) / width**0.5
    return Direction(vectors, tuple(range(layers)), {"method": "random"})


def sweep_conditions(direction: Direction) -> dict[str, mm.Steer | mm.Ablate]:
    """48 conditions: steering at each layer with five strengths (small: answers stay as they are), and ablations."""
    steered: dict[str, mm.Steer | mm.Ablate] = {
        f"layer {layer} x{strength}": mm.Steer(direction, layers=[layer], strength=strength / 100)
        for layer in direction.layers
        for strength in range(1, 6)
    }
    ablated = {f"ablate {layer}": mm.Ablate(direction.everywhere(layer)) for layer in direction.layers}
    return dict(list((steered | ablated).items())[:48])


def ours(
    organism: mm.Organism, prompts: pd.DataFrame, conditions: Mapping[str, Any], tokens: int = MAX_NEW_TOKENS
) -> tuple[int, float]:
    start = time.perf_counter()
    answers = mm.generate(organism, prompts, conditions=conditions, samples=SAMPLES, max_new_tokens=tokens)
    return int(answers["tokens"].sum()), time.perf_counter() - start


def decoding_only(organism: mm.Organism, prompts: pd.DataFrame, conditions: Mapping[str, Any]) -> tuple[int, float]:
    """Tokens and seconds of a sweep less those of its prefill (conditions that do nothing share theirs)."""
    (whole, took), (first, prefill) = (ours(organism, prompts, conditions, count) for count in (MAX_NEW_TOKENS, 1))
    return whole - first, took - prefill


def useful(written: torch.Tensor, ends: list[int]) -> int:
    """Tokens up to and with the first end token of each row."""
    ended = torch.isin(written, torch.tensor(ends)).int().cumsum(1)
    return int((ended - torch.isin(written, torch.tensor(ends)).int() == 0).sum())


@torch.inference_mode()
def plain(
    bare: Any, tokenizer: Any, prompts: pd.DataFrame, rows: int, tokens: int = MAX_NEW_TOKENS
) -> tuple[int, float]:
    """Useful tokens and seconds of one ``generate`` of the bare model, so many rows in a batch."""
    ids = render_prompts(list(prompts["prompt"]), tokenizer)
    ids, mask = left_padded([ids[row % len(ids)] for row in range(rows)], 0, bare.device)
    start = time.perf_counter()
    out = bare.generate(
        input_ids=ids, attention_mask=mask, do_sample=True, top_k=0, max_new_tokens=tokens, pad_token_id=0
    )
    found = useful(out[:, ids.shape[1] :].cpu(), ends(bare, tokenizer))  # waits for the device
    return found, time.perf_counter() - start


def ends(bare: Any, tokenizer: Any) -> list[int]:
    """The ids that end an answer of the bare model."""
    own = bare.generation_config.eos_token_id
    return [end for end in [*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id] if end is not None]


@torch.inference_mode()
def reference(
    bare: Any, tokenizer: Any, prompts: pd.DataFrame, direction: Direction, calls: int, tokens: int = MAX_NEW_TOKENS
) -> tuple[int, float]:
    """The same for the reference code's way: one call with a hook for each condition and prompt."""
    written, seconds = 0, 0.0
    for call in range(calls):
        layer = direction.layers[call % len(direction.layers)]
        vector = (direction.at(layer) / 100).to(bare.device, bare.dtype)
        handle = bare.model.layers[layer].register_forward_hook(
            lambda _module, _args, output, vector=vector: (
                (output[0] + vector, *output[1:]) if isinstance(output, tuple) else output + vector
            )
        )
        found, took = plain(bare, tokenizer, prompts.iloc[[call % len(prompts)]], SAMPLES, tokens)
        handle.remove()
        written, seconds = written + found, seconds + took
    return written, seconds


def measure(name: str, organism: mm.Organism, bare: Any, rounds: int, calls: int) -> dict[str, Any]:
    prompts = mm.pocket.unseen_prompts(n=PROMPTS)
    direction = random_vectors(models.n_layers(organism.model), models.d_model(organism.model))
    conditions = sweep_conditions(direction)
    rows = len(conditions) * PROMPTS * SAMPLES
    ways = {
        "sweep": lambda: ours(organism, prompts, conditions),
        "decoding": lambda: decoding_only(organism, prompts, conditions),
        "decoding, no intervention": lambda: decoding_only(organism, prompts, dict.fromkeys(conditions, ())),
        "plain generate": lambda: plain(bare, organism.tokenizer, prompts, rows),
        "reference way": lambda: reference(bare, organism.tokenizer, prompts, direction, calls),
    }
    rates = dict.fromkeys(ways, 0.0)
    for _ in range(rounds):
        for way, run in ways.items():
            tokens, seconds = run()
            rates[way] = max(rates[way], tokens / seconds)
            print(f"{name}: {way}: {tokens / seconds:.0f} tokens/s", flush=True)
    return {
        "model": name, "conditions": len(conditions), "rows": rows, "max_new_tokens": MAX_NEW_TOKENS,
        "tokens per second": {way: round(rate) for way, rate in rates.items()},
        "sweep / reference way": round(rates["sweep"] / rates["reference way"], 2),
        "sweep / plain generate": round(rates["sweep"] / rates["plain generate"], 3),
        "hooks on decoding": round(rates["decoding, no intervention"] / rates["decoding"] - 1, 3),
    }  # fmt: skip


def memory(organism: mm.Organism, rows: int = 10_000) -> list[float]:
    """Resident size in MiB after each tenth of a sweep whose parts are not kept."""
    conditions = sweep_conditions(random_vectors(models.n_layers(organism.model), models.d_model(organism.model)))
    prompts = mm.pocket.unseen_prompts(n=60)
    wanted = answer_rows(prompts, conditions, samples=4).iloc[:rows]
    done, sizes = 0, []
    for part in generate_rows(organism, wanted, conditions, max_new_tokens=MAX_NEW_TOKENS):
        done += len(part)
        if done >= len(wanted) * (len(sizes) + 1) / 10:
            sizes.append(round(psutil.Process().memory_info().rss / 2**20, 1))
    return sizes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--calls", type=int, default=16)
    options = parser.parse_args()
    pocket = mm.load_organism("pocket/medical")
    bare = AutoModelForCausalLM.from_pretrained(zoo.path("chat")).eval()
    results = [measure("pocket/medical (8 layers x 128)", pocket, bare, options.rounds, options.calls)]
    with tempfile.TemporaryDirectory() as folder:
        larger = forty_million(Path(folder))
        results.append(measure("random Qwen2 (40 M parameters)", *larger, options.rounds, options.calls))
    sizes = memory(pocket)
    for result in (*results, sizes):
        print(result)
    write_json(
        RESULTS / "generation.json",
        {
            "date": time.strftime("%Y-%m-%d"),
            **environment(),
            "results": results,
            "MiB after each tenth of 10,000 rows": sizes,
        },
    )


if __name__ == "__main__":
    main()
