"""Each answer's own randomness, and picking tokens with it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad

from .rows import prompt_keys

NOT_FINITE = -1
"""Picked where logits are NaN or infinite: no token."""

_BLOCK = 256
_LIKELY = 1e-3
"""Of the likeliest token's probability: from there on a token is likely."""


def uniforms(rows: pd.DataFrame, seed: int, count: int) -> Float[np.ndarray, "batch token"]:
    """Each row's own stream of uniform numbers, keyed by (seed, prompt, sample, condition)."""
    streams = []
    for prompt, sample, condition in zip(prompt_keys(rows), rows["sample"], rows["condition"], strict=True):
        identity = repr((int(seed), str(prompt), int(sample), str(condition)))
        key = hashlib.blake2b(identity.encode(), digest_size=16).digest()
        streams.append(np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little"))).random(count))
    return np.stack(streams)


def stage_seed(seed: int, stage: str) -> int:
    """A seed of its own for each stage: what a search selected is confirmed on samples that it never saw."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{stage}".encode(), digest_size=6).digest(), "big")


def pick_tokens(
    logits: Float[Tensor, "batch vocab"], draws: Float[Tensor, " batch"], temperature: float
) -> Int[Tensor, " batch"]:
    """Sample by inverting the cumulative distribution at one uniform number per row.

    Likely tokens come first in it, then the others. So what the rounding of the logits moves about the boundaries of
    likely tokens does not reach the thousands of narrow intervals of the unlikely ones, and a row that is computed in
    another batch picks the same token. The vocabulary is summed in blocks: the block is found first, then the token.
    Where no logit is a finite maximum (NaN, overflow), ``NOT_FINITE`` is picked.
    """
    top = logits.amax(-1, keepdim=True).float()
    sound = top.isfinite()[:, 0]
    if temperature == 0:
        return torch.where(sound, logits.argmax(-1), NOT_FINITE)
    weights = (logits.float() - top).div_(temperature).exp_()
    extra = -weights.shape[1] % _BLOCK
    weights = pad(weights, (0, extra)) if extra else weights
    likely = torch.where(weights >= _LIKELY, weights, 0.0)
    halves = [half.view(len(half), -1, _BLOCK) for half in (likely, weights.sub_(likely))]
    ends = [half.sum(-1).double().cumsum(-1) for half in halves]
    before = ends[0][:, -1:]
    target = draws.double()[:, None] * (before + ends[1][:, -1:])
    rare = target >= before
    place = _inverted(
        torch.where(rare, ends[1], ends[0]),
        torch.where(rare, target - before, target),
        lambda rows, block: torch.where(rare, halves[1][rows, block], halves[0][rows, block]),
    )
    return torch.where(sound, place.clamp_max(logits.shape[-1] - 1), NOT_FINITE)


def _inverted(
    ends: Float[Tensor, "batch block"],
    target: Float[Tensor, "batch 1"],
    weights_of: Callable[[Tensor, Tensor], Float[Tensor, "batch width"]],
) -> Int[Tensor, " batch"]:
    """The place at which the cumulative weights pass the target, by the blocks' ends and the weights in one block."""
    block = torch.searchsorted(ends, target, right=True).clamp_max(ends.shape[1] - 1)
    start, end = (pad(ends, (1, 0)).gather(1, block + step) for step in (0, 1))
    inside = weights_of(torch.arange(len(ends), device=ends.device), block[:, 0]).double().cumsum(-1)
    share = ((target - start) / (end - start)).clamp_max(1 - 1e-12)  # sums are rounded: never past the block's end
    place = torch.searchsorted(inside, share * inside[:, -1:], right=True)
    return (block * _BLOCK + place)[:, 0]
