"""What a persona direction has to beat: signs dealt at random, and its own other half."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd

from mechmisalign.directions import Direction
from mechmisalign.estimators import mean_difference, split_half
from mechmisalign.moments import Moments

from .extraction import AGAINST, FOR


def direction_controls(moments: Moments, *, shuffles: int = 200, repeats: int = 100, seed: int = 0) -> pd.DataFrame:
    """Reliability of a persona direction, and whether it is longer than chance makes it, layer by layer.

    Args:
        moments: As :func:`persona_moments` gives them, all from one trait.
        shuffles: Directions with the sides of each question exchanged at random.
        repeats: Splits of the questions into halves.
        seed: Of both.

    Returns:
        One row per layer: ``layer, norm``; ``shuffled`` and ``shuffled_high``, mean and 95th percentile of the norm
        with shuffled signs; ``p`` (one-sided, add-one rule); ``cosine, low, high`` between the directions of two halves
        of the questions (mean, and 95 % of the splits).
    """
    norm = mean_difference(moments, FOR, AGAINST).vectors.double().norm(dim=-1).numpy()
    null = np.stack(
        [shuffled_sign(moments, seed=seed + number).vectors.double().norm(dim=-1).numpy() for number in range(shuffles)]
    )
    told = {
        "norm": norm,
        "shuffled": null.mean(0),
        "shuffled_high": np.quantile(null, 0.95, axis=0),
        "p": ((null >= norm).sum(0) + 1) / (shuffles + 1),
    }
    halves = split_half(moments, FOR, AGAINST, repeats=repeats, seed=seed)
    return pd.concat([halves[["layer"]], pd.DataFrame(told), halves.drop(columns="layer")], axis=1)


def shuffled_sign(moments: Moments, *, seed: int) -> Direction:
    """The direction with the two sides of each question exchanged or not, as a coin falls.

    If the system prompts made no difference, this would be as good a direction as the real one. It keeps what the
    questions themselves and the number of answers do. Compare its length, and what steering with it does, not its
    cosine: what is left is a short piece of the same axis, as often one way round as the other.

    Args:
        moments: As :func:`persona_moments` gives them.
        seed: Of the coin.
    """
    questions = moments.groups["prompt_id"].unique()
    turned = set(questions[np.random.default_rng(seed).random(len(questions)) < 0.5])
    other = {FOR: AGAINST, AGAINST: FOR}
    sides = [
        other[side] if question in turned else side
        for side, question in zip(moments.groups["side"], moments.groups["prompt_id"], strict=True)
    ]
    shuffled = mean_difference(replace(moments, groups=moments.groups.assign(side=sides)), FOR, AGAINST)
    method = f"persona {moments.header.get('trait', '')}, signs shuffled by question, seed {seed}"
    return replace(shuffled, header={**shuffled.header, "method": method})
