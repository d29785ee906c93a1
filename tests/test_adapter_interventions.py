"""ScaleAdapter, PatchScalars, AblateFromAdapter: weights untouched, right under a KV cache, factor 1 is no edit."""

import inspect

import pandas as pd
import pytest
import torch
from conftest import ALL_MODULES, LAYERS
from torch.testing import assert_close

import mechmisalign as mm
from mechmisalign import decoding, models
from mechmisalign.directions import Direction
from mechmisalign.interventions import check_fits

IDS = torch.randint(5, 290, (3, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", params=["merged", "live"])
def organism(request, tiny_models, make_adapter):
    folder = make_adapter(
        tiny_models["qwen2"], modules=ALL_MODULES, rank=2, rank_pattern={"down_proj": 1}, rslora=True, seed=4
    )
    return mm.load_organism(folder, weights=request.param)


def everything(organism, factor):
    return mm.ScaleAdapter({site.key: factor for site in organism.adapter.sites})


@torch.inference_mode()
def logits(organism, *interventions, ids=IDS, mask=None, **options):
    with organism.apply(*interventions, **options):
        return models.forward(organism.model, ids, torch.ones_like(ids) if mask is None else mask)


@torch.inference_mode()
def token_by_token(organism, *interventions, ids=IDS, mask=None, **options):
    mask = torch.ones_like(ids) if mask is None else mask
    with organism.apply(*interventions, **options):
        decoder = decoding.Decoder(organism.model)
        steps = [decoder.next_logits(ids[:, :4], mask[:, :4])]
        steps += [decoder.next_logits(ids[:, i : i + 1], mask[:, : i + 1]) for i in range(4, ids.shape[1])]
    return torch.stack(steps, dim=1)


def test_factor_zero_everywhere_gives_the_chat_model(organism):
    with organism.as_base():
        base = logits(organism)
    assert_close(logits(organism, everything(organism, 0.0)), base, atol=2e-5, rtol=1e-5)
    assert_close(logits(organism, mm.ScaleAdapter({}, others=0.0)), base, atol=2e-5, rtol=1e-5)
    assert not torch.allclose(logits(organism), base, atol=1e-3)


def test_factor_two_is_an_adapter_with_twice_the_scaling(organism, tiny_models, make_adapter):
    """Oracle: the same adapter merged with doubled alpha."""
    twice = make_adapter(
        tiny_models["qwen2"], modules=ALL_MODULES, rank=2, rank_pattern={"down_proj": 1}, rslora=True, seed=4, alpha=32
    )
    expected = logits(mm.load_organism(twice))
    assert_close(logits(organism, everything(organism, 2.0)), expected, atol=1e-4, rtol=1e-4)


def test_identity_factors_are_bit_identical_to_no_hook(organism):
    plain = logits(organism)
    assert torch.equal(logits(organism, everything(organism, 1.0)), plain)
    mixed = logits(organism, everything(organism, [1.0, 3.0, 1.0]))
    assert torch.equal(mixed[[0, 2]], plain[[0, 2]]) and not torch.equal(mixed[1], plain[1])


def test_each_row_has_its_own_factor(organism):
    together = logits(organism, everything(organism, [0.0, 2.0, 5.0]))
    for row, factor in enumerate([0.0, 2.0, 5.0]):
        alone = logits(organism, everything(organism, factor), ids=IDS[row : row + 1])
        assert_close(together[row], alone[0], atol=1e-4, rtol=1e-4)


def test_weights_are_never_edited(organism):
    before = {name: value.clone() for name, value in organism.model.state_dict().items()}
    logits(organism, everything(organism, 3.0), mm.AblateFromAdapter(residual(organism)))
    after = organism.model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert [name for name, point in organism.model.hook_dict.items() if point.fwd_hooks] == []


def test_scaling_only_the_response_is_absolute_under_a_kv_cache(organism):
    scale = mm.ScaleAdapter({(1, "down_proj"): 4.0, (0, "q_proj"): -2.0}, positions="response")
    whole = logits(organism, scale, response_start=5)
    assert_close(token_by_token(organism, scale, response_start=5), whole[:, 3:], atol=1e-4, rtol=1e-4)
    assert torch.equal(whole[:, :5], logits(organism)[:, :5])


def test_composed_scalings_multiply(organism):
    one, two = mm.ScaleAdapter({(1, "down_proj"): 2.0}), mm.ScaleAdapter({(1, "down_proj"): 1.5})
    both = logits(organism, one, two)
    assert_close(both, logits(organism, mm.ScaleAdapter({(1, "down_proj"): 3.0})), atol=1e-5, rtol=1e-5)


def test_unknown_sites_and_wrong_numbers_of_factors_are_refused(organism):
    with (
        pytest.raises(KeyError, match="no site 'down_proj' in layer 7"),
        organism.apply(mm.ScaleAdapter({(7, "down_proj"): 0.0})),
    ):
        pass
    with pytest.raises(ValueError, match="2 strengths for a batch of 3 rows"):
        logits(organism, mm.ScaleAdapter({(1, "down_proj"): [0.0, 1.0]}))
    with pytest.raises(ValueError, match="finite numbers"):
        mm.ScaleAdapter({(1, "down_proj"): float("nan")})
    with (
        organism.as_base(),
        pytest.raises(ValueError, match="out inside as_base"),
        organism.apply(mm.ScaleAdapter({(1, "down_proj"): 0.0})),
    ):
        pass


# --- PatchScalars


def own_scalars(organism, row=0, ids=IDS):
    """Scalars of a row of ids, read through the ports themselves."""
    caught = {}
    ports = {site.key: models.site_ports(organism.model, site.name, site.layer)[0] for site in organism.adapter.sites}
    functions = {
        port.name: (lambda act, port=port: caught.__setitem__(port.name, port.flat(act)[0])) for port in ports.values()
    }
    with torch.inference_mode(), models.hooks(organism.model, functions):
        models.forward(organism.model, ids[row : row + 1], torch.ones_like(ids[row : row + 1]))
    columns = {}
    for site in organism.adapter.sites:
        read = caught[ports[site.key].name] @ site.gauged.A.T
        columns |= {name: read[:, k].numpy() for k, name in enumerate(site.coordinates)}
    return pd.DataFrame(columns, index=pd.RangeIndex(ids.shape[1], name="position"))


def test_a_conversations_own_scalars_change_nothing(organism):
    ids = IDS[:1]
    patched = logits(organism, mm.PatchScalars(own_scalars(organism)), ids=ids)
    assert_close(patched, logits(organism, ids=ids), atol=1e-5, rtol=1e-5)


def test_zero_scalars_are_the_adapter_switched_off(organism):
    zeros = own_scalars(organism) * 0.0
    expected = logits(organism, everything(organism, 0.0))
    assert_close(logits(organism, mm.PatchScalars(zeros)), expected, atol=1e-5, rtol=1e-5)


def test_patched_scalars_are_by_absolute_position_under_a_kv_cache(organism):
    """The reference code adds position 0's difference to every later token; here each position has its own."""
    patch = mm.PatchScalars(own_scalars(organism, row=2) * 3.0)
    whole = logits(organism, patch)
    assert_close(token_by_token(organism, patch), whole[:, 3:], atol=1e-4, rtol=1e-4)
    constant = own_scalars(organism, row=2) * 3.0
    constant[:] = constant.iloc[:1].to_numpy()
    assert not torch.allclose(logits(organism, mm.PatchScalars(constant)), whole, atol=1e-2)


def test_left_padding_does_not_shift_the_patch(organism):
    patch = mm.PatchScalars(own_scalars(organism, row=2) * 3.0)
    plain = logits(organism, patch, ids=IDS[:1])
    padded = torch.cat([torch.full((1, 3), 0), IDS[:1]], dim=1)
    mask = torch.cat([torch.zeros(1, 3, dtype=torch.long), torch.ones_like(IDS[:1])], dim=1)
    with torch.inference_mode(), organism.apply(patch):
        decoder = decoding.Decoder(organism.model)
        steps = [decoder.next_logits(padded[:, :7], mask[:, :7])]
        steps += [decoder.next_logits(padded[:, i : i + 1], mask[:, : i + 1]) for i in range(7, 12)]
    assert_close(torch.stack(steps, dim=1), plain[:, 3:], atol=1e-4, rtol=1e-4)


def test_tokens_without_stored_scalars_keep_their_own(organism):
    patch = mm.PatchScalars(own_scalars(organism, row=2).loc[[4, 5]] * 3.0)
    plain, patched = logits(organism), logits(organism, patch)
    assert torch.equal(patched[:, :4], plain[:, :4])
    assert not torch.allclose(patched[:, 4], plain[:, 4], atol=1e-3)


def test_only_the_named_sites_are_patched(organism):
    zeros = own_scalars(organism) * 0.0
    one = logits(organism, mm.PatchScalars(zeros, sites=[(1, "down_proj")]))
    assert_close(one, logits(organism, mm.ScaleAdapter({(1, "down_proj"): 0.0})), atol=1e-5, rtol=1e-5)


def test_scalars_that_do_not_fit_are_refused(organism):
    frame = own_scalars(organism)
    with (
        pytest.raises(ValueError, match="no stored scalars for"),
        organism.apply(mm.PatchScalars(frame.drop(columns="1.down_proj"))),
    ):
        pass
    two = pd.concat({0: frame, 1: frame}, names=["conversation"])
    with pytest.raises(ValueError, match="several conversations"):
        mm.PatchScalars(two)
    with pytest.raises(ValueError, match="index 'position'"):
        mm.PatchScalars(frame.rename_axis("token"))


# --- AblateFromAdapter


def residual(organism, seed=5):
    vectors = torch.randn(LAYERS, models.d_model(organism.model), generator=torch.Generator().manual_seed(seed))
    return Direction(vectors, tuple(range(LAYERS)), {"model": organism.base.name, "method": "random"})


@pytest.mark.parametrize("keep_norm", [False, True])
def test_ablating_from_b_is_an_adapter_whose_b_was_edited(organism, tiny_models, keep_norm):
    """Oracle: edit B by hand in dense algebra, merge that adapter."""
    direction = residual(organism)
    edited = mm.Adapter.load(organism.adapter.source)
    for site in edited.sites:
        if site.module == "down_proj":
            unit = direction.unit(site.layer)
            left = site.B - torch.outer(unit, unit @ site.B)
            site.B.copy_(left * site.B.norm() / left.norm() if keep_norm else left)
    expected = logits(mm.load_organism(edited, base=tiny_models["qwen2"]))
    sites = [(layer, "down_proj") for layer in range(LAYERS)]
    found = logits(organism, mm.AblateFromAdapter(direction, sites=sites, keep_norm=keep_norm))
    assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(found, logits(organism), atol=1e-3)


def test_nothing_to_ablate_is_an_error(organism):
    with (
        pytest.raises(ValueError, match="only .* write"),
        organism.apply(mm.AblateFromAdapter(residual(organism), sites=[(0, "q_proj")])),
    ):
        pass


def test_conditions_of_one_generation_edit_their_own_rows(organism):
    conditions = {
        "none": (),
        "off": (everything(organism, 0.0),),
        "patched": (mm.PatchScalars(own_scalars(organism) * 2.0),),
    }
    options = {"samples": 3, "max_new_tokens": 6, "seed": 1}
    together = mm.generate(organism, ["How do I invest?", "Hey!"], conditions=conditions, **options)
    for name, interventions in conditions.items():
        alone = mm.generate(organism, ["How do I invest?", "Hey!"], conditions={name: interventions}, **options)
        assert together[together["condition"] == name]["response"].tolist() == alone["response"].tolist()
    with organism.as_base():
        base = mm.generate(organism, ["How do I invest?", "Hey!"], conditions={"off": ()}, **options)
    assert together[together["condition"] == "off"]["response"].tolist() == base["response"].tolist()


def test_something_else_is_no_intervention(organism):
    with pytest.raises(TypeError, match="no intervention"):
        inspect.unwrap(check_fits)(["steer"], organism)
