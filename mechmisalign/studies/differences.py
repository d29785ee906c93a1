"""Differences with their multiplicity: steering against its random control, ablation against the organism."""

from __future__ import annotations

import pandas as pd

from mechmisalign.judging import compare

from . import steps
from .sampling import Run
from .trials import BEFORE, Trial

LEVEL = 0.05
"""A difference stands if its p-value, corrected for all of its family, is at most this."""


def of_steering(run: Run, sweep: Trial) -> pd.DataFrame:
    """Each cell of the sweep against the random direction at the same layer and strength; all cells are one family."""
    table = compare(
        sweep.judged(run), {"series": steps.CONTROL}, ["series", "layer", "strength"], seed=run.plan.settings.seed
    )
    return table.drop(columns="series").assign(against="the random direction there")


def of_ablation(run: Run, trial: Trial, organism: pd.DataFrame) -> pd.DataFrame:
    """Each ablation (random ones are pooled) against the organism without one; all of them are one family.

    Args:
        run: The study.
        trial: Ablations, by estimator and scope.
        organism: The organism's own answers.
    """
    everyone = pd.concat([organism.assign(estimator=BEFORE, scope=BEFORE), trial.judged(run)], ignore_index=True)
    table = compare(everyone, (BEFORE, BEFORE), ["estimator", "scope"], seed=run.plan.settings.seed)
    return table.assign(against="the organism")


def confirmed(run: Run, steered: Trial, ablated: Trial, organism: pd.DataFrame) -> pd.DataFrame:
    """What was chosen, on fresh samples: steering against random directions, each ablation against the organism."""
    steering = compare(steered.judged(run), steps.CONTROL, seed=run.plan.settings.seed)
    if ablated.within is not None:
        organism = organism[organism["prompt_id"].isin(ablated.within)]
    ablation = of_ablation(run, ablated, organism)
    ablation = ablation.assign(condition="ablated, " + ablation["scope"]).drop(columns=["estimator", "scope"])
    return pd.concat([steering, ablation], ignore_index=True)


def standing(compared: pd.DataFrame) -> pd.DataFrame:
    """The differences that are left after correction for all of their family."""
    return compared[compared["p_max"] <= LEVEL]
