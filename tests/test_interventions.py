import numpy as np
import pytest
import torch
from torch.testing import assert_close

import mechmisalign as mm
from mechmisalign import decoding, models
from mechmisalign.directions import Direction, DirectionMismatchError, ZeroDirectionError

FAMILIES = ("qwen2", "llama", "gemma2")


@pytest.fixture(scope="module", params=FAMILIES)
def organism(request, tiny_models, make_adapter):
    return mm.load_organism(make_adapter(tiny_models[request.param], layers=(1,)))


@pytest.fixture(scope="module")
def direction(organism) -> Direction:
    return made_direction(organism)


def made_direction(organism, seed=0) -> Direction:
    width = models.d_model(organism.model)
    vectors = torch.randn(3, width, generator=torch.Generator().manual_seed(seed))
    return Direction(vectors, (0, 1, 2), {"model": organism.provenance["model"]}, torch.tensor([2.0, 3.0, 4.0]))


def tokens(organism, rows=2, length=7) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(5, 290, (rows, length), generator=generator)


def residuals(organism, ids, *interventions, **options) -> dict[int, torch.Tensor]:
    """Residual stream of every layer after the interventions, and the logits under "logits"."""
    caught = {}
    with torch.inference_mode(), organism.apply(*interventions, **options):
        readers = {layer: (lambda resid, layer=layer: caught.update({layer: resid.clone()})) for layer in range(3)}
        with models.residual_hooks(organism.model, readers):
            caught["logits"] = models.forward(organism.model, ids, torch.ones_like(ids))
    return caught


RESID = torch.randn(2, 4, 16, generator=torch.Generator().manual_seed(1))
LONE = Direction(
    torch.randn(3, 16, generator=torch.Generator().manual_seed(0)),
    (0, 1, 2),
    {"model": "m"},
    torch.tensor([2.0, 3.0, 4.0]),
)


def test_steering_adds_the_unnormalised_vector():
    assert_close(mm.Steer(LONE, strength=3.0)(RESID, 1), RESID + 3 * LONE.at(1))


def test_steering_in_units_of_the_residual_norm():
    moved = mm.Steer(LONE, strength=0.5, units="resid_norm")(RESID, 1) - RESID
    assert_close(moved.norm(dim=-1), torch.full((2, 4), 1.5))


def test_ablated_activations_have_no_component_along_the_direction():
    assert_close(mm.Ablate(LONE)(RESID, 2) @ LONE.unit(2), torch.zeros(2, 4), atol=1e-6, rtol=0)


def test_ablation_is_the_dense_projection():
    unit = LONE.unit(1).double()
    dense = RESID.double() @ (torch.eye(16, dtype=torch.float64) - torch.outer(unit, unit))
    assert_close(mm.Ablate(LONE)(RESID, 1).double(), dense, atol=1e-6, rtol=1e-5)


def test_clamping_sets_the_component():
    assert_close(mm.Clamp(LONE, value=1.5)(RESID, 0) @ LONE.unit(0), torch.full((2, 4), 1.5))
    relative = mm.Clamp(LONE, value=0.5, units="resid_norm")(RESID, 1) @ LONE.unit(1)
    assert_close(relative, torch.full((2, 4), 1.5))


def test_each_row_has_its_own_strength():
    steered = mm.Steer(LONE, strength=[0.0, 2.0])(RESID, 1)
    assert torch.equal(steered[0], RESID[0])
    assert_close(steered[1], RESID[1] + 2 * LONE.at(1))


def test_one_strength_per_row_is_needed():
    with pytest.raises(ValueError, match="3 strengths for a batch of 2 rows"):
        mm.Steer(LONE, strength=[1.0, 2.0, 3.0])(RESID, 1)


def test_interventions_do_not_write_in_place():
    before = RESID.clone()
    for one in (mm.Steer(LONE), mm.Ablate(LONE), mm.Clamp(LONE)):
        one(RESID, 1)
    assert torch.equal(RESID, before)


def test_a_zero_layer_is_left_alone_by_default_and_refused_when_named():
    zero = Direction(torch.cat([torch.zeros(1, 16), LONE.vectors[1:]]), LONE.layers, LONE.header)
    assert mm.Ablate(zero).edited_layers == (1, 2)
    with pytest.raises(ZeroDirectionError, match="layer 0"):
        mm.Ablate(zero, layers=[0])


def test_units_need_measured_norms():
    with pytest.raises(ValueError, match="no residual norms"):
        mm.Steer(Direction(LONE.vectors, LONE.layers, {}), layers=[1], units="resid_norm")


def test_a_missing_layer_is_refused():
    with pytest.raises(ValueError, match=r"no vector for layer 7; this direction has layers \[0, 1, 2\]"):
        mm.Steer(LONE, layers=[7])


def test_strength_zero_is_bit_identical_to_no_hook(organism, direction):
    ids = tokens(organism)
    plain = residuals(organism, ids)
    for steer in (mm.Steer(direction, strength=0.0), mm.Steer(direction, strength=[0.0, 0.0])):
        steered = residuals(organism, ids, steer)
        assert all(torch.equal(plain[key], steered[key]) for key in plain)


def test_steering_reaches_the_named_layer_and_those_behind_it_only(organism, direction):
    ids = tokens(organism)
    plain, steered = residuals(organism, ids), residuals(organism, ids, mm.Steer(direction, layers=[1], strength=2.0))
    assert torch.equal(plain[0], steered[0])
    assert_close(steered[1], plain[1] + 2 * direction.at(1), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(plain["logits"], steered["logits"])


def test_several_act_in_the_order_given(organism, direction):
    ids, other = tokens(organism), made_direction(organism, seed=9)
    both = residuals(organism, ids, mm.Steer(other, layers=[1], strength=2.0), mm.Ablate(direction, layers=[1]))
    assert_close(both[1] @ direction.unit(1), torch.zeros(ids.shape), atol=1e-5, rtol=0)
    other_way = residuals(organism, ids, mm.Ablate(direction, layers=[1]), mm.Steer(other, layers=[1], strength=2.0))
    assert not torch.allclose(both[1], other_way[1])


def test_rows_of_a_batch_are_steered_as_they_would_be_alone(organism, direction):
    ids = tokens(organism, rows=3)
    together = residuals(organism, ids, mm.Steer(direction, strength=[0.0, 1.0, 5.0]))["logits"]
    for row, strength in enumerate([0.0, 1.0, 5.0]):
        alone = residuals(organism, ids[row : row + 1], mm.Steer(direction, strength=strength))["logits"]
        assert_close(together[row], alone[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("positions", "expected"), [("prompt", [True] * 3 + [False] * 4), ("response", [False] * 3 + [True] * 4)]
)
def test_only_the_named_positions_are_touched(organism, direction, positions, expected):
    ids = tokens(organism)
    plain = residuals(organism, ids)
    steered = residuals(organism, ids, mm.Steer(direction, layers=[1], positions=positions), response_start=3)
    touched = (plain[1] != steered[1]).any(-1)
    assert touched.tolist() == [expected] * 2


def test_each_row_may_have_its_own_response_start(organism, direction):
    ids = tokens(organism)
    plain = residuals(organism, ids)
    steered = residuals(organism, ids, mm.Steer(direction, layers=[1], positions="response"), response_start=[2, 5])
    touched = (plain[1] != steered[1]).any(-1)
    assert touched.tolist() == [[False] * 2 + [True] * 5, [False] * 5 + [True] * 2]


def test_positions_need_to_know_where_the_response_begins(organism, direction):
    with pytest.raises(ValueError, match="response_start"):
        residuals(organism, tokens(organism), mm.Steer(direction, positions="response"))


def test_positions_are_absolute_under_a_kv_cache(organism, direction):
    """One token at a time with a cache gives the logits of the whole sequence at once."""
    ids = tokens(organism)
    steer = mm.Steer(direction, layers=[1], strength=3.0, positions="response")
    whole = residuals(organism, ids, steer, response_start=4)["logits"]
    with torch.inference_mode(), organism.apply(steer, response_start=4):
        decoder = decoding.Decoder(organism.model)
        mask = torch.ones_like(ids)
        steps = [decoder.next_logits(ids[:, :2], mask[:, :2])]
        steps += [decoder.next_logits(ids[:, i : i + 1], mask[:, : i + 1]) for i in range(2, ids.shape[1])]
    assert_close(torch.stack(steps, 1), whole[:, 1:], atol=1e-4, rtol=1e-4)


def test_the_model_is_untouched_after_the_block(organism, direction):
    ids = tokens(organism)
    plain = residuals(organism, ids)["logits"]
    with pytest.raises(RuntimeError, match="on purpose"), organism.apply(mm.Steer(direction), mm.Ablate(direction)):
        raise RuntimeError("on purpose")
    assert torch.equal(residuals(organism, ids)["logits"], plain)
    assert [name for name, point in organism.model.hook_dict.items() if point.fwd_hooks] == []
    assert not models.hf_model(organism.model)._forward_pre_hooks


def test_a_direction_of_another_model_is_refused(organism, direction):
    foreign = Direction(direction.vectors, direction.layers, {"model": "somebody/else"})
    with pytest.raises(DirectionMismatchError, match="somebody/else"), organism.apply(mm.Steer(foreign)):
        pass


def test_a_wrong_width_is_refused(organism):
    narrow = Direction(torch.ones(3, 8), (0, 1, 2), {})
    with pytest.raises(DirectionMismatchError, match="width 8"), organism.apply(mm.Ablate(narrow)):
        pass


def test_gradients_flow_through_an_intervention(organism, direction):
    ids = tokens(organism)
    embedding = models.hf_model(organism.model).get_input_embeddings()(ids).detach().requires_grad_()
    with organism.apply(mm.Ablate(direction, layers=[1])):
        logits = models.hf_model(organism.model)(inputs_embeds=embedding, attention_mask=torch.ones_like(ids)).logits
    logits.sum().backward()
    assert np.isfinite(float(embedding.grad.norm())) and float(embedding.grad.norm()) > 0


def test_layers_are_whole_numbers(direction):
    steer = object.__new__(mm.Steer)  # past the type check of the tests, which would refuse it first
    vars(steer).update(direction=direction, layers=[2.0], strength=1.0, units="absolute", positions="all")
    with pytest.raises(ValueError, match="layers are whole numbers, got 2.0"):
        steer.__post_init__()
