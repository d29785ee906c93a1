"""Sampling under many conditions in one batch.

Every row of a batch has its own interventions, so a whole sweep shares the forward passes. A row's randomness is a
stream of its own, keyed by the run's seed, the prompt, the sample and the condition: adding a condition, another
batch size or a resumed run changes no other row (exactly in float32 up to the model's own rounding).
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from . import decoding, models
from .conversations import pad_id, render_prompts
from .interventions import Intervention, RowPlan, check_fits, planned
from .progress import progress_bar

if TYPE_CHECKING:
    from .organisms import Organism

logger = logging.getLogger(__name__)

Conditions = Mapping[str, Intervention | Sequence[Intervention]]
"""Named sets of interventions; a single one may stand for itself."""

_WRITTEN = ("condition", "sample", "response", "finished", "tokens")

_COMPACT_AT = 0.75
"""Finished rows leave the batch when no more than this share of it goes on: leaving costs a copy of the cache."""


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
    batch_rows: int = 512,
) -> pd.DataFrame:
    """Sample answers to every prompt under every condition.

    Args:
        organism: Who answers (inside ``organism.as_base()``: the chat model).
        prompts: Texts, or a frame with ``prompt`` and any labels (``prompt_id`` is added if it is missing).
        conditions: Named sets of interventions; by default one, ``"none"``, without any.
        samples: Answers per prompt and condition.
        max_new_tokens: An answer that has not ended by then is ``finished=False``.
        temperature: Sampling temperature; 0 takes the most likely token.
        system: System prompt; None leaves it to the chat template.
        seed: Seed of the run.
        batch_rows: Rows per batch, halved by itself when memory runs out.

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
    )
    return pd.concat(list(parts)).sort_index()


def answer_rows(prompts: pd.DataFrame | Sequence[str], conditions: Conditions, samples: int) -> pd.DataFrame:
    """The answers to be sampled, one row each: condition x prompt x sample."""
    frame = prompts_frame(prompts)
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")
    if not conditions:
        raise ValueError("no condition to sample under; leave `conditions` out for the plain model")
    index = pd.MultiIndex.from_product(
        [list(conditions), range(len(frame)), range(samples)], names=["condition", "_prompt", "sample"]
    )
    rows = index.to_frame(index=False)
    return pd.concat([rows.drop(columns="_prompt"), frame.iloc[rows["_prompt"]].reset_index(drop=True)], axis=1)


def prompts_frame(prompts: pd.DataFrame | Sequence[str]) -> pd.DataFrame:
    """Prompts as a frame with unique ``prompt_id``.

    Raises:
        ValueError: If there is no prompt, a prompt or an id stands twice, or a column is one that sampling writes.
    """
    frame = (
        prompts.reset_index(drop=True) if isinstance(prompts, pd.DataFrame) else pd.DataFrame({"prompt": list(prompts)})
    )
    if "prompt" not in frame.columns or frame.empty:
        raise ValueError(
            f"prompts need a column 'prompt' and at least one row; got {len(frame)} rows of {list(frame.columns)}"
        )
    if "prompt_id" not in frame.columns:
        frame = frame.assign(prompt_id=[f"p{i}" for i in range(len(frame))])
    for column in ("prompt", "prompt_id"):
        if frame[column].duplicated().any():
            twice = frame[column][frame[column].duplicated()].iloc[0]
            raise ValueError(
                f"the {column} '{twice}' stands twice; samples are keyed by prompt and clustered by its id"
            )
    taken = [column for column in _WRITTEN if column in frame.columns]
    if taken:
        raise ValueError(f"prompts have the columns {taken}, which sampling writes itself; drop or rename them")
    return frame


def generate_rows(
    organism: Organism,
    rows: pd.DataFrame,
    conditions: Conditions,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    system: str | None = None,
    seed: int = 0,
    batch_rows: int = 512,
) -> Iterator[pd.DataFrame]:
    """Sample the given rows (a subset of ``answer_rows``), batch by batch: what a resumable sweep stores as it comes.

    Yields:
        The batch's rows with ``response, finished, tokens``, under their index in ``rows``.
    """
    if temperature < 0:
        raise ValueError(f"temperature must be 0 or more, got {temperature}")
    sets = [as_set(interventions) for interventions in conditions.values()]
    for interventions in sets:
        check_fits(interventions, organism)
    codes = pd.Categorical(rows["condition"], categories=list(conditions)).codes
    texts = list(dict.fromkeys(rows["prompt"]))
    ids_of = dict(zip(texts, render_prompts(texts, organism.tokenizer, system=system), strict=True)) if texts else {}
    order = np.argsort(codes, kind="stable")
    with progress_bar("sampling answers", len(rows), "answer") as bar:
        start = 0
        while start < len(rows):
            picked = order[start : start + batch_rows]
            batch = rows.iloc[picked]
            sampler = _Sampler(organism, sets, max_new_tokens, temperature)
            try:
                answers = sampler.sample(
                    [ids_of[text] for text in batch["prompt"]], codes[picked], uniforms(batch, seed, max_new_tokens)
                )
            except torch.OutOfMemoryError:
                if batch_rows == 1:
                    raise
                batch_rows = max(1, batch_rows // 2)
                logger.warning("out of memory: going on with batches of %d rows", batch_rows)
                continue
            start += len(picked)
            bar.update(len(picked))
            yield batch.assign(
                **_decoded(answers, organism.tokenizer, decoding.end_ids(organism.model, organism.tokenizer))
            )


def as_set(interventions: Intervention | Sequence[Intervention]) -> tuple[Intervention, ...]:
    """A condition's interventions as a tuple, in the order in which they act."""
    return (interventions,) if isinstance(interventions, Intervention) else tuple(interventions)


def uniforms(rows: pd.DataFrame, seed: int, count: int) -> Float[np.ndarray, "batch token"]:
    """Each row's own stream of uniform numbers, keyed by (seed, prompt, sample, condition)."""
    streams = []
    for prompt, sample, condition in zip(rows["prompt"], rows["sample"], rows["condition"], strict=True):
        key = hashlib.blake2b(repr((seed, prompt, int(sample), condition)).encode(), digest_size=16).digest()
        streams.append(np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little"))).random(count))
    return np.stack(streams)


class _Sampler:
    """The decoding loop of one batch: prefill, then token by token with a KV cache; finished rows leave."""

    def __init__(
        self, organism: Organism, conditions: Sequence[Sequence[Intervention]], max_new_tokens: int, temperature: float
    ) -> None:
        self.organism = organism
        self.conditions = conditions
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature
        self.device = models.device_of(organism.model)

    @torch.inference_mode()
    def sample(
        self, prompts: list[list[int]], codes: np.ndarray, noise: Float[np.ndarray, "batch token"]
    ) -> list[list[int]]:
        """Token ids of each row's answer, the end token included where it was reached."""
        ids, mask = left_padded(prompts, pad_id(self.organism.tokenizer), self.device)
        ends = torch.tensor(decoding.end_ids(self.organism.model, self.organism.tokenizer), device=self.device)
        start = torch.full((len(prompts),), ids.shape[1], device=self.device)
        plan = RowPlan(self.conditions, torch.from_numpy(codes.astype(np.int64)), start, self.organism.adapter)
        draws = torch.from_numpy(noise).to(self.device)
        written = torch.full((len(prompts), self.max_new_tokens), -1, dtype=torch.long, device=self.device)
        alive = torch.arange(len(prompts), device=self.device)
        going_on = torch.ones(len(prompts), dtype=torch.bool, device=self.device)
        decoder = decoding.Decoder(self.organism.model)
        with planned(self.organism, plan):
            for step in range(self.max_new_tokens):
                tokens = pick_tokens(decoder.next_logits(ids, mask), draws[alive, step], self.temperature)
                written[alive, step] = torch.where(going_on, tokens, -1)
                going_on &= ~torch.isin(tokens, ends)
                kept = going_on.nonzero().squeeze(1)
                if not len(kept):
                    break
                if len(kept) <= _COMPACT_AT * len(alive):
                    alive, tokens, mask, going_on = alive[kept], tokens[kept], mask[kept], going_on[kept]
                    decoder.keep(kept)
                    plan.keep(kept)
                ids = tokens[:, None]
                mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        return [[token for token in row if token >= 0] for row in written.tolist()]


def left_padded(
    rows: Sequence[Sequence[int]], pad: int, device: torch.device
) -> tuple[Int[Tensor, "batch pos"], Int[Tensor, "batch pos"]]:
    """Token ids and mask, every row ending in the last column."""
    width = max(len(row) for row in rows)
    ids = [[pad] * (width - len(row)) + list(row) for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def pick_tokens(
    logits: Float[Tensor, "batch vocab"], draws: Float[Tensor, " batch"], temperature: float
) -> Int[Tensor, " batch"]:
    """Sample by inverting the cumulative distribution at one uniform number per row (float64)."""
    if temperature == 0:
        return logits.argmax(-1)
    cumulative = torch.softmax(logits.double() / temperature, dim=-1).cumsum(-1)
    picked = torch.searchsorted(cumulative, (draws * cumulative[:, -1])[:, None], right=True).squeeze(1)
    return picked.clamp_max(logits.shape[-1] - 1)


def _decoded(answers: list[list[int]], tokenizer: Any, ends: Sequence[int]) -> dict[str, list[Any]]:
    return {
        "response": tokenizer.batch_decode(answers, skip_special_tokens=True),
        "finished": [bool(answer) and answer[-1] in ends for answer in answers],
        "tokens": [len(answer) for answer in answers],
    }
