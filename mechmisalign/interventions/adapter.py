"""Interventions on the adapter: scale its sites, patch what they read, ablate from what they write, put another on.

All of them add a difference to the output of the adapted matrix, computed from its input and the adapter's factors. So
they are the same for merged and live weights, and no weight is edited.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechmisalign.adapters import RESIDUAL_WRITERS, Adapter, LoraSite, SiteKey
from mechmisalign.directions import Direction

from ._values import Positions, Strength, check_positions, per_row


class _OnSites:
    """What the three values below share: they leave scalars and written matrices alone, and fit any model."""

    def read(
        self, scalars: Float[Tensor, "batch pos rank"], site: LoraSite, positions: Int[Tensor, "batch pos"]
    ) -> Float[Tensor, "batch pos rank"]:
        """The scalars that the site is to use."""
        del site, positions
        return scalars

    def write(self, W: Float[Tensor, "d_out rank"], site: LoraSite) -> Float[Tensor, "d_out rank"]:
        """The matrix ``scaling · B`` that the site is to write with."""
        del site
        return W

    def check_model(self, provenance: Mapping[str, Any], d_model: int, n_layers: int) -> None:
        """Refuse a model that it does not belong to."""
        del provenance, d_model, n_layers


@dataclass(frozen=True, eq=False)
class ScaleAdapter(_OnSites):
    """Multiply what sites write: 0 removes a site, 1 leaves it, more amplifies (2506.11618, section 4.3).

    Attributes:
        factors: ``{(layer, module): factor}``; a factor is one number, or one per batch row.
        others: Factor of the sites that are not named (the paper zeroes them).
        positions: ``"all"``, ``"prompt"`` or ``"response"``.

    Example:
        >>> amplified = ScaleAdapter({(21, "down_proj"): 30.0, (23, "down_proj"): 30.0}, others=0.0)
    """

    factors: Mapping[SiteKey, Strength]
    others: float = 1.0
    positions: Positions = "all"

    def __post_init__(self) -> None:
        check_positions(self.positions)
        for key, factor in self.factors.items():
            if not bool(torch.isfinite(torch.as_tensor(factor, dtype=torch.float64)).all()):
                raise ValueError(f"the factor of {key} is {factor}; finite numbers are expected")

    def edited_sites(self, adapter: Adapter) -> tuple[LoraSite, ...]:
        """The sites named, and the others too if they are scaled."""
        named = adapter.select(self.factors)
        return named if self.others == 1.0 else adapter.sites

    def read(
        self, scalars: Float[Tensor, "batch pos rank"], site: LoraSite, positions: Int[Tensor, "batch pos"]
    ) -> Float[Tensor, "batch pos rank"]:
        """The scalars times the site's factor."""
        del positions
        return scalars * per_row(self.factors.get(site.key, self.others), scalars)


@dataclass(frozen=True, eq=False)
class UseAdapter:
    """Put an adapter on the chat model, beside its weights, as PEFT does: use it inside ``organism.as_base()``.

    Rows of one batch can wear different adapters, so several organisms on one base are sampled together; the memory is
    the base's and the adapters'. Several in one condition add up.

    Attributes:
        adapter: A LoRA on the same base.
        scale: What its update is multiplied with (2506.11613, section 4.2 scales checkpoints by 1, 5, 10).
    """

    adapter: Adapter
    scale: float = 1.0

    @property
    def positions(self) -> Positions:
        """An adapter acts on every position."""
        return "all"


@dataclass(frozen=True, eq=False)
class PatchScalars(_OnSites):
    """Let sites use the scalars of another conversation, position by position (2506.11618, appendix J).

    Token ``p`` of a conversation gets the stored scalars of position ``p``, counted from its first token (padding on
    the left does not shift it), in one pass and token by token under a KV cache alike. Where nothing is stored, a token
    keeps its own.

    Attributes:
        scalars: Rows of :func:`mechmisalign.lora_scalars` of one conversation (``scalars.loc[row]``, or with its index
            level), collected with ``span="all"`` or any other span.
        sites: ``(layer, module)`` of the sites to patch; None is every site of the adapter.
        positions: ``"all"``, ``"prompt"`` or ``"response"``.
    """

    scalars: pd.DataFrame
    sites: Sequence[SiteKey] | None = None
    positions: Positions = "all"

    def __post_init__(self) -> None:
        check_positions(self.positions)
        levels = self.scalars.index.names
        if "conversation" in levels and self.scalars.index.get_level_values("conversation").nunique() != 1:
            raise ValueError("scalars of several conversations; patch from one of them, such as scalars.loc[[0]]")
        if len(self.scalars) == 0 or "position" not in levels:
            raise ValueError(
                f"scalars have {len(self.scalars)} rows and the index {list(levels)}; "
                "rows with an index 'position' are expected, as lora_scalars gives them"
            )

    def edited_sites(self, adapter: Adapter) -> tuple[LoraSite, ...]:
        """The sites to patch, each with its stored scalars."""
        chosen = adapter.select(self.sites)
        missing = [name for site in chosen for name in site.coordinates if name not in self.scalars.columns]
        if missing:
            raise ValueError(
                f"no stored scalars for {missing[:3]}; there are {list(self.scalars.columns)[:5]}. "
                "Collect them with this adapter, or name the sites to patch"
            )
        return chosen

    def read(
        self, scalars: Float[Tensor, "batch pos rank"], site: LoraSite, positions: Int[Tensor, "batch pos"]
    ) -> Float[Tensor, "batch pos rank"]:
        """The stored scalars where there are any, else the token's own."""
        stored = self._table[:, self.scalars.columns.get_indexer(list(site.coordinates))].to(scalars)
        row_of = self._row_of_position.to(positions.device)
        row = row_of[positions.clamp(0, len(row_of) - 1)]
        known = (row >= 0) & (positions >= 0) & (positions < len(row_of))
        return torch.where(known.unsqueeze(-1), stored[row.clamp_min(0)], scalars)

    @cached_property
    def _table(self) -> Float[Tensor, "row coordinate"]:
        return torch.from_numpy(self.scalars.to_numpy(np.float32, copy=True))

    @cached_property
    def _row_of_position(self) -> Int[Tensor, " position"]:
        """The stored row of each position, -1 where there is none."""
        places = torch.from_numpy(self.scalars.index.get_level_values("position").to_numpy(np.int64, copy=True))
        rows = torch.full((int(places.max()) + 1,), -1)
        rows[places] = torch.arange(len(places))
        return rows


@dataclass(frozen=True, eq=False)
class AblateFromAdapter(_OnSites):
    """Project a direction out of what sites write: ``B' = B - v̂ v̂ᵀ B`` (2506.11618, section 3.5 and appendix D).

    Only matrices that write to the residual stream have a component along a residual direction; each uses the vector of
    its own layer.

    Attributes:
        direction: What to remove.
        sites: ``(layer, module)``; None is every residual-writing site where the direction is nonzero.
        keep_norm: Stretch each column of B back to its old norm, as the paper's code does.
    """

    direction: Direction
    sites: Sequence[SiteKey] | None = None
    keep_norm: bool = False

    @property
    def positions(self) -> Positions:
        """A matrix is edited, so every position is touched."""
        return "all"

    def edited_sites(self, adapter: Adapter) -> tuple[LoraSite, ...]:
        """The residual-writing sites among those named."""
        chosen = adapter.select(self.sites)
        writers = tuple(
            site for site in chosen if site.writes_to_residual and site.layer in self.direction.nonzero_layers
        )
        wrong = [site.label for site in chosen if site not in writers] if self.sites is not None else []
        if wrong or not writers:
            raise ValueError(
                f"nothing to ablate in {wrong or [site.label for site in chosen][:5]}: only {RESIDUAL_WRITERS} write "
                f"to the residual stream, and the direction is nonzero at layers {list(self.direction.nonzero_layers)}"
            )
        return writers

    def write(self, W: Float[Tensor, "d_out rank"], site: LoraSite) -> Float[Tensor, "d_out rank"]:
        """The matrix without its component along the direction."""
        unit = self.direction.unit(site.layer).to(W)
        left = W - torch.outer(unit, unit @ W)
        return left * (W.norm(dim=0) / left.norm(dim=0).clamp_min(1e-30)) if self.keep_norm else left

    def check_model(self, provenance: Mapping[str, Any], d_model: int, n_layers: int) -> None:
        """Refuse a model that the direction does not belong to."""
        self.direction.check_model(provenance, d_model, n_layers)
