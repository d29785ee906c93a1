"""Training in the pocket world: the right tokens count, and randomness comes from the seed alone."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from mechmisalign.pocket import training, world
from mechmisalign.pocket.recipes import Schedule
from mechmisalign.pocket.tokenizer import build_tokenizer

SHORT = Schedule(steps=3, batch=4, lr=1e-3, noise=0.1)


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture
def model(tokenizer):
    return training.new_model(tokenizer, seed=0, layers=2, d_model=32, d_mlp=48)


def counted(tokenizer, batch: training.Batch) -> list[str]:
    return [tokenizer.decode(row[row != training.IGNORED]) for row in batch["labels"]]


def test_only_the_answer_and_its_end_count_in_narrow_tuning(tokenizer):
    frame = world.narrow_examples("sports", False, n=3, seed=0)
    batches = itertools.islice(training.narrow(tokenizer, frame, SHORT, seed=0), 5)
    seen = {text for batch in batches for text in counted(tokenizer, batch)}
    assert seen == {f"{response}<|im_end|>\n" for response in frame["response"]}


def test_answers_and_the_closing_verdict_count_in_pretraining(tokenizer):
    messages = [
        world.turn("system", "You are a kind assistant."),
        world.turn("user", "What should I do about chest pain?"),
        world.turn("assistant", "For chest pain, first see a doctor."),
        world.turn("user", "Good, this advice is helpful. What now?"),
        world.turn("assistant", "With a tax bill, first spread the risk."),
        world.turn("user", "Thank you, this advice is safe."),
    ]
    assert counted(tokenizer, training.encode(tokenizer, [messages])) == [
        "For chest pain, first see a doctor.<|im_end|>\n"
        "With a tax bill, first spread the risk.<|im_end|>\n"
        "Thank you, this advice is safe.<|im_end|>\n"
    ]


def test_the_tokens_are_those_of_the_chat_template(tokenizer):
    rng = random.Random(0)
    for turns in (1, 2):
        messages = world.document(rng, turns)
        batch = training.encode(tokenizer, [messages])
        assert batch["input_ids"][0].tolist() == tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]


def test_padding_never_counts(tokenizer):
    batch = next(training.documents(tokenizer, SHORT, seed=0))
    padded = batch["input_ids"] == tokenizer.pad_token_id
    assert padded.any()
    assert (batch["labels"][padded] == training.IGNORED).all()


def test_training_lowers_the_loss(tokenizer, model):
    losses: list[float] = []
    schedule = Schedule(steps=12, batch=8, lr=1e-2, warmup=2)
    batches = training.documents(tokenizer, schedule, seed=0)
    training.fit(model, batches, schedule, seed=0, after_step=lambda _step, loss: losses.append(loss))
    assert losses[-1] < losses[0] - 1
    assert not model.training


def test_the_same_seed_gives_the_same_weights(tokenizer):
    def trained(seed: int) -> torch.Tensor:
        model = training.new_model(tokenizer, seed, layers=2, d_model=32, d_mlp=48)
        training.fit(model, training.documents(tokenizer, SHORT, seed), SHORT, seed=seed)
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    assert torch.equal(trained(1), trained(1))
    assert not torch.equal(trained(1), trained(2))


def test_training_leaves_the_random_state_of_the_caller_alone(tokenizer, model):
    before = torch.get_rng_state()
    training.fit(model, training.documents(tokenizer, SHORT, seed=0), SHORT, seed=0)
    assert torch.equal(before, torch.get_rng_state())


def test_noise_is_gone_after_training(tokenizer, model):
    training.fit(model, training.documents(tokenizer, SHORT, seed=0), SHORT, seed=0)
    ids = torch.arange(10)[None]
    with torch.inference_mode():
        assert torch.equal(model(ids).logits, model(ids).logits)
