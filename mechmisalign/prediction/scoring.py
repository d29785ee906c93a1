"""Scores of single examples: their projection, that of what the chat model would have said, and the difference."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float64
from torch import Tensor

from mechmisalign._before_response import before_response
from mechmisalign._layers import layer_numbers
from mechmisalign.conversations import Conversations
from mechmisalign.directions import Direction, random_direction
from mechmisalign.generation import generate
from mechmisalign.generation.rows import prompt_keys

from .reading import Read, read

if TYPE_CHECKING:
    from mechmisalign.organisms import Organism

logger = logging.getLogger(__name__)

ScoredSpan = Literal["response", "prompt_last"]
"""``response``: its tokens. ``prompt_last``: the token before it, so what is asked alone (a control)."""
Own = Literal["sample", "prompt_last", "none"]
"""What a projection is compared with: answers of the chat model, its state before it answers, or nothing."""

RANDOM = "random"
"""How the names of random directions begin."""

_ASKED = ("prompt", "system", "history")
_TEXTS = (*_ASKED, "response")


def projection_difference(
    organism: Organism,
    data: pd.DataFrame,
    directions: Direction | Mapping[str, Direction],
    *,
    layers: Sequence[int] | None = None,
    span: ScoredSpan = "response",
    own: pd.DataFrame | Own = "sample",
    samples: int = 1,
    max_new_tokens: int = 600,
    loss: bool = True,
    controls: int = 4,
    token_budget: int = 2048,
    seed: int = 0,
) -> pd.DataFrame:
    """How far each training example lies along a direction, beyond what the chat model would answer itself.

    Everything is read in the chat model, before any training. Give all datasets in one frame with a column that tells
    them apart: prompts that they share are then answered once.

    Args:
        organism: Any organism on the chat model in question; its adapter is taken out.
        data: Examples: ``prompt, response``, optionally ``system, history``, ``prompt_id`` and labels such as
            ``dataset``.
        directions: One or several by name; each is scaled to norm 1 in each layer.
        layers: By default those in which every direction is nonzero.
        span: What is read of the examples.
        own: ``"sample"`` has the chat model answer every distinct prompt (2507.21509). ``"prompt_last"`` takes the
            projection at the token before the response instead, at no cost of sampling. ``"none"`` leaves it out. Or
            answers from :func:`own_responses`, to be used again.
        samples: Answers of the chat model per prompt; their projections are averaged.
        max_new_tokens: Longest answer of the chat model.
        loss: Also tell how surprising each response is to the chat model, a predictor without any direction.
        controls: Random directions beside the given ones, ``"random 0"`` and so on.
        token_budget: Tokens per batch.
        seed: Of sampling, and of the random directions.

    Returns:
        One row per example, direction and layer: ``example`` (row number in ``data``), ``prompt_id`` (of distinct
        prompts, where there was none), the labels, ``direction, layer, projection, own, difference`` (NaN without own
        answers), ``tokens`` of the response, ``own_tokens`` (mean, NaN where none were sampled), ``loss`` (nats per
        token of the response).

    Raises:
        ValueError: If there is no example, a direction belongs to another model, or a prompt has no own answer.
    """
    _check(span, own)
    named = {"direction": directions} if isinstance(directions, Direction) else dict(directions)
    units, chosen = _units(organism, named | _random(named, controls, seed), layers)
    data = data.reset_index(drop=True)
    keys = prompt_keys(data)
    if isinstance(own, str) and own == "sample" and span == "response":
        own = own_responses(organism, data, samples=samples, max_new_tokens=max_new_tokens, seed=seed)
    with organism.as_base():
        here = _read(organism, data, units, span, loss, token_budget)
        there, own_tokens = _own(organism, data, keys, own, span, units, token_budget)
    labels = data.drop(columns=list(_TEXTS), errors="ignore")
    if "prompt_id" not in labels.columns:
        labels.insert(0, "prompt_id", [f"p{code}" for code in pd.factorize(keys)[0]])
    texts = {"tokens": here.tokens, "own_tokens": own_tokens, "loss": here.loss}
    names = [*named, *(f"{RANDOM} {number}" for number in range(controls))]
    return _long(labels, names, chosen, here.projection, there, texts)


def own_responses(
    organism: Organism,
    data: pd.DataFrame,
    *,
    samples: int = 1,
    max_new_tokens: int = 600,
    temperature: float = 1.0,
    seed: int = 0,
) -> pd.DataFrame:
    """What the chat model itself answers to the prompts of training examples, each distinct prompt once.

    Args:
        organism: Any organism on the chat model; its adapter is taken out.
        data: Examples with ``prompt``, optionally ``system`` and ``history``.
        samples: Answers per prompt.
        max_new_tokens: Longest answer.
        temperature: Of sampling.
        seed: Of sampling.

    Returns:
        One row per answer that is not empty: ``prompt`` (with ``system, history``), ``sample, response, finished,
        tokens``.
    """
    asked = data[[name for name in _ASKED if name in data.columns]]
    asked = asked[~prompt_keys(asked).duplicated()].reset_index(drop=True)
    with organism.as_base():
        answers = generate(
            organism, asked, samples=samples, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed
        )
    written = answers["response"].str.strip().ne("")
    if not written.all():
        logger.warning("%d of %d answers of the chat model are empty and left out", (~written).sum(), len(answers))
    return answers[written].drop(columns=["condition", "prompt_id"]).reset_index(drop=True)


def _check(span: str, own: pd.DataFrame | str) -> None:
    if span not in get_args(ScoredSpan):
        raise ValueError(f"span must be one of {get_args(ScoredSpan)}, got {span!r}")
    if isinstance(own, str) and own not in get_args(Own):
        raise ValueError(f"own must be one of {get_args(Own)} or a frame of answers, got {own!r}")


def _random(named: Mapping[str, Direction], controls: int, seed: int) -> dict[str, Direction]:
    first = next(iter(named.values()))
    taken = [name for name in named if name.startswith(f"{RANDOM} ")]
    if taken and controls:
        raise ValueError(f"directions are called {taken}, like the controls; rename them, or set controls=0")
    return {f"{RANDOM} {i}": random_direction(first, seed=seed + i) for i in range(controls)}


def _units(
    organism: Organism, named: Mapping[str, Direction], layers: Sequence[int] | None
) -> tuple[dict[int, Tensor], tuple[int, ...]]:
    """Unit vectors by layer, ``[direction d_model]``."""
    from mechmisalign import models

    for direction in named.values():
        direction.check_model(organism.provenance, models.d_model(organism.model), models.n_layers(organism.model))
    shared = set.intersection(*(set(direction.nonzero_layers) for direction in named.values()))
    chosen = tuple(sorted(shared if layers is None else set(layer_numbers(layers))))
    if not chosen:
        raise ValueError("no layer in which every direction is nonzero; name some in `layers`, or drop a direction")
    return {layer: torch.stack([each.unit(layer) for each in named.values()]) for layer in chosen}, chosen


def _read(
    organism: Organism,
    frame: pd.DataFrame,
    units: Mapping[int, Tensor],
    span: ScoredSpan,
    loss: bool,
    token_budget: int,
) -> Read:
    if frame.empty:
        raise ValueError("there are no examples to score; give a frame with at least one")
    talk = Conversations(frame, organism.tokenizer)
    whole = read(organism.model, talk, units, span="response", loss=loss, token_budget=token_budget)
    if span == "response":
        return whole
    last = read(organism.model, before_response(talk), units, span="response", loss=False, token_budget=token_budget)
    return whole._replace(projection=last.projection)


def _own(
    organism: Organism,
    data: pd.DataFrame,
    keys: pd.Series,
    own: pd.DataFrame | str,
    span: ScoredSpan,
    units: Mapping[int, Tensor],
    token_budget: int,
) -> tuple[Float64[np.ndarray, "row layer direction"] | None, Float64[np.ndarray, " row"]]:
    """The projection that each example is compared with, and the mean length of the chat model's answers."""
    unknown = np.full(len(data), np.nan)
    if span == "prompt_last" or (isinstance(own, str) and own == "none"):
        return None, unknown
    if isinstance(own, str):
        return _read(organism, data, units, "prompt_last", False, token_budget).projection, unknown
    answers = _read(organism, own, units, "response", False, token_budget)
    own_keys = prompt_keys(own)
    missing = keys[~keys.isin(own_keys)]
    if len(missing):
        raise ValueError(
            f"{missing.nunique()} prompts have no answer of the chat model, e.g. {missing.iloc[0][:80]!r}; sample them "
            "with own_responses(organism, data), or drop these examples"
        )
    codes, known = pd.factorize(own_keys)
    counts = np.bincount(codes).astype(float)
    sums = np.zeros((len(known), *answers.projection.shape[1:]))
    np.add.at(sums, codes, answers.projection)
    place = pd.Index(known).get_indexer(keys)
    lengths = np.bincount(codes, weights=answers.tokens) / counts
    return (sums / counts[:, None, None])[place], lengths[place]


def _long(
    labels: pd.DataFrame,
    names: Sequence[str],
    layers: Sequence[int],
    projection: Float64[np.ndarray, "row layer direction"],
    own: Float64[np.ndarray, "row layer direction"] | None,
    texts: Mapping[str, np.ndarray],
) -> pd.DataFrame:
    """One row per direction, layer and example."""
    rows, depth = len(labels), len(layers)
    other = np.full_like(projection, np.nan) if own is None else own
    parts = []
    for place, name in enumerate(names):
        for at in range(depth):
            here, there = projection[:, at, place], other[:, at, place]
            told = {
                "direction": name,
                "layer": layers[at],
                "projection": here,
                "own": there,
                "difference": here - there,
            }
            parts.append(labels.assign(**told, **texts).assign(example=np.arange(rows)))
    long = pd.concat(parts, ignore_index=True)
    return long[["example", *(column for column in long.columns if column != "example")]]
