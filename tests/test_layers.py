"""Layers and other numbers as people hand them over."""

import json

import numpy as np
import pandas as pd
import pytest
import torch

import mechmisalign as mm
from mechmisalign._layers import layer_numbers
from mechmisalign.interop import from_layer_activations
from mechmisalign.judging.local import _spread
from mechmisalign.judging.scores import Reply, read_reply

DIRECTION = mm.Direction(torch.ones(4, 3), tuple(range(4)), {})


@pytest.mark.parametrize(
    "given",
    [[1, 2], (1, 2), range(1, 3), np.arange(1, 3), np.array([1, 2], np.uint8), pd.Series([1, 2]), torch.tensor([1, 2])],
)
def test_layers_of_any_container_become_plain_numbers(given):
    assert layer_numbers(given) == (1, 2)
    assert json.dumps(mm.Steer(DIRECTION, layers=given).edited_layers) == "[1, 2]"
    assert DIRECTION.everywhere(1, layers=given).layers == (1, 2)


@pytest.mark.parametrize("given", [2, np.int64(2), np.array(2), torch.tensor(2)])
def test_one_layer_may_stand_for_a_list_of_one(given):
    assert mm.Ablate(DIRECTION, layers=given).edited_layers == (2,)


@pytest.mark.parametrize(
    "given", [[], np.array([], int), True, [np.True_], torch.tensor([True]), 2.0, [1.0], "2", ["2"]]
)
def test_what_names_no_layer_is_refused(given):
    with pytest.raises(ValueError, match=r"is empty|are whole numbers"):
        layer_numbers(given)


def test_a_vector_may_have_leading_axes_of_one_and_nothing_else_is_flattened():
    assert from_layer_activations({"3": torch.ones(1, 8)}).d_model == 8
    for shape in ((2, 4), (4, 1, 2), (8, 1)):
        with pytest.raises(ValueError, match="has the shape"):
            from_layer_activations({3: torch.ones(*shape)})


def test_impossible_tokens_and_missing_numbers_hold_no_probability():
    nan, inf = float("nan"), float("inf")
    assert read_reply(Reply("50", (("50", -0.01), ("zz", -inf), ("y", nan)))).score == 50
    assert read_reply(Reply("50", (("50", nan),))).status == "unparsable"
    json.dumps(Reply("50", (("50", inf), ("x", -inf))).top, allow_nan=False)


def test_places_in_a_tensor_of_more_than_2_to_the_24_elements_are_inside_it():
    large = torch.zeros(1).expand(2**24 + 3)
    places = _spread(large.numel(), large.device)
    assert int(places.max()) == large.numel() - 1
    assert len(large[places]) == 64
    assert _spread(3, large.device).tolist() == [0, 1, 2]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_default_dtype_of_torch_changes_no_direction_file(dtype, tmp_path):
    made = mm.Direction(torch.randn(4, 3), tuple(range(4)), {})
    torch.set_default_dtype(dtype)
    try:
        mm.interop.write_persona_vectors(made, tmp_path / "v.pt", n_layers=4)
        assert torch.equal(mm.interop.read_persona_vectors(tmp_path / "v.pt", keep_last=True).vectors, made.vectors)
    finally:
        torch.set_default_dtype(torch.float32)
