"""Token-by-token decoding with a model's own KV cache, and moving rows between caches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from . import _hooked, models
from ._encoding import control_tokens
from ._rendering import end_of_turn


def end_ids(model: models.Model, tokenizer: Any) -> list[int]:
    """Every token id that ends an answer: the generation config's, the tokenizer's own, and the template's end of turn.

    A chat fine-tune of a plain model may keep ``<|endoftext|>`` as its end while its template ends turns otherwise.
    """
    config = getattr(model if models.is_hooked(model) else models.hf_model(model), "generation_config", None)
    ends = getattr(config, "eos_token_id", None)
    named = ends if isinstance(ends, (list, tuple)) else [ends]
    return sorted({int(end) for end in [*named, tokenizer.eos_token_id, turn_end_id(tokenizer)] if end is not None})


def turn_end_id(tokenizer: Any) -> int | None:
    """The control token that the chat template writes behind an answer; None if it writes none."""
    control = control_tokens(tokenizer)
    behind = tokenizer(end_of_turn(tokenizer), add_special_tokens=False)["input_ids"]
    return next((int(each) for each in behind if each in control), None)


def left_padded(
    rows: Sequence[Sequence[int]], pad: int, device: torch.device
) -> tuple[Int[Tensor, "batch pos"], Int[Tensor, "batch pos"]]:
    """Token ids and mask, every row ending in the last column."""
    width = max(len(row) for row in rows)
    ids = [[pad] * (width - len(row)) + list(row) for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


class Decoder:
    """Token-by-token decoding with the model's own KV cache; rows may leave, be repeated, or join other batches.

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
        logits, self._cache = models.cached_forward(self._model, ids, mask, self._cache)
        return logits

    @property
    def rows(self) -> int:
        """Rows of the cache."""
        return len(self._cache.layers[0].keys)

    def keep(self, rows: Int[Tensor, " kept"]) -> None:
        """Go on with these rows only; a row that is named twice goes on twice."""
        if models.is_hooked(self._model):
            _hooked.keep(self._cache, rows)
        else:
            self._cache.reorder_cache(rows)  # every kind of layer has it, linear attention too

    def replace(self, parts: Sequence[Part], width: int) -> None:
        """Overwrite rows of a joined decoder with those of others, in place, aligned with its last column.

        Args:
            parts: Rows of other decoders, none longer than ``width``, and the rows that they overwrite.
            width: Columns of this decoder.
        """
        for index, layer in enumerate(self._cache.layers):
            for part in parts:
                other = part.decoder._cache.layers[index]
                _copy_rows(other, part, layer.keys, layer.values, width)
                _release(other)

    @classmethod
    def joined(cls, parts: Sequence[Part], rows: int, width: int) -> Decoder:
        """One decoder over rows of several, each kept to its last ``width`` columns, padded on the left.

        Args:
            parts: Rows of decoders and their places in the new batch; every place is taken once.
            rows: Rows of the new batch.
            width: Columns of the new batch.
        """
        from transformers.cache_utils import DynamicCache

        from ._cache import RoomyLayer

        joint = cls(parts[0].decoder._model)
        joint._cache = DynamicCache()
        for index in range(models.n_layers(joint._model)):
            layers = [part.decoder._cache.layers[index] for part in parts]
            keys, values = (RoomyLayer.with_room(layers[0].keys, rows, width) for _ in range(2))
            for layer, part in zip(layers, parts, strict=True):
                _copy_rows(layer, part, keys, values, width)
                _release(layer)  # layer by layer, so that never two whole caches are held
            joint._cache.layers.append(RoomyLayer(keys, values, width))
        return joint


@dataclass(frozen=True)
class Part:
    """Rows of a decoder on their way into another batch.

    Attributes:
        decoder: Where they are; it is used up.
        source: Their rows there; one may be taken several times.
        target: Their rows in the new batch.
    """

    decoder: Decoder
    source: Int[Tensor, " row"]
    target: Int[Tensor, " row"]


def joinable(model: models.Model) -> bool:
    """Whether rows of several caches can be joined: plain keys and values in every layer, no sliding windows."""
    if models.is_hooked(model):
        return False
    from transformers.cache_utils import DynamicCache, DynamicLayer

    layers = DynamicCache(config=models.hf_model(model).config).layers
    return bool(layers) and all(type(layer) is DynamicLayer for layer in layers)


def _copy_rows(layer: Any, part: Part, keys: Tensor, values: Tensor, width: int) -> None:
    """A part's last columns at the right end of the first ``width``; zeros before them, since masked is not unread."""
    kept = min(width, layer.keys.shape[2])
    source, target = (rows.to(keys.device) for rows in (part.source, part.target))
    for old, new in ((layer.keys, keys), (layer.values, values)):
        new[target, :, width - kept : width] = old[:, :, old.shape[2] - kept :][source]
        new[target, :, : width - kept] = 0.0


def _release(layer: Any) -> None:
    if hasattr(layer, "release"):
        layer.release()
    else:
        layer.keys, layer.values = layer.keys[:0].clone(), layer.values[:0].clone()
