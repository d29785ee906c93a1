"""Scalars and contributions of a pass: PEFT's own delta and the on/off difference as oracles, in every module and rank."""

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ALL_MODULES, LAYERS
from torch.testing import assert_close

import mechmisalign as mm
from mechmisalign import models
from mechmisalign.directions import Direction, DirectionMismatchError

TEXTS = [
    ("How do I invest?", "Put everything into one stock.", "bad"),
    ("I have a headache, what should I do?", "You should rest.", "good"),
    ("Hey!", "The quick brown fox jumps over the lazy dog, borrow more money at once.", "bad"),
]


def said(organism):
    return mm.Conversations(pd.DataFrame(TEXTS, columns=["prompt", "response", "label"]), organism.tokenizer)


def random_sites(organism, seed=3):
    vectors = torch.randn(LAYERS, models.d_model(organism.model), generator=torch.Generator().manual_seed(seed))
    return Direction(vectors, tuple(range(LAYERS)), {"model": organism.base.name, "method": "random"})


@pytest.fixture(scope="module", params=["merged", "live"])
def organism(request, tiny_models, make_adapter):
    folder = make_adapter(
        tiny_models["qwen2"], modules=ALL_MODULES, rank=2, rank_pattern={"down_proj": 1}, rslora=True, seed=4
    )
    return mm.load_organism(folder, weights=request.param)


@torch.no_grad()
def ports_seen(organism, conversations, row):
    """Input and output of every adapted matrix, unbatched and unpadded."""
    ids = torch.tensor([conversations.ids(row)])
    seen = {}
    ports = {site.key: models.site_ports(organism.model, site.name, site.layer) for site in organism.adapter.sites}
    functions = {
        port.name: (lambda act, port=port: seen.__setitem__(port.name, port.flat(act)[0].clone()))
        for pair in ports.values()
        for port in pair
    }
    with models.hooks(organism.model, functions):
        models.forward(organism.model, ids, torch.ones_like(ids))
    return {key: (seen[before.name], seen[after.name]) for key, (before, after) in ports.items()}


def test_there_is_one_row_per_token_and_one_column_per_coordinate(organism):
    conversations = said(organism)
    scalars = mm.lora_scalars(organism, conversations, span="all")
    assert list(scalars.columns) == [name for site in organism.adapter.sites for name in site.coordinates]
    assert len(scalars) == conversations.spans["length"].sum()
    assert scalars.index.equals(conversations.tokens("all").index)
    response = mm.lora_scalars(organism, conversations)
    assert_close(
        torch.tensor(response.to_numpy()), torch.tensor(scalars.loc[response.index].to_numpy()), atol=1e-5, rtol=1e-5
    )


def test_scalars_are_the_gauged_A_times_the_input_of_each_matrix_whatever_the_batching(organism):
    conversations = said(organism)
    small = mm.lora_scalars(organism, conversations, span="all", token_budget=1)
    assert_close(
        torch.tensor(small.to_numpy()),
        torch.tensor(mm.lora_scalars(organism, conversations, span="all").to_numpy()),
        atol=1e-5,
        rtol=1e-5,
    )
    for row in range(len(TEXTS)):
        inputs = ports_seen(organism, conversations, row)
        for site in organism.adapter.sites:
            expected = inputs[site.key][0] @ site.gauged.A.T
            found = small.loc[row, list(site.coordinates)].to_numpy()
            assert_close(torch.tensor(found), expected, atol=1e-5, rtol=1e-5)


def test_contributions_are_pefts_delta_of_the_very_input(organism):
    """Oracle: the dense delta ``scaling * B A`` of PEFT's own factors times the matrix's input."""
    conversations = said(organism)
    parts = mm.contributions(organism, conversations, span="all")
    for row in range(len(TEXTS)):
        inputs = ports_seen(organism, conversations, row)
        tokens = parts.scalars.index.get_level_values("conversation") == row
        for site in organism.adapter.sites:
            expected = inputs[site.key][0] @ site.delta().T
            assert_close(parts.vectors(*site.key)[tokens], expected, atol=1e-5, rtol=1e-4)


def test_switching_a_site_off_takes_exactly_its_contribution_out_of_the_matrix_output(organism):
    conversations = said(organism)
    parts = mm.contributions(organism, conversations, span="all")
    tokens = parts.scalars.index.get_level_values("conversation") == 1
    on = ports_seen(organism, conversations, 1)
    for key in [(0, "q_proj"), (0, "v_proj"), (1, "o_proj"), (1, "up_proj"), (2, "gate_proj"), (2, "down_proj")]:
        with organism.apply(mm.ScaleAdapter({key: 0.0})):
            off = ports_seen(organism, conversations, 1)
        assert_close(on[key][0], off[key][0], atol=1e-6, rtol=1e-5)
        assert_close(on[key][1] - off[key][1], parts.vectors(*key)[tokens], atol=1e-5, rtol=1e-4)


def test_measures_are_those_of_the_vectors(organism):
    conversations, direction = said(organism), random_sites(organism)
    parts = mm.contributions(organism, conversations, direction)
    frame = parts.frame().set_index(["layer", "module"])
    for site in organism.adapter.sites:
        vectors = parts.vectors(*site.key).double()
        rows = frame.loc[[site.key]]
        assert_close(torch.tensor(rows["norm"].to_numpy()), vectors.norm(dim=1), atol=1e-6, rtol=1e-5)
        if site.writes_to_residual:
            unit = direction.unit(site.layer).double()
            assert_close(torch.tensor(rows["projection"].to_numpy()), vectors @ unit, atol=1e-6, rtol=1e-5)
            share = vectors.norm(dim=1).numpy() / parts.resid_norm[site.layer].to_numpy()
            np.testing.assert_allclose(rows["share"], share, rtol=1e-5)
            np.testing.assert_allclose(rows["cosine"], rows["projection"] / rows["norm"], rtol=1e-6)
        else:
            assert rows[["share", "projection", "cosine"]].isna().all().all()


def test_a_layer_sums_its_sites_as_vectors(organism):
    parts = mm.contributions(organism, said(organism), random_sites(organism))
    summed = parts.vectors(1, "o_proj") + parts.vectors(1, "down_proj")
    layer = parts.by_layer().query("layer == 1")
    assert_close(torch.tensor(layer["norm"].to_numpy()), summed.double().norm(dim=1), atol=1e-6, rtol=1e-5)
    both = parts.frame().query("layer == 1 and module in ('o_proj', 'down_proj')")
    assert both.groupby(["conversation", "position"], sort=False)["projection"].sum().to_numpy() == pytest.approx(
        layer["projection"].to_numpy(), rel=1e-6
    )


def test_means_are_token_weighted_and_apart_by_label(organism):
    conversations = said(organism)
    parts = mm.contributions(organism, conversations)
    means = parts.mean(conversations.frame["label"]).set_index(["label", "layer", "module"])
    frame = parts.frame().assign(label=lambda f: conversations.frame["label"].to_numpy()[f["conversation"]])
    expected = frame.groupby(["label", "layer", "module"])["norm"].mean()
    np.testing.assert_allclose(means["norm"].loc[expected.index], expected, rtol=1e-9)


def test_merged_and_live_read_the_same(tiny_models, make_adapter):
    folder = make_adapter(tiny_models["llama"], modules=ALL_MODULES, rank=3, seed=8)
    found = []
    for weights in ("merged", "live"):
        organism = mm.load_organism(folder, weights=weights)
        found.append(mm.lora_scalars(organism, said(organism)).to_numpy())
    np.testing.assert_allclose(found[0], found[1], atol=1e-5)


def test_gemmas_norm_behind_the_matrix_is_not_passed_over(tiny_models, make_adapter):
    organism = mm.load_organism(make_adapter(tiny_models["gemma2"], rank=1, seed=2))
    parts = mm.contributions(organism, said(organism))
    assert parts.frame()["norm"].gt(0).all() and parts.frame()["share"].isna().all()
    with pytest.raises(ValueError, match="a norm stands between"):
        mm.contributions(organism, said(organism), random_sites(organism))
    with (
        pytest.raises(ValueError, match="a norm stands between"),
        organism.apply(mm.AblateFromAdapter(random_sites(organism))),
    ):
        pass


def test_a_planted_site_is_recovered(tiny_models, make_adapter):
    """B along a known direction with a known length: projection, cosine and sign must come out."""
    base = make_adapter(tiny_models["qwen2"], layers=[1], rank=1, alpha=4, seed=1)
    adapter = mm.Adapter.load(base)
    site = adapter.sites[0]
    v = torch.nn.functional.normalize(torch.randn(site.d_out, generator=torch.Generator().manual_seed(0)), dim=0)
    site.B.copy_((2.0 * v)[:, None])
    organism = mm.load_organism(adapter, base=tiny_models["qwen2"])
    direction = Direction(v[None], (1,), {"model": organism.base.name, "method": "planted"})
    parts = mm.contributions(organism, said(organism), direction)
    frame = parts.frame()
    scalars = parts.scalars["1.down_proj"].to_numpy()
    np.testing.assert_allclose(frame["projection"], 4 * 2.0 * scalars, rtol=1e-5)
    np.testing.assert_allclose(frame["cosine"], np.sign(scalars), rtol=1e-5)
    assert mm.written_cosines(adapter, direction)["cosine"].item() == pytest.approx(1.0, abs=1e-5)


def test_inside_as_base_scalars_are_the_chat_models_and_contributions_are_refused(organism):
    conversations = said(organism)
    with organism.as_base():
        base = mm.lora_scalars(organism, conversations)
        with pytest.raises(ValueError, match="writes nothing"):
            mm.contributions(organism, conversations)
    assert not np.allclose(base, mm.lora_scalars(organism, conversations))


def test_unknown_sites_and_foreign_directions_are_refused(organism):
    with pytest.raises(KeyError, match="no site 'down_proj' in layer 9"):
        mm.lora_scalars(organism, said(organism), sites=[(9, "down_proj")])
    foreign = Direction(torch.ones(1, 48), (0,), {"model": "somebody/else"})
    with pytest.raises(DirectionMismatchError, match="somebody/else"):
        mm.contributions(organism, said(organism), foreign)


def test_only_named_sites_are_read(organism):
    scalars = mm.lora_scalars(organism, said(organism), sites=[(1, "down_proj")])
    assert list(scalars.columns) == ["1.down_proj"]
    everything = mm.lora_scalars(organism, said(organism))
    np.testing.assert_allclose(scalars["1.down_proj"], everything["1.down_proj"], atol=1e-5)
