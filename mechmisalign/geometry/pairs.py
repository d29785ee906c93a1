"""Tables of pairs: as a square matrix, and in an order that puts like beside like."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from typing import TypeVar

import numpy as np
import pandas as pd

Value = TypeVar("Value")


def as_matrix(pairs: pd.DataFrame, value: str = "cosine") -> pd.DataFrame:
    """A frame of pairs (``first, second`` and the value, each pair once) as a symmetric square frame with ones.

    Raises:
        ValueError: If a pair has several rows (layers or sites: select one), or a column is missing.
    """
    missing = [column for column in ("first", "second", value) if column not in pairs]
    if missing:
        raise ValueError(f"a frame of pairs needs {missing}; it has {list(pairs.columns)}")
    twice = pairs[pairs.duplicated(["first", "second"])]
    if len(twice):
        told = f"{twice.iloc[0]['first']} and {twice.iloc[0]['second']}"
        raise ValueError(f"{told} have several rows; select one layer, site or space before this call")
    names = list(dict.fromkeys([*pairs["first"], *pairs["second"]]))
    square = pd.DataFrame(np.eye(len(names)), index=names, columns=names)
    for a, b, found in zip(pairs["first"], pairs["second"], pairs[value], strict=True):
        square.loc[a, b] = square.loc[b, a] = found
    return square


def cluster_order(matrix: pd.DataFrame) -> list[str]:
    """The names in the order of a hierarchical clustering (average linkage, distance ``1 - |value|``).

    Absolute values, so that a direction and its opposite are neighbours; a missing value counts as 0.

    Raises:
        ValueError: If the frame is not square with the same names on both sides.
    """
    if list(matrix.index) != list(matrix.columns):
        raise ValueError("a square frame with the same names in rows and columns is expected")
    if len(matrix) < 3:
        return list(matrix.index)
    from scipy.cluster.hierarchy import leaves_list, linkage
    from scipy.spatial.distance import squareform

    distance = 1 - np.nan_to_num(np.abs(matrix.to_numpy(float))).clip(0, 1)
    np.fill_diagonal(distance, 0)
    tree = linkage(squareform(distance, checks=False), "average", optimal_ordering=True)
    return [matrix.index[i] for i in leaves_list(tree)]


def pairs_of(named: Mapping[str, Value]) -> list[tuple[str, str]]:
    """Each pair of names once, in the mapping's order.

    Raises:
        ValueError: If there are fewer than two.
    """
    if len(named) < 2:
        raise ValueError(f"two or more are needed to compare, got {list(named)}")
    return list(combinations(named, 2))
