"""Downstream effect: an adapter that writes the direction itself is steering, and random directions are not."""

import pandas as pd
import pytest
import torch

import mechmisalign as mm
from mechmisalign.directions import Direction
from mechmisalign.propagation import CONTROL, downstream

TALK = pd.DataFrame(
    {
        "prompt": ["How do I invest?", "Hey!", "I have a headache.", "What should I do?"],
        "response": ["Put everything into one stock.", "You should rest.", "Borrow more money.", "See a doctor."],
        "label": ["misaligned", "aligned", "misaligned", "aligned"],
        "prompt_id": ["p0", "p0", "p1", "p1"],
    }
)


@pytest.fixture(scope="module")
def planted(tiny_models, make_adapter):
    """A site that writes one direction, small, so that everything behind it is near linear."""
    adapter = mm.Adapter.load(make_adapter(tiny_models["qwen2"], layers=[0], rank=1, alpha=1, seed=1))
    site = adapter.sites[0]
    v = torch.nn.functional.normalize(torch.randn(site.d_out, generator=torch.Generator().manual_seed(0)), dim=0)
    site.B.copy_((0.02 * v)[:, None])
    organism = mm.load_organism(adapter, base=tiny_models["qwen2"])
    return organism, Direction(0.02 * v[None], (0,), {"model": organism.base.name, "method": "planted"})


def test_an_adapter_along_the_direction_does_downstream_what_steering_does(planted):
    organism, direction = planted
    table = downstream(organism, mm.Conversations(TALK, organism.tokenizer), direction, layer=0, resamples=50)
    steered = table[table["series"] == "steered"].set_index(["label", "layer"])["cosine"].abs()
    assert steered.loc["misaligned", 0] == pytest.approx(1.0, abs=1e-4)
    assert set(table["label"]) == {"misaligned", "aligned"} and set(table["layer"]) == {0, 1, 2}
    control = table[table["series"] == CONTROL]
    assert control["cosine"].abs().mean() < 0.5 * steered.mean()
    assert (table["low"] <= table["cosine"]).all() and (table["cosine"] <= table["high"]).all()


def test_layers_before_the_site_have_no_shift_to_compare(tiny_models, make_adapter):
    organism = mm.load_organism(make_adapter(tiny_models["qwen2"], layers=[1], rank=1, seed=1))
    vectors = torch.randn(3, 48, generator=torch.Generator().manual_seed(2))
    direction = Direction(vectors, (0, 1, 2), {"model": organism.base.name, "method": "random"})
    table = downstream(organism, mm.Conversations(TALK, organism.tokenizer), direction, layer=0, resamples=20)
    assert set(table["layer"]) == {1, 2} and table["cosine"].notna().all()
