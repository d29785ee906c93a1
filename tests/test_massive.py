"""Attention sinks: found where there is one, and left alone by ablation, its fused rows and means."""

from threading import Thread

import pandas as pd
import pytest
import torch
from conftest import new_tokenizer, random_model
from torch.testing import assert_close

import mechmisalign as mm
from mechmisalign import _threads, models
from mechmisalign.directions import Direction, random_direction
from mechmisalign.massive import first_token_is_sink, has_sink

PROMPTS = ["Hello there?", "What should I do about my headache, and when?"]


def loaded(folder, make_adapter, *, sink):
    """An organism; with a sink, the token that begins every chat has an embedding of 500 times the length."""
    tokenizer = new_tokenizer("qwen2")
    model = random_model("qwen2", tokenizer)
    organism = mm.load_organism(make_adapter(folder, layers=(1,)), model, tokenizer=tokenizer)
    if sink:
        first = mm.Conversations(pd.DataFrame({"prompt": ["a"], "response": ["b"]}), organism.tokenizer).ids(0)[0]
        with torch.no_grad():
            models.hf_model(organism.model).get_input_embeddings().weight[first] *= 500
    return organism


@pytest.fixture(scope="module")
def sinking(tiny_models, make_adapter):
    return loaded(tiny_models["qwen2"], make_adapter, sink=True)


@pytest.fixture(scope="module")
def plain(tiny_models, make_adapter):
    return loaded(tiny_models["qwen2"], make_adapter, sink=False)


@pytest.fixture(scope="module")
def direction(plain):
    width = models.d_model(plain.model)
    return random_direction(Direction(torch.ones(3, width), (0, 1, 2), {}), seed=1)


def stream(organism, ids, mask, *edits, layer=1):
    kept = []
    with torch.inference_mode(), organism.apply(*edits):
        models.run_until(organism.model, ids, mask, {layer: lambda resid: kept.append(resid.clone())})
    return kept[0]


def test_massive_activations_say_where_and_how_much(sinking, plain):
    found = mm.massive_activations(sinking, PROMPTS)
    assert found.sink
    assert set(found.tokens.loc[found.tokens["position"] == 0, "conversation"]) == {0, 1}
    assert (found.tokens["ratio"] > 10).all()
    assert found.tokens["share"].between(0, 1).all()
    assert "an attention sink" in str(found)
    assert not len(found.elsewhere) or (found.elsewhere["position"] > 0).all()
    nothing = mm.massive_activations(plain, PROMPTS)
    assert not nothing.sink
    assert nothing.tokens.empty
    assert "no token" in str(nothing)


@pytest.mark.parametrize("texts, threshold", [([], 10.0), (PROMPTS, 1.0)])
def test_nothing_to_read_and_thresholds_below_one_are_refused(plain, texts, threshold):
    with pytest.raises(ValueError, match=r"no text|threshold"):
        mm.massive_activations(plain, texts, threshold=threshold)


def test_ablation_leaves_the_first_real_token_alone_under_padding(sinking, direction):
    ids = torch.randint(5, 200, (2, 6), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    before = stream(sinking, ids, mask)
    after = stream(sinking, ids, mask, mm.Ablate(direction, layers=[1]))
    for row, first in enumerate((2, 0)):
        assert_close(after[row, first], before[row, first], rtol=0, atol=0)
        assert_close((after[row, first + 1 :] @ direction.unit(1)).abs().max(), torch.tensor(0.0), rtol=0, atol=1e-4)
    everywhere = stream(sinking, ids, mask, mm.Ablate(direction, layers=[1], positions="all"))
    assert float((everywhere @ direction.unit(1)).abs().max()) < 1e-3


def test_without_a_sink_the_default_is_the_edit_of_all_positions_bit_for_bit(plain, direction):
    assert not has_sink(plain)
    ids = torch.randint(5, 200, (2, 6), generator=torch.Generator().manual_seed(0))
    edits = [
        stream(plain, ids, torch.ones_like(ids), mm.Ablate(direction, positions=each)) for each in ("all", "non_sink")
    ]
    assert torch.equal(*edits)


def test_rows_of_many_conditions_leave_the_sink_alone_as_each_does_alone(sinking, direction):
    conditions = {
        "none": (),
        "ablated": (mm.Ablate(direction),),
        "everywhere": (mm.Ablate(direction, positions="all"),),
        "response": (mm.Steer(direction, layers=[1], strength=5.0, positions="response"),),
        "clamped": (mm.Clamp(direction, 3.0),),
    }
    options = {"samples": 2, "max_new_tokens": 5, "seed": 3}
    together = mm.generate(sinking, PROMPTS, conditions=conditions, **options)
    for name, edits in conditions.items():
        alone = mm.generate(sinking, PROMPTS, conditions={name: edits}, **options)
        assert list(together.loc[together["condition"] == name, "response"]) == list(alone["response"])


def test_means_and_norms_leave_the_sink_out_unless_it_is_asked_for(sinking, plain):
    frame = pd.DataFrame({"prompt": PROMPTS, "response": ["Yes.", "No."], "label": ["a", "a"]})
    for organism, differs in ((sinking, True), (plain, False)):
        talk = mm.Conversations(frame, organism.tokenizer)
        usual = mm.collect(organism, talk, span="all")
        everything = mm.collect(organism, talk, span="all", positions="all")
        assert bool((everything.norm > 1.2 * usual.norm).any()) is differs
        assert (int(usual.tokens[0]) < int(everything.tokens[0])) is differs
        response = mm.collect(organism, talk).mean
        assert torch.equal(response, mm.collect(organism, talk, positions="all").mean)


def test_a_model_in_training_is_seen_to_have_a_sink_on_its_batch(sinking, plain):
    for organism, expected in ((sinking, True), (plain, False)):
        frame = pd.DataFrame({"prompt": PROMPTS, "response": ["Yes.", "No."]})
        batch = next(mm.Conversations(frame, organism.tokenizer).batches("all"))
        assert first_token_is_sink(models.hf_model(organism.model), batch.ids, batch.mask) is expected


def test_a_second_thread_is_refused_while_one_has_a_block_open(plain, direction):
    ids = torch.randint(5, 200, (1, 4))
    attempts = {
        "apply": lambda: plain.apply(mm.Ablate(direction)).__enter__(),
        "as_base": lambda: plain.as_base().__enter__(),
        "a pass": lambda: models.forward(plain.model, ids, torch.ones_like(ids)),
        "generate": lambda: mm.generate(plain, PROMPTS[:1], samples=1, max_new_tokens=2),
    }
    said = {}

    def try_all():
        for name, attempt in attempts.items():
            try:
                attempt()
            except RuntimeError as error:
                said[name] = str(error)

    with plain.apply(mm.Ablate(direction)):
        second = Thread(target=try_all)
        second.start()
        second.join()
        attempts["a pass"]()
    assert set(said) == set(attempts)
    assert all("another thread is using this organism" in message for message in said.values())
    third = Thread(target=attempts["generate"])
    third.start()
    third.join()
    assert not models_in_use(plain.model)


def models_in_use(model) -> bool:
    return _threads._users[model][1] > 0
