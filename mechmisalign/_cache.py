"""A KV cache with room: a new token is written into it, instead of copying the whole cache for every token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

_ROOM = 32
"""Columns that are added when the room is used up: the copy is then a thirty-second of one for each token."""


class RoomyLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values of one layer ``[row head pos d]``, views of buffers that are longer than what they hold.

    Args:
        keys: Buffer of the keys.
        values: Buffer of the values.
        length: Columns that are filled.
    """

    def __init__(self, keys: Tensor, values: Tensor, length: int) -> None:
        super().__init__()
        self.dtype, self.device = keys.dtype, keys.device
        self._buffers = (keys, values)
        self._show(length)
        self.is_initialized = True

    @staticmethod
    def with_room(like: Tensor, rows: int, length: int) -> Tensor:
        """A buffer for so many rows and columns, and some more of these; what is in it has still to be written."""
        return like.new_empty(rows, like.shape[1], length + _ROOM, like.shape[3])

    def update(self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the new columns behind those that are there."""
        start = self.keys.shape[2]
        end = start + key_states.shape[2]
        if end > self._buffers[0].shape[2]:
            self._buffers = self._longer(self.keys, end), self._longer(self.values, end)
        for buffer, new in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, start:end] = new
        self._show(end)
        return self.keys, self.values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep these rows; one that is named twice is there twice."""
        length, rows = self.keys.shape[2], beam_idx.to(self.keys.device)
        self._buffers = self._buffers[0][rows], self._buffers[1][rows]
        self._show(length)

    def batch_select_indices(self, indices: Tensor) -> None:
        """The same."""
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row so many times, side by side."""
        self.reorder_cache(torch.arange(len(self.keys), device=self.device).repeat_interleave(repeats))

    def release(self) -> None:
        """Give the memory back; the layer is used up."""
        self.keys = self.values = torch.empty(0, device=self.device)
        self._buffers = self.keys, self.values

    def _show(self, length: int) -> None:
        self.keys, self.values = (buffer[:, :, :length] for buffer in self._buffers)

    def _longer(self, held: Tensor, length: int) -> Tensor:
        buffer = self.with_room(held, len(held), length)
        buffer[:, :, : held.shape[2]] = held
        return buffer
