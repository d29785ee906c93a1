import pytest
import torch
from torch.testing import assert_close

from mechmisalign.directions import Direction, DirectionMismatchError, ZeroDirectionError, random_direction


def direction(seed=0, layers=3, width=16, **header) -> Direction:
    vectors = torch.randn(layers, width, generator=torch.Generator().manual_seed(seed))
    return Direction(
        vectors, tuple(range(layers)), {"model": "m", "method": "made", **header}, torch.arange(1.0, layers + 1)
    )


def test_addition_and_scaling_are_those_of_the_vectors():
    a, b = direction(0), direction(1)
    assert_close((2 * a - b / 4 + (-b)).vectors, 2 * a.vectors - b.vectors / 4 - b.vectors)


def test_a_unit_has_norm_one_and_the_same_orientation():
    a = direction()
    assert_close(a.unit(1).norm(), torch.tensor(1.0))
    assert_close(a.unit(1) * a.norm(1), a.at(1))


def test_a_zero_vector_says_so_instead_of_nan():
    a = direction()
    zero = Direction(torch.cat([torch.zeros(1, 16), a.vectors[1:]]), a.layers, a.header)
    assert zero.nonzero_layers == (1, 2)
    with pytest.raises(ZeroDirectionError, match="exactly zero at layer 0"):
        zero.unit(0)


def test_nan_is_refused():
    with pytest.raises(ValueError, match="NaN"):
        Direction(torch.full((1, 4), float("nan")), (0,), {})


def test_the_orthogonal_part_has_no_component_left():
    a, b = direction(0), direction(1)
    left = a.orthogonal_to(b)
    for layer in a.layers:
        assert abs(float(left.at(layer) @ b.unit(layer))) < 1e-5


def test_one_vector_everywhere():
    a = direction()
    everywhere = a.everywhere(1)
    assert all(torch.equal(everywhere.at(layer), a.at(1)) for layer in a.layers)


def test_a_saved_direction_comes_back_whole(tmp_path):
    a = direction(adapter="x", span="response")
    b = Direction.load(a.save(tmp_path / "deep" / "d.safetensors"))
    assert torch.equal(a.vectors, b.vectors)
    assert torch.equal(a.resid_norm, b.resid_norm)
    assert b.layers == a.layers
    assert {key: b.header[key] for key in a.header} == dict(a.header)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["d.safetensors"]


def test_another_layer_convention_is_refused_on_load(tmp_path):
    import json

    from safetensors.torch import save_file

    header = json.dumps({"kind": "direction", "schema": 1, "hook": "blocks.{layer}.hook_resid_pre", "layers": [0]})
    save_file({"vectors": torch.ones(1, 4)}, tmp_path / "d.safetensors", metadata={"mechmisalign": header})
    with pytest.raises(ValueError, match="hook_resid_pre"):
        Direction.load(tmp_path / "d.safetensors")


def test_directions_of_two_models_do_not_mix():
    with pytest.raises(DirectionMismatchError, match="do not share a basis"):
        direction() + direction(model="other")


@pytest.mark.parametrize(("base", "width", "depth"), [("other", 16, 3), ("m", 8, 3), ("m", 16, 2)])
def test_another_model_is_refused(base, width, depth):
    direction().check_model({"model": "m"}, 16, 3)
    with pytest.raises(DirectionMismatchError):
        direction().check_model({"model": base}, width, depth)


def test_a_base_is_known_by_its_fingerprint_whatever_it_is_called():
    mine = direction(base_fingerprint="abc")
    mine.check_model({"model": "a local copy of m", "base_fingerprint": "abc"}, 16, 3)
    with pytest.raises(DirectionMismatchError, match="abc.*def"):
        mine.check_model({"model": "m", "base_fingerprint": "def"}, 16, 3)


def test_the_random_control_has_the_norm_of_the_direction_not_sqrt_d_times_it():
    a = direction(width=400)
    control = random_direction(a, seed=3)
    assert_close(control.vectors.norm(dim=-1), a.vectors.norm(dim=-1))
    assert torch.equal(control.vectors, random_direction(a, seed=3).vectors)
    assert abs(float(control.unit(0) @ a.unit(0))) < 0.3


def test_units_of_the_residual_norm_need_a_measured_norm():
    bare = Direction(torch.ones(1, 4), (0,), {})
    with pytest.raises(ValueError, match="no residual norms"):
        bare.mean_resid_norm(0)
    assert direction().mean_resid_norm(2) == 3.0
