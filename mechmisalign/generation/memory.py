"""How many answers fit into memory at once."""

from __future__ import annotations

from collections import Counter

from mechmisalign import models
from mechmisalign._placement import free_bytes

MOST_ROWS = {"cpu": 512, "cuda": 4096}
"""More rows gain nothing: on a CPU they fall out of its caches, on a GPU it is busy long before."""

_SHARE = {"cpu": 0.25, "cuda": 0.6}
"""Of the free memory; the rest is for the forward pass itself, and other people's programs."""


def rows_that_fit(model: models.Model, length: int) -> int:
    """How many conversations of so many tokens can be decoded at once: keys and values, and the logits' copies.

    Keys and values are counted twice in one layer, which is what a change of rows costs. Where blocks are on several
    devices, each holds its own layers' keys and values, and the fullest one decides.
    """
    item = next(model.parameters()).element_size()
    token = 2 * models.key_value_width(model) * item
    logits = models.vocabulary(model) * (item + 3 * 4)
    layers = Counter(models.device_of_layer(model, layer) for layer in range(models.n_layers(model)))
    first = models.device_of(model)  # logits come back to where the ids were
    fits = []
    for device in {first, *layers}:
        row = length * token * (layers[device] + 1) + (logits if device == first else 0)
        free = int(_SHARE.get(device.type, 0.25) * free_bytes(device))
        fits.append(min(MOST_ROWS.get(device.type, 512), free // row))
    return max(1, min(fits))
