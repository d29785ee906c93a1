"""Token-by-token decoding with a model's own KV cache."""

from __future__ import annotations

from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

from . import _hooked, models


def end_ids(model: models.Model, tokenizer: Any) -> list[int]:
    """Every token id that ends an answer: the generation config's, and the tokenizer's own."""
    config = getattr(model if models.is_hooked(model) else models.hf_model(model), "generation_config", None)
    ends = getattr(config, "eos_token_id", None)
    named = ends if isinstance(ends, list) else [ends]
    return sorted({int(end) for end in [*named, tokenizer.eos_token_id] if end is not None})


class Decoder:
    """Token-by-token decoding with the model's own KV cache; rows may leave on the way.

    Args:
        model: A TransformerLens model.
    """

    def __init__(self, model: models.Model) -> None:
        self._model = model
        self._cache: Any = None

    def next_logits(
        self, ids: Int[Tensor, "batch new"], mask: Int[Tensor, "batch pos"]
    ) -> Float[Tensor, "batch vocab"]:
        """Logits after the last of the new tokens; ``mask`` covers everything so far (left padding is 0)."""
        if models.is_hooked(self._model):
            logits, self._cache = _hooked.next_logits(self._model, ids, mask, self._cache)
            return logits
        positions = (mask.cumsum(-1) - 1).clamp_min(0)[:, -ids.shape[1] :]
        output = models.hf_model(self._model)(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self._cache = output.past_key_values
        return output.logits[:, -1]

    def keep(self, rows: Int[Tensor, " kept"]) -> None:
        """Go on with these rows only."""
        if models.is_hooked(self._model):
            _hooked.keep(self._cache, rows)
        else:
            self._cache.batch_select_indices(rows)
