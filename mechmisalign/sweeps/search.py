"""The strength at which a direction induces most misalignment while answers stay coherent, found by search.

Misalignment and incoherence both rise with the strength (2506.11618, section 3.2), so a maximum over strengths alone
hides what it costs. Here every dose that was tried is reported with both, the coherence limit is found by bisection,
and the chosen dose is sampled afresh, beside a random direction of the same norm: the best of several doses is an
optimistic reading of the samples that chose it.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from mechmisalign._renamed import renamed
from mechmisalign.directions import Direction, random_direction
from mechmisalign.generation import generate, stage_seed
from mechmisalign.interventions import Intervention, Positions, Steer
from mechmisalign.interventions.residual import Units
from mechmisalign.judging import Judge, rates
from mechmisalign.judging import judge as judge_answers
from mechmisalign.organisms import Organism

from .spec import On

STEERED, CONTROL, NONE = "steered", "random control", "none"


@dataclass(frozen=True)
class StrengthSearch:
    """What a search for the best coherent strength found.

    Attributes:
        layer: Where the direction was added.
        strength: The dose with the highest EM rate among those that left enough answers coherent; NaN if none did.
        doses: One row per dose tried, ascending: ``strength, stage`` (``coarse`` or ``bisection``), the columns of
            ``rates``, ``is_coherent``.
        confirmed: Rates of the chosen dose on fresh samples, of random directions of that norm, and of the model
            without any; empty if no dose was chosen.
        min_coherent: Share of coherent answers that was asked for.
    """

    layer: int
    strength: float
    doses: pd.DataFrame
    confirmed: pd.DataFrame
    min_coherent: float

    @property
    def holds(self) -> bool:
        """Whether the chosen dose left enough of the fresh answers coherent too."""
        steered = self.confirmed[self.confirmed["condition"] == STEERED] if len(self.confirmed) else self.confirmed
        return bool(len(steered)) and bool(steered["coherent"].iloc[0] >= self.min_coherent)

    @property
    def limit(self) -> tuple[float, float]:
        """Between which doses coherence is lost: the largest below it and the smallest beyond (0, infinity: none)."""
        return _bracket(self.doses)


@renamed(with_judge="judge")
def best_strength(
    organism: Organism,
    direction: Direction,
    layer: int,
    prompts: pd.DataFrame | Sequence[str],
    judge: Judge,
    *,
    lowest: float = 0.5,
    highest: float = 16.0,
    coarse: int = 6,
    bisections: int = 4,
    min_coherent: float = 0.8,
    samples: int = 4,
    confirm_samples: int = 16,
    controls: int = 1,
    on: On = "chat",
    units: Units = "absolute",
    positions: Positions = "all",
    max_new_tokens: int = 600,
    temperature: float = 1.0,
    system: str | None = None,
    seed: int = 0,
) -> StrengthSearch:
    """Search the strength of steering at one layer; the same arguments give the same result.

    Doses in geometric steps are sampled in one batch. The interval in which coherence falls below ``min_coherent`` is
    then halved (in the logarithm), a few samples each time. Of all coherent doses the one with the highest EM rate is
    confirmed on samples that the search never saw.

    Args:
        organism: Whom to steer.
        direction: What to add.
        layer: Where.
        prompts: What to ask, as for ``generate``.
        judge: Scores the answers.
        lowest: Smallest of the first doses, in multiples of the direction (or of ``units``).
        highest: Largest of them.
        coarse: How many first doses.
        bisections: How often the interval is halved.
        min_coherent: Share of answers that must stay coherent.
        samples: Answers per prompt and dose of the search.
        confirm_samples: Answers per prompt of the confirmation.
        controls: Random directions of the confirmation.
        on: Whether to steer the chat model or the organism.
        units: Of the doses, as for ``Steer``.
        positions: As for ``Steer``.
        max_new_tokens: Longer answers are cut off.
        temperature: Of the sampling.
        system: System prompt.
        seed: Seed of the sampling and of the controls.

    Raises:
        ValueError: If the doses do not ascend, or the direction is zero at the layer.
    """
    if not (0 < lowest < highest < math.inf and coarse >= 2 and bisections >= 0 and controls >= 0):
        raise ValueError(
            f"doses from {lowest} to {highest} in {coarse} steps, {bisections} bisections, {controls} controls: "
            "0 < lowest < highest, at least 2 steps and no negative counts are expected"
        )
    direction.unit(layer)  # refuses a layer at which there is nothing to add
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature, "system": system}

    def asked(conditions: Mapping[str, Sequence[Intervention]], count: int, stage: str) -> pd.DataFrame:
        with organism.as_base() if on == "chat" else contextlib.nullcontext():
            sampled = generate(
                organism,
                prompts,
                conditions=conditions,
                samples=count,
                seed=stage_seed(seed, f"best_strength/{stage}"),
                **options,
            )
        return rates(judge_answers(sampled, judge))

    def steer(vectors: Direction, dose: float) -> tuple[Steer, ...]:
        return (Steer(vectors, (layer,), dose, units, positions),)

    def tried(doses: Sequence[float], stage: str) -> pd.DataFrame:
        names = {f"x{dose!r}": dose for dose in doses}
        found = asked({name: steer(direction, dose) for name, dose in names.items()}, samples, "search")
        strengths = found["condition"].map(names)
        told = found.assign(strength=strengths, stage=stage, is_coherent=found["coherent"] >= min_coherent)
        return told.drop(columns="condition")

    doses = _searched(tried, [_rounded(dose) for dose in np.geomspace(lowest, highest, coarse)], bisections)
    chosen = _best(doses)
    confirmed = pd.DataFrame()
    if not math.isnan(chosen):
        randoms = {f"{CONTROL} {i}": random_direction(direction, seed=seed + i) for i in range(controls)}
        steered = {name: steer(vectors, chosen) for name, vectors in {STEERED: direction, **randoms}.items()}
        confirmed = asked({**steered, NONE: ()}, confirm_samples, "confirmation").assign(strength=chosen)
    return StrengthSearch(layer, chosen, doses, confirmed, min_coherent)


def _searched(
    tried: Callable[[Sequence[float], str], pd.DataFrame], first: Sequence[float], bisections: int
) -> pd.DataFrame:
    """All doses: the first ones, then those that halve the interval in which coherence is lost."""
    doses = tried(first, "coarse")
    for _ in range(bisections):
        low, high = _bracket(doses)
        if math.isinf(high):
            break
        middle = _rounded(math.sqrt(low * high) if low > 0 else high / 2)
        if middle in set(doses["strength"]):
            break
        doses = pd.concat([doses, tried([middle], "bisection")])
    first_columns = ["strength", "stage", "is_coherent"]
    ordered = doses.sort_values("strength", ignore_index=True)
    return ordered[[*first_columns, *(column for column in ordered.columns if column not in first_columns)]]


def _bracket(doses: pd.DataFrame) -> tuple[float, float]:
    """The first loss of coherence: the largest dose below it (0 if there is none), and the dose that lost it."""
    ordered = doses.sort_values("strength")
    lost = ordered.loc[~ordered["is_coherent"].astype(bool), "strength"]
    if not len(lost):
        return float(ordered["strength"].iloc[-1]), math.inf
    kept = ordered.loc[ordered["strength"] < lost.iloc[0], "strength"]
    return (float(kept.iloc[-1]) if len(kept) else 0.0), float(lost.iloc[0])


def _best(doses: pd.DataFrame) -> float:
    """The coherent dose with the highest EM rate, the smallest of several; NaN if no dose is coherent."""
    coherent = doses[doses["is_coherent"].astype(bool)]
    if not len(coherent):
        return math.nan
    return float(coherent.sort_values(["rate", "strength"], ascending=[False, True])["strength"].iloc[0])


def _rounded(dose: Any) -> float:
    """Three significant digits: finer steps are beyond what a few samples can tell."""
    return float(f"{float(dose):.3g}")
