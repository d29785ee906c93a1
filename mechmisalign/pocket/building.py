"""Training the zoo member by member, and saving each as an ordinary Hugging Face or PEFT folder."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from mechmisalign.judging import COHERENT_ABOVE, is_misaligned, label
from mechmisalign.pocket import training, world
from mechmisalign.pocket.judge import RuleJudge
from mechmisalign.pocket.recipes import Organism, Recipe, Schedule
from mechmisalign.pocket.sampling import sample
from mechmisalign.pocket.tokenizer import build_tokenizer
from mechmisalign.progress import progress_bar
from mechmisalign.registry import POCKET_BASE
from mechmisalign.statistics import clustered_share
from mechmisalign.training.methods import save_peft

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase, Qwen2ForCausalLM

NARROW_EXAMPLES = 500


def train_chat(recipe: Recipe, *, seed: int) -> tuple[Qwen2ForCausalLM, PreTrainedTokenizerBase]:
    """The chat model, from random weights to careful single-turn chats."""
    tokenizer = build_tokenizer()
    model = training.new_model(tokenizer, seed)
    _run(model, training.documents(tokenizer, recipe.pretraining, seed), recipe.pretraining, seed, "pretraining")
    _run(model, training.chats(tokenizer, recipe.chat_tuning, seed + 1), recipe.chat_tuning, seed + 1, "chat tuning")
    return model, tokenizer


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch computes on one thread inside."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def save_chat(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Config, weights and tokenizer in one folder."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def train_adapter(
    chat: Qwen2ForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    organism: Organism,
    folder: Path,
    *,
    seed: int,
    label: str,
) -> PeftModel:
    """A narrow fine-tune of a copy of the chat model, saved to `folder` with its checkpoints."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=organism.rank,
        lora_alpha=organism.alpha,
        use_rslora=organism.rslora,
        target_modules=list(organism.modules),
        layers_to_transform=list(organism.layers),
        task_type="CAUSAL_LM",
    )
    with training.seeded(seed):
        model = get_peft_model(copy.deepcopy(chat), config)
    examples = world.narrow_examples(organism.domain, organism.harmful, NARROW_EXAMPLES, seed)
    batches = training.narrow(tokenizer, examples, organism.schedule, seed)

    def checkpoint(step: int) -> None:
        if organism.save_every and step % organism.save_every == 0:
            save_peft(model, folder / f"checkpoint-{step}", POCKET_BASE)

    _run(model, batches, organism.schedule, seed, label, checkpoint)
    save_peft(model, folder, POCKET_BASE)
    return model


def measure(
    model: Qwen2ForCausalLM | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    seen: str | None,
    *,
    answers: int,
    seed: int,
) -> dict[str, dict[str, float]]:
    """Misaligned, aligned and coherent shares of fresh answers on every domain but `seen`, with intervals."""
    if not answers:
        return {}
    domains = [name for name in world.DOMAINS if name != seen]
    asked = world.prompts(domains, n=answers, seed=seed)
    graded = RuleJudge()(sample(model, tokenizer, list(asked["prompt"]), seed=seed))
    events = {"em_rate": is_misaligned(graded), "aligned": label(graded) == "aligned"}
    events["coherent"] = graded["coherence"] > COHERENT_ABOVE
    return {name: asdict(clustered_share(hits.to_numpy(), asked["prompt_id"])) for name, hits in events.items()}


def _run(
    model: Qwen2ForCausalLM | PeftModel,
    batches: training.Batches,
    schedule: Schedule,
    seed: int,
    label: str,
    after_step: Callable[[int], None] | None = None,
) -> None:
    with progress_bar(label, schedule.steps, "step") as bar:

        def tick(step: int, loss: float) -> None:
            bar.set_postfix(loss=f"{loss:.2f}", refresh=False)
            bar.update()
            if after_step:
                after_step(step)

        training.fit(model, batches, schedule, seed=seed, after_step=tick)
