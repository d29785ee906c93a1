r"""What fine-tunes share and what each has for itself.

The shared axis of a set is the first principal axis of its members at length 1 (uncentred: what they have in common is
the signal), pointing along their mean. Each member is its component along that axis plus a specific rest, orthogonal to
it. With few members the axis bends towards each of them: of n random vectors each has about ``1 / n`` of its squared
length along it. So the share is told twice, the second time along the axis of the *other* members, where a random
vector has ``1 / d``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float

from mechmisalign._artifacts import base_name, same_base
from mechmisalign.adapters import Adapter
from mechmisalign.combining import combine
from mechmisalign.directions import Direction, DirectionMismatchError

from .factors import inner, thinned
from .pairs import pairs_of


@dataclass(frozen=True, eq=False)
class SharedDirections:
    """Directions taken apart.

    Attributes:
        shared: The shared axis in each layer, with the members' mean norm.
        specific: What is left of each member, orthogonal to the axis, at its own length.
        shares: ``name, layer, cosine`` (with the axis), ``share`` of the squared norm along it, ``held_out`` share
            along the axis of the other members, ``expected`` of a random vector for the latter.
    """

    shared: Direction
    specific: Mapping[str, Direction]
    shares: pd.DataFrame


@dataclass(frozen=True, eq=False)
class SharedUpdates:
    """Updates taken apart.

    Attributes:
        shared: The shared axis in the space of all weights, with the members' mean norm.
        specific: What is left of each member, orthogonal to it.
        shares: ``name, cosine, share, held_out, expected``, as for directions.
    """

    shared: Adapter
    specific: Mapping[str, Adapter]
    shares: pd.DataFrame


def shared_and_specific(directions: Mapping[str, Direction]) -> SharedDirections:
    """The shared and the specific part of each direction, layer by layer, over the layers where all are nonzero.

    Raises:
        ValueError: If there are fewer than two, or no layer where all are nonzero.
    """
    pairs_of(directions)
    layers = common_layers(directions)
    width, rows, axes = next(iter(directions.values())).d_model, [], []
    for layer in layers:
        units = torch.stack([direction.unit(layer) for direction in directions.values()]).double()
        gram = (units @ units.T).numpy()
        weights = _axis(gram)
        axis = torch.from_numpy(weights) @ units
        norm = np.mean([direction.norm(layer) for direction in directions.values()])
        axes.append(axis / axis.norm() * norm)
        told = _shares(list(directions), gram, weights)
        rows.append(told.assign(layer=layer, expected=1 / width))
    model = next(iter(directions.values()))
    told_by = f"shared axis of {', '.join(directions)}"
    shared = Direction(torch.stack(axes).float(), layers, {**model.header, "method": told_by, "adapter": None})
    specific = {name: _at(direction, layers).orthogonal_to(shared) for name, direction in directions.items()}
    table = pd.concat(rows, ignore_index=True)[["name", "layer", "cosine", "share", "held_out", "expected"]]
    return SharedDirections(shared, specific, table)


def shared_and_specific_updates(adapters: Mapping[str, Adapter]) -> SharedUpdates:
    """The shared and the specific part of each update, over all sites at once; a site that one lacks counts as zero.

    Both are sums of the members' updates, so they are ordinary adapters: to be worn, scaled, saved.

    Raises:
        AdapterError: If the adapters belong to different bases.
        ValueError: If there are fewer than two, or an update is zero.
    """
    pairs_of(adapters)
    norms, gram = update_gram(adapters)
    weights = _axis(gram)
    length = float(np.sqrt(weights @ gram @ weights))
    axis: dict[Adapter, float] = {}
    for adapter, w, n in zip(adapters.values(), weights, norms, strict=True):
        axis[adapter] = axis.get(adapter, 0.0) + w / (n * length)
    shared = combine({adapter: float(w * norms.mean()) for adapter, w in axis.items()})
    along = norms * (gram @ weights) / length
    specific = {
        name: combine({other: float((other is own) - part * w) for other, w in axis.items()})
        for (name, own), part in zip(adapters.items(), along, strict=True)
    }
    size = sum(site.d_out * site.d_in for site in shared.sites)
    return SharedUpdates(shared, specific, _shares(list(adapters), gram, weights).assign(expected=1 / size))


def common_layers(directions: Mapping[str, Direction]) -> tuple[int, ...]:
    """The layers where every direction is nonzero.

    Raises:
        DirectionMismatchError: If the directions belong to different models.
        ValueError: If there is no such layer.
    """
    headers = [direction.header for direction in directions.values()]
    other = next((header for header in headers if not same_base(headers[0], header)), None)
    if other is not None or len({direction.d_model for direction in directions.values()}) > 1:
        names = f"{base_name(headers[0])} and {base_name(other or headers[-1])}"
        raise DirectionMismatchError(f"directions of different models, {names}, do not share a basis")
    layers = sorted(set.intersection(*(set(direction.nonzero_layers) for direction in directions.values())))
    if not layers:
        raise ValueError(f"no layer where all of {list(directions)} are nonzero; leave one out")
    return tuple(layers)


def update_gram(adapters: Mapping[str, Adapter]) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, "n n"]]:
    """Norms of whole updates, and their cosines where a site that one lacks counts as zero.

    Raises:
        ValueError: If an update is zero.
    """
    found = list(thinned(adapters).values())
    products = np.array(
        [[sum(inner(each, b[site]) for site, each in a.items() if site in b) for b in found] for a in found]
    )
    norms = np.sqrt(np.diag(products))
    if not norms.all():
        raise ValueError(f"the update of {list(adapters)[int(np.argmin(norms))]!r} is zero; leave it out")
    return norms, products / np.outer(norms, norms)


def _at(direction: Direction, layers: tuple[int, ...]) -> Direction:
    norms = direction.resid_norm
    kept = [direction.layers.index(layer) for layer in layers]
    return replace(
        direction, vectors=direction.vectors[kept], layers=layers, resid_norm=None if norms is None else norms[kept]
    )


def _axis(gram: Float[np.ndarray, "n n"]) -> Float[np.ndarray, " n"]:
    """Weights of the members in their first principal axis, positive along their sum."""
    first = np.linalg.eigh(gram)[1][:, -1]
    return first * (1.0 if first @ gram.sum(1) >= 0 else -1.0)


def _shares(names: list[str], gram: np.ndarray, weights: np.ndarray) -> pd.DataFrame:
    cosines = gram @ weights / np.sqrt(weights @ gram @ weights)
    rows = []
    for i, name in enumerate(names):
        others = np.delete(np.arange(len(names)), i)
        axis = _axis(gram[np.ix_(others, others)])
        held_out = (gram[i, others] @ axis) ** 2 / (axis @ gram[np.ix_(others, others)] @ axis)
        rows.append({"name": name, "cosine": cosines[i], "share": cosines[i] ** 2, "held_out": held_out})
    return pd.DataFrame(rows)
