"""How directions lie to each other: cosines by layer, and between several at one layer."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd
import torch

from .directions import Direction


def cosine_by_layer(first: Direction, second: Direction) -> pd.DataFrame:
    """Cosine between two directions in each layer where both are nonzero: columns ``layer, cosine``."""
    layers = [layer for layer in first.nonzero_layers if layer in second.nonzero_layers]
    cosines = [float(first.unit(layer).double() @ second.unit(layer).double()) for layer in layers]
    return pd.DataFrame({"layer": layers, "cosine": cosines})


def cosines(directions: Mapping[str, Direction]) -> pd.DataFrame:
    """All pairs of named directions, layer by layer: columns ``first, second, layer, cosine`` (each pair once)."""
    names = list(directions)
    frames = [
        cosine_by_layer(directions[a], directions[b]).assign(first=a, second=b)
        for i, a in enumerate(names)
        for b in names[i + 1 :]
    ]
    if not frames:
        return pd.DataFrame(columns=["first", "second", "layer", "cosine"])
    return pd.concat(frames, ignore_index=True)[["first", "second", "layer", "cosine"]]


def cosine_matrix(directions: Mapping[str, Direction], layer: int) -> pd.DataFrame:
    """Square frame of cosines between named directions at one layer.

    Raises:
        ZeroDirectionError: If one of them is zero at that layer.
    """
    units = torch.stack([direction.unit(layer).double() for direction in directions.values()])
    names = list(directions)
    return pd.DataFrame((units @ units.T).numpy(), index=names, columns=names)
