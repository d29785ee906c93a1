"""From a specification to conditions and rows.

The name of a condition says everything that it is and nothing of the grid around it. It is part of the key of each
row's randomness, so a grid that grows changes no row that was there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from mechmisalign.adapters import Adapter
from mechmisalign.directions import Direction
from mechmisalign.interventions import Intervention
from mechmisalign.store import text_digest

from ._cells import cells, named
from ._errors import SweepError
from .sources import OrganismSource, direction_digest, resolve_directions
from .spec import Kind, On, ScaleGrid, Sweep

CONDITION_COLUMNS = (
    "condition",
    "organism",
    "on",
    "intervention",
    "direction",
    "layer",
    "layers",
    "strength",
    "units",
    "positions",
)
_WRITTEN = (*CONDITION_COLUMNS, "seed")


@dataclass(frozen=True)
class Condition:
    """One cell of the grid.

    Attributes:
        told: Its row of the table, by the names of ``CONDITION_COLUMNS``.
        interventions: What is done.
        base: Name of the chat model; conditions of one base and one ``on`` can share batches.
        host: Name of the organism that is loaded for it.
    """

    told: Mapping[str, Any]
    interventions: tuple[Intervention, ...]
    base: str
    host: str

    @property
    def name(self) -> str:
        """Its name, unique in the grid."""
        return str(self.told["condition"])

    @property
    def on(self) -> On:
        """Whom it edits."""
        on: On = self.told["on"]
        return on


@dataclass(frozen=True)
class Grid:
    """Everything that a specification resolves to.

    Attributes:
        spec: The specification.
        conditions: The cells in their order.
        prompts: Frame with ``prompt_id, prompt`` and labels.
        adapters: The organisms' adapters by name.
        directions: The directions by name.
    """

    spec: Sweep
    conditions: tuple[Condition, ...]
    prompts: pd.DataFrame
    adapters: Mapping[str, Adapter]
    directions: Mapping[str, Direction]

    @cached_property
    def table(self) -> pd.DataFrame:
        """One row per condition: ``condition, organism, on, intervention, direction, layer, layers, strength …``.

        ``layer`` is the layer where one alone is edited, ``layers`` says in words which are. ``strength`` holds a
        clamp's value or a factor too. Under ``on="chat"`` the column ``organism`` holds the chat model's name.
        """
        table = pd.DataFrame([dict(one.told) for one in self.conditions], columns=list(CONDITION_COLUMNS))
        return table.astype({"layer": "Int64", "strength": "float64"})

    @cached_property
    def rows(self) -> pd.DataFrame:
        """The answers to sample, as numbers: ``condition`` and ``prompt`` (positions), ``seed, sample``, by key."""
        spec = self.spec
        index = pd.MultiIndex.from_product(
            [range(len(self.conditions)), spec.seeds, range(len(self.prompts)), range(spec.samples)],
            names=["condition", "seed", "prompt", "sample"],
        )
        rows = index.to_frame(index=False).astype({"condition": "int32", "prompt": "int32", "sample": "int32"})
        rows.index = pd.Index(_keys(rows, [one.name for one in self.conditions], self._prompt_ids), name="row")
        return rows

    def spelt(self, rows: pd.DataFrame) -> pd.DataFrame:
        """Rows with names and texts in the place of numbers, as ``generate_rows`` takes them."""
        names = np.array([one.name for one in self.conditions], dtype=object)
        return spelt(rows, names, self.prompts)

    def growing(self) -> dict[str, dict[str, Any]]:
        """What decides each row's value and may be added to: organisms, directions, prompts, seeds."""
        return {
            "organisms": {source.name: self._organism(source) for source in self.spec.organisms},
            "directions": {name: direction_digest(direction) for name, direction in self.directions.items()},
            "prompts": {
                row["prompt_id"]: text_digest({key: row.get(key) for key in ("prompt", "system", "history")})
                for row in self.prompts.astype(object).to_dict("records")
            },
            "seeds": {str(seed): seed for seed in self.spec.seeds},
        }

    def _organism(self, source: OrganismSource) -> dict[str, Any]:
        adapter = self.adapters[source.name]
        own = {"adapter": adapter.digest, "base": source.base_of(adapter), "weights": source.weights}
        return own if source.dtype is None else own | {"dtype": source.dtype}

    @property
    def _prompt_ids(self) -> list[str]:
        return [str(each) for each in self.prompts["prompt_id"]]


def make_grid(spec: Sweep) -> Grid:
    """Read the adapters, directions and prompts of a specification, and expand it.

    Raises:
        SweepError: If two conditions have one name, or the prompts have a column that the sweep writes.
        ValueError: If something cannot be read, or an intervention does not fit (a direction that is zero at a layer
            that is to be ablated, say).
    """
    adapters = {source.name: source.read(spec.root) for source in spec.organisms}
    directions = resolve_directions(spec.directions, spec.root)
    prompts = spec.prompts.resolve(spec.root)
    taken = [column for column in _WRITTEN if column in prompts.columns]
    if taken:
        raise SweepError(f"the prompts have the columns {taken}, which the sweep writes itself; drop or rename them")
    unique: dict[str, Condition] = {}
    for one in _expanded(spec, adapters, directions):
        if unique.setdefault(one.name, one).told != one.told:
            raise SweepError(
                f"two different conditions are both called {one.name!r}; rename a direction or an organism"
            )
    if not unique:
        raise SweepError("no condition is left: the directions are zero at every layer")
    return Grid(spec, tuple(unique.values()), prompts, adapters, directions)


def spelt(rows: pd.DataFrame, names: np.ndarray, prompts: pd.DataFrame) -> pd.DataFrame:
    """Rows as numbers turned into ``condition, sample`` and the prompts' columns, under the same keys."""
    texts = prompts.iloc[rows["prompt"]].set_axis(rows.index)
    own = pd.DataFrame({"condition": names[rows["condition"]], "sample": rows["sample"]}, index=rows.index)
    return pd.concat([own, texts], axis=1)


def _keys(rows: pd.DataFrame, names: Sequence[str], prompt_ids: Sequence[str]) -> np.ndarray:
    """A key of 64 bits for each row, from (condition, seed, prompt id, sample).

    Raises:
        SweepError: If two rows have one key (for a million rows, once in forty million sweeps).
    """
    numbers = zip(*(rows[column] for column in ("condition", "seed", "prompt", "sample")), strict=True)
    digests = b"".join(
        hashlib.blake2b(repr((names[c], int(seed), prompt_ids[p], int(s))).encode(), digest_size=8).digest()
        for c, seed, p, s in numbers
    )
    keys = np.frombuffer(digests, dtype="<i8").copy()
    if len(np.unique(keys)) < len(keys):
        raise SweepError("two rows have the same key; rename an organism or a prompt_id")
    return keys


def _expanded(spec: Sweep, adapters: Mapping[str, Adapter], directions: Mapping[str, Direction]) -> Iterator[Condition]:
    """Every condition; on the chat model once for each base, whichever organism lies over it."""
    bases = {source.name: source.base_of(adapters[source.name]) for source in spec.organisms}
    hosts = {base: name for name, base in reversed(bases.items())}
    for one in spec.interventions:
        for on in one.on or spec.on:
            if on == "chat":
                _check_chat(one, spec, bases)
            for host in hosts.values() if on == "chat" else bases:
                who = bases[host] if on == "chat" else host
                for told, interventions in cells(one, adapters[host], directions):
                    name = f"{who}: {named(told)}" if on == "organism" else f"{who} (chat): {named(told)}"
                    described = {"condition": name, "organism": who, "on": on, **told}
                    yield Condition(described, interventions, bases[host], host)


def _check_chat(one: Kind, spec: Sweep, bases: Mapping[str, str]) -> None:
    """Refuse what cannot be asked of a chat model, or of which one it is not clear."""
    if isinstance(one, ScaleGrid):
        raise SweepError("scale_adapter on 'chat': the chat model has no adapter; use on: organism")
    for base in set(bases.values()):
        precisions = {source.dtype for source in spec.organisms if bases[source.name] == base}
        if len(precisions) > 1:
            raise SweepError(
                f"on 'chat': the organisms over {base!r} ask for it as {sorted(map(str, precisions))}; give them one "
                "dtype, or sweep them apart"
            )
