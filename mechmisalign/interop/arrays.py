"""Activations as numpy arrays, with a frame that says what each row is: for tools that want rows, not moments.

Where means are enough, ``mm.collect`` needs no such array. Here each token of a span (or the mean of each
conversation's) is a row; the array is filled batch by batch, in memory or straight in a ``.npy`` file that is mapped,
not loaded. How large it becomes is known before anything is read, and refused where it does not fit.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from mechmisalign import models
from mechmisalign._placement import free_bytes
from mechmisalign._reading import read_object
from mechmisalign._tables import read_parquet, write_parquet
from mechmisalign.activations import checked_layers, header_of, in_memory
from mechmisalign.conversations import Batch, Conversations, Span
from mechmisalign.correction.saving import refuse_taken, whole_folder
from mechmisalign.progress import progress

if TYPE_CHECKING:
    from mechmisalign.organisms import Organism

Per = Literal["token", "conversation"]
Precision = Literal["float32", "float16"]

VALUES_FILE, ROWS_FILE, HEADER_FILE = "values.npy", "rows.parquet", "header.json"

_ROOM = 0.8
"""Share of the free memory that an array may take."""


@dataclass(frozen=True, eq=False)
class Activations:
    """Rows of the residual stream.

    Attributes:
        values: ``[row layer d_model]``; mapped from a file if it was written to one.
        rows: One row for each of them. Of tokens: index ``conversation, position``, columns ``token_id, token`` and the
            conversations' labels. Of conversations: ``tokens`` (how many were averaged) and the labels.
        layers: The layer of each place on the second axis; layer ``i`` is the residual stream after block ``i``.
        header: Where the numbers come from: model, adapter, span, template, data, versions.
    """

    values: np.ndarray
    rows: pd.DataFrame
    layers: tuple[int, ...]
    header: Mapping[str, Any]

    def at(self, layer: int) -> np.ndarray:
        """The rows of one layer, ``[row d_model]``, as a view.

        Raises:
            ValueError: If it was not read.
        """
        if layer not in self.layers:
            raise ValueError(f"layer {layer} was not read; there is {list(self.layers)}")
        found: np.ndarray = self.values[:, self.layers.index(layer)]
        return found

    @staticmethod
    def load(folder: str | Path) -> Activations:
        """What :func:`activations` wrote to a folder; the array is mapped, not read.

        Raises:
            FileNotFoundError: If the folder does not hold it.
        """
        place = Path(folder)
        header = read_object(place / HEADER_FILE)
        values = np.load(place / VALUES_FILE, mmap_mode="r", allow_pickle=False)
        return Activations(values, read_parquet(place / ROWS_FILE), tuple(header.pop("layers")), header)


def activations(
    organism: Organism,
    conversations: Conversations,
    *,
    span: Span = "response",
    per: Per = "token",
    layers: Sequence[int] | None = None,
    first: int | None = None,
    out: str | Path | None = None,
    dtype: Precision = "float32",
    token_budget: int = 2048,
) -> Activations:
    """The residual stream over one span of every conversation, row by row.

    Args:
        organism: The model to read (inside ``organism.as_base()`` it is the chat model).
        conversations: What it reads; rows come in their order.
        span: ``"response"``, ``"prompt"``, ``"template"`` or ``"all"``.
        per: ``"token"``, or ``"conversation"``: the mean over the span's tokens.
        layers: Layers to read; all by default.
        first: Only the first so many tokens of the span.
        out: A new folder for the array, its rows and its header; without, the array is in memory.
        dtype: Of the array. In ``"float16"`` values beyond 65504 are refused, not clipped.
        token_budget: Tokens per batch, padding included; halved by itself when memory runs out.

    Raises:
        ValueError: On unknown options or layers, or values that float16 cannot hold.
        MemoryError: If the array would not fit in memory, or on the disk; says how large it is.
        FolderTakenError: If the folder holds something.

    Example:
        >>> read = activations(organism, conversations, layers=[24], out="runs/layer-24")  # doctest: +SKIP
        >>> read.at(24).shape, read.rows["label"].value_counts()  # doctest: +SKIP
    """
    for name, value, known in (("per", per, get_args(Per)), ("dtype", dtype, get_args(Precision))):
        if value not in known:
            raise ValueError(f"{name} must be one of {known}, got {value!r}")
    chosen = checked_layers(layers, models.n_layers(organism.model))
    rows, counts = _rows(conversations, span, per, first)
    shape = (len(rows), len(chosen), models.d_model(organism.model))
    header = {**header_of(organism, conversations, span, first), "per": per}
    if out is not None:
        refuse_taken(Path(out))
    _refuse_too_large(shape, dtype, out)
    with ExitStack() as stack:
        values: Any
        if out is None:
            values = np.empty(shape, dtype)
        else:
            place = stack.enter_context(whole_folder(Path(out)))
            values = np.lib.format.open_memmap(place / VALUES_FILE, mode="w+", dtype=dtype, shape=shape)
        starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
        for batch in progress(
            conversations.batches(span, token_budget=token_budget, first=first), "reading activations"
        ):
            for _ in in_memory(batch, lambda part: _fill(values, organism.model, part, chosen, per, starts)):
                pass
        if out is not None:
            values.flush()
            write_parquet(rows, place / ROWS_FILE)
            (place / HEADER_FILE).write_text(json.dumps({**header, "layers": list(chosen)}, indent=2) + "\n")
    return Activations(values, rows, chosen, header) if out is None else Activations.load(out)


def _rows(conversations: Conversations, span: Span, per: Per, first: int | None) -> tuple[pd.DataFrame, np.ndarray]:
    """The frame of rows, and how many tokens each conversation has.

    Raises:
        ValueError: If a conversation has no token in the span.
    """
    tokens = conversations.tokens(span)
    if first is not None:
        tokens = tokens[tokens.groupby(level="conversation").cumcount() < first]
    of = tokens.index.get_level_values("conversation").to_numpy(np.int64)
    counts = np.bincount(of, minlength=len(conversations))
    if per == "token":
        return tokens, counts
    if (counts == 0).any():
        raise ValueError(
            f"{int((counts == 0).sum())} conversation(s) have no token of the span {span!r}; drop those rows"
        )
    labels = conversations.frame.drop(columns=["prompt", "response", "system", "history"], errors="ignore")
    return labels.assign(tokens=counts), counts


@torch.inference_mode()
def _fill(values: np.ndarray, model: Any, batch: Batch, layers: tuple[int, ...], per: Per, starts: np.ndarray) -> None:
    """Write one batch's rows to their places; doing it twice changes nothing."""
    device = models.device_of(model)
    marked = batch.span.bool()
    counts = marked.sum(1)
    within = (marked.cumsum(1) - 1)[marked].numpy()
    places = np.repeat(starts[batch.rows], counts.numpy()) + within if per == "token" else np.asarray(batch.rows)

    def reader(column: int) -> models.HookFunction:
        def read(resid: Tensor) -> None:
            here = marked.to(resid.device)
            if per == "token":
                found = resid[here].float()
            else:
                weights = here.unsqueeze(-1)
                found = (resid.float() * weights).sum(1) / counts.to(resid.device)[:, None]
            with np.errstate(over="ignore"):
                stored = found.cpu().numpy().astype(values.dtype)
            if not np.isfinite(stored).all():
                raise ValueError(
                    f"layer {layers[column]} has values that {values.dtype} cannot hold; use dtype='float32'"
                )
            values[places, column] = stored

        return read

    readers = {layer: reader(column) for column, layer in enumerate(layers)}
    models.run_until(model, batch.ids.to(device), batch.mask.to(device), readers)


def _refuse_too_large(shape: tuple[int, ...], dtype: str, out: str | Path | None) -> None:
    """Refuse an array that will not fit, before anything is read.

    Raises:
        MemoryError: Naming its size, and what is free.
    """
    size = math.prod(shape) * np.dtype(dtype).itemsize
    told = f"the array {list(shape)} of {dtype} takes {size / 2**30:.1f} GiB"
    remedy = "read fewer layers, the first tokens only (first=), or per='conversation'"
    if out is None:
        free = free_bytes(torch.device("cpu"))
        if size > _ROOM * free:
            raise MemoryError(
                f"{told}, {free / 2**30:.1f} GiB of memory are free; write it to a folder (out=), {remedy}"
            )
        return
    parent = next(each for each in Path(out).absolute().parents if each.exists())
    free = shutil.disk_usage(parent).free
    if size > free:
        raise MemoryError(f"{told}, {parent} has {free / 2**30:.1f} GiB; {remedy}")
