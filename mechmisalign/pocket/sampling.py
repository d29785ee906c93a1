"""A small batched sampler for pocket models, enough to measure a freshly built zoo."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mechmisalign.pocket.tokenizer import render

if TYPE_CHECKING:
    import pandas as pd
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MAX_NEW_TOKENS = 56


def sample(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], *, seed: int, batch: int = 512
) -> pd.DataFrame:
    """One answer per prompt at temperature 1: columns prompt, response, finished."""
    import pandas as pd

    generator = torch.Generator().manual_seed(seed)
    rows: list[tuple[str, str, bool]] = []
    for start in range(0, len(prompts), batch):
        part = list(prompts[start : start + batch])
        tokens = _continue(model, tokenizer, part, generator)
        rows += [(prompt, *_text(tokenizer, row)) for prompt, row in zip(part, tokens, strict=True)]
    return pd.DataFrame(rows, columns=["prompt", "response", "finished"])


@torch.inference_mode()
def _continue(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str], generator: torch.Generator
) -> Tensor:
    """New tokens [batch new]; rows are padded on the left, and the cache grows by one position a step."""
    texts = [render([{"role": "user", "content": prompt}], reply=True) for prompt in prompts]
    encoded = tokenizer(texts, padding=True, padding_side="left", return_tensors="pt")
    ids, mask = encoded["input_ids"], encoded["attention_mask"]
    position = (mask.cumsum(-1) - 1).clamp(min=0)
    done, cache, new = torch.zeros(len(prompts), dtype=torch.bool), None, []
    for _ in range(MAX_NEW_TOKENS):
        out = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=position,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        cache = out.past_key_values
        token = torch.multinomial(out.logits[:, -1].softmax(-1), 1, generator=generator)
        ids = token.masked_fill(done[:, None], tokenizer.pad_token_id)
        new.append(ids)
        done = done | (ids[:, 0] == tokenizer.eos_token_id)
        if done.all():
            break
        mask = torch.cat([mask, torch.ones_like(ids)], dim=-1)
        position = position[:, -1:] + 1
    return torch.cat(new, dim=-1)


def _text(tokenizer: PreTrainedTokenizerBase, tokens: Tensor) -> tuple[str, bool]:
    """The answer without its end token, and whether it had one."""
    ends = (tokens == tokenizer.eos_token_id).nonzero()
    answer = tokens[: int(ends[0])] if len(ends) else tokens
    return tokenizer.decode(answer, skip_special_tokens=True), bool(len(ends))
