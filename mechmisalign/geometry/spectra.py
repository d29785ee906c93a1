r"""One direction or several? The spectrum of a set of directions, against chance and against estimation noise.

The squared singular values of ``n`` directions at length 1, stacked, add up to ``n``; divided by it they are shares.
One common direction gives the first a share of 1. Estimates of one and the same direction do not: each has its own
noise, and noise looks like further directions. So the spectrum is compared with two nulls:

* *random*: n random directions;
* *noise*: all members are the **same** direction (the first principal axis), each at its length without noise, plus its
  own estimation noise, taken from replicates (bootstrap resamples) of each member.

More generally, ``p_enough`` of row k tests whether k dimensions are enough: members are moved into the span of the
first k axes, noise is added, and what is left outside of the first k axes is compared. The test keeps its level where
estimates are longer than their noise; where noise is the longer part it refutes one direction too often (12 % instead
of 5 % in a simulation with noise of 1.4 times the signal).
:math:`1 / \sum_k share_k^2` is the effective (participation) rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float

from mechmisalign.adapters import Adapter
from mechmisalign.directions import Direction

from .factors import thinned
from .nulls import at_least, band
from .pairs import pairs_of
from .sharing import common_layers, update_gram

ENOUGH = 0.05
"""A number of dimensions is enough where it is not refuted at this level."""


@dataclass(frozen=True, eq=False)
class Spectrum:
    """The spectrum of a set, and what it says.

    Attributes:
        values: One row per layer and k, from 1: ``share`` of the k-th axis; ``random_low, random_high``; and with
            replicates ``noise_low, noise_high`` (one direction plus noise) and ``p_enough``.
        summary: One row per layer: ``members, first_share, effective_rank`` with ``random_low, random_high`` and
            ``noise_low, noise_high`` of the effective rank; with replicates ``p_one`` (one direction is enough),
            ``p_one_everywhere`` (the same for all layers at once) and ``dimensions``, the fewest that are enough.
    """

    values: pd.DataFrame
    summary: pd.DataFrame


def spectrum(
    directions: Mapping[str, Direction],
    replicates: Mapping[str, Sequence[Direction]] | None = None,
    *,
    draws: int = 1000,
    seed: int = 0,
) -> Spectrum:
    """Is a set of directions one direction or several, layer by layer?

    Args:
        directions: Named estimates.
        replicates: For each name, bootstrap replicates of the estimate, as :func:`mechmisalign.bootstrap_directions`
            gives; their deviations from it are its noise. Those with the same number go together, so resample the
            members alike where they answered the same prompts. (From split halves: ``v + (half₁ - half₂) / 2``.)
        draws: Of the random null.
        seed: Of the random null.

    Raises:
        ValueError: If there are fewer than two directions, they share no layer, or the replicates are not equally many
            for each of them.
    """
    pairs_of(directions)
    layers, members = common_layers(directions), list(directions.values())
    rng = np.random.default_rng(seed)
    random = _random_shares(len(members), members[0].d_model, draws, rng)
    noises = None if replicates is None else _noises(directions, replicates, layers)
    tables, summaries, rests = [], [], []
    for place, layer in enumerate(layers):
        vectors = np.stack([member.at(layer).double().numpy() for member in members])
        share = _shares(_units(vectors))
        table, row = _told(layer, share, random)
        if noises is not None:
            nulls = _noisy_shares(vectors, noises[:, place])
            table, row, rest = _with_noise(table, row, share, nulls)
            rests.append(rest)
        tables.append(table)
        summaries.append(row)
    summary = pd.DataFrame(summaries)
    if rests:
        found, null = (np.sum(parts, axis=0) for parts in zip(*rests, strict=True))
        summary["p_one_everywhere"] = at_least(float(found), null)
    return Spectrum(pd.concat(tables, ignore_index=True), summary)


def update_spectrum(adapters: Mapping[str, Adapter], *, draws: int = 1000, seed: int = 0) -> Spectrum:
    """The spectrum of a set of whole updates at length 1 (one layer, called "all"), against random updates.

    The null draws each cosine from a normal distribution with the variance that random updates of these singular values
    have; cosines of random updates are uncorrelated.

    Raises:
        AdapterError: If the adapters belong to different bases.
        ValueError: If there are fewer than two, or an update is zero.
    """
    pairs_of(adapters)
    norms, gram = update_gram(adapters)
    n, rng = len(norms), np.random.default_rng(seed)
    variance = np.zeros((n, n))
    found = list(thinned(adapters).values())
    for i, j in np.ndindex(n, n):
        both = [(a, found[j][site]) for site, a in found[i].items() if site in found[j]]
        variance[i, j] = sum(a.norm**2 * b.norm**2 / np.prod(a.shape) for a, b in both) / (norms[i] * norms[j]) ** 2
    noise = np.triu(rng.standard_normal((draws, n, n)) * np.sqrt(variance), 1)
    null = np.linalg.eigvalsh(noise + noise.swapaxes(1, 2) + np.eye(n))[:, ::-1].clip(0) / n
    table, row = _told("all", np.linalg.eigvalsh(gram)[::-1].clip(0) / n, null)
    return Spectrum(table, pd.DataFrame([row]))


def _noises(
    directions: Mapping[str, Direction], replicates: Mapping[str, Sequence[Direction]], layers: Sequence[int]
) -> Float[np.ndarray, "replicate layer member d_model"]:
    lengths = {name: len(replicates.get(name, ())) for name in directions}
    if len(set(lengths.values())) != 1 or min(lengths.values()) < 2:
        raise ValueError(f"equally many replicates, two or more, are needed for each direction, got {lengths}")
    parts = []
    for name, own in directions.items():
        centre = torch.stack([own.at(layer) for layer in layers]).double()
        drawn = torch.stack([torch.stack([each.at(layer) for layer in layers]) for each in replicates[name]]).double()
        parts.append((drawn - centre).numpy())
    return np.stack(parts, axis=2)


def _units(vectors: Float[np.ndarray, "*n d"]) -> Float[np.ndarray, "*n d"]:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True).clip(1e-300)


def _shares(units: Float[np.ndarray, "*draws n d"]) -> Float[np.ndarray, "*draws n"]:
    """Eigenvalues of the matrix of cosines, largest first, over their sum."""
    return np.linalg.eigvalsh(units @ units.swapaxes(-1, -2))[..., ::-1].clip(0) / units.shape[-2]


def _random_shares(n: int, width: int, draws: int, rng: np.random.Generator) -> Float[np.ndarray, "draws n"]:
    return np.stack([_shares(_units(rng.standard_normal((n, width)))) for _ in range(draws)])


def _noisy_shares(
    vectors: Float[np.ndarray, "n d"], noise: Float[np.ndarray, "replicate n d"]
) -> list[Float[np.ndarray, "replicate n"]]:
    """For each k: shares of members that lie in the first k axes but for their noise."""
    units, energy = _units(vectors), (noise**2).sum(-1).mean(0)
    length = np.sqrt(((vectors**2).sum(-1) - energy).clip(0))  # an estimate is longer than what it estimates
    axes = np.linalg.svd(units, full_matrices=False)[2]
    inside = [_units(units @ axes[:k].T @ axes[:k]) * length[:, None] for k in range(1, len(vectors))]
    return [_shares(_units(true + noise)) for true in inside]


def _effective(shares: Float[np.ndarray, "draws n"]) -> Float[np.ndarray, " draws"]:
    return 1 / (shares**2).sum(1)


def _told(
    layer: int | str, share: Float[np.ndarray, " n"], random: Float[np.ndarray, "draws n"]
) -> tuple[pd.DataFrame, dict[str, object]]:
    table = pd.DataFrame({"layer": layer, "k": np.arange(1, len(share) + 1), "share": share})
    row: dict[str, object] = {"layer": layer, "members": len(share), "first_share": share[0]}
    row |= {"effective_rank": float(_effective(share[None])[0])} | _ends("random", _effective(random))
    return table.join(_bands("random", random)), row


def _with_noise(
    table: pd.DataFrame, row: dict[str, object], share: np.ndarray, nulls: Sequence[np.ndarray]
) -> tuple[pd.DataFrame, dict[str, object], tuple[float, np.ndarray]]:
    """Both tables with the second null, and what lies outside of the first axis with its null."""
    rests = [(float(share[k:].sum()), null[:, k:].sum(1)) for k, null in enumerate(nulls, 1)]
    enough = [at_least(*rest) for rest in rests] + [1.0]  # n dimensions always are
    row = row | _ends("noise", _effective(nulls[0])) | {"p_one": enough[0]}
    row["dimensions"] = 1 + next(k for k, p in enumerate(enough) if p > ENOUGH)
    return table.join(_bands("noise", nulls[0])).assign(p_enough=enough), row, rests[0]


def _ends(name: str, null: np.ndarray) -> dict[str, float]:
    return dict(zip((f"{name}_low", f"{name}_high"), band(null), strict=True))


def _bands(name: str, null: Float[np.ndarray, "draws n"]) -> pd.DataFrame:
    return pd.DataFrame([_ends(name, column) for column in null.T])
