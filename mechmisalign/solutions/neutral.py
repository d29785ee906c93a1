"""Significance: how far solutions of a given norm move the chat model on neutral text, beside random ones (2602.07852).

A direction that moves predictions on any text is one that pre-training made much of. Two controls belong to it: random
solutions of the same norm, several of them, and texts of the trained matter, on which even a narrow one should move.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from mechmisalign.capability.texts import Counted, TextSums, mean_interval, text_sums
from mechmisalign.conversations import Conversations

from .efficiency import refuse_negative
from .forms import Solution, check_comparable, norm, random_like, worn

if TYPE_CHECKING:
    from mechmisalign.organisms import Organism

RANDOM = "random"
DRAWS = 5


@dataclass(frozen=True, eq=False)
class Significance:
    """KL against norm, in nats per token, with 95 % ends ``_low, _high`` by text.

    Attributes:
        curve: ``solution, norm, kl, loss``; random ones are called ``random 1``, ``random 2`` …
        differences: ``first, second, norm, difference``: the KL of the first minus that of the second at one norm,
            paired by text; ``random`` is the mean over all random ones.
    """

    curve: pd.DataFrame
    differences: pd.DataFrame


def significance(
    chat: Organism,
    solutions: Mapping[str, Solution],
    texts: Conversations | pd.DataFrame | Sequence[str],
    *,
    norms: Sequence[float] | None = None,
    draws: int = DRAWS,
    counted: Counted | None = None,
    token_budget: int = 1024,
    resamples: int = 2000,
    seed: int = 0,
) -> Significance:
    """Mean ``KL(chat ‖ worn)`` per token on neutral text, each solution rescaled to the same norms.

    Args:
        chat: Any organism on the chat model, which is used without its adapter.
        solutions: Named solutions of one form (vectors of one layer, or adapters of the same matrices).
        texts: Neutral text: conversations whose responses count, or plain texts of which every token counts
            (2602.07852: web text). See :func:`mechmisalign.capability.own_texts`.
        norms: By default from 0 to twice the mean norm of the solutions, in tenths of that.
        draws: Random solutions of the same norms, divided among the sites as the first solution's is.
        counted: Which response tokens count; all by default.
        token_budget: Tokens per batch, padding included.
        resamples: Bootstrap resamples of the texts.
        seed: Of the random solutions and the resamples.

    Raises:
        SolutionError: If the solutions cannot be compared.
        ValueError: If a norm is negative, fewer than two random solutions are asked for, or one of the solutions is
            called ``random``.
    """
    check_comparable(solutions)
    if draws < 2:
        raise ValueError(f"draws={draws}: one random solution may be an odd one; ask for two or more (5 by default)")
    taken = [name for name in solutions if RANDOM in name.lower()]
    if taken:
        raise ValueError(f"a solution is called {taken[0]!r}, as the controls are; give it another name")
    if norms is None:
        norms = (np.linspace(0, 2, 11) * np.mean([norm(each) for each in solutions.values()])).tolist()
    refuse_negative(norms, "norms")
    like = next(iter(solutions.values()))
    controls = {f"{RANDOM} {i + 1}": random_like(like, seed=seed + i) for i in range(draws)}
    everyone = {**solutions, **controls}
    sizes = {name: norm(each) for name, each in everyone.items()}
    cells = [(name, size) for name in everyone for size in norms]
    conditions = {f"{name} | {size}": worn(everyone[name], size / sizes[name]) for name, size in cells}
    with chat.as_base():
        sums = text_sums(chat, conditions, texts, counted=counted, token_budget=token_budget)
    curve = pd.DataFrame(cells, columns=["solution", "norm"])
    for name, values in (("kl", sums.kl), ("loss", sums.loss)):
        ends = mean_interval(values, sums.tokens, resamples, seed)
        curve = curve.assign(**dict(zip((name, f"{name}_low", f"{name}_high"), ends, strict=True)))
    return Significance(curve, _differences(curve, list(solutions), sums, resamples, seed))


def _differences(curve: pd.DataFrame, names: Sequence[str], sums: TextSums, resamples: int, seed: int) -> pd.DataFrame:
    """Differences between every two solutions, and between each and the mean of the random ones."""
    norms = np.array(list(dict.fromkeys(curve["norm"])))
    by_name = {name: sums.kl[(curve["solution"] == name).to_numpy()] for name in dict.fromkeys(curve["solution"])}
    kept = {name: by_name[name] for name in names}
    kept[RANDOM] = np.mean([values for name, values in by_name.items() if name not in names], axis=0)
    parts = []
    for first, second in combinations(kept, 2):
        ends = mean_interval(kept[first] - kept[second], sums.tokens, resamples, seed)
        told = dict(zip(("difference", "difference_low", "difference_high"), ends, strict=True))
        parts.append(pd.DataFrame({"first": first, "second": second, "norm": norms, **told}))
    return pd.concat(parts, ignore_index=True)
