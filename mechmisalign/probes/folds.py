"""Folds: which rows a probe is trained on, which it is tested on, and with which labels.

Rows of one prompt resemble each other, so a prompt must not stand on both sides: ``"grouped"`` holds whole prompts out.
``"rows"`` splits rows at random, as the reference code splits tokens; it is there to show how much that flatters.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
from jaxtyping import Bool, Int

Split = Literal["grouped", "rows"]
SPLITS: tuple[str, ...] = get_args(Split)
_ATTEMPTS = 100
_REAL, _SHUFFLED, _WITHIN = range(3)  # streams of random numbers: one series does not move another

Column = Any
"""One value per row: a list, an array, a Series."""

HeldOut = Callable[[np.random.Generator], Bool[np.ndarray, " row"]]


@dataclass(frozen=True, eq=False)
class Fold:
    """One split of the rows.

    Attributes:
        labels: Whether each row is of class 1, ``[row]``; shuffled in the control.
        train: Rows to fit on, ``[train]``.
        test: Rows to score, ``[test]``.
    """

    labels: Bool[np.ndarray, " row"]
    train: Int[np.ndarray, " train"]
    test: Int[np.ndarray, " test"]

    def dealt(self, rng: np.random.Generator) -> Fold:
        """The same fold over rows in another order: what a fixed table of random features is dealt out by."""
        place = rng.permutation(len(self.labels))
        labels = np.empty_like(self.labels)
        labels[place] = self.labels
        return Fold(labels, place[self.train], place[self.test])


@dataclass(frozen=True)
class Design:
    """How folds are drawn: the options of :func:`mechmisalign.probes.evaluate` of the same names."""

    split: Split = "grouped"
    repeats: int = 20
    test_size: float = 0.2
    balance: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise ValueError(f"split must be one of {SPLITS}, got {self.split!r}")
        if not 0 < self.test_size < 1:
            raise ValueError(f"test_size must lie between 0 and 1, got {self.test_size}; 0.2 holds a fifth out")
        if self.repeats < 1:
            raise ValueError(f"repeats must be 1 or more, got {self.repeats}")


@dataclass(frozen=True, eq=False)
class Examples:
    """What is known of every row before a feature is read.

    Attributes:
        labels: Whether the row is of class 1, ``[row]``.
        groups: Number of its prompt, ``[row]``.
        units: Number of its unit (its response, say), ``[row]``: labels are shuffled between units.
        classes: The labels that stand for 0 and 1, in sorted order.
    """

    labels: Bool[np.ndarray, " row"]
    groups: Int[np.ndarray, " row"]
    units: Int[np.ndarray, " row"]
    classes: tuple[Any, Any]

    @staticmethod
    def of(labels: Column, groups: Column, units: Column = None) -> Examples:
        """Check and number the columns.

        Raises:
            ValueError: On unequal lengths, missing values, not exactly two classes, or a unit with two labels.
        """
        columns = {"labels": pd.Series(labels), "groups": pd.Series(groups)}
        columns["units"] = pd.Series(np.arange(len(columns["labels"])) if units is None else units)
        lengths = {name: len(column) for name, column in columns.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"lengths differ: {lengths}; give one label, group and unit per row")
        for name, column in columns.items():
            if missing := int(column.isna().sum()):
                raise ValueError(f"{missing} of {len(column)} {name} are missing; drop those rows first")
        classes = sorted(columns["labels"].unique().tolist())
        if len(classes) != 2:
            raise ValueError(f"a probe tells two classes apart, the labels have {len(classes)}: {classes[:5]}")
        truth = (columns["labels"] == classes[1]).to_numpy(dtype=bool)
        codes = [pd.factorize(columns[name])[0].astype(np.int64) for name in ("groups", "units")]
        _refuse_mixed_units(truth, codes[1])
        return Examples(truth, codes[0], codes[1], (classes[0], classes[1]))

    def shuffled(self, rng: np.random.Generator) -> Bool[np.ndarray, " row"]:
        """Labels permuted between units; the rows of one unit keep one label."""
        of_unit = np.zeros(self.units.max() + 1, dtype=bool)
        of_unit[self.units] = self.labels
        return rng.permutation(of_unit)[self.units]


def draw_folds(examples: Examples, design: Design, *, shuffled: bool = False) -> list[Fold]:
    """One fold per repeat, both classes on both sides; with ``shuffled``, labels permuted anew in each.

    Raises:
        ValueError: If a class stands in too few groups for such a split.
    """
    places = examples.groups if design.split == "grouped" else np.arange(len(examples.labels))
    for label, name in zip((False, True), examples.classes, strict=True):
        found = len(np.unique(places[examples.labels == label]))
        if found < 2:
            raise ValueError(
                f"class {name!r} stands in {found} group(s); a {design.split} split needs each class in 2 or more, to "
                "train on and to test on: add prompts of that class"
            )
    count = int(places.max()) + 1

    def held_out(rng: np.random.Generator) -> Bool[np.ndarray, " row"]:
        chosen = np.zeros(count, dtype=bool)
        chosen[rng.permutation(count)[: math.ceil(design.test_size * count)]] = True
        return chosen[places]

    return _draw(examples, design, held_out, _SHUFFLED if shuffled else _REAL)


def draw_within(examples: Examples, design: Design) -> list[Fold]:
    """Folds that hold a share of every prompt's units out, and keep at least one where there are two or more.

    The count is rounded up or down at random, so that a share ``test_size`` is held out also where units are few.
    """
    pairs = pd.DataFrame({"group": examples.groups, "unit": examples.units})
    pair_of_row, unique = pd.factorize(pd.MultiIndex.from_frame(pairs))
    group = unique.get_level_values(0).to_numpy()
    size = np.bincount(group)

    def held_out(rng: np.random.Generator) -> Bool[np.ndarray, " row"]:
        wanted = np.floor(design.test_size * size + rng.random(len(size))).clip(max=np.maximum(size - 1, 1))
        order = np.lexsort((rng.random(len(group)), group))
        rank = np.empty(len(group), dtype=np.int64)
        rank[order] = np.arange(len(group)) - (np.cumsum(size) - size)[group[order]]
        return (rank < wanted[group])[pair_of_row]

    return _draw(examples, design, held_out, _WITHIN)


def _draw(examples: Examples, design: Design, held_out: HeldOut, stream: int) -> list[Fold]:
    return [
        _draw_one(examples, design, held_out, np.random.default_rng([design.seed, repeat, stream]), stream == _SHUFFLED)
        for repeat in range(design.repeats)
    ]


def _draw_one(examples: Examples, design: Design, held_out: HeldOut, rng: np.random.Generator, shuffled: bool) -> Fold:
    for _ in range(_ATTEMPTS):
        labels = examples.shuffled(rng) if shuffled else examples.labels
        held = held_out(rng)
        sides = [np.flatnonzero(~held), np.flatnonzero(held)]
        if all(len(side) and labels[side].any() and not labels[side].all() for side in sides):
            train, test = (_balanced(side, labels, rng) if design.balance else side for side in sides)
            return Fold(labels, train, test)
    raise ValueError(
        f"in {_ATTEMPTS} draws no split had both classes on both sides (test_size {design.test_size}, "
        f"{len(np.unique(examples.groups))} groups, classes {examples.classes}); "
        "add prompts of the rarer class, or raise test_size"
    )


def _balanced(
    rows: Int[np.ndarray, " n"], labels: Bool[np.ndarray, " row"], rng: np.random.Generator
) -> Int[np.ndarray, " m"]:
    """As many rows of either class: the larger one is thinned out at random."""
    classes = [rows[labels[rows]], rows[~labels[rows]]]
    size = min(len(side) for side in classes)
    return np.sort(np.concatenate([rng.permutation(side)[:size] for side in classes]))


def _refuse_mixed_units(labels: Bool[np.ndarray, " row"], units: Int[np.ndarray, " row"]) -> None:
    share = np.bincount(units, weights=labels) / np.bincount(units)
    mixed = int(((share > 0) & (share < 1)).sum())
    if mixed:
        raise ValueError(
            f"{mixed} of {len(share)} units have rows of both classes, so labels cannot be permuted between units; "
            "leave units= out where labels belong to rows"
        )
