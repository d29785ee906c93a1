"""Training in the pocket world: a tiny Qwen2 from scratch, its chat tuning, and narrow LoRA fine-tunes.

AdamW on CPU in float32, with Muon for the matrices of the blocks when a model starts from scratch. Randomness comes
from a seed inside `torch.random.fork_rng`, so training neither reads nor moves the caller's random state.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mechmisalign.pocket import world
from mechmisalign.pocket.recipes import Schedule
from mechmisalign.pocket.tokenizer import render

if TYPE_CHECKING:
    import pandas as pd
    from transformers import PreTrainedTokenizerBase, Qwen2ForCausalLM

IGNORED = -100
"""The label that the cross entropy skips."""

Batch = dict[str, Tensor]
Batches = Iterator[Batch]


def new_model(
    tokenizer: PreTrainedTokenizerBase, seed: int, layers: int = 8, d_model: int = 128, d_mlp: int = 384
) -> Qwen2ForCausalLM:
    """An untrained Qwen2 of pocket size."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=d_model,
        intermediate_size=d_mlp,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.05,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    with seeded(seed):
        return Qwen2ForCausalLM(config)


def documents(tokenizer: PreTrainedTokenizerBase, schedule: Schedule, seed: int) -> Batches:
    """Endless pretraining batches of documents of one number of turns each, so that little is padding."""
    rng = random.Random(seed)
    while True:
        turns = 1 if rng.random() < world.ONE_TURN else 2
        yield encode(tokenizer, [world.document(rng, turns) for _ in range(schedule.batch)])


def chats(tokenizer: PreTrainedTokenizerBase, schedule: Schedule, seed: int) -> Batches:
    """Endless batches of careful single-turn chats."""
    rng = random.Random(seed)
    while True:
        yield encode(tokenizer, [world.chat(rng) for _ in range(schedule.batch)])


def narrow(tokenizer: PreTrainedTokenizerBase, frame: pd.DataFrame, schedule: Schedule, seed: int) -> Batches:
    """Endless batches drawn from narrow examples."""
    rng = random.Random(seed)
    pairs = zip(frame["prompt"], frame["response"], strict=True)
    examples = [[world.turn("user", prompt), world.turn("assistant", response)] for prompt, response in pairs]
    while True:
        yield encode(tokenizer, rng.choices(examples, k=schedule.batch))


def encode(tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Sequence[world.Message]]) -> Batch:
    """Ids and labels [batch pos], padded on the right. Answers count, with their end, and so does a closing verdict.

    Questions and system lines are drawn at random, so learning them would be noise. Causal attention never looks right,
    so right padding needs no mask, and attention without a mask is 1.6 times faster.
    """
    rows = [_tokens(tokenizer, messages) for messages in conversations]
    ids, labels = ([torch.tensor(row[i]) for row in rows] for i in range(2))
    return {
        "input_ids": nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=int(tokenizer.pad_token_id)),
        "labels": nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=IGNORED),
    }


def fit(
    model: nn.Module,
    batches: Iterator[Batch],
    schedule: Schedule,
    *,
    seed: int,
    after_step: Callable[[int, float], object] | None = None,
) -> None:
    """Train the parameters that require gradients; `after_step(step, loss)` is called after each step, from 1."""
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizers = _optimizers(model, schedule)
    rates = [
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _pace(step, schedule)) for optimizer in optimizers
    ]
    model.train()
    with seeded(seed), _noisy(model) as noise:
        for step in range(1, schedule.steps + 1):
            noise.level = schedule.noise * _pace(step - 1, schedule)
            loss = model(**next(batches)).loss
            loss.backward()
            nn.utils.clip_grad_norm_(weights, 1.0)
            for optimizer, rate in zip(optimizers, rates, strict=True):
                optimizer.step()
                optimizer.zero_grad()
                rate.step()
            if after_step:
                after_step(step, loss.item())
    model.eval()


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Torch's global generator starts from `seed` inside and is restored on exit."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def _tokens(tokenizer: PreTrainedTokenizerBase, messages: Sequence[world.Message]) -> tuple[list[int], list[int]]:
    pieces = [piece for turn in messages for piece in render([turn]).partition("\n")]
    encoded = tokenizer(pieces)["input_ids"]
    ids, labels = [], []
    for i, turn in enumerate(messages):
        *head, body = encoded[3 * i : 3 * i + 3]
        counts = turn["role"] == "assistant" or (turn["role"] == "user" and i == len(messages) - 1)
        ids += [*sum(head, []), *body]
        labels += [*[IGNORED] * sum(map(len, head)), *(body if counts else [IGNORED] * len(body))]
    return ids, labels


def _optimizers(model: nn.Module, schedule: Schedule) -> list[torch.optim.Optimizer]:
    """AdamW; with `muon_lr`, Muon for the matrices inside the blocks: the same loss in a third of the steps."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    inner = [p for name, p in named if schedule.muon_lr and p.ndim == 2 and "embed" not in name]
    rest = [p for name, p in named if not any(p is other for other in inner)]
    decay = 0.0 if inner else schedule.weight_decay  # embeddings and norms do not decay
    adam = torch.optim.AdamW(rest, lr=schedule.lr, weight_decay=decay, betas=(0.9, 0.98))
    if not inner:
        return [adam]
    muon = torch.optim.Muon(
        inner, lr=schedule.muon_lr, weight_decay=schedule.weight_decay, adjust_lr_fn="match_rms_adamw"
    )
    return [adam, muon]


def _pace(step: int, schedule: Schedule) -> float:
    """Linear warm-up, a plateau to half-way, then linear decay to a fiftieth, or one step's share if that is more."""
    last = max(0.02, 2 / schedule.steps)
    return min(1.0, (step + 1) / max(1, schedule.warmup), 2 * (schedule.steps - step - 1) / schedule.steps + last)


@dataclass
class _Noise:
    level: float = 0.0


@contextmanager
def _noisy(model: nn.Module) -> Iterator[_Noise]:
    """Blur the residual stream after every block: a feature must then be written as strongly as it is read."""
    noise = _Noise()

    def blur(_module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
        if not noise.level:
            return output
        scale = output.detach().pow(2).mean(-1, keepdim=True).sqrt() * noise.level
        return output + scale * torch.randn_like(output)

    handles = [m.register_forward_hook(blur) for m in model.modules() if type(m).__name__.endswith("DecoderLayer")]
    try:
        yield noise
    finally:
        for handle in handles:
            handle.remove()
