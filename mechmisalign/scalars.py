"""What an adapter's sites read: ``A x`` at every token, in one forward pass.

Each hook multiplies a matrix's input with the few rows of A at once, so no activation of width ``d_mlp`` is kept; the
pass ends behind the last adapted block. Merged and live weights, bridge and ``HookedTransformer`` give the same
numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from . import models
from .activations import in_memory
from .conversations import Batch, Conversations, Span
from .decomposition import Contributions
from .progress import progress

if TYPE_CHECKING:
    from .adapters import LoraSite, SiteKey
    from .directions import Direction
    from .organisms import Organism

_SHARED_INPUTS = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "gate_up", "up_proj": "gate_up"}
"""Matrices that read the very same activation: one hook serves them all."""


def lora_scalars(
    organism: Organism,
    conversations: Conversations,
    *,
    span: Span = "response",
    sites: Sequence[SiteKey] | None = None,
    token_budget: int = 2048,
) -> pd.DataFrame:
    """Scalars ``A x`` of every site at every token of the span (2506.11618, section 4.1).

    Rank-1 sites give ``A x`` as trained; for higher ranks the coordinates are those of the SVD gauge
    (:attr:`LoraSite.gauged`), so that equal adapters give equal numbers. Inside ``organism.as_base()`` they are what
    the sites would read in the chat model.

    Args:
        organism: The model to read.
        conversations: What it reads.
        span: ``"response"``, ``"prompt"``, ``"template"`` or ``"all"``.
        sites: ``(layer, module)`` of the sites; None for all.
        token_budget: Tokens per batch, padding included.

    Returns:
        One row per token (index ``conversation, position``, as ``conversations.tokens(span)``), one float32 column per
        coordinate: ``"3.down_proj"``, or ``"3.down_proj[0]"`` … where the rank is more than one.

    Raises:
        KeyError: If the adapter has no such site.
    """
    chosen = organism.require_adapter("reading scalars").select(sites)
    last = max(site.layer for site in chosen)
    readers = scalar_readers(organism.model, chosen)
    table = read_tokens(organism, conversations, readers, span=span, last_layer=last, token_budget=token_budget)
    return _in_order(table, chosen)


def contributions(
    organism: Organism,
    conversations: Conversations,
    direction: Direction | None = None,
    *,
    span: Span = "response",
    sites: Sequence[SiteKey] | None = None,
    token_budget: int = 2048,
) -> Contributions:
    """What every site writes at every token of the span: exactly ``scaling · B (A x)``.

    Args:
        organism: The model to read, with its adapter in.
        conversations: What it reads.
        direction: What contributions are projected on and compared with, layer by layer.
        span: ``"response"``, ``"prompt"``, ``"template"`` or ``"all"``.
        sites: ``(layer, module)`` of the sites; None for all.
        token_budget: Tokens per batch, padding included.

    Raises:
        ValueError: Inside ``as_base()``, where the sites write nothing; or if a direction is given although a norm
        stands
            between the sites and the residual stream.
        DirectionMismatchError: If the direction belongs to another model.
    """
    if organism.is_base:
        raise ValueError("inside as_base() the adapter writes nothing; ask for contributions outside the block")
    residual = not models.has_post_norms(organism.model)
    if direction is not None:
        direction.check_model(organism.provenance, models.d_model(organism.model), models.n_layers(organism.model))
        if not residual:
            raise ValueError(
                "in this model a norm stands between the sites and the residual stream, so a contribution has no exact "
                "projection on a residual direction; leave direction= out"
            )
    chosen = organism.require_adapter("contributions of sites").select(sites)
    layers = sorted({site.layer for site in chosen})
    readers = [*scalar_readers(organism.model, chosen), *(resid_reader(layer, _norm) for layer in layers)]
    table = read_tokens(organism, conversations, readers, span=span, last_layer=layers[-1], token_budget=token_budget)
    return Contributions(_in_order(table, chosen), chosen, table[layers], direction, residual)


def _in_order(table: pd.DataFrame, sites: Sequence[LoraSite]) -> pd.DataFrame:
    """The columns of the sites, in the adapter's order (untouched where they stand so)."""
    names = [name for site in sites for name in site.coordinates]
    ordered = table if list(table.columns) == names else table[names]
    return ordered.rename_axis(columns="site")


@dataclass(frozen=True)
class Reader:
    """One hook of a pass, and what it makes of each token.

    Attributes:
        port: Where the activation passes.
        measure: From rows of the activation, ``[token width]`` in float32, to ``[token column]``.
        names: The columns that it fills.
    """

    port: models.Port
    measure: Callable[[Tensor], Tensor]
    names: tuple[str | int, ...]


def read_tokens(
    organism: Organism,
    conversations: Conversations,
    readers: Sequence[Reader],
    *,
    span: Span,
    last_layer: int,
    token_budget: int,
) -> pd.DataFrame:
    """What readers make of every token of the span, in one pass that ends behind ``last_layer``: a column per name."""
    index = conversations.tokens(span).index
    first_row = np.searchsorted(index.get_level_values("conversation"), np.arange(len(conversations)))
    names = [name for reader in readers for name in reader.names]
    table = np.empty((len(index), len(names)), dtype=np.float32)

    def compute(batch: Batch) -> Tensor:
        return _pass(organism.model, batch, readers, len(names), last_layer)

    for batch in progress(conversations.batches(span, token_budget=token_budget), "reading tokens"):
        for part, values in in_memory(batch, compute):
            counts = part.span.sum(1).numpy()
            within = np.concatenate([np.arange(count) for count in counts])
            table[np.repeat(first_row[part.rows], counts) + within] = values.numpy()
    return pd.DataFrame(table, index=index, columns=names, copy=False)


def scalar_readers(model: Any, sites: Sequence[LoraSite]) -> list[Reader]:
    """Readers of every site's scalars: one for each activation that sites read, with the rows of A stacked."""
    groups: dict[tuple[int, str], list[LoraSite]] = {}
    for site in sites:
        groups.setdefault((site.layer, _SHARED_INPUTS.get(site.module, site.name)), []).append(site)
    readers = []
    for group in groups.values():
        port, _ = models.site_ports(model, group[0].name, group[0].layer)
        A = torch.cat([site.gauged.A for site in group]).T
        readers.append(Reader(port, _times(A), tuple(name for site in group for name in site.coordinates)))
    return readers


def resid_reader(layer: int, measure: Callable[[Tensor], Tensor]) -> Reader:
    """A reader of the residual stream behind a block; ``measure`` gives one number per token, named by the layer."""
    return Reader(models.Port(models.RESID_POST.format(layer=layer)), lambda x: measure(x).unsqueeze(1), (layer,))


def _times(matrix: Float[Tensor, "d_in coordinate"]) -> Callable[[Tensor], Tensor]:
    return lambda x: x @ matrix.to(x.device)


def _norm(x: Float[Tensor, "token d_model"]) -> Float[Tensor, " token"]:
    return torch.linalg.vector_norm(x, dim=-1)


@torch.inference_mode()
def _pass(
    model: Any, batch: Batch, readers: Sequence[Reader], width: int, last_layer: int
) -> Float[Tensor, "token column"]:
    device = models.device_of(model)
    chosen = batch.span.flatten().nonzero().squeeze(1)
    everything = len(chosen) == batch.span.numel()
    table = torch.empty(len(chosen), width, dtype=torch.float32, device="cpu")
    functions: dict[str, models.HookFunction] = {}
    start = 0
    for reader in readers:
        columns = slice(start, start := start + len(reader.names))

        def read(activation: Tensor, reader: Reader = reader, columns: slice = columns) -> None:
            rows = reader.port.flat(activation).flatten(0, 1)
            spoken = rows if everything else rows[chosen.to(rows.device)]
            table[:, columns] = reader.measure(spoken.float()).cpu()

        functions[reader.port.name] = read
    with models.hooks(model, functions):
        models.run_until(model, batch.ids.to(device), batch.mask.to(device), {last_layer: lambda _resid: None})
    return table
