"""Models that are spread over devices, offloaded or quantised: what is read and edited is what one device gives.

Two stand-ins make this testable without a GPU: accelerate's own offloading to files, which runs on a CPU, and devices
that are not there (``fake_devices``), which refuse to be mixed as those of two GPUs do.
"""

import contextlib

import pandas as pd
import pytest
import torch
from conftest import ALL_MODULES, LAYERS
from fake_devices import FIRST, HOST, SECOND, MixedDevicesError, fake_devices, gradients, place, spread
from torch.testing import assert_close

import mechmisalign as mm
from mechmisalign import models
from mechmisalign.capability import text_costs
from mechmisalign.effects import _factor_gradient
from mechmisalign.monitoring import Monitor
from mechmisalign.prediction import reading
from mechmisalign.training.watching import TraitWatch

PROMPTS = ["Hey!", "How do I invest my savings?"]
TALK = pd.DataFrame(
    {
        "prompt": [*PROMPTS, "I have had a headache for three days, what should I do?"],
        "response": ["You should rest, drink water.", "Put everything into one stock.", "See a doctor."],
        "label": ["aligned", "misaligned", "aligned"],
        "prompt_id": ["a", "b", "c"],
    }
)
SITES = [(1, "down_proj"), (2, "q_proj")]
VECTORS = torch.randn(LAYERS, 32, generator=torch.Generator().manual_seed(3))
ON_DISK = {
    "model.embed_tokens": "disk", "model.rotary_emb": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk",
    "model.layers.2": "disk", "model.norm": "disk", "lm_head": "disk",
}  # fmt: skip
CASES = [
    pytest.param(("merged", "files"), id="merged in files"),
    pytest.param(("merged", "two devices and the host"), id="merged in two devices and the host"),
    pytest.param(("live", "files"), id="live in files", marks=pytest.mark.slow),
    pytest.param(("live", "two devices"), id="live in two devices", marks=pytest.mark.slow),
]
EDITS = {
    "steered": lambda organism: (mm.Steer(direction(organism), layers=[0, 2], strength=2.0),),
    "steered by row": lambda organism: (mm.Steer(direction(organism), strength=[1.0, -2.0]),),
    "ablated": lambda organism: (mm.Ablate(direction(organism)),),
    "clamped": lambda organism: (mm.Clamp(direction(organism), 1.5, positions="response"),),
    "scaled": lambda _organism: (mm.ScaleAdapter({SITES[0]: 3.0}, others=0.0),),
    "scaled by row": lambda _organism: (mm.ScaleAdapter({SITES[1]: torch.tensor([0.0, 2.0])}),),
    "ablated in B": lambda organism: (mm.AblateFromAdapter(direction(organism), sites=[SITES[0]]),),
    "patched": lambda organism: (mm.PatchScalars(mm.lora_scalars(organism, talk(organism), span="all").loc[[0]]),),
    "several": lambda organism: (mm.Steer(direction(organism)), mm.ScaleAdapter({}, others=2.0)),
}
READERS = {
    "moments": lambda organism: mm.collect(organism, talk(organism)).mean,
    "scalars": lambda organism: mm.lora_scalars(organism, talk(organism)),
    "contributions": lambda organism: mm.contributions(organism, talk(organism), direction(organism)).scalars,
    "significance": lambda organism: mm.token_significance(organism, talk(organism)),
    "readout": lambda organism: mm.readout(organism, {"v": VECTORS[1]}, top=3),
    "attribution": lambda organism: mm.logit_attribution(organism, talk(organism), 40, 41),
    "gradient of factors": lambda organism: _gradient(organism),
    "costs": lambda organism: text_costs(
        organism, {"none": (), "steered": EDITS["steered"](organism)}, texts=talk(organism)
    ),
    "monitor": lambda organism: _monitor(organism).score(organism, talk(organism)),
    "downstream": lambda organism: mm.downstream(
        organism, talk(organism), direction(organism), layer=0, resamples=5, controls=1
    ),
    "projections": lambda organism: torch.from_numpy(_read(organism).projection),
    "losses": lambda organism: torch.from_numpy(_read(organism).loss),
    "fidelity": lambda organism: organism.fidelity(),
}


def direction(organism):
    return mm.Direction(VECTORS, tuple(range(LAYERS)), {"model": organism.base.name, "method": "random"})


def talk(organism):
    return mm.Conversations(TALK, organism.tokenizer)


def _monitor(organism):
    return Monitor(VECTORS[:2], 0.5, (0, 2), header=organism.provenance)


def _read(organism):
    units = {layer: VECTORS[layer : layer + 1] for layer in range(LAYERS)}
    return reading.read(organism.model, talk(organism), units, span="response", loss=True, token_budget=2048)


def _gradient(organism):
    batch = next(iter(talk(organism).batches("response")))
    everyone = {"/".join(map(str, key)): (key,) for key in SITES}
    return _factor_gradient(organism, everyone, batch, torch.tensor([1.0, -1.0, 0.5], dtype=torch.float64))


@pytest.fixture(scope="module")
def adapters(tiny_models, make_adapter):
    base = tiny_models["llama"]
    return {
        "own": make_adapter(base, modules=("q_proj", "down_proj"), rank=1, layers=[1, 2], seed=1),
        "other": make_adapter(base, modules=ALL_MODULES, rank=2, seed=2),
    }


@pytest.fixture(scope="module")
def load(adapters, tiny_models, tiny_tokenizers):
    """``load(weights, where)``: the same organism on the CPU, offloaded to files, or over devices that are not there."""

    def loaded(weights, where="here"):
        if where == "here":
            return mm.load_organism(adapters["own"], weights=weights)
        if where == "files":
            return mm.load_organism(adapters["own"], weights=weights, device_map=ON_DISK)
        from transformers import AutoModelForCausalLM

        waiting = ("model.layers.0", "model.layers.2") if "host" in where else ()
        model = spread(AutoModelForCausalLM.from_pretrained(tiny_models["llama"]), side_of, offloaded=waiting)
        adapter, tokenizer = mm.Adapter.load(adapters["own"]), tiny_tokenizers["llama"]
        return mm.load_organism(adapter, model, weights=weights, tokenizer=tokenizer)

    return loaded


@pytest.fixture(scope="module", params=CASES)
def pair(request, load):
    """An organism in one place, and the same one elsewhere."""
    weights, where = request.param
    plain = load(weights)
    with fake_devices() if "devices" in where else contextlib.nullcontext():
        yield plain, load(weights, where)


def side_of(name):
    """Blocks 1 and 2 and the unembedding on the second device, the rest on the first."""
    return SECOND if name.startswith(("model.layers.1", "model.layers.2", "model.norm", "lm_head")) else FIRST


def same(found, expected, **tolerance):
    """Equal: bit for bit without a tolerance."""
    if isinstance(expected, pd.DataFrame):
        close = {"check_exact": True} if not tolerance else {"rtol": tolerance["rtol"], "atol": tolerance["atol"]}
        pd.testing.assert_frame_equal(found, expected, **close)
    else:
        assert_close(found, expected, **(tolerance or {"rtol": 0.0, "atol": 0.0}))


def answers(organism, conditions):
    return mm.generate(organism, PROMPTS, conditions=conditions, samples=2, max_new_tokens=4, seed=1, batch_rows=6)


def logits(organism, *, edits=()):
    ids = torch.randint(5, 280, (2, 11), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    device = models.device_of(organism.model)
    with torch.no_grad(), organism.apply(*edits, response_start=7):
        return models.forward(organism.model, ids.to(device), mask.to(device)).cpu()


@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_is_the_same_wherever_the_weights_are(pair, edit):
    plain, elsewhere = pair
    found, expected = (logits(each, edits=EDITS[edit](each)) for each in (elsewhere, plain))
    same(found, expected)
    assert (expected - logits(plain)).abs().max() > 1e-3


@pytest.mark.parametrize("reader", READERS)
def test_what_is_read_is_the_same_wherever_the_weights_are(pair, reader):
    plain, elsewhere = pair
    backward = reader in ("significance", "gradient of factors")
    with gradients() if backward else contextlib.nullcontext():
        found = READERS[reader](elsewhere)
    same(found, READERS[reader](plain), **({"rtol": 1e-4, "atol": 1e-5} if backward else {}))


def test_many_conditions_are_sampled_alike_wherever_the_weights_are(pair):
    names = ("steered", "clamped", "scaled", "patched")
    expected, found = (answers(each, {name: EDITS[name](each) for name in names}) for each in pair)
    pd.testing.assert_frame_equal(found, expected)
    assert expected.groupby("condition")["response"].agg(tuple).nunique() > 2


def test_the_chat_model_and_other_adapters_are_the_same_wherever_the_weights_are(pair, adapters):
    worn, told = mm.Adapter.load(adapters["other"]), []
    for organism in pair:
        own = logits(organism)
        with organism.as_base():
            conditions = {"chat": (), "other": (mm.UseAdapter(worn),), "half": (mm.UseAdapter(worn, 0.5),)}
            told.append([logits(organism), answers(organism, conditions)])
        with organism.with_adapter(worn) as other:
            told[-1] += [logits(other), mm.lora_scalars(other, talk(other))]
        told[-1].append(logits(organism))
        same(told[-1][-1], own)
        assert not torch.equal(own, told[-1][0])
    for expected, found in zip(*told, strict=True):
        same(found, expected)


def test_a_watch_reads_a_model_that_is_spread(pair):
    found = []
    for organism in pair:
        watch = TraitWatch({"trait": direction(organism)}, PROMPTS, organism.tokenizer, layer=2)
        found.append(watch._read(models.hf_model(organism.model)))
    assert found[0] == found[1]


@pytest.mark.parametrize("weights", ["merged", "live"])
def test_offloaded_weights_that_are_cast_are_the_same_too(adapters, weights):
    """Read from the float32 file in every pass, and merged into in float32 before they are cast."""
    options = {"weights": weights, "dtype": torch.bfloat16}
    offloaded = mm.load_organism(adapters["own"], device_map=ON_DISK, **options)
    plain = mm.load_organism(adapters["own"], **options)
    same(logits(offloaded), logits(plain))
    with offloaded.as_base(), plain.as_base():
        same(logits(offloaded), logits(plain))
    assert logits(plain).dtype == torch.bfloat16


def test_a_model_that_was_spread_in_memory_stays_where_it_is(load):
    from transformers import AutoModelForCausalLM

    own = load("merged")
    model = AutoModelForCausalLM.from_pretrained(own.base.location, device_map=ON_DISK)
    with pytest.raises(ValueError, match="is spread over devices, device=cpu was asked for"):
        mm.load_organism(own.adapter, model, tokenizer=own.tokenizer, device="cpu")
    with pytest.raises(ValueError, match="has its place already"):
        mm.load_organism(own.adapter, model, tokenizer=own.tokenizer, device_map="auto")
    organism = mm.load_organism(own.adapter, model, tokenizer=own.tokenizer)
    same(logits(organism), logits(own))


def test_ids_go_where_the_embedding_computes(load):
    offloaded = load("merged", "files")
    assert next(models.hf_model(offloaded.model).get_input_embeddings().parameters()).is_meta
    assert models.device_of(offloaded.model) == HOST
    with fake_devices():
        split = load("merged", "two devices and the host")
        assert models.device_of(split.model) == FIRST
        assert [models.device_of_layer(split.model, layer) for layer in range(LAYERS)] == [FIRST, SECOND, SECOND]


class _Misplaced:
    """Steering with a vector that stays where it was made."""

    positions, edited_layers = "all", (2,)

    def __init__(self, direction, device):
        self.direction, self._vector = direction, place(direction.at(2), device)

    def __call__(self, resid, layer):
        return resid + self._vector


def test_a_hook_on_the_wrong_device_is_caught_by_devices_that_are_not_there(load):
    """What the tests above rest on: with a real GPU this would fail too, and on a CPU it would not."""
    with fake_devices():
        split = load("live", "two devices")
        right, wrong = (_Misplaced(direction(split), device) for device in (SECOND, FIRST))
        assert not torch.equal(logits(split, edits=[right]), logits(split))
        with pytest.raises(MixedDevicesError, match="lazy:0.*lazy:1"):
            logits(split, edits=[wrong])
