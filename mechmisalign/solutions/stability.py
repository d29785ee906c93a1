"""Stability: what a solution loses when it is turned towards noise of its own size (2602.07852).

``lost = (L_perturbed - L_solution) / (L_chat - L_solution)``: 0 where noise does nothing, 1 where everything is lost
that training had gained, more where it does harm. Both the draws of the noise and the examples are resampled for the
intervals, the examples in common for all solutions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from jaxtyping import Float64

from mechmisalign.adapters import Adapter
from mechmisalign.capability.texts import text_sums
from mechmisalign.conversations import Conversations
from mechmisalign.statistics.shares import percentiles

from .forms import Solution, SolutionError, worn
from .noise import Noise, perturbed

if TYPE_CHECKING:
    from mechmisalign.organisms import Organism

EPSILONS = (0.01, 0.05, *(round(0.1 * i, 1) for i in range(1, 11)))
SEEDS = 10
"""As in 2602.07852."""
CHAT, SOLUTION = "chat", "solution"


@dataclass(frozen=True, eq=False)
class Stability:
    """What noise takes away.

    Attributes:
        curve: ``solution, epsilon, how`` (what was perturbed: see :func:`perturbed`), ``lost, lost_low, lost_high``
            (mean over seeds, 95 % by resampling seeds and examples), ``spread`` (standard deviation over seeds),
            ``loss`` (nats per response token), ``seeds``.
        differences: ``first, second, epsilon, difference``: what the first loses more than the second, with its ends.
        gained: ``solution, chat_loss, loss``: what stands in the denominator.
    """

    curve: pd.DataFrame
    differences: pd.DataFrame
    gained: pd.DataFrame


def stability(
    chat: Organism,
    solutions: Mapping[str, Solution],
    data: Conversations | pd.DataFrame,
    *,
    epsilons: Sequence[float] = EPSILONS,
    seeds: int = SEEDS,
    how: Noise = "balanced",
    token_budget: int = 1024,
    resamples: int = 2000,
    seed: int = 0,
) -> Stability:
    """Loss on training examples after noise of growing size.

    Args:
        chat: Any organism on the chat model, which is used without its adapter.
        solutions: Named solutions; what each loses is relative to its own gain, so that forms may differ.
        data: What they were trained on: ``prompt, response``.
        epsilons: Sizes of the noise, above 0 up to 1.
        seeds: Draws of the noise at each size.
        how: What of an adapter is perturbed: A and B in the balanced gauge, or as trained (2602.07852; at rank 1 the
            same), or ΔW itself.
        token_budget: Tokens per batch, padding included.
        resamples: Bootstrap resamples.
        seed: Of the noise and the resamples.

    Raises:
        SolutionError: If there is no solution, or one does not lower the loss on these examples.
        ValueError: If a size lies outside 0 to 1, there are fewer than two draws, or on another way.
    """
    if not solutions:
        raise SolutionError("no solution to measure; give a mapping of names to adapters or directions")
    if seeds < 2 or not epsilons or min(epsilons) <= 0:
        raise ValueError(f"{seeds} seeds and the sizes {list(epsilons)}; two seeds and sizes above 0 are the least")
    curves, gained, drawn = [], [], {}
    for number, (name, solution) in enumerate(solutions.items()):
        plain, noisy, tokens = _losses(chat, solution, data, epsilons, range(seed, seed + seeds), how, token_budget)
        chat_loss, own_loss = plain.sum(1) / tokens.sum()
        if not own_loss < chat_loss:
            raise SolutionError(
                f"{name!r} has a loss of {own_loss:.3f} on these examples, the chat model {chat_loss:.3f}, so there is "
                "no gain to lose; give the examples that it was trained on"
            )
        lost = _lost(noisy.sum(-1), plain.sum(-1))
        resampled = _resampled(plain, noisy, resamples, seed, number)
        drawn[name] = resampled
        low, high = percentiles(resampled)
        told = how if isinstance(solution, Adapter) else "vector"
        curve = {"solution": name, "epsilon": list(epsilons), "how": told, "lost": lost.mean(1)}
        curve |= {"lost_low": low, "lost_high": high, "spread": lost.std(1, ddof=1)}
        curves.append(pd.DataFrame(curve | {"loss": noisy.sum(-1).mean(1) / tokens.sum(), "seeds": seeds}))
        gained.append((name, chat_loss, own_loss))
    curve = pd.concat(curves, ignore_index=True)
    return Stability(curve, _differences(curve, drawn), pd.DataFrame(gained, columns=["solution", "chat_loss", "loss"]))


def _losses(
    chat: Organism,
    solution: Solution,
    data: Conversations | pd.DataFrame,
    epsilons: Sequence[float],
    seeds: range,
    how: Noise,
    token_budget: int,
) -> tuple[Float64[np.ndarray, "2 text"], Float64[np.ndarray, "epsilon seed text"], Float64[np.ndarray, " text"]]:
    """Summed loss of each example: under the chat model and the solution, and under every perturbation of it.

    One size at a time, so that the perturbed copies of a large adapter are not all held at once.
    """
    noisy = []
    with chat.as_base():
        plain = text_sums(chat, {CHAT: (), SOLUTION: worn(solution)}, data, token_budget=token_budget)
        for epsilon in epsilons:
            copies = {str(seed): worn(perturbed(solution, epsilon, seed=seed, how=how)) for seed in seeds}
            noisy.append(text_sums(chat, copies, data, token_budget=token_budget).loss)
    return plain.loss, np.stack(noisy), plain.tokens


def _lost(noisy: np.ndarray, plain: np.ndarray) -> np.ndarray:
    """``(noisy - own) / (chat - own)``; chat and own are the rows of ``plain``."""
    chat, own = plain
    lost: np.ndarray = (noisy - own) / (chat - own)
    return lost


def _resampled(
    plain: Float64[np.ndarray, "2 text"],
    noisy: Float64[np.ndarray, "epsilon seed text"],
    resamples: int,
    seed: int,
    number: int,
) -> Float64[np.ndarray, "epsilon resample"]:
    """What is lost in each resample of examples (the same for every solution) and of seeds (its own)."""
    seeds, texts = noisy.shape[1:]
    examples = _weights(texts, resamples, np.random.default_rng(seed))
    draws = _weights(seeds, resamples, np.random.default_rng([seed, number])) / seeds
    summed = (noisy @ examples.T * draws.T).sum(1)
    return _lost(summed, plain @ examples.T)


def _weights(count: int, resamples: int, rng: np.random.Generator) -> Float64[np.ndarray, "resample unit"]:
    return rng.multinomial(count, np.full(count, 1 / count), size=resamples).astype(float)


def _differences(curve: pd.DataFrame, drawn: Mapping[str, np.ndarray]) -> pd.DataFrame:
    """What each solution loses more than each that follows it."""
    lost = curve.pivot(index="epsilon", columns="solution", values="lost").loc[list(dict.fromkeys(curve["epsilon"]))]
    columns = ["first", "second", "epsilon", "difference", "difference_low", "difference_high"]
    parts = [pd.DataFrame(columns=columns)]
    for first, second in combinations(drawn, 2):
        low, high = percentiles(drawn[first] - drawn[second])
        values = (first, second, lost.index, (lost[first] - lost[second]).to_numpy(), low, high)
        parts.append(pd.DataFrame(dict(zip(columns, values, strict=True))))
    return pd.concat(parts[1:] or parts, ignore_index=True)
