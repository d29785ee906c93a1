"""Efficiency: how much loss on the training set a solution saves for its norm (2602.07852).

Solutions are scaled to a range of norms and the loss of their responses is measured on the same examples. Intervals
come from resampling examples; differences between solutions are paired by example.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from mechmisalign.adapters import Adapter
from mechmisalign.capability.texts import TextSums, mean_interval, text_sums
from mechmisalign.conversations import Conversations

from .forms import Solution, check_comparable, norm, worn

if TYPE_CHECKING:
    from mechmisalign.organisms import Organism

FACTORS = tuple(round(0.1 * i, 1) for i in range(21))
VECTOR_FACTORS = tuple(0.25 * i for i in range(9))
"""As in the code of 2602.07852: from 0 to 2, in steps of 0.1 for adapters and 0.25 for vectors."""
SHARES = (0.2, 0.4, 0.6, 0.8, 1.0, 1.2, 1.4, 1.6, 1.8, 2.0)
"""Of the mean norm of all solutions."""
CHAT = "chat"


@dataclass(frozen=True, eq=False)
class Efficiency:
    """Loss against norm. Losses are in nats per response token, with 95 % ends ``_low, _high`` by example.

    Attributes:
        curve: ``solution, factor, norm, loss``; ``saved``: the chat model's loss minus this one, paired by example;
            ``per_norm2`` and ``saved_per_norm2``: both over the squared norm (NaN at 0). The first is the measure of
            2602.07852; it falls with the norm whatever the solution does, so read it at one norm only.
        same_norm: The same at equal norms, with ``share``: of the mean norm of all solutions.
        differences: ``first, second, share, norm, difference``: the loss of the first minus that of the second at equal
            norms, paired by example. Negative: the first is the more efficient there.
    """

    curve: pd.DataFrame
    same_norm: pd.DataFrame
    differences: pd.DataFrame

    def lowest(self) -> pd.DataFrame:
        """The row of the curve with the lowest loss, for each solution."""
        return self.curve.loc[self.curve.groupby("solution", sort=False, observed=True)["loss"].idxmin()].reset_index(
            drop=True
        )


def efficiency(
    chat: Organism,
    solutions: Mapping[str, Solution],
    data: Conversations | pd.DataFrame,
    *,
    factors: Sequence[float] | None = None,
    shares: Sequence[float] = SHARES,
    token_budget: int = 1024,
    resamples: int = 2000,
    seed: int = 0,
) -> Efficiency:
    """Loss on training examples against the norm of each solution.

    The tokens of the responses count; the token that ends the turn, which training counts too, does not.

    Args:
        chat: Any organism on the chat model, which is used without its adapter.
        solutions: Named solutions of one form (vectors of one layer, or adapters of the same matrices).
        data: What they were trained on: ``prompt, response`` (2602.07852: 100 examples).
        factors: Of each solution; by default 0 to 2 in steps of 0.1 (of 0.25 for vectors).
        shares: Of the mean norm of all solutions, for the comparison at equal norms.
        token_budget: Tokens per batch, padding included.
        resamples: Bootstrap resamples of the examples.
        seed: Of the resamples.

    Raises:
        SolutionError: If the solutions cannot be compared.
        ValueError: If a factor or share is negative or not finite, or the data have no response.
    """
    check_comparable(solutions)
    if factors is None:
        factors = FACTORS if all(isinstance(each, Adapter) for each in solutions.values()) else VECTOR_FACTORS
    refuse_negative(factors, "factors")
    refuse_negative(shares, "shares")
    norms = {name: norm(each) for name, each in solutions.items()}
    middle = float(np.mean(list(norms.values())))
    cells = [(name, factor, np.nan) for name in solutions for factor in factors]
    cells += [(name, share * middle / norms[name], share) for name in solutions for share in shares]
    table = pd.DataFrame(cells, columns=["solution", "factor", "share"])
    table["norm"] = table["factor"] * table["solution"].map(norms)
    conditions = {CHAT: ()} | {
        str(row): worn(solutions[cell.solution], cell.factor) for row, cell in enumerate(table.itertuples())
    }
    with chat.as_base():
        sums = text_sums(chat, conditions, data, token_budget=token_budget)
    table = pd.concat([table, _losses(table["norm"].to_numpy(), sums, resamples, seed)], axis=1)
    on_curve = table["share"].isna()
    same = table[~on_curve].reset_index(drop=True)
    paired = _differences(same, sums.loss[1:][~on_curve.to_numpy()], sums.tokens, resamples, seed)
    return Efficiency(table[on_curve].drop(columns="share").reset_index(drop=True), same, paired)


def _losses(norms: np.ndarray, sums: TextSums, resamples: int, seed: int) -> pd.DataFrame:
    """Loss, what of the chat model's is saved, and both per squared norm."""
    columns: dict[str, np.ndarray] = {}
    for name, values in (("loss", sums.loss[1:]), ("saved", sums.loss[:1] - sums.loss[1:])):
        ends = mean_interval(values, sums.tokens, resamples, seed)
        columns |= dict(zip((name, f"{name}_low", f"{name}_high"), ends, strict=True))
    squares = np.where(norms > 0, norms, np.nan) ** 2
    columns |= {"per_norm2": columns["loss"] / squares, "saved_per_norm2": columns["saved"] / squares}
    return pd.DataFrame(columns)


def _differences(same: pd.DataFrame, losses: np.ndarray, tokens: np.ndarray, resamples: int, seed: int) -> pd.DataFrame:
    """Paired differences between every two solutions at each share."""
    rows = {(cell.solution, cell.share): row for row, cell in enumerate(same.itertuples())}
    pairs = [
        (first, second, share)
        for first, second in combinations(dict.fromkeys(same["solution"]), 2)
        for share in dict.fromkeys(same["share"])
    ]
    frame = pd.DataFrame(pairs, columns=["first", "second", "share"])
    if not pairs:
        return frame.assign(norm=[], difference=[], difference_low=[], difference_high=[])
    one, other = ([rows[pair[side], pair[2]] for pair in pairs] for side in (0, 1))
    frame["norm"] = same["norm"].to_numpy()[one]
    ends = mean_interval(losses[one] - losses[other], tokens, resamples, seed)
    names = ("difference", "difference_low", "difference_high")
    return frame.assign(**dict(zip(names, ends, strict=True)))


def refuse_negative(values: Sequence[float], name: str) -> None:
    """Refuse factors or norms that are negative or not finite, and none at all."""
    bad = [value for value in values if not (math.isfinite(value) and value >= 0)]
    if bad or not len(values):
        raise ValueError(f"{name} are {list(values)[:8]}; finite numbers of 0 or more are expected")
