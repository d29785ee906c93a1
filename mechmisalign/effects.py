"""Which site does what: switching sites off and on, Shapley values, and the cheap estimate by gradients.

Behaviour is the measure: the EM rate of sampled answers while some sites are switched off (``ScaleAdapter``). Leaving
one out, or leaving only one in, misses what sites do together; Shapley values share the whole effect out among them
(Shapley 1953; sampled over orders as in Castro et al. 2009). ``gradient x scalar`` costs one backward pass and no
sampling.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import permutations as orders
from math import factorial
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from scipy import stats
from torch import Tensor
from torch.nn.functional import cross_entropy

from . import models
from ._frames import plain_frame
from ._renamed import renamed
from .activations import in_memory
from .adapters import Adapter, LoraSite, SiteKey
from .conversations import Batch, Conversations
from .generation import generate
from .interventions import ScaleAdapter
from .judging import Judge, label, rates
from .judging import judge as judge_answers
from .progress import progress
from .statistics import CONFIDENCE, clustered_difference

if TYPE_CHECKING:
    from .organisms import Organism

Players = Mapping[str, tuple[SiteKey, ...]]
"""Named groups of sites that are switched together."""

Coalition = frozenset[str]


def players(adapter: Adapter, by: str = "site") -> dict[str, tuple[SiteKey, ...]]:
    """The adapter's sites as players: each on its own, or together by ``"layer"`` or ``"module"``.

    Raises:
        ValueError: On another grouping.
    """
    names: dict[str, Callable[[LoraSite], str]] = {
        "site": lambda site: site.label,
        "layer": lambda site: f"layer {site.layer}",
        "module": lambda site: site.module,
    }
    if by not in names:
        raise ValueError(f"by must be one of {tuple(names)}, got {by!r}")
    groups: dict[str, tuple[SiteKey, ...]] = {}
    for site in adapter.sites:
        name = names[by](site)
        groups[name] = (*groups.get(name, ()), site.key)
    return groups


def switched(everyone: Players, on: Coalition) -> tuple[ScaleAdapter, ...]:
    """The condition in which only the players of a coalition are on."""
    off = {key: 0.0 for name, keys in everyone.items() if name not in on for key in keys}
    return (ScaleAdapter(off),) if off else ()


@renamed(judge_with="judge")
def site_effects(
    organism: Organism,
    prompts: pd.DataFrame | Sequence[str],
    judge: Judge,
    *,
    by: str = "site",
    samples: int = 16,
    max_new_tokens: int = 600,
    seed: int = 0,
) -> pd.DataFrame:
    """EM rate with each player left out, and with only that player in, and what that says the player does.

    Returns:
        ``site, kind``; ``value, low, high``: the effect on the EM rate (all minus "leave one out"; "only one" minus
        none; paired by prompt); ``rate, rate_low, rate_high, coherent, n``: the EM rate in that condition itself. The
        rows of kind "all" and "none" have the effect against none.
    """
    everyone = players(organism.require_adapter("leaving sites out"), by)
    judged = _answers(organism, prompts, judge, effect_conditions(everyone), samples, max_new_tokens, seed)
    return effect_table(judged, everyone)


def effect_conditions(everyone: Players) -> dict[str, tuple[ScaleAdapter, ...]]:
    """The conditions that :func:`site_effects` compares, by name: all, none, each left out, only each."""
    return _conditions(everyone, {on for pair in _compared(everyone).values() for on in pair})


def effect_table(judged: pd.DataFrame, everyone: Players) -> pd.DataFrame:
    """The table of :func:`site_effects` from judged answers to its conditions."""
    judged = plain_frame(judged)
    told = rates(judged).set_index("condition")
    misaligned = (label(judged) == "misaligned").groupby(judged["condition"], observed=True)
    events = {name: (group.to_numpy(), judged.loc[group.index, "prompt_id"].to_numpy()) for name, group in misaligned}
    rows = []
    for (site, kind), (more, less) in _compared(everyone).items():
        effect = clustered_difference(events[_named(more)], events[_named(less)])
        here = told.loc[_named(less if kind == "leave one out" else more)]
        rows.append(
            {"site": site, "kind": kind, "value": effect.value, "low": effect.low, "high": effect.high}
            | {"rate": here["rate"], "rate_low": here["low"], "rate_high": here["high"]}
            | {"coherent": here["coherent"], "n": here["n"]}
        )
    return pd.DataFrame(rows)


@renamed(judge_with="judge")
def shapley(
    organism: Organism,
    prompts: pd.DataFrame | Sequence[str],
    judge: Judge,
    *,
    by: str = "site",
    permutations: int = 20,
    samples: int = 16,
    max_new_tokens: int = 600,
    resamples: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """Each player's Shapley value for the EM rate: its mean gain over random orders in which players are switched on.

    In every order the gains add up to the rate with all minus the rate with none, and so do the values. Where there are
    no more orders than ``permutations``, all of them are used and only the sampled answers are uncertain.

    Args:
        organism: With its adapter in.
        prompts: Questions.
        judge: Scores the answers.
        by: ``"site"``, ``"layer"`` or ``"module"``: who is switched on together.
        permutations: Orders to sample.
        samples: Answers per prompt and coalition.
        max_new_tokens: Longest answer.
        resamples: Bootstrap resamples, of orders and prompts together.
        seed: Of orders, answers and resamples.

    Returns:
        ``site, value, low, high`` (share of answers), and ``kind`` "Shapley".
    """
    everyone = players(organism.require_adapter("leaving sites out"), by)
    sampled = sampled_orders(list(everyone), permutations, seed)
    coalitions = {Coalition(order[:size]) for order in sampled for size in range(len(order) + 1)}
    conditions = _conditions(everyone, coalitions)
    judged = _answers(organism, prompts, judge, conditions, samples, max_new_tokens, seed)
    misaligned = judged.assign(event=(label(judged) == "misaligned").astype(float))
    by_prompt = misaligned.groupby(["condition", "prompt_id"], observed=True)["event"].mean().unstack("prompt_id")
    worth = {on: by_prompt.loc[_named(on)].to_numpy() for on in coalitions}
    return shapley_values(worth, sampled, resamples=resamples, seed=seed)


def sampled_orders(names: Sequence[str], count: int, seed: int) -> list[tuple[str, ...]]:
    """Random orders of the players, or every order if there are no more than ``count``."""
    if factorial(len(names)) <= count:
        return list(orders(names))
    rng = np.random.default_rng(seed)
    return [tuple(names[i] for i in rng.permutation(len(names))) for _ in range(count)]


def shapley_values(
    worth: Mapping[Coalition, Float[np.ndarray, " prompt"]],
    sampled: Sequence[tuple[str, ...]],
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """Shapley values from what coalitions are worth, prompt by prompt, over sampled orders.

    Returns:
        ``site, kind, value, low, high``, with 95 % bootstrap intervals over orders and prompts.
    """
    names = sorted(sampled[0])
    gains = np.stack([[_gain(worth, order, name) for name in names] for order in sampled])  # [order player prompt]
    rng = np.random.default_rng(seed)
    n_orders, _, n_prompts = gains.shape
    complete = n_orders == factorial(len(names)) and len(set(sampled)) == n_orders
    draws = np.empty((resamples, len(names)))
    for draw in range(resamples):
        weights = rng.multinomial(n_prompts, np.full(n_prompts, 1 / n_prompts)) / n_prompts
        rows = np.arange(n_orders) if complete else rng.integers(n_orders, size=n_orders)
        draws[draw] = gains[rows].mean(0) @ weights
    low, high = np.quantile(draws, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], axis=0)
    return pd.DataFrame({"site": names, "kind": "Shapley", "value": gains.mean((0, 2)), "low": low, "high": high})


def gradient_attribution(
    organism: Organism,
    conversations: Conversations,
    *,
    positive: str = "misaligned",
    negative: str | None = "aligned",
    column: str = "label",
    by: str = "site",
    token_budget: int = 4096,
) -> pd.DataFrame:
    """Gradient x scalar: how the mean log-probability of one class of answers, minus the other's, moves with each site.

    A factor on every site (1 as it is) is differentiated: its gradient is the sum over tokens of gradient times scalar,
    a first-order estimate of what switching the site off would take away. One backward pass serves all sites.

    Args:
        organism: With its adapter in.
        conversations: Answers with a column of classes.
        positive: The class whose log-probability counts up.
        negative: The class that counts down; None for the first alone.
        column: The column of classes.
        by: ``"site"``, ``"layer"`` or ``"module"``.
        token_budget: Tokens per batch, padding included.

    Returns:
        ``site, kind "gradient", value`` (nats per answer token).

    Raises:
        ValueError: If a class has no answer.
    """
    weights = _class_weights(conversations, column, positive, negative)
    everyone = players(organism.require_adapter("leaving sites out"), by)
    totals = torch.zeros(len(everyone), dtype=torch.float64)
    for batch in progress(conversations.batches("response", token_budget=token_budget), "gradient attribution"):
        for _, gradient in in_memory(batch, lambda part: _factor_gradient(organism, everyone, part, weights)):
            totals += gradient
    return pd.DataFrame({"site": list(everyone), "kind": "gradient", "value": totals.numpy()})


def rank_correlation(first: pd.DataFrame, second: pd.DataFrame) -> float:
    """Spearman's correlation between two tables of ``site, value`` over the sites that both have (NaN below three)."""
    both = first[["site", "value"]].merge(second[["site", "value"]], on="site")
    if len(both) < 3:
        return float("nan")
    return float(stats.spearmanr(both["value_x"], both["value_y"]).statistic)


def _compared(everyone: Players) -> dict[tuple[str, str], tuple[Coalition, Coalition]]:
    """Site and kind of each comparison: the coalition with more, and the one that is subtracted."""
    whole, nobody = Coalition(everyone), Coalition()
    compared = {("all", "all"): (whole, nobody), ("none", "none"): (nobody, nobody)}
    for name in everyone:
        compared[(name, "leave one out")] = (whole, whole - {name})
        compared[(name, "only one")] = (Coalition({name}), nobody)
    return compared


def _conditions(everyone: Players, coalitions: set[Coalition]) -> dict[str, tuple[ScaleAdapter, ...]]:
    return {_named(on): switched(everyone, on) for on in sorted(coalitions, key=_named)}


def _gain(worth: Mapping[Coalition, np.ndarray], order: tuple[str, ...], name: str) -> np.ndarray:
    place = order.index(name)
    return worth[Coalition(order[: place + 1])] - worth[Coalition(order[:place])]


def _named(on: Coalition) -> str:
    return " + ".join(sorted(on)) or "none"


def _answers(
    organism: Organism,
    prompts: pd.DataFrame | Sequence[str],
    judge: Judge,
    conditions: Mapping[str, tuple[ScaleAdapter, ...]],
    samples: int,
    max_new_tokens: int,
    seed: int,
) -> pd.DataFrame:
    sampled = generate(
        organism, prompts, conditions=conditions, samples=samples, max_new_tokens=max_new_tokens, seed=seed
    )
    return judge_answers(sampled, judge)


def _class_weights(
    conversations: Conversations, column: str, positive: str, negative: str | None
) -> Float[Tensor, " conversation"]:
    """Weight of each conversation's tokens, so that the weighted sum is a difference of means over tokens."""
    classes, tokens = conversations.frame[column].to_numpy(), conversations.spans
    lengths = (tokens["response_stop"] - tokens["response_start"]).to_numpy(np.float64, copy=True)
    weights = np.zeros(len(conversations))
    for name, sign in ((positive, 1.0), (negative, -1.0)):
        if name is None:
            continue
        of_class = classes == name
        if not of_class.any():
            raise ValueError(f"no conversation has {column}={name!r}; there are {sorted(set(map(str, classes)))}")
        weights[of_class] = sign / lengths[of_class].sum()
    return torch.from_numpy(weights)


def _factor_gradient(
    organism: Organism, everyone: Players, batch: Batch, weights: Float[Tensor, " conversation"]
) -> Float[Tensor, " player"]:
    device = models.device_of(organism.model)
    factors = torch.ones(len(everyone), dtype=torch.float32, device=device, requires_grad=True)
    scale = ScaleAdapter({key: factor for factor, keys in zip(factors, everyone.values(), strict=True) for key in keys})
    ids = batch.ids.to(device)
    with torch.enable_grad(), organism.apply(scale):
        logits = models.forward(organism.model, ids, batch.mask.to(device))
        counted = batch.span[:, 1:].to(logits.device)
        predicting = logits[:, :-1][counted].float()  # the others of a large vocabulary are not worth a float32 copy
        losses = cross_entropy(predicting, ids[:, 1:].to(logits.device)[counted], reduction="none")
        weight = weights[torch.from_numpy(batch.rows.copy())].to(losses)[counted.nonzero()[:, 0]]
        (gradient,) = torch.autograd.grad(-(losses * weight).sum(), factors)
    return gradient.double().cpu()
