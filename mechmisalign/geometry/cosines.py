"""How directions lie to each other: cosines by layer, and between several at one layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch

from mechmisalign.directions import Direction

from .nulls import band, random_cosine, two_sided
from .pairs import pairs_of


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


def cosines_against_null(
    directions: Mapping[str, Direction], shuffled: Mapping[str, Sequence[Direction]] | None = None
) -> pd.DataFrame:
    """:func:`cosines`, beside what chance gives.

    Random directions of this width are the weaker null: activations are not isotropic, and answers to the same prompts
    share more than misalignment. Directions that the same answers give when their labels are shuffled are the stronger.

    Args:
        directions: Named directions.
        shuffled: For each name, directions from shuffled labels; those with the same number are compared, so what the
            shuffles of two organisms have in common stays in.

    Returns:
        ``first, second, layer, cosine``; ``random, random_low, random_high``: expected ``|cosine|`` and 95 % band of
        random directions; with ``shuffled`` also ``shuffled_low, shuffled_high`` and the two-sided p-value ``p``.

    Raises:
        ValueError: If there are fewer than two directions, or the shuffles are not equally many for each of them.
    """
    pairs_of(directions)
    width = next(iter(directions.values())).d_model
    frame = cosines(directions).assign(**dict(zip(("random", *_ENDS), random_cosine(width), strict=True)))
    if shuffled is None:
        return frame
    lengths = {name: len(shuffled.get(name, ())) for name in directions}
    if len(set(lengths.values())) != 1 or not min(lengths.values()):
        raise ValueError(f"equally many shuffles are needed for each direction, got {lengths}")
    draws = range(next(iter(lengths.values())))
    null = pd.concat([cosines({name: shuffled[name][i] for name in directions}) for i in draws])
    drawn = null.groupby(["first", "second", "layer"], observed=True)["cosine"].agg(list)
    rows = []
    for key, found in zip(frame[["first", "second", "layer"]].itertuples(index=False), frame["cosine"], strict=True):
        values = np.asarray(drawn.get(tuple(key), [np.nan]))
        low, high = band(values)
        rows.append({"shuffled_low": low, "shuffled_high": high, "p": two_sided(found, values)})
    return frame.join(pd.DataFrame(rows, index=frame.index))


_ENDS = ("random_low", "random_high")
