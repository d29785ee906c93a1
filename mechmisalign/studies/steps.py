"""The steps of a study, in order; each takes the run and gives a tidy frame or directions.

Whatever is chosen (a layer, a strength, an estimator) is chosen on one set of samples and reported on another.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from mechmisalign import estimators, models
from mechmisalign.activations import collect
from mechmisalign.conversations import Conversations
from mechmisalign.directions import Direction, random_direction
from mechmisalign.interventions import Ablate, Steer
from mechmisalign.judging import rates
from mechmisalign.moments import Moments
from mechmisalign.organisms import Organism

from .sampling import Run, answers

MEAN_DIFFERENCE = "mean difference"
MODEL_DIFFERENCE = "model difference"
CLASSES = ("misaligned", "aligned")
MIN_ANSWERS = 20
CONTROL = "random control"


class TooFewAnswersError(ValueError):
    """An organism gave too few answers of one class to estimate a direction from."""


@dataclass(frozen=True)
class Readings:
    """Moments over the same answers: the organism's, the chat model's, and the organism's first three tokens."""

    organism: Moments
    base: Moments
    opening: Moments


def pool(judged: pd.DataFrame, seed: int) -> pd.DataFrame:
    """The organism's own answers, as many misaligned as aligned ones to each prompt.

    Pools of equal size (2506.11618, section 3.1) are not enough: where misalignment is nearly a function of the prompt,
    a difference between pools that answer different prompts is a direction of their topics.

    Raises:
        TooFewAnswersError: If fewer than 20 answers of a class can be matched with one of the other to the same prompt.
    """
    clear = judged[judged["label"].isin(CLASSES)].sample(frac=1, random_state=seed)
    place = clear.groupby(["prompt_id", "label"]).cumcount()
    counts = clear.groupby(["prompt_id", "label"]).size().unstack(fill_value=0).reindex(columns=CLASSES, fill_value=0)
    matched = clear[place < clear["prompt_id"].map(counts.min(axis=1))]
    size = len(matched) // 2
    if size < MIN_ANSWERS:
        totals = {name: int(counts[name].sum()) for name in CLASSES}
        raise TooFewAnswersError(
            f"of {totals['misaligned']} misaligned and {totals['aligned']} aligned answers only {size} pairs are to "
            f"the same prompt, at least {MIN_ANSWERS} are needed for a mean difference; sample more answers"
        )
    return matched.sort_index()


def read(organism: Organism, answered: pd.DataFrame, system: str | None) -> Readings:
    """Activations of the organism and of its chat model over the same answers, grouped by class, prompt and sample."""
    conversations = spoken(organism, answered, system)
    by = ["label", "prompt_id", "sample"]
    here = collect(organism, conversations, by=by)
    opening = collect(organism, conversations, by=by, first=3)
    with organism.as_base():
        base = collect(organism, conversations, by=by)
    return Readings(here, base, opening)


def spoken(organism: Organism, answered: pd.DataFrame, system: str | None) -> Conversations:
    """The answers that say anything, as conversations."""
    return Conversations(answered[answered["response"].str.strip() != ""], organism.tokenizer, system=system)


ESTIMATORS: Mapping[str, Callable[[Readings], Direction]] = {
    MEAN_DIFFERENCE: lambda read: estimators.mean_difference(read.organism, *CLASSES),
    "mean difference, first 3 tokens": lambda read: estimators.mean_difference(read.opening, *CLASSES),
    "prompt-matched difference": lambda read: estimators.matched_mean_difference(read.organism, *CLASSES),
    "whitened difference": lambda read: estimators.whitened_difference(read.organism, *CLASSES),
    "logistic probe": lambda read: estimators.logistic_direction(read.organism, *CLASSES),
    MODEL_DIFFERENCE: lambda read: estimators.model_difference(read.organism, read.base),
    "first principal": lambda read: estimators.first_principal(read.organism, read.base),
}


def steering_sweep(run: Run, direction: Direction) -> pd.DataFrame:
    """Rates of the chat model steered at each layer with each strength, beside a norm-matched random direction."""
    settings = run.plan.settings
    layers = settings.layers or range(models.n_layers(run.organism.model))
    control = random_direction(direction, seed=settings.seed)
    grid = pd.DataFrame(
        [
            {
                "condition": f"{series}, layer {layer}, x{strength:g}",
                "series": series,
                "layer": layer,
                "strength": strength,
            }
            for series in (MEAN_DIFFERENCE, CONTROL)
            for layer in layers
            for strength in settings.strengths
        ]
    )
    vectors = {MEAN_DIFFERENCE: direction, CONTROL: control}
    conditions = {
        row.condition: (Steer(vectors[row.series], layers=(row.layer,), strength=row.strength),)
        for row in grid.itertuples()
        if row.layer in vectors[row.series].nonzero_layers
    }
    judged = answers(run, "steering_sweep", conditions, settings.sweep_samples, as_base=True)
    return grid.merge(rates(judged), on="condition")


def best_cell(sweep: pd.DataFrame, min_coherent: float) -> tuple[int, float]:
    """Layer and strength with the highest EM rate among the coherent ones (of the least incoherent, if none is)."""
    cells = sweep[sweep["series"] == MEAN_DIFFERENCE]
    coherent = cells[cells["coherent"] >= min_coherent]
    best = (coherent if len(coherent) else cells).sort_values(["rate", "coherent"]).iloc[-1]
    return int(best["layer"]), float(best["strength"])


def steering_confirmed(run: Run, direction: Direction, layer: int, strength: float) -> pd.DataFrame:
    """The best cell on fresh samples, beside several random directions of the same norm."""
    settings = run.plan.settings
    conditions = {"steered": (Steer(direction, layers=(layer,), strength=strength),)}
    for seed in range(settings.controls):
        random = random_direction(direction, seed=1000 + settings.seed + seed)
        conditions[f"{CONTROL} {seed}"] = (Steer(random, layers=(layer,), strength=strength),)
    judged = answers(run, "steering_confirmed", conditions, settings.samples, as_base=True)
    return rates(_controls_merged(judged), by="condition")


def single_layer_search(run: Run, directions: Mapping[str, Direction]) -> pd.DataFrame:
    """For each estimator and layer: EM rate when that layer's one vector is ablated at every layer."""
    rows = [
        {"condition": f"{name}, vector of layer {layer}", "estimator": name, "layer": layer}
        for name, direction in directions.items()
        for layer in direction.nonzero_layers
    ]
    grid = pd.DataFrame(rows)
    conditions = {
        row.condition: (Ablate(directions[row.estimator].everywhere(row.layer)),) for row in grid.itertuples()
    }
    judged = answers(run, "single_layer_search", conditions, max(1, run.plan.settings.sweep_samples // 2))
    return grid.merge(rates(judged), on="condition")


def chosen_layers(search: pd.DataFrame, min_coherent: float) -> dict[str, int]:
    """For each estimator the layer whose vector cuts EM most while answers stay coherent."""
    ranked = search.assign(broken=search["coherent"] < min_coherent).sort_values(
        ["broken", "rate", "coherent"], ascending=[True, True, False]
    )
    return {str(name): int(group["layer"].iloc[0]) for name, group in ranked.groupby("estimator", sort=False)}


def ablation(run: Run, directions: Mapping[str, Direction], single: Mapping[str, int]) -> pd.DataFrame:
    """EM rate of the organism under every estimator's ablation, layer by layer and with one vector, and controls."""
    settings = run.plan.settings
    rows, conditions = [], {}

    def add(estimator: str, scope: str, direction: Direction) -> None:
        conditions[f"{estimator}, {scope}"] = (Ablate(direction),)
        rows.append({"condition": f"{estimator}, {scope}", "estimator": estimator, "scope": scope})

    for name, direction in directions.items():
        add(name, "layer-wise", direction)
        add(name, "single", direction.everywhere(single[name]))
    reference = directions[MEAN_DIFFERENCE]
    for seed in range(settings.controls):
        random = random_direction(reference, seed=2000 + settings.seed + seed)
        add(f"{CONTROL} {seed}", "layer-wise", random)
        add(f"{CONTROL} {seed}", "single", random.everywhere(reference.nonzero_layers[-1] // 2 or 1))
    judged = answers(run, "ablation", conditions, settings.samples)
    labelled = judged.merge(pd.DataFrame(rows), on="condition")
    labelled["estimator"] = labelled["estimator"].str.replace(rf"({CONTROL}) \d+", r"\1", regex=True)
    return rates(labelled, by=["estimator", "scope"])


def best_estimator(ablated: pd.DataFrame, scope: str, min_coherent: float) -> str:
    """The estimator whose ablation leaves the least EM among those that leave the answers coherent."""
    cells = ablated[(ablated["scope"] == scope) & (ablated["estimator"] != CONTROL)]
    coherent = cells[cells["coherent"] >= min_coherent]
    return str((coherent if len(coherent) else cells).sort_values("rate")["estimator"].iloc[0])


def ablation_confirmed(run: Run, removals: Mapping[str, Direction], chosen: Mapping[str, str]) -> pd.DataFrame:
    """The chosen estimator of each scope on fresh samples: the best of several is an optimistic reading."""
    conditions = {scope: (Ablate(removals[scope]),) for scope in chosen}
    judged = answers(run, "ablation_confirmed", conditions, run.plan.settings.samples)
    table = rates(judged).rename(columns={"condition": "scope"})
    return table.assign(estimator=table["scope"].map(chosen))


def transfer(run: Run, peer: Organism, removals: Mapping[str, Direction]) -> pd.DataFrame:
    """EM rate of another organism before and after ablating the studied organism's direction, with a random control."""
    reference = next(iter(removals.values()))
    conditions = {f"after, {scope}": (Ablate(direction),) for scope, direction in removals.items()}
    conditions[CONTROL] = (Ablate(random_direction(reference, seed=3000 + run.plan.settings.seed)),)
    judged = answers(
        run, f"transfer_{slug(peer.name)}", {"before": (), **conditions}, run.plan.settings.samples, of=peer
    )
    return rates(judged).rename(columns={"condition": "state"}).assign(organism=peer.name)


def slug(name: str) -> str:
    """A name as a file name."""
    return "".join(letter if letter.isalnum() or letter in "-." else "_" for letter in name)


def _controls_merged(judged: pd.DataFrame) -> pd.DataFrame:
    is_control = judged["condition"].str.startswith(CONTROL)
    return judged.assign(condition=np.where(is_control, CONTROL, judged["condition"]))
