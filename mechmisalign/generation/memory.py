"""How many answers fit into memory at once."""

from __future__ import annotations

import torch

from mechmisalign import models

MOST_ROWS = {"cpu": 512, "cuda": 4096}
"""More rows gain nothing: on a CPU they fall out of its caches, on a GPU it is busy long before."""

_SHARE = {"cpu": 0.25, "cuda": 0.6}
"""Of the free memory; the rest is for the forward pass itself, and other people's programs."""


def rows_that_fit(model: models.Model, length: int) -> int:
    """How many conversations of so many tokens can be decoded at once: keys and values, and the logits' copies.

    Keys and values are counted twice in one layer, which is what a change of rows costs.
    """
    device = models.device_of(model)
    item = next(model.parameters()).element_size()
    layers = models.n_layers(model)
    token = 2 * models.key_value_width(model) * item * (layers + 1)
    row = length * token + models.vocabulary(model) * (item + 3 * 4)
    share = _SHARE.get(device.type, 0.25)
    return max(1, min(MOST_ROWS.get(device.type, 512), int(share * _free_bytes(device)) // row))


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    import psutil

    return int(psutil.virtual_memory().available)
