"""What vectors say in words: readouts through the unembedding, and direct logit attribution of an adapter's sites.

Both go through TransformerLens's ``logit_readout``. A readout treats a vector as if it were the whole residual stream,
so it shows which tokens a vector promotes, in both signs. Direct logit attribution freezes the final norm at what it
was for each token, so that the attributions of all writers would sum to the logit difference.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from . import models
from ._context import refuse_beyond
from .adapters import Adapter
from .conversations import Conversations, Span
from .directions import Direction
from .loading.wrappers import text_config
from .scalars import read_tokens, resid_reader, scalar_readers

if TYPE_CHECKING:
    from .organisms import Organism

Tokens = str | int | Sequence[str | int]
"""One token or several, as text (each exactly one token) or id."""
_SAME = 1e-4
"""Largest difference from the model's own logits, as a share of the largest, in float32."""


def readout(organism: Organism, vectors: Mapping[str, Tensor], *, top: int = 10) -> pd.DataFrame:
    """The tokens that vectors promote most, and those that their negatives do.

    Args:
        organism: Whose final norm and unembedding are used.
        vectors: Named vectors of width ``d_model``: see :func:`written_vectors` and :func:`direction_vectors`.
        top: Tokens for each vector and sign.

    Returns:
        ``name, sign ("+" or "-"), rank (from 1), token, token_id, logit``.

    Raises:
        ValueError: If there is no vector, or a vector is zero or of another width.
    """
    width = models.d_model(organism.model)
    wrong = [name for name, vector in vectors.items() if vector.shape != (width,) or not bool(vector.any())]
    if wrong or not vectors:
        raise ValueError(f"nonzero vectors of width {width} are needed; not so: {wrong or 'no vector at all'}")
    stacked = torch.stack([vector.float() for vector in vectors.values()])
    rows = []
    for sign, signed in (("+", stacked), ("-", -stacked)):
        logits, ids = models.read_logits(organism.model, signed, final_norm=True).topk(top, dim=1)
        for name, values, tokens in zip(vectors, logits.tolist(), ids.tolist(), strict=True):
            rows += [
                {"name": name, "sign": sign, "rank": rank, "token_id": token, "logit": value}
                for rank, (value, token) in enumerate(zip(values, tokens, strict=True), start=1)
            ]
    table = pd.DataFrame(rows).sort_values(["name", "sign", "rank"], kind="stable", ignore_index=True)
    table.insert(3, "token", [organism.tokenizer.decode([token]) for token in table["token_id"]])
    return table


def written_vectors(adapter: Adapter) -> dict[str, Float[Tensor, " d_model"]]:
    """What residual-writing sites write: ``scaling · B`` of rank 1, or each gauged column of a higher rank."""
    return {
        name: site.scaling * site.gauged.B[:, k]
        for site in adapter.sites
        if site.writes_to_residual
        for k, name in enumerate(site.coordinates)
    }


def direction_vectors(direction: Direction) -> dict[str, Float[Tensor, " d_model"]]:
    """A direction's vectors by name, for :func:`readout`."""
    return {f"layer {layer}": direction.at(layer) for layer in direction.nonzero_layers}


def logit_attribution(
    organism: Organism,
    conversations: Conversations,
    positive: Tokens,
    negative: Tokens,
    *,
    span: Span = "response",
    token_budget: int = 2048,
) -> pd.DataFrame:
    """Direct logit attribution of each residual-writing site: its share of ``logit(positive) - logit(negative)``.

    At position ``p`` this is about the token that follows. Of several tokens the mean logit counts.

    Args:
        organism: The model to read, with its adapter in.
        conversations: What it reads.
        positive: Tokens whose logits count up.
        negative: Tokens whose logits count down.
        span: Where.
        token_budget: Tokens per batch, padding included.

    Returns:
        One row per token (index ``conversation, position``), one column per residual-writing site.

    Raises:
        ValueError: On a text that is not one token, inside ``as_base()``, if no site writes to the residual stream, or
            if norms other than a plain final RMS norm stand before the unembedding.
    """
    if organism.is_base:
        raise ValueError("inside as_base() the adapter writes nothing; attribute logits outside the block")
    sites = [site for site in organism.require_adapter("logit attribution of sites").sites if site.writes_to_residual]
    if not sites or models.has_post_norms(organism.model):
        raise ValueError("no site of this adapter writes to the residual stream as it is: nothing to attribute")
    weight, epsilon = models.final_rms_norm(organism.model)
    contrast = tuple(_token_ids(organism.tokenizer, tokens) for tokens in (positive, negative))
    last = models.n_layers(organism.model) - 1

    def scale(resid: Tensor) -> Tensor:
        return resid.square().mean(-1).add(epsilon).sqrt()

    readers = [*scalar_readers(organism.model, sites), resid_reader(last, scale)]
    table = read_tokens(organism, conversations, readers, span=span, last_layer=last, token_budget=token_budget)
    columns = {}
    for site in sites:
        gains = _gains(organism.model, (site.scaling * site.gauged.B).T * weight, contrast)
        columns[site.label] = table[list(site.coordinates)].to_numpy() @ gains.numpy() / table[last].to_numpy()
    return pd.DataFrame(columns, index=table.index).rename_axis(columns="site")


def _gains(
    model: Any, vectors: Float[Tensor, "coordinate d_model"], contrast: Sequence[Sequence[int]]
) -> Float[Tensor, " coordinate"]:
    """Logit difference per unit of each vector: linear, so the unembedding's bias is taken off."""
    zero = torch.zeros_like(vectors[:1])
    up, down = (
        models.read_logits(model, torch.cat([vectors, zero]), final_norm=False, ids=ids).mean(1) for ids in contrast
    )
    difference = up - down
    return difference[:-1] - difference[-1]


def _token_ids(tokenizer: Any, tokens: Tokens) -> list[int]:
    ids: list[int] = []
    for token in [tokens] if isinstance(tokens, (str, int)) else tokens:
        found = [token] if isinstance(token, int) else tokenizer.encode(token, add_special_tokens=False)
        if len(found) != 1 or not 0 <= found[0] < len(tokenizer):
            raise ValueError(
                f"{token!r} is {len(found)} tokens ({found}); a token of the vocabulary is expected: "
                "mind the space before a word, or give the id"
            )
        ids += found
    if not ids:
        raise ValueError("no token given; a contrast needs at least one on each side")
    return ids


def forward_to_unembedding(
    model: models.Model, ids: Int[Tensor, "batch pos"], mask: Int[Tensor, "batch pos"]
) -> tuple[Float[Tensor, "batch pos width"], Callable[[Tensor], Tensor]]:
    """What the unembedding reads in one uncached pass, and the function that makes logits of some of it.

    The function is compared with the model's own logits of the first position. Where they differ (a head of an unknown
    kind), and for a ``HookedTransformer``, what is given is the logits themselves and the identity.

    Raises:
        ValueError: If a row is longer than the model's context.
    """
    hf = None if models.is_hooked(model) else models.hf_model(model)
    head = None if hf is None else hf.get_output_embeddings()
    if head is None:
        return models.forward(model, ids, mask), _unchanged
    refuse_beyond(ids.shape[1], models.context(model), "a conversation")
    read: list[Tensor] = []

    def keep(_: Any, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        read.append(given[0])
        return (given[0][:, :1], *given[1:])

    handle = head.register_forward_pre_hook(keep)
    try:
        own = models.hf_logits(model, ids, mask)
    finally:
        handle.remove()

    def logits(rows: Tensor) -> Tensor:
        return _scaled(head(rows), hf)

    if len(read) != 1 or not _agree(logits, read[0][:, :1], own):
        return models.forward(model, ids, mask), _unchanged
    return read[0], logits


def _scaled(logits: Tensor, hf: Any) -> Tensor:
    """What the families do to logits: Cohere and Granite scale them, Gemma caps them."""
    config = text_config(hf.config)
    logits = logits * (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
    cap = getattr(config, "final_logit_softcapping", None)
    return logits if not cap else torch.tanh(logits / cap) * cap


@torch.no_grad()
def _agree(logits: Callable[[Tensor], Tensor], read: Tensor, own: Tensor) -> bool:
    found = logits(read).to(own.device)
    if found.shape != own.shape:
        return False
    tolerance = _SAME if own.dtype == torch.float32 else 0.05
    return bool((found - own).abs().max() <= tolerance * own.abs().max())


def _unchanged(logits: Tensor) -> Tensor:
    return logits
