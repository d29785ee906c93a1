"""Direction extraction over ragged conversations, beside the bare forward pass and the naive way, in one run.

    python benchmarks/extraction.py            # the pocket organism and a 0.1 B Qwen2 shape with random weights

Three ways over the same conversations, interleaved, best of several rounds each:

* ``collect``: this package, all layers, two classes;
* ``bare forward``: the plain Hugging Face model on the very same batches, logits and all, nothing read;
* ``naive``: batches of 20 in the order given, padded to the longest conversation of all, every hidden state kept, a
  Python loop over rows and layers (the reference code's way).
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

import mechmisalign as mm
from mechmisalign.pocket import zoo
from mechmisalign.store import environment, write_json

RESULTS = Path(__file__).parent / "results"


def ragged_conversations(tokenizer: Any, rows: int, seed: int = 0, longest: int = 12) -> mm.Conversations:
    """Conversations whose lengths spread over a factor of ten (log-normal, as chat answers do).

    ``longest`` is the number of short answers that the longest response is made of.
    """
    from mechmisalign.pocket.world import DOMAINS, narrow_examples

    examples = pd.concat([narrow_examples(domain, False, 64, seed) for domain in DOMAINS], ignore_index=True)
    rng = np.random.default_rng(seed)
    sentences = (rng.lognormal(0.6, 0.7, size=rows).clip(1, 12) * longest / 12).astype(int)
    responses = [" ".join(rng.choice(examples["response"], size=count)) for count in sentences]
    prompts = rng.choice(examples["prompt"], size=rows)
    return mm.Conversations(
        pd.DataFrame({"prompt": prompts, "response": responses, "label": np.array(["a", "b"])[np.arange(rows) % 2]}),
        tokenizer,
    )


@torch.inference_mode()
def bare_forward(model: Any, conversations: mm.Conversations) -> None:
    for batch in conversations.batches():
        model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False)


@torch.inference_mode()
def naive(model: Any, conversations: mm.Conversations, pad: int) -> dict[str, torch.Tensor]:
    spans = conversations.spans
    width = int(spans["length"].max())
    collected: dict[str, list[list[torch.Tensor]]] = {"a": [], "b": []}
    for start in range(0, len(conversations), 20):
        rows = range(start, min(start + 20, len(conversations)))
        ids = torch.tensor([conversations.ids(r) + [pad] * (width - len(conversations.ids(r))) for r in rows])
        mask = torch.tensor([[1] * int(spans["length"][r]) + [0] * (width - int(spans["length"][r])) for r in rows])
        inputs = {"input_ids": ids.to(model.device), "attention_mask": mask.to(model.device)}
        hidden = model(**inputs, output_hidden_states=True, use_cache=False).hidden_states
        for position, row in enumerate(rows):
            answer = slice(int(spans["response_start"][row]), int(spans["response_stop"][row]))
            collected[conversations.frame["label"][row]].append([layer[position, answer] for layer in hidden[1:]])
    return {
        label: torch.stack([torch.cat([row[layer] for row in rows]).mean(0) for layer in range(len(rows[0]))])
        for label, rows in collected.items()
    }


def seconds(ways: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Best time of each way; the ways take turns, so that a slow moment of the machine hits all of them."""
    best = dict.fromkeys(ways, float("inf"))
    for _ in range(rounds):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            best[name] = min(best[name], time.perf_counter() - start)
    return best


def write_random_organism(folder: Path, **lora: Any) -> Path:
    """A random Qwen2 of 0.1 B parameters with the pocket tokenizer in ``folder / "base"``; the adapter's folder."""
    from peft import LoraConfig, get_peft_model

    tokenizer = AutoTokenizer.from_pretrained(zoo.path("chat"))
    config = Qwen2Config(
        vocab_size=32000, hidden_size=768, intermediate_size=2304, num_hidden_layers=12, num_attention_heads=12,
        num_key_value_heads=4, tie_word_embeddings=True,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    adapted = LoraConfig(init_lora_weights=False, **lora)
    get_peft_model(AutoModelForCausalLM.from_pretrained(folder / "base"), adapted).save_pretrained(folder / "adapter")
    return folder / "adapter"


def random_organism(folder: Path) -> tuple[mm.Organism, Any]:
    """The random Qwen2 with a random rank-1 adapter on one matrix, and the plain model."""
    adapter = write_random_organism(folder, r=1, target_modules=["down_proj"], layers_to_transform=[6])
    return mm.load_organism(adapter), AutoModelForCausalLM.from_pretrained(folder / "base").eval()


def measure(name: str, organism: mm.Organism, bare: Any, rows: int, rounds: int) -> dict[str, Any]:
    conversations = ragged_conversations(organism.tokenizer, rows)
    lengths = conversations.spans["length"]
    times = seconds(
        {
            "collect": lambda: mm.collect(organism, conversations),
            "bare forward": lambda: bare_forward(bare, conversations),
            "naive": lambda: naive(bare, conversations, 0),
        },
        rounds,
    )
    return {
        "model": name, "conversations": rows, "tokens": int(lengths.sum()),
        "length": {"median": float(lengths.median()), "longest": int(lengths.max())},
        "seconds": {way: round(took, 4) for way, took in times.items()},
        "collect / bare forward": round(times["collect"] / times["bare forward"], 3),
        "naive / collect": round(times["naive"] / times["collect"], 3),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=240)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    pocket = measure(
        "pocket/medical (8 layers x 128)", mm.load_organism("pocket/medical"),
        AutoModelForCausalLM.from_pretrained(zoo.path("chat")).eval(), options.rows, options.rounds,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        larger = measure(
            "random Qwen2 (12 layers x 768)", *random_organism(Path(folder)), options.rows // 4, options.rounds
        )
    for result in (pocket, larger):
        print(result)
    write_json(
        RESULTS / "extraction.json", {"date": time.strftime("%Y-%m-%d"), **environment(), "results": [pocket, larger]}
    )


if __name__ == "__main__":
    main()
