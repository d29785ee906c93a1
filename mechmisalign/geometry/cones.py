"""Members of a cone of directions, and what to compare them with: one direction, or a region of them?

If several independent directions each make a model misaligned, so should every nonnegative combination of them
(2502.17420 calls that a concept cone). If there is one direction, a combination works as far as it has a component
along that one, and no further. The groups here tell the two apart; steer the chat model with all of them in one batch.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from jaxtyping import Float

from mechmisalign.directions import Direction

from .pairs import pairs_of
from .sharing import common_layers

CONE_KINDS = {
    "cone": "nonnegative combinations of the directions",
    "axis": "principal axes of the directions, in both senses but for the first",
    "inside": "random directions in the span of the first axes, on the shared axis' side",
    "inside, shared part": "the component of each of those along the first axis, at its own length",
    "inside, rest random": "the same component, with a random rest from outside of the span",
    "outside": "random directions orthogonal to the span",
}
"""Groups of :func:`cone_members`."""


def cone_members(
    directions: Mapping[str, Direction], *, k: int | None = None, draws: int = 8, seed: int = 0
) -> dict[str, tuple[Direction, ...]]:
    """Directions in, along, and outside of the cone of a set.

    In each layer every member has the mean norm of the set, but for ``"inside, shared part"``, which is shorter.
    Members with the same number go together: ``inside`` is its shared part plus a rest in the span;
    ``inside, rest random`` the same part plus a rest outside of it.

    Args:
        directions: What the cone is spanned by; each counts with length 1.
        k: Number of principal axes that span the subspace; as many as there are directions without.
        draws: Members of each random group.
        seed: Of the random groups.

    Returns:
        Kind -> members; the kinds are those of :data:`CONE_KINDS`. ``axis`` holds +1, then +2, -2, +3, -3 …

    Raises:
        ValueError: If there are fewer than two directions, they share no layer, or ``k`` does not fit.
    """
    pairs_of(directions)
    layers, width = common_layers(directions), next(iter(directions.values())).d_model
    k = len(directions) if k is None else k
    if not 2 <= k <= min(len(directions), width - 1):
        raise ValueError(f"k={k} axes of {len(directions)} directions of width {width}; expected 2 to their number")
    rng = np.random.default_rng(seed)
    mixes = rng.dirichlet(np.ones(len(directions)), draws)
    found: dict[str, list[np.ndarray]] = {kind: [] for kind in CONE_KINDS}
    spans, outsides = rng.standard_normal((draws, k)), rng.standard_normal((draws, width))
    for layer in layers:
        units = torch.stack([direction.unit(layer) for direction in directions.values()]).double().numpy()
        norm = float(np.mean([direction.norm(layer) for direction in directions.values()]))
        for kind, rows in _at_layer(units, k, mixes, spans, outsides).items():
            found[kind].append(rows * norm)
    model = next(iter(directions.values()))
    return {
        kind: tuple(
            Direction(
                torch.from_numpy(vectors).float(), layers, {**model.header, "method": f"{kind} {i}", "adapter": None}
            )
            for i, vectors in enumerate(np.stack(each, axis=1), 1)
        )
        for kind, each in found.items()
    }


def _at_layer(
    units: Float[np.ndarray, "n d"],
    k: int,
    mixes: Float[np.ndarray, "draws n"],
    spans: Float[np.ndarray, "draws k"],
    outsides: Float[np.ndarray, "draws d"],
) -> dict[str, Float[np.ndarray, "member d"]]:
    """Each group at length 1."""
    axes = np.linalg.svd(units, full_matrices=False)[2][:k]
    axes[0] *= 1.0 if axes[0] @ units.sum(0) >= 0 else -1.0
    inside = _unit(spans) * np.sign(spans[:, :1])  # on the side of the shared axis
    along = inside[:, :1] * axes[0]
    outside = _unit(outsides - outsides @ axes.T @ axes)
    return {
        "cone": _unit(mixes @ units),
        "axis": np.stack([axes[0], *(sign * axis for axis in axes[1:] for sign in (1.0, -1.0))]),
        "inside": inside @ axes,
        "inside, shared part": along,
        "inside, rest random": along + np.sqrt(1 - inside[:, :1] ** 2) * outside,
        "outside": outside,
    }


def _unit(rows: Float[np.ndarray, "row d"]) -> Float[np.ndarray, "row d"]:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)
