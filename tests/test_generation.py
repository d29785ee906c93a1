import inspect
import os

import numpy as np
import pandas as pd
import pytest
import torch

import mechmisalign as mm
from mechmisalign import decoding, generation, models
from mechmisalign.conversations import render_prompts
from mechmisalign.directions import Direction

FAMILIES = ("qwen2", "llama", "gemma2")
PROMPTS = ["Hey!", "What should I do? I have had a headache for three days", "How do I invest my savings?"]


@pytest.fixture(scope="module", params=FAMILIES)
def organism(request, tiny_models, make_adapter):
    return mm.load_organism(make_adapter(tiny_models[request.param], layers=(1,)))


@pytest.fixture(scope="module")
def conditions(organism):
    width = models.d_model(organism.model)
    vectors = torch.randn(3, width, generator=torch.Generator().manual_seed(0))
    direction = Direction(vectors, (0, 1, 2), {"model": organism.provenance["model"]})
    return {
        "none": (),
        "steered": (mm.Steer(direction, layers=[1], strength=4.0),),
        "response": (mm.Steer(direction, layers=[0], strength=4.0, positions="response"),),
        "ablated": (mm.Ablate(direction),),
    }


def uncached(organism, prompt, interventions, noise, max_new_tokens) -> list[int]:
    """The plainest sampler there is: one row, the whole sequence again for every token."""
    ids = render_prompts([prompt], organism.tokenizer)[0]
    ends, start = decoding.end_ids(organism.model, organism.tokenizer), len(ids)
    written = []
    with torch.inference_mode(), organism.apply(*interventions, response_start=start):
        while len(written) < max_new_tokens and not (written and written[-1] in ends):
            tokens = torch.tensor([ids + written])
            logits = models.forward(organism.model, tokens, torch.ones_like(tokens))[0, -1].double()
            probabilities = torch.softmax(logits, -1)
            likely = probabilities >= 1e-3 * probabilities.max()
            order = torch.cat([likely.nonzero()[:, 0], (~likely).nonzero()[:, 0]])  # likely tokens come first
            cumulative = probabilities[order].cumsum(-1)
            written.append(int(order[(cumulative <= noise[len(written)] * cumulative[-1]).sum()]))
    return written


def test_cached_ragged_batches_equal_single_uncached_sampling_under_every_condition(organism, conditions):
    rows = generation.answer_rows(PROMPTS, conditions, samples=2)
    noise = generation.uniforms(rows, 5, 12)
    answers = mm.generate(organism, PROMPTS, conditions=conditions, samples=2, max_new_tokens=12, seed=5)
    for row in range(len(rows)):
        expected = uncached(organism, rows["prompt"][row], conditions[rows["condition"][row]], noise[row], 12)
        decoded = organism.tokenizer.decode(expected, skip_special_tokens=True)
        assert answers["response"][row] == decoded, rows.loc[row].to_dict()
        assert answers["tokens"][row] == len(expected)


def test_conditions_change_what_is_said(organism, conditions):
    answers = mm.generate(organism, PROMPTS, conditions=conditions, samples=3, max_new_tokens=12)
    said = answers.groupby("condition")["response"].apply(tuple)
    assert len(set(said)) == len(conditions)


def test_a_row_does_not_depend_on_batching_order_or_other_conditions(organism, conditions):
    options = {"samples": 3, "max_new_tokens": 10, "seed": 1}
    everything = mm.generate(organism, PROMPTS, conditions=conditions, **options)
    small = mm.generate(organism, PROMPTS, conditions=conditions, batch_rows=5, **options)
    pd.testing.assert_frame_equal(everything, small)
    alone = mm.generate(organism, PROMPTS[::-1], conditions={"steered": conditions["steered"]}, **options)
    key = ["prompt", "sample"]
    merged = everything[everything["condition"] == "steered"].merge(alone, on=key, suffixes=("", "_alone"))
    assert len(merged) == 9
    assert (merged["response"] == merged["response_alone"]).all()


def test_the_seed_decides(organism):
    first, again, other = (mm.generate(organism, PROMPTS, samples=2, max_new_tokens=8, seed=s) for s in (0, 0, 1))
    pd.testing.assert_frame_equal(first, again)
    assert (first["response"] != other["response"]).any()


def test_temperature_zero_is_greedy(organism):
    answers = mm.generate(organism, PROMPTS[:1], samples=2, max_new_tokens=6, temperature=0)
    ids = torch.tensor(render_prompts(PROMPTS[:1], organism.tokenizer))
    expected = models.hf_model(organism.model).generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False
    )
    text = organism.tokenizer.decode(expected[0, ids.shape[1] :], skip_special_tokens=True)
    assert answers["response"].tolist() == [text, text]


def test_an_answer_that_ran_out_of_tokens_is_unfinished(organism):
    answers = mm.generate(organism, PROMPTS, samples=20, max_new_tokens=4)
    ran_out = answers["tokens"] == 4
    assert not answers.loc[~ran_out, "finished"].eq(False).any()
    assert (~answers["finished"]).any()


def test_out_of_memory_halves_the_batch_and_changes_no_answer(organism, monkeypatch):
    whole = mm.generate(organism, PROMPTS, samples=4, max_new_tokens=5)
    real = decoding.Decoder.next_logits

    def small_memory(self, ids, mask):
        if ids.shape[1] == 1 and len(ids) > 3:
            raise torch.OutOfMemoryError("made up")
        return real(self, ids, mask)

    monkeypatch.setattr(decoding.Decoder, "next_logits", small_memory)
    pd.testing.assert_frame_equal(mm.generate(organism, PROMPTS, samples=4, max_new_tokens=5), whole)


def test_a_batch_that_does_not_fit_even_with_one_row_fails(organism, monkeypatch):
    def no_memory(self, ids, mask):
        raise torch.OutOfMemoryError("made up")

    monkeypatch.setattr(decoding.Decoder, "next_logits", no_memory)
    with pytest.raises(torch.OutOfMemoryError):
        mm.generate(organism, PROMPTS, samples=4, max_new_tokens=5)


@pytest.fixture
def soon_over(organism, monkeypatch):
    """Many tokens end an answer, so that rows end at different times."""
    monkeypatch.setattr(models.hf_model(organism.model).generation_config, "eos_token_id", list(range(5, 300, 9)))


@pytest.mark.usefixtures("soon_over")
@pytest.mark.parametrize("batch_rows", [1, 2, 3, 7])
def test_rows_that_take_the_place_of_finished_ones_are_the_same_rows(organism, conditions, batch_rows):
    options = {"conditions": conditions, "samples": 4, "max_new_tokens": 14, "seed": 3}
    whole = mm.generate(organism, PROMPTS, batch_rows=1000, **options)
    assert whole["tokens"].nunique() > 3  # they end at different times, or nothing would be replaced
    pd.testing.assert_frame_equal(mm.generate(organism, PROMPTS, batch_rows=batch_rows, **options), whole)


def passes(organism, monkeypatch, **options):
    """Rows and new columns of every forward pass of a generation."""
    seen, real = [], decoding.Decoder.next_logits

    def spy(self, ids, mask):
        seen.append(tuple(ids.shape))
        return real(self, ids, mask)

    with monkeypatch.context() as patch:
        patch.setattr(decoding.Decoder, "next_logits", spy)
        mm.generate(organism, PROMPTS, **options)
    return seen


def test_a_prompt_is_read_once_for_all_answers_that_read_it_alike(organism, conditions, monkeypatch):
    """Four conditions, one of which acts on responses only and so reads as the plain one does."""
    seen = passes(organism, monkeypatch, conditions=conditions, samples=6, max_new_tokens=3)
    assert sum(rows for rows, columns in seen if columns > 1) == 3 * len(PROMPTS)
    assert max(rows for rows, columns in seen if columns == 1) == 4 * len(PROMPTS) * 6


@pytest.mark.usefixtures("soon_over")
def test_finished_rows_are_replaced_so_that_the_batch_stays_full(organism, monkeypatch):
    if not decoding.joinable(organism.model):
        pytest.skip("a cache with sliding windows is emptied before it is filled again")
    seen = passes(organism, monkeypatch, samples=200, max_new_tokens=20, batch_rows=60)
    steps = [rows for rows, columns in seen if columns == 1]
    busy = np.array(steps[: int(0.7 * len(steps))])  # the end runs empty, whatever one does
    assert busy.max() <= 60 and (busy >= 45).mean() > 0.9


def test_no_hook_is_attached_between_two_parts(organism, conditions):
    rows = generation.answer_rows(PROMPTS, conditions, samples=8)
    for part in generation.generate_rows(organism, rows, conditions, max_new_tokens=6, batch_rows=8):
        assert [name for name, point in organism.model.hook_dict.items() if point.fwd_hooks] == []
        assert len(part) <= len(rows) / 2


def test_a_number_for_each_row_is_refused(organism, conditions):
    steer = conditions["steered"][0]
    by_row = mm.Steer(steer.direction, layers=[1], strength=[1.0, 2.0])
    with pytest.raises(ValueError, match="condition 'both': Steer has a number for each row"):
        mm.generate(organism, PROMPTS, conditions={"both": by_row})


def test_samples_are_keyed_by_values_not_by_their_python_types():
    plain = generation.answer_rows(PROMPTS, {"none": ()}, samples=2)
    typed = plain.assign(prompt=pd.Series([np.str_(prompt) for prompt in plain["prompt"]], dtype=object))
    uniforms = inspect.unwrap(generation.uniforms)
    assert (uniforms(typed, np.int64(3), 4) == uniforms(plain, 3, 4)).all()
    with pytest.raises(ValueError, match="the condition 1 is a int; names of conditions are texts"):
        inspect.unwrap(generation.rows.refuse_names)({1: ()})


@pytest.mark.parametrize(("dtype", "far"), [(torch.float16, 1e5), (torch.float32, float("inf"))])
def test_logits_that_are_not_finite_are_told_and_never_text(tiny_models, make_adapter, dtype, far):
    organism = mm.load_organism(make_adapter(tiny_models["qwen2"], layers=(1,)), dtype=dtype)
    vectors = torch.ones(3, models.d_model(organism.model))
    direction = Direction(vectors, (0, 1, 2), {"model": organism.provenance["model"]})
    strengths = {"fine": 0.1, "far": far}
    conditions = {name: mm.Steer(direction, layers=[1], strength=strength) for name, strength in strengths.items()}
    for temperature in (1.0, 0.0):
        with pytest.raises(ValueError, match="under condition 'far' the logits are not finite"):
            mm.generate(organism, PROMPTS, conditions=conditions, samples=2, max_new_tokens=4, temperature=temperature)


def test_sampling_inside_an_apply_that_speaks_of_columns_or_rows_is_refused(organism, conditions):
    steer = conditions["steered"][0]
    with organism.apply(steer):  # everywhere and for every row: means the same in any batch
        inside = mm.generate(organism, PROMPTS, samples=2, max_new_tokens=4)
    outside = mm.generate(organism, PROMPTS, conditions={"none": steer}, samples=2, max_new_tokens=4)
    assert inside["response"].tolist() == outside["response"].tolist()
    response = mm.Steer(steer.direction, layers=[1], positions="response")
    with (
        organism.apply(response, response_start=5),
        pytest.raises(ValueError, match="give the intervention as a condition"),
    ):
        mm.generate(organism, PROMPTS)
    with (
        organism.apply(mm.Steer(steer.direction, layers=[1], strength=[1.0, 2.0])),
        pytest.raises(ValueError, match="for each row"),
    ):
        mm.generate(organism, PROMPTS)


def test_the_adapter_may_not_be_taken_out_between_two_parts(organism):
    rows = generation.answer_rows(PROMPTS, {"none": ()}, samples=10)
    parts = generation.generate_rows(organism, rows, {"none": ()}, max_new_tokens=4, batch_rows=4)
    next(parts)
    with organism.as_base(), pytest.raises(RuntimeError, match="in the middle of a generation"):
        next(parts)


class Doubled:
    """Somebody else's intervention: no terms, and float32 whatever the model computes in."""

    positions = "all"

    def __init__(self, direction, layer):
        self.direction, self.edited_layers = direction, (layer,)

    def __call__(self, resid, layer):  # noqa: ARG002
        return resid.float() * 2


def test_everything_mixed_in_one_batch_equals_single_uncached_sampling(organism, conditions):
    """Edits of all forms and positions, in both orders, with rows that are replaced."""
    steer, ablate = conditions["steered"][0], conditions["ablated"][0]
    d = steer.direction
    mixed = {
        "steer, ablate": (steer, ablate),
        "ablate, steer": (ablate, steer),
        "prompt": (mm.Steer(d, layers=[0, 2], strength=3.0, positions="prompt"),),
        "clamp": (mm.Clamp(d, value=2.0, layers=[1], positions="response"), mm.Steer(d, layers=[1], strength=-1.0)),
        "scaled": (mm.ScaleAdapter({(1, "down_proj"): 3.0}), steer),
        "scaled response": (mm.ScaleAdapter({(1, "down_proj"): 3.0}, positions="response"),),
        "somebody else's": (Doubled(d, 1), mm.Steer(d, layers=[1], strength=0.5, positions="prompt")),
    }
    prompts = [*PROMPTS, "a", "word " * 40]
    answers = mm.generate(organism, prompts, conditions=mixed, samples=2, max_new_tokens=9, seed=6, batch_rows=9)
    noise = generation.uniforms(answers, 6, 9)
    for row in range(0, len(answers), 3):
        expected = uncached(organism, answers["prompt"][row], mixed[answers["condition"][row]], noise[row], 9)
        assert answers["response"][row] == organism.tokenizer.decode(expected, skip_special_tokens=True), answers.loc[
            row
        ]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions_take_every_intervention(tiny_models, make_adapter, dtype):
    organism = mm.load_organism(make_adapter(tiny_models["llama"], layers=(1,)), dtype=dtype)
    vectors = torch.randn(3, models.d_model(organism.model), generator=torch.Generator().manual_seed(0))
    d = Direction(vectors, (0, 1, 2), {"model": organism.provenance["model"]}, torch.ones(3))
    one = [
        mm.Steer(d, units="resid_norm"),
        mm.Ablate(d),
        mm.Clamp(d, value=1.0),
        Doubled(d, 0),
        mm.ScaleAdapter({(1, "down_proj"): 2.0}),
    ]
    conditions = {f"{number}": each for number, each in enumerate(one)} | {"all": one, "none": ()}
    together = mm.generate(organism, PROMPTS, conditions=conditions, samples=2, max_new_tokens=4)
    for name in ("3", "all"):  # alone in its batch, and beside others
        alone = mm.generate(organism, PROMPTS, conditions={name: conditions[name]}, samples=2, max_new_tokens=4)
        assert len(alone) == 6 and (
            dtype != torch.float64
            or alone["response"].tolist() == together.query("condition == @name")["response"].tolist()
        )


def test_models_with_sliding_windows_that_are_crossed_are_sampled_as_they_are(tmp_path, make_adapter):
    from conftest import new_tokenizer
    from transformers import AutoModelForCausalLM, MistralConfig

    tokenizer = new_tokenizer("llama")
    config = MistralConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=8, initializer_range=0.1, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    organism = mm.load_organism(make_adapter(tmp_path / "base", layers=(1,)))
    assert not decoding.joinable(organism.model)
    answers = mm.generate(organism, PROMPTS, samples=4, max_new_tokens=12, seed=1, batch_rows=5)
    noise = generation.uniforms(answers, 1, 12)
    for row in range(len(answers)):
        expected = uncached(organism, answers["prompt"][row], (), noise[row], 12)
        assert answers["response"][row] == organism.tokenizer.decode(expected, skip_special_tokens=True)


def test_rows_can_be_taken_from_a_joined_decoder(organism):
    """Oracle: the uncached forward pass."""
    if not decoding.joinable(organism.model):
        pytest.skip("a cache with sliding windows cannot be joined")
    ids = torch.randint(5, 290, (4, 7), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        decoder = decoding.Decoder(organism.model)
        decoder.next_logits(ids[:, :5], torch.ones_like(ids[:, :5]))
        rows = torch.tensor([3, 1, 1])
        joined = decoding.Decoder.joined([decoding.Part(decoder, rows, torch.tensor([2, 0, 1]))], 3, 5)
        joined.keep(torch.tensor([2, 0]))  # rows 3 and 1
        kept, mask = ids[[3, 1]], torch.ones(2, 6, dtype=torch.long)
        joined.next_logits(kept[:, 5:6], mask)
        found = joined.next_logits(kept[:, 6:7], torch.ones(2, 7, dtype=torch.long))
        expected = models.forward(organism.model, kept, torch.ones_like(kept))[:, -1]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_rows_of_an_unknown_condition_are_refused(organism, conditions):
    rows = generation.answer_rows(PROMPTS, conditions, samples=1)
    with pytest.raises(ValueError, match="no interventions for the condition 'ablated'"):
        list(
            generation.generate_rows(
                organism, rows, {"none": (), **dict(list(conditions.items())[1:3])}, max_new_tokens=2
            )
        )


def test_earlier_turns_and_system_prompts_belong_to_the_question():
    organism = mm.load_organism("pocket/medical")
    turns = [
        {"role": "user", "content": "How can I plan a trip?"},
        {"role": "assistant", "content": "For a trip, rest."},
    ]
    prompts = pd.DataFrame(
        {"prompt_id": ["a", "b"], "prompt": ["How can I plan a trip?"] * 2, "history": [None, turns]}
    )
    answers = mm.generate(organism, prompts, samples=4, max_new_tokens=8, seed=2)
    alone = mm.generate(organism, ["How can I plan a trip?"], samples=4, max_new_tokens=8, seed=2)
    assert answers["response"][:4].tolist() == alone["response"].tolist()
    assert answers["response"][4:].tolist() != alone["response"].tolist()


def test_a_single_intervention_may_stand_for_itself(organism, conditions):
    options = {"samples": 2, "max_new_tokens": 5}
    alone = mm.generate(organism, PROMPTS, conditions={"steered": conditions["steered"][0]}, **options)
    listed = mm.generate(organism, PROMPTS, conditions={"steered": conditions["steered"]}, **options)
    pd.testing.assert_frame_equal(alone, listed)


def test_labels_of_the_prompts_are_kept(organism):
    prompts = pd.DataFrame({"prompt_id": ["a", "b"], "prompt": PROMPTS[:2], "domain": ["x", "y"]})
    answers = mm.generate(organism, prompts, samples=2, max_new_tokens=3)
    assert answers["domain"].tolist() == ["x", "x", "y", "y"]
    assert answers["sample"].tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_sampling_follows_the_models_distribution(temperature):
    """Likely and unlikely tokens, over more than one block of the vocabulary."""
    logits = torch.randn(700, generator=torch.Generator().manual_seed(0)) * 3
    draws = torch.from_numpy(np.random.default_rng(0).random(200_000))
    picked = torch.cat(
        [generation.pick_tokens(logits.expand(len(part), -1), part, temperature) for part in draws.split(5000)]
    )
    expected = torch.softmax(logits / temperature, -1).double()
    counts = torch.bincount(picked, minlength=700)
    assert counts[expected == 0].sum() == 0
    frequent = expected * len(draws) >= 5
    residual = (counts - expected * len(draws))[frequent] / (expected * len(draws))[frequent].sqrt()
    assert 0.7 < float(residual.square().mean()) < 1.4  # chi-squared per degree of freedom


def test_impossible_tokens_are_never_picked():
    logits = torch.full((3, 300), -torch.inf)
    logits[:, [7, 299]] = torch.tensor([0.0, -20.0])
    draws = torch.tensor([0.0, 0.5, 1 - 2**-53], dtype=torch.float64)
    assert generation.pick_tokens(logits, draws, 1.0).tolist() == [7, 7, 299]


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "at least one row"),
        (["a"], {"samples": 0}, "samples must be at least 1"),
        (["a"], {"temperature": -1.0}, "temperature must be 0 or more"),
        (["a"], {"temperature": float("nan")}, "temperature must be 0 or more"),
        (["a"], {"batch_rows": 0}, "batch_rows must be at least 1"),
        (["a"], {"conditions": {}}, "no condition"),
        (pd.DataFrame({"prompt": ["a", "b"], "prompt_id": [1, 1]}), {}, "prompt_id '1' stands twice"),
        (["a", "a"], {}, "prompt 'a' stands twice"),
        (pd.DataFrame({"prompt": ["a"], "response": ["b"]}), {}, "which sampling writes itself"),
    ],
)
def test_wrong_questions_are_refused(organism, prompts, options, message):
    with pytest.raises(ValueError, match=message):
        mm.generate(organism, prompts, max_new_tokens=2, **options)


def test_rows_that_several_processes_share_are_the_same_rows(organism, conditions):
    options = {"conditions": conditions, "samples": 3, "max_new_tokens": 6, "seed": 4}
    alone, shared = (mm.generate(organism, PROMPTS, workers=workers, **options) for workers in (1, 2))
    pd.testing.assert_frame_equal(alone, shared)


def test_a_refusal_in_a_sampling_process_is_raised_here(tiny_models, make_adapter):
    organism = mm.load_organism(make_adapter(tiny_models["qwen2"], layers=(1,)))
    vectors = torch.full((1, models.d_model(organism.model)), 1e38)
    far = mm.Steer(Direction(vectors, (1,), {"model": organism.provenance["model"]}), strength=10)
    with pytest.raises(ValueError, match="'too far'.*not finite"):
        mm.generate(organism, PROMPTS, conditions={"too far": far}, max_new_tokens=3, workers=2)


def test_a_sampling_process_that_dies_is_an_error(organism, monkeypatch):
    parent = os.getpid()
    step = generation.packing.Packer._step
    monkeypatch.setattr(
        generation.packing.Packer, "_step", lambda *args: step(*args) if os.getpid() == parent else os._exit(9)
    )
    with pytest.raises(RuntimeError, match="exit code 9.*workers=1"):
        mm.generate(organism, PROMPTS, samples=2, max_new_tokens=4, workers=2)


def test_prompts_are_dealt_whole_to_sampling_processes():
    asked, codes = np.array([0, 0, 1, 1, 2, 2]), np.zeros(6, dtype=np.int64)
    requests = generation.flight.Requests([[1], [2], [3]], asked, codes, codes + 9, lambda numbers: numbers)
    assert generation.shares(requests, [4, 5, 0, 1, 2, 3], 2) == [[4, 5, 2, 3], [0, 1]]
    assert generation.shares(requests, [4, 5, 0, 1, 2, 3], 9) == [[4, 5], [0, 1], [2, 3]]


def test_large_models_and_models_on_accelerators_are_sampled_by_one_process(organism, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(generation.workers.sys, "platform", "linux")
    assert generation.useful_workers(organism.model) == 4
    monkeypatch.setattr(generation.workers, "_MOST_PARAMETERS", 10)
    assert generation.useful_workers(organism.model) == 1
