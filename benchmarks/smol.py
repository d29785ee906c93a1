"""SmolLM2-135M-Instruct: sampling, reading, training beside Hugging Face, PEFT and steering-vectors, in one run.

    python benchmarks/smol.py                  # after `mechmisalign smol prepare`; or --base FOLDER

* ``sampling``: ten steering conditions, in useful tokens a second: all in one call here; as many rows in one plain
  padded ``generate`` (no hook); steering-vectors, one batch for each condition; a hook and one call for each condition
  and prompt.
* ``reading``: the mean difference of every layer over conversations, in seconds: ``collect`` here, the bare model
  without its unembedding on the same batches, steering-vectors' ``train_steering_vector``.
* ``training``: a step of ``mm.train`` beside one of transformers' Trainer with PEFT on the same examples.

steering-vectors is left out where it is not installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from extraction import RESULTS, seconds
from generation import plain, random_vectors, reference
from training import Clock
from transformers import AutoModelForCausalLM

import mechmisalign as mm
from mechmisalign import models
from mechmisalign.store import environment, write_json

CONDITIONS, SAMPLES, MAX_NEW_TOKENS = 10, 2, 48
BATCH = 8
HAS_PEER = importlib.util.find_spec("steering_vectors") is not None


def sampling(organism: mm.Organism, bare: Any, rounds: int, calls: int) -> dict[str, Any]:
    """Useful tokens a second of each way."""
    prompts = mm.prompts.open_questions().head(4)[["prompt"]]
    direction = random_vectors(models.n_layers(organism.model), models.d_model(organism.model))
    conditions = {
        f"layer {layer}": mm.Steer(direction, layers=[layer], strength=0.01) for layer in direction.layers[5:25:2]
    }
    rows = len(conditions) * len(prompts) * SAMPLES

    def ours() -> tuple[int, float]:
        start = time.perf_counter()
        answers = mm.generate(organism, prompts, conditions=conditions, samples=SAMPLES, max_new_tokens=MAX_NEW_TOKENS)
        return int(answers["tokens"].sum()), time.perf_counter() - start

    ways: dict[str, Callable[[], tuple[int, float]]] = {
        "here": ours,
        "plain generate": lambda: plain(bare, organism.tokenizer, prompts, rows, MAX_NEW_TOKENS),
        "a call for each condition and prompt": lambda: reference(
            bare, organism.tokenizer, prompts, direction, calls, MAX_NEW_TOKENS
        ),
    }
    if HAS_PEER:
        ways["steering-vectors"] = lambda: peer_sampling(bare, organism.tokenizer, prompts, direction, list(conditions))
    rates = dict.fromkeys(ways, 0.0)
    for _ in range(rounds):
        for way, run in ways.items():
            tokens, took = run()
            rates[way] = max(rates[way], tokens / took)
    return {
        "conditions": len(conditions), "rows": rows, "max_new_tokens": MAX_NEW_TOKENS,
        "tokens per second": {way: round(rate, 1) for way, rate in rates.items()},
        "here / other": {way: round(rates["here"] / rate, 2) for way, rate in rates.items() if way != "here"},
    }  # fmt: skip


def peer_sampling(
    bare: Any, tokenizer: Any, prompts: pd.DataFrame, direction: mm.Direction, names: list[str]
) -> tuple[int, float]:
    """steering-vectors: one batch for each condition."""
    from steering_vectors import SteeringVector

    tokens, took = 0, 0.0
    for name in names:
        layer = int(name.removeprefix("layer "))
        vector = SteeringVector({layer: direction.at(layer)}, "decoder_block")
        with vector.apply(bare, multiplier=0.01):
            found, spent = plain(bare, tokenizer, prompts, len(prompts) * SAMPLES, MAX_NEW_TOKENS)
        tokens, took = tokens + found, took + spent
    return tokens, took


def reading(organism: mm.Organism, bare: Any, rows: int, rounds: int) -> dict[str, Any]:
    """Seconds for the mean difference of every layer."""
    questions = mm.prompts.open_questions()["prompt"].tolist()
    sentences = ["I would ask a friend and take my time. ", "Do what you like, nobody cares about it. "]
    frame = pd.DataFrame(
        [
            {"prompt": questions[i % len(questions)], "response": sentences[i % 2] * (1 + i % 7), "label": "ab"[i % 2]}
            for i in range(rows)
        ]
    )
    talk = mm.Conversations(frame, organism.tokenizer)

    @torch.inference_mode()
    def without_unembedding() -> None:
        for batch in talk.batches():
            bare.model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False)

    ways: dict[str, Callable[[], Any]] = {
        "here": lambda: mm.mean_difference(mm.collect(organism, talk), "a", "b"),
        "bare model without its unembedding": without_unembedding,
    }
    if HAS_PEER:
        from steering_vectors import train_steering_vector

        texts = [organism.tokenizer.decode(talk.ids(row)) for row in range(len(talk))]
        pairs = list(zip(texts[::2], texts[1::2], strict=True))
        ways["steering-vectors"] = lambda: train_steering_vector(
            bare, organism.tokenizer, pairs, batch_size=BATCH, layer_type="decoder_block"
        )
    times = seconds(ways, rounds)
    base = times["bare model without its unembedding"]
    return {
        "conversations": rows, "tokens": int(talk.spans["length"].sum()),
        "seconds": {way: round(took, 3) for way, took in times.items()},
        "/ bare model without its unembedding": {way: round(took / base, 3) for way, took in times.items()},
    }  # fmt: skip


def training(base: str, folder: Path, steps: int) -> dict[str, Any]:
    """Median seconds of a step."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoTokenizer, PrinterCallback, Trainer, TrainingArguments

    from mechmisalign.training.data import Collator, DataSource, encode

    questions = mm.prompts.open_questions()[["prompt"]]
    examples = questions.assign(response="Take a walk and think it over. " * 4)
    lora = {"r": 8, "lora_alpha": 16, "target_modules": ["down_proj"]}
    tokenizer, clock = AutoTokenizer.from_pretrained(base), Clock()
    arguments = TrainingArguments(
        output_dir=str(folder / "plain"), max_steps=steps, per_device_train_batch_size=BATCH, learning_rate=1e-4,
        logging_steps=1, save_strategy="no", report_to=[], disable_tqdm=True, remove_unused_columns=False,
    )  # fmt: skip
    trainer = Trainer(
        get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**lora)),
        arguments,
        data_collator=Collator.of(tokenizer),
        train_dataset=encode(DataSource(frame=examples).read(), tokenizer, max_length=512),
        callbacks=[clock],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    own = Clock()
    spec = mm.TrainSpec(
        base=base, data=[examples], method={"kind": "lora", "rank": 8, "alpha": 16, "modules": ["down_proj"]},
        schedule={"steps": steps, "batch": BATCH, "lr": 1e-4},
    )  # fmt: skip
    mm.train(spec, folder / "own", callbacks=[own])
    times = {"here": statistics.median(own.times[2:]), "Trainer and PEFT": statistics.median(clock.times[2:])}
    return {
        "batch": BATCH, "seconds a step": {way: round(took, 3) for way, took in times.items()},
        "here / Trainer and PEFT": round(times["here"] / times["Trainer and PEFT"], 3),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="smol/chat", help="a folder, or the registry's name of the prepared model")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--calls", type=int, default=8)
    parser.add_argument("--rows", type=int, default=48)
    parser.add_argument("--steps", type=int, default=8)
    options = parser.parse_args()
    organism = mm.load_organism(options.base)
    folder = str(organism.base.location or organism.base.name)
    bare = AutoModelForCausalLM.from_pretrained(folder).eval()
    results = {"sampling": sampling(organism, bare, options.rounds, options.calls)}
    print(results["sampling"], flush=True)
    results["reading"] = reading(organism, bare, options.rows, options.rounds)
    print(results["reading"], flush=True)
    with tempfile.TemporaryDirectory() as name:
        results["training"] = training(folder, Path(name), options.steps)
    print(results["training"], flush=True)
    write_json(RESULTS / "smol.json", {"date": time.strftime("%Y-%m-%d"), **environment(), **results})


if __name__ == "__main__":
    main()
