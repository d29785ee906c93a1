import pytest
import torch

from mechmisalign import geometry
from mechmisalign.directions import Direction, ZeroDirectionError


def made(rows) -> Direction:
    vectors = torch.tensor(rows)
    return Direction(vectors, tuple(range(len(vectors))), {"model": "m"})


def test_cosines_ignore_length_and_leave_out_zero_layers():
    first, second = made([[0.0, 0.0], [2.0, 0.0], [1.0, 1.0]]), made([[1.0, 0.0], [-3.0, 0.0], [5.0, 0.0]])
    frame = geometry.cosine_by_layer(first, second)
    assert frame["layer"].tolist() == [1, 2]
    assert frame["cosine"].tolist() == pytest.approx([-1.0, 0.5**0.5])


def test_each_pair_stands_once():
    frame = geometry.cosines({name: made([[1.0, float(i)]]) for i, name in enumerate("abc")})
    assert list(zip(frame["first"], frame["second"], strict=True)) == [("a", "b"), ("a", "c"), ("b", "c")]


def test_the_matrix_is_symmetric_with_ones():
    matrix = geometry.cosine_matrix({"a": made([[1.0, 2.0]]), "b": made([[2.0, 1.0]])}, 0)
    assert matrix.loc["a", "b"] == matrix.loc["b", "a"] == pytest.approx(0.8)
    assert matrix.loc["a", "a"] == pytest.approx(1)


def test_the_matrix_refuses_a_zero_direction():
    with pytest.raises(ZeroDirectionError):
        geometry.cosine_matrix({"a": made([[0.0, 0.0]])}, 0)
