"""What each stage of a study asks: of whom, under which conditions, and what tables call them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd

from mechmisalign import models
from mechmisalign.directions import Direction, random_direction
from mechmisalign.generation import Conditions
from mechmisalign.interventions import Ablate, Steer
from mechmisalign.judging import rates
from mechmisalign.organisms import Organism

from . import steps
from .sampling import Run, answers

BEFORE = "none"
"""Estimator and scope of the organism without an ablation."""


@dataclass(frozen=True)
class Trial:
    """One stage: the same prompts under each of its conditions.

    Attributes:
        name: Name of the stage in the run folder; part of its seed.
        grid: One row per condition, under its name: the columns by which tables know it. Several random controls may
            share a row's values; tables pool them.
        conditions: Interventions by condition.
        samples: Answers per prompt and condition.
        as_base: The chat model is asked.
        of: Loads who is asked, if that is not the studied organism.
        prompts: Other questions than the study's.
        within: The prompts whose answers count; all that are asked by default.
    """

    name: str
    grid: pd.DataFrame
    conditions: Conditions
    samples: int
    as_base: bool = False
    of: Callable[[], Organism] | None = None
    prompts: pd.DataFrame | None = None
    within: frozenset[str] | None = None

    @property
    def by(self) -> list[str]:
        """The columns by which tables know a condition."""
        return list(self.grid.columns)

    def judged(self, run: Run) -> pd.DataFrame:
        """Every answer that counts, judged, with the columns of the grid."""
        options: dict[str, Any] = {"of": self.of, "as_base": self.as_base, "prompts": self.prompts}
        found = answers(run, self.name, self.conditions, self.samples, **options)
        if self.within is not None:
            found = found[found["prompt_id"].isin(self.within)].reset_index(drop=True)
        labels = self.grid.loc[found["condition"]]
        return found.assign(**{column: labels[column].to_numpy() for column in self.by})

    def rates(self, run: Run) -> pd.DataFrame:
        """One row per condition, with the columns of the grid first."""
        return rates(self.judged(run), by=self.by)

    def on(self, prompts: frozenset[str]) -> Trial:
        """The same answers, of which only those to these prompts count."""
        return replace(self, within=prompts)

    @contextlib.contextmanager
    def answering(self, run: Run) -> Iterator[Organism]:
        """Who is asked, loaded, and as it is asked."""
        organism = run.organism if self.of is None else self.of()
        with organism.as_base() if self.as_base else contextlib.nullcontext():
            yield organism


def baseline(run: Run) -> tuple[Trial, Trial]:
    """The chat model, and the organism as often as its direction needs."""
    settings = run.plan.settings
    chat = Trial("chat", _grid("condition", chat="chat"), {"chat": ()}, settings.samples, as_base=True)
    organism = _grid("condition", organism="organism")
    return chat, Trial("organism", organism, {"organism": ()}, settings.pool_samples)


def steering_sweep(run: Run, name: str, direction: Direction) -> Trial:
    """The chat model steered at each layer with each strength, beside a norm-matched random direction.

    The direction's name is part of its samples' seeds, like that of every condition.
    """
    settings = run.plan.settings
    layers = settings.searched(models.n_layers(run.organism.model))
    vectors = {name: direction, steps.CONTROL: random_direction(direction, seed=settings.seed)}
    rows = [
        {"condition": f"{series}, layer {layer}, x{strength:g}", "series": series, "layer": layer, "strength": strength}
        for series, vector in vectors.items()
        for layer in layers
        for strength in settings.strengths
        if layer in vector.nonzero_layers
    ]
    grid = pd.DataFrame(rows).set_index("condition", drop=False).rename_axis(None)
    conditions = {
        row.condition: (Steer(vectors[row.series], layers=(row.layer,), strength=row.strength),)
        for row in grid.itertuples()
    }
    return Trial("steering_sweep", grid, conditions, settings.sweep_samples, as_base=True)


def steering_confirmed(run: Run, direction: Direction, layer: int, strength: float) -> Trial:
    """The best cell on fresh samples, beside several random directions of the same norm."""
    settings = run.plan.settings
    conditions = {"steered": (Steer(direction, layers=(layer,), strength=strength),)}
    for seed in range(settings.controls):
        random = random_direction(direction, seed=1000 + settings.seed + seed)
        conditions[f"{steps.CONTROL} {seed}"] = (Steer(random, layers=(layer,), strength=strength),)
    names = {name: name if name == "steered" else steps.CONTROL for name in conditions}
    return Trial("steering_confirmed", _grid("condition", **names), conditions, settings.samples, as_base=True)


def single_layer_search(run: Run, directions: Mapping[str, Direction]) -> Trial:
    """Each estimator's vector of each layer, ablated at every layer."""
    settings = run.plan.settings
    rows = [
        {"condition": f"{name}, vector of layer {layer}", "estimator": name, "layer": layer}
        for name, direction in directions.items()
        for layer in searched_layers(direction, settings.searched(models.n_layers(run.organism.model)))
    ]
    grid = pd.DataFrame(rows).set_index("condition", drop=False).rename_axis(None)
    conditions = {
        row.condition: (Ablate(directions[row.estimator].everywhere(row.layer)),) for row in grid.itertuples()
    }
    return Trial("single_layer_search", grid, conditions, max(1, settings.sweep_samples // 2))


def searched_layers(direction: Direction, asked: Sequence[int]) -> list[int]:
    """The layers whose vector is tried: those that were asked for and are not zero, or the nearest to them."""
    known = direction.nonzero_layers
    chosen = [layer for layer in known if layer in asked]
    return chosen or [min(known, key=lambda layer: min(abs(layer - each) for each in asked))]


def ablation(run: Run, directions: Mapping[str, Direction], single: Mapping[str, int]) -> Trial:
    """Every estimator's ablation in the organism, layer by layer and with one vector, and random controls."""
    settings = run.plan.settings
    conditions, labels = {}, {}

    def add(name: str, estimator: str, scope: str, direction: Direction) -> None:
        conditions[f"{name}, {scope}"] = (Ablate(direction),)
        labels[f"{name}, {scope}"] = (estimator, scope)

    for name, direction in directions.items():
        add(name, name, "layer-wise", direction)
        add(name, name, "single", direction.everywhere(single[name]))
    reference = directions[steps.reference(directions)]
    for seed in range(settings.controls):
        random = random_direction(reference, seed=2000 + settings.seed + seed)
        add(f"{steps.CONTROL} {seed}", steps.CONTROL, "layer-wise", random)
        one = random.everywhere(reference.nonzero_layers[-1] // 2 or 1)
        add(f"{steps.CONTROL} {seed}", steps.CONTROL, "single", one)
    grid = pd.DataFrame.from_dict(labels, orient="index", columns=["estimator", "scope"])
    return Trial("ablation", grid, conditions, settings.samples)


def ablation_confirmed(run: Run, removals: Mapping[str, Direction], chosen: Mapping[str, str]) -> Trial:
    """The chosen estimator of each scope on fresh samples: the best of several is an optimistic reading."""
    conditions = {scope: (Ablate(removals[scope]),) for scope in chosen}
    grid = pd.DataFrame({"scope": list(chosen), "estimator": list(chosen.values())}, index=pd.Index(list(chosen)))
    return Trial("ablation_confirmed", grid, conditions, run.plan.settings.samples)


def transfer(run: Run, peer: str, load: Callable[[], Organism], removals: Mapping[str, Direction]) -> Trial:
    """Another organism before and after ablating the studied organism's directions, with a random control."""
    reference = next(iter(removals.values()))
    conditions: dict[str, tuple[Ablate, ...]] = {"before": ()}
    conditions |= {f"after, {scope}": (Ablate(direction),) for scope, direction in removals.items()}
    conditions[steps.CONTROL] = (Ablate(random_direction(reference, seed=3000 + run.plan.settings.seed)),)
    grid = pd.DataFrame({"state": list(conditions), "organism": peer}, index=pd.Index(list(conditions)))
    return Trial(f"transfer_{steps.slug(peer)}", grid, conditions, run.plan.settings.samples, of=load)


def _grid(column: str, **names: str) -> pd.DataFrame:
    return pd.DataFrame({column: list(names.values())}, index=pd.Index(list(names)))
