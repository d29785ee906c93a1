"""Each answer's own randomness, and picking tokens with it."""

from __future__ import annotations

import hashlib

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad

from .rows import prompt_keys

_BLOCK = 256


def uniforms(rows: pd.DataFrame, seed: int, count: int) -> Float[np.ndarray, "batch token"]:
    """Each row's own stream of uniform numbers, keyed by (seed, prompt, sample, condition)."""
    streams = []
    for prompt, sample, condition in zip(prompt_keys(rows), rows["sample"], rows["condition"], strict=True):
        key = hashlib.blake2b(repr((seed, prompt, int(sample), condition)).encode(), digest_size=16).digest()
        streams.append(np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little"))).random(count))
    return np.stack(streams)


def pick_tokens(
    logits: Float[Tensor, "batch vocab"], draws: Float[Tensor, " batch"], temperature: float
) -> Int[Tensor, " batch"]:
    """Sample by inverting the cumulative distribution at one uniform number per row.

    The vocabulary is summed in blocks: the block is found first, then the token in it, so that sums of many small
    probabilities stay exact in float32 and a large vocabulary is passed over only once.
    """
    if temperature == 0:
        return logits.argmax(-1)
    scaled = logits.float()
    scaled = scaled if temperature == 1 else scaled / temperature
    weights = (scaled - scaled.amax(-1, keepdim=True)).exp_()
    extra = -weights.shape[1] % _BLOCK
    blocks = (pad(weights, (0, extra)) if extra else weights).view(len(weights), -1, _BLOCK)
    ends = blocks.sum(-1).double().cumsum(-1)
    targets = draws.double()[:, None] * ends[:, -1:]
    block = torch.searchsorted(ends, targets, right=True).clamp_max(ends.shape[1] - 1)
    start, end = (pad(ends, (1, 0)).gather(1, block + step) for step in (0, 1))
    inside = blocks[torch.arange(len(blocks), device=blocks.device), block[:, 0]].double().cumsum(-1)
    share = ((targets - start) / (end - start)).clamp_max(1 - 1e-12)  # a block's sum is rounded: never past its end
    place = torch.searchsorted(inside, share * inside[:, -1:], right=True)
    return (block * _BLOCK + place)[:, 0].clamp_max(logits.shape[-1] - 1)
