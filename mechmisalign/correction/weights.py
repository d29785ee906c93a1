r"""A direction projected out of a model's weights, so that nothing in it can write the direction.

Everything that is added to the residual stream loses its component along one unit vector:
:math:`W' = W - \hat v \hat v^\top W` for the attention's and the MLP's output matrices (and their biases), and every
row of the token embedding. It is the same function as the unedited model with the direction projected out after the
embedding, after each attention and after each MLP (2406.11717, section 4.1 and appendix E), to rounding.

It is *not* the same as :class:`mechmisalign.Ablate` at all layers, which acts after whole blocks only: there the first
block still reads the direction from the embedding, and each MLP from the attention before it. Where no weight edit can
equal an ablation: one vector per layer (what an earlier layer wrote along a later layer's vector is still in the
stream), and models whose matrices are followed by a norm (Gemma 2 and 3); both are refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float64
from torch import Tensor, nn

from mechmisalign._blocks import block_hooks, blocks
from mechmisalign.adapters import Adapter
from mechmisalign.directions import Direction
from mechmisalign.loading import bases, fitting, placing, reading

from ._writers import writers
from .projection import unit_vector

_ALIKE = 1e-5
"""How far the unit vectors of two layers may differ to be one vector."""
_LEFT = {torch.float32: 1e-4, torch.float64: 1e-4}
"""Component along the vector, relative to the stream's norm, that rounding may leave."""
_LEFT_IN_HALF = 3e-2


@torch.no_grad()
def project_out_of_model(model: Any, direction: Direction, *, adapter: Adapter | None = None) -> pd.DataFrame:
    """Project one vector out of every matrix of a Hugging Face model that writes to the residual stream, in place.

    Each matrix is computed in float32 and cast last, with the update of ``adapter`` folded in first. An unembedding
    that is tied to the embedding is untied: it reads the stream and stays as it was, so the model grows by that matrix.

    Args:
        model: A causal language model, not booted in TransformerLens and without a live adapter. Which base it is
            cannot be seen here; :func:`corrected_model` checks that the direction is its own.
        direction: The same vector in all its layers: ``direction.everywhere(layer)``.
        adapter: Folded into the weights on the way.

    Returns:
        One row per edited tensor: ``matrix, norm``, and ``removed``: the share of its squared norm.

    Raises:
        ValueError: If the direction has a vector of its own in each layer, or another width; on post norms, fused
            experts, or matrices of other names; or if the edited model still writes the direction (an architecture that
            writes in a way that is not known here): the model is then spoilt and must be loaded again.
    """
    unit = _one_vector(direction)
    width = int(model.config.get_text_config().hidden_size)
    if width != direction.d_model:
        raise ValueError(f"the direction has width {direction.d_model}, the model {width}: it belongs to another model")
    found = dict(writers(model))
    updates = {} if adapter is None else {site.name: site for site in adapter.sites}
    for name in updates.keys() - found.keys():
        weight = model.get_submodule(name).weight
        weight.copy_(weight.float() + updates[name].delta().to(weight.device))
    _untie(model)
    embedding = model.get_input_embeddings().weight
    rows_of, own = embedding.float(), unit.float().to(embedding.device)
    rows = [_edit("embedding", embedding, rows_of - torch.outer(rows_of @ own, own))]
    for name, module in found.items():
        whole = module.weight.float()
        if name in updates:
            whole = whole + updates[name].delta().to(whole.device)
        own = unit.float().to(whole.device)
        rows.append(_edit(name, module.weight, whole - torch.outer(own, own @ whole), whole))
        if module.bias is not None:
            rows.append(_edit(f"{name}.bias", module.bias, module.bias.float() - own * (own @ module.bias.float())))
    _refuse_leaks(model, unit)
    return pd.DataFrame(rows)


def corrected_model(
    adapter: str | Path | Adapter,
    direction: Direction,
    *,
    base: str | Path | nn.Module | None = None,
    tokenizer: Any = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    name: str | None = None,
) -> tuple[Any, Any, pd.DataFrame]:
    """An organism's whole model, merged, without one vector in anything that writes to the residual stream.

    Args:
        adapter: A registry name, a Hub id, a folder, or an adapter.
        direction: One vector for all layers (``direction.everywhere(layer)``), found in this base.
        base: The chat model; by default the one that the adapter names. A model in memory is edited in place.
        tokenizer: By default the one beside the base.
        dtype: Of the weights; by default that of the checkpoint.
        device: Where it is loaded.
        name: What the base is called in the direction's header, where a folder stands for it.

    Returns:
        The Hugging Face model, its tokenizer, and what :func:`project_out_of_model` tells. ``save_model`` writes the
        first two as an ordinary folder.

    Raises:
        DirectionMismatchError: If the direction belongs to another base.
        AdapterError: If the adapter cannot be read or does not fit the base.
        ValueError: As :func:`project_out_of_model`.
    """
    read = adapter if isinstance(adapter, Adapter) else Adapter.load(adapter)
    found = bases.find_base(base, read)
    empty = bases.skeleton(found)
    fitting.check_fits(read, empty, found, merging=True, claimed=False)
    _one_vector(direction)
    dict(writers(empty))  # refused before anything is loaded
    found = bases.pinned(found)  # before anything else of it is read, so that all of it is of one commit
    own = bases.load_tokenizer(found, tokenizer, empty.get_input_embeddings().weight.shape[0])
    placing.check_dtype(found, dtype)
    model = placing.load_weights(found, dtype, torch.device(device))
    settings = model.config.get_text_config()
    provenance = {"model": name or found.name, "base_fingerprint": reading.fingerprint(model, own)}
    direction.check_model(provenance, settings.hidden_size, settings.num_hidden_layers)
    return model, own, project_out_of_model(model, direction, adapter=read)


def _one_vector(direction: Direction) -> Float64[Tensor, " d_model"]:
    units = torch.stack([unit_vector(direction, layer) for layer in direction.nonzero_layers])
    if len(units) == 0:
        direction.unit(direction.layers[0])  # says that it is zero
    furthest = float((units - units[0]).norm(dim=-1).max())
    if furthest > _ALIKE:
        raise ValueError(
            f"the direction has a vector of its own in each layer (unit vectors differ by up to {furthest:.2g}); "
            "weights can lose one vector only, since the stream carries on what earlier layers wrote: pass "
            "direction.everywhere(layer)"
        )
    return units[0]


def _untie(model: Any) -> None:
    """Give the unembedding its own copy of a shared matrix: it reads the stream, and is not to be edited."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or head.weight is not embedding.weight:
        return
    head.weight = nn.Parameter(embedding.weight.detach().clone(), requires_grad=embedding.weight.requires_grad)
    for config in {id(one): one for one in (model.config, model.config.get_text_config())}.values():
        config.tie_word_embeddings = False


def _edit(name: str, place: Tensor, new: Tensor, old: Tensor | None = None) -> dict[str, Any]:
    before = float((place if old is None else old).double().square().sum())
    share = 1 - float(new.double().square().sum()) / before if before else 0.0
    place.data.copy_(new)
    return {"matrix": name, "norm": before**0.5, "removed": max(share, 0.0)}


def _refuse_leaks(model: Any, unit: Float64[Tensor, " d_model"]) -> None:
    """Run a few tokens and look: whatever the architecture, no block may leave a component along the vector."""
    shares: dict[int, float] = {}

    def reader(layer: int) -> Any:
        def read(resid: Tensor) -> None:
            stream = resid.double().cpu()
            shares[layer] = float(((stream @ unit.cpu()).abs() / stream.norm(dim=-1).clamp_min(1e-12)).max())

        return read

    embedding = model.get_input_embeddings().weight
    ids = torch.arange(min(16, len(embedding)), device=embedding.device)[None]
    with block_hooks(model, {layer: reader(layer) for layer in range(len(blocks(model)))}):
        model(input_ids=ids, use_cache=False)
    allowed = _LEFT.get(embedding.dtype, _LEFT_IN_HALF)
    layer, most = max(shares.items(), key=lambda item: item[1])
    if most > allowed:
        raise ValueError(
            f"after the edit {most:.2g} of the stream's norm still lies along the direction at layer {layer} (rounding "
            f"leaves at most {allowed:g}): {type(model).__name__} writes to the stream in a way that is not known "
            "here. The model is edited by now: load it again, and use mm.Ablate"
        )
