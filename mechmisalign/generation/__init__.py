"""Sampling under many conditions in one batch.

Every row of a batch has its own interventions, so a whole sweep shares the forward passes. A row's randomness is a
stream of its own, keyed by the run's seed, the prompt, the sample and the condition: adding a condition, another
batch size, another order or a resumed run changes no other row. That is exact up to the rounding of the model's own
matrix products, which depends on the number of rows. In float32 it moved one of 5,200 pocket answers (150,000 tokens)
between batch sizes; in bfloat16 it moves one in ten, and only the random numbers stay the same.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from jaxtyping import Int

from mechmisalign import models
from mechmisalign._context import refuse_beyond
from mechmisalign.conversations import render_rows
from mechmisalign.decoding import end_ids
from mechmisalign.interventions import check_fits
from mechmisalign.progress import progress_bar

from .flight import Requests
from .memory import rows_that_fit
from .packing import Packer
from .rows import Conditions, answer_rows, as_set, prompt_keys, prompts_frame, refuse_names, refuse_numbers_per_row
from .sampling import pick_tokens, stage_seed, uniforms
from .workers import Answers, forked, shares, useful_workers

if TYPE_CHECKING:
    from mechmisalign.organisms import Organism

__all__ = [
    "Conditions",
    "answer_rows",
    "as_set",
    "generate",
    "generate_rows",
    "pick_tokens",
    "prompts_frame",
    "stage_seed",
    "uniforms",
    "useful_workers",
]

_MOST_TOKENS = 10**6
"""No answer is longer: what is written is held for every row in flight."""


def generate(
    organism: Organism,
    prompts: pd.DataFrame | Sequence[str],
    *,
    conditions: Conditions | None = None,
    samples: int = 50,
    max_new_tokens: int = 600,
    temperature: float = 1.0,
    system: str | None = None,
    seed: int = 0,
    batch_rows: int | None = None,
    workers: int = 1,
) -> pd.DataFrame:
    """Sample answers to every prompt under every condition.

    Args:
        organism: Who answers (inside ``organism.as_base()``: the chat model).
        prompts: Texts, or a frame with ``prompt``, optionally ``system`` and ``history`` (earlier turns), and any
            labels (``prompt_id`` is added if it is missing).
        conditions: Named sets of interventions; by default one, ``"none"``, without any.
        samples: Answers per prompt and condition.
        max_new_tokens: An answer that has not ended by then is ``finished=False``.
        temperature: Sampling temperature; 0 takes the most likely token.
        system: System prompt of the rows that have none of their own; None leaves it to the chat template.
        seed: Seed of the run.
        batch_rows: Answers in flight at once; by default as many as fit into the free memory. Halved when it runs out.
        workers: Processes that share the rows (Linux, CPU). For small models two processes of one thread each are
            faster than one of two; interventions that record something would record it there and not here.

    Returns:
        One row per answer: ``condition, sample``, the prompts' columns, ``response, finished, tokens``.
    """
    named: Conditions = {"none": ()} if conditions is None else conditions
    parts = generate_rows(
        organism,
        answer_rows(prompts, named, samples),
        named,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        system=system,
        seed=seed,
        batch_rows=batch_rows,
        workers=workers,
    )
    with models.in_one_thread(organism.model):
        return pd.concat(list(parts)).sort_index()


def generate_rows(
    organism: Organism,
    rows: pd.DataFrame,
    conditions: Conditions,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    system: str | None = None,
    seed: int = 0,
    batch_rows: int | None = None,
    workers: int = 1,
) -> Iterator[pd.DataFrame]:
    """Sample the given rows (a subset of ``answer_rows``) and give them out in parts: what a resumable sweep stores.

    Between two parts no hook is attached, and about ``batch_rows`` answers are in flight.

    Yields:
        Finished rows with ``response, finished, tokens``, under their index in ``rows``.

    Raises:
        ValueError: On an unknown condition, a number per row in one, a negative temperature, no token to write, logits
            that are not finite, or inside an ``apply()`` that speaks of columns or rows.
    """
    _refuse_numbers(temperature, max_new_tokens, batch_rows, workers)
    refuse_names(conditions)
    refuse_numbers_per_row(conditions)
    sets = {name: as_set(interventions) for name, interventions in conditions.items()}
    for interventions in sets.values():
        check_fits(interventions, organism)
    _refuse_open_blocks(organism)
    if not len(rows):
        return
    requests = _requests(organism, rows, conditions, system, seed, max_new_tokens)
    length = max(map(len, requests.prompts)) + int(requests.limits.max())
    capacity = min(len(rows), batch_rows or rows_that_fit(organism.model, length))
    orders = shares(requests, _neighbours(requests), min(workers, capacity))

    def sampled(order: Sequence[int]) -> Iterator[Answers]:
        fits = max(1, capacity // len(orders))
        packer = Packer(organism, sets, temperature=temperature, capacity=fits)
        return packer.answers(requests, order)

    done: Answers = []
    with progress_bar("sampling answers", len(rows), "answer") as bar:
        for answers in sampled(orders[0]) if len(orders) == 1 else forked(sampled, orders):
            bar.update(len(answers))
            done += answers
            if len(done) >= capacity // 4:
                yield _finished(done, rows, organism)
                done = []
        if done:
            yield _finished(done, rows, organism)


def _refuse_numbers(temperature: float, max_new_tokens: int, batch_rows: int | None, workers: int) -> None:
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature must be 0 or more, got {temperature}")
    if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int | np.integer):
        raise ValueError(f"max_new_tokens must be a whole number, got {max_new_tokens!r}")
    if max_new_tokens > _MOST_TOKENS:
        raise ValueError(f"max_new_tokens must be at most {_MOST_TOKENS:,}, got {max_new_tokens:,}")
    for name, value in (("max_new_tokens", max_new_tokens), ("batch_rows", batch_rows), ("workers", workers)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


def _in_context(
    organism: Organism, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> Int[np.ndarray, " prompt"]:
    """How many tokens may follow each prompt: fewer than were asked for where the model's context ends before."""
    limit = models.context(organism.model)
    lengths = np.array([len(prompt) for prompt in prompts])
    longest = int(lengths.max())
    refuse_beyond(longest + 1, limit, "a prompt with one token of its answer")
    if limit is None or longest + max_new_tokens <= limit:
        return np.full(len(lengths), max_new_tokens)
    warnings.warn(
        f"answers to {int((lengths + max_new_tokens > limit).sum()):,} of {len(lengths):,} prompts are cut where the "
        f"model's context of {limit:,} tokens ends: the longest prompt has {longest:,}, which leaves "
        f"{limit - longest:,} of the {max_new_tokens:,} tokens that were asked for",
        stacklevel=4,
    )
    return np.minimum(limit - lengths, max_new_tokens)


def _refuse_open_blocks(organism: Organism) -> None:
    """Refuse to sample inside an ``apply()`` that speaks of columns or rows: in a packed batch they are not its own."""
    for interventions in organism.applied:
        if any(one.positions in ("prompt", "response") for one in interventions):
            raise ValueError(
                "this is inside organism.apply(…) with positions 'prompt' or 'response', whose columns are not those "
                "of the batches that sampling makes; give the intervention as a condition"
            )
        refuse_numbers_per_row({"of the open apply() block": interventions})


def _requests(
    organism: Organism,
    rows: pd.DataFrame,
    conditions: Conditions,
    system: str | None,
    seed: int,
    max_new_tokens: int,
) -> Requests:
    codes = pd.Categorical(rows["condition"], categories=list(conditions)).codes.astype(np.int64)
    if (codes < 0).any():
        unknown = rows["condition"].iloc[int(np.argmin(codes))]
        raise ValueError(f"no interventions for the condition {unknown!r}; there are {list(conditions)}")
    keys = prompt_keys(rows)
    asked, _ = pd.factorize(keys)
    prompts = render_rows(rows[~keys.duplicated().to_numpy()], organism.tokenizer, system=system)
    limits = _in_context(organism, prompts, max_new_tokens)
    return Requests(
        prompts,
        asked.astype(np.int64),
        codes,
        limits[asked],
        lambda numbers: uniforms(rows.iloc[numbers], seed, int(limits.max())),
    )


def _neighbours(requests: Requests) -> list[int]:
    """The order in which requests are taken: long prompts first, those that ask the same side by side."""
    lengths = np.array([len(prompt) for prompt in requests.prompts])[requests.asked]
    return [int(number) for number in np.lexsort((requests.conditions, requests.asked, -lengths))]


def _finished(done: Sequence[tuple[int, list[int]]], rows: pd.DataFrame, organism: Organism) -> pd.DataFrame:
    numbers, answers = [number for number, _ in done], [answer for _, answer in done]
    ends = set(end_ids(organism.model, organism.tokenizer))
    return rows.iloc[numbers].assign(
        response=organism.tokenizer.batch_decode(answers, skip_special_tokens=True, clean_up_tokenization_spaces=False),
        finished=[bool(answer) and answer[-1] in ends for answer in answers],
        tokens=[len(answer) for answer in answers],
    )
