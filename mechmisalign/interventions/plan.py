"""The plan of a batch: which rows and positions the conditions touch, in cached and uncached passes alike."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechmisalign import models
from mechmisalign.adapters import SiteKey

from ._fusing import NOWHERE, POSITIONS, Compiled, Factors, ScaleTable, Stage, Table
from ._values import SiteIntervention

Rows = slice | Tensor
"""Rows of a batch: a slice where they are neighbours (views, no copies), or their indices."""

RowEdit = Callable[[Tensor], Tensor]

_SPANS = {POSITIONS["prompt"], POSITIONS["response"]}

Change = tuple[Rows, Float[Tensor, "rows pos d_out"]]


class RowPlan:
    """The interventions on the rows of one batch.

    Args:
        compiled: The conditions.
        row_conditions: The condition of each row; neighbours in the same condition make for fewer copies.
        response_start: The column at which each row's response begins, ``[batch]``; None if nobody asked.
    """

    def __init__(self, compiled: Compiled, row_conditions: Tensor, response_start: Tensor | None) -> None:
        self.compiled = compiled
        self.row_conditions = row_conditions.cpu()
        self.response_start = response_start
        self._found: dict[int, _Found | None] = {}

    def edit(
        self, resid: Float[Tensor, "batch pos d_model"], layer: int, place: models.Place
    ) -> Float[Tensor, "batch pos d_model"] | None:
        """The residual stream of the whole batch after every intervention on its own rows, or None if nothing acts."""
        edited = None
        for stage in self.compiled.stages.get(layer, ()):
            for found, function in self._edits(stage, layer, resid.device):
                rows = found.rows
                chosen = self._chosen(found, place)
                old = (resid if edited is None else edited)[rows]
                new = function(old).to(old)
                new = new if chosen is None else torch.where(chosen, new, old)
                if len(new) == len(resid):
                    edited = new.clone() if new.data_ptr() == resid.data_ptr() else new
                else:
                    edited = resid.clone() if edited is None else edited
                    edited[rows] = new
        return edited

    def _edits(self, stage: Stage, layer: int, device: torch.device) -> Iterator[tuple[_Found, RowEdit]]:
        """Rows, and what is to be done to them."""
        found = None if stage.fused is None else self._rows_of(stage.fused, device)
        if stage.fused is not None and found is not None:
            yield found, functools.partial(stage.fused.edit, entries=found.entries)
        for table, one in stage.others:
            alone = self._rows_of(table, device)
            if alone is not None:
                yield alone, functools.partial(one, layer=layer)

    def edit_site(self, key: SiteKey, x: Float[Tensor, "batch pos d_in"], place: models.Place) -> list[Change]:
        """What is to be added to a matrix's output, for each group of rows on which something acts."""
        edits = self.compiled.sites.get(key)
        if edits is None:
            return []
        changes = [change for factors, table in edits.borrowed for change in self._scaled(factors, table, x, 0.0)]
        if edits.own is None:
            return changes
        if edits.scale is not None:
            changes += self._scaled(edits.own, edits.scale, x, 1.0)
        for ones in edits.others:
            acting = [(one, found) for table, one in ones if (found := self._rows_of(table, x.device)) is not None]
            if acting:
                changes.append((acting[0][1].rows, self._edited(edits.own, acting, x, place)))
        return changes

    def _scaled(self, factors: Factors, table: ScaleTable, x: Tensor, already: float) -> list[Change]:
        """``(factor - already)`` times what the site writes; exactly zero where it is written already."""
        found = self._rows_of(table, x.device)
        if found is None:
            return []
        factor = table.factor[found.entries][:, None, None] - already
        scalars = factor * (x[found.rows].float() @ factors.A.T)
        return [(found.rows, scalars @ factors.W.T)]

    def _edited(
        self,
        factors: Factors,
        acting: Sequence[tuple[SiteIntervention, _Found]],
        x: Tensor,
        place: models.Place,
    ) -> Float[Tensor, "rows pos d_out"]:
        rows = acting[0][1].rows
        W = written = factors.W
        own = scalars = x[rows].float() @ factors.A.T
        for one, found in acting:
            chosen = self._chosen(found, place)
            new = one.read(scalars, factors.site, place.positions[rows])
            scalars = new if chosen is None else torch.where(chosen, new, scalars)
            written = one.write(written, factors.site)
        if written is W:
            return (scalars - own) @ W.T  # exactly zero where a scalar is left alone
        return (scalars - own) @ written.T + own @ (written - W).T

    def _rows_of(self, table: Table, device: torch.device) -> _Found | None:
        """The rows that a table has entries for; None if there is no such row."""
        if id(table) not in self._found:
            entries = table.entry_of[self.row_conditions]
            rows = _compact(entries != NOWHERE)
            found = None
            if rows is not None:
                codes = table.positions[entries[rows]]
                kinds = frozenset(codes.tolist())
                touched = None if kinds == {POSITIONS["all"]} else codes.to(device)
                found = _Found(_on(rows, device), entries[rows].to(device), touched, kinds)
            self._found[id(table)] = found
        return self._found[id(table)]

    def _chosen(self, found: _Found, place: models.Place) -> Bool[Tensor, "rows pos 1"] | None:
        """The positions that are touched, by the codes of the rows; None for all of them."""
        if found.positions is None:
            return None
        code = found.positions[:, None]
        chosen = self._in_span(found, code, place) if found.kinds & _SPANS else None
        if POSITIONS["non_sink"] in found.kinds and place.first is not None:
            others = ~place.first[found.rows] | (code != POSITIONS["non_sink"])
            chosen = others if chosen is None else chosen & others
        return None if chosen is None else chosen.unsqueeze(-1)

    def _in_span(self, found: _Found, code: Tensor, place: models.Place) -> Bool[Tensor, "rows pos"]:
        """Prompt or response, as each row asks; everything where it asks for neither."""
        if self.response_start is None:
            raise ValueError(
                "positions='prompt' and 'response' need to know where the response begins: "
                "pass response_start=<column, or one per row> to apply()"
            )
        in_response = place.columns >= self.response_start.to(place.columns.device)[found.rows, None]
        elsewhere = (code != POSITIONS["prompt"]) & (code != POSITIONS["response"])
        return torch.where(code == POSITIONS["response"], in_response, ~in_response) | elsewhere


@dataclass(frozen=True)
class _Found:
    """Rows of the batch, their entries in a table, and the codes of their positions (None: all positions).

    ``kinds`` are the codes that occur.
    """

    rows: Rows
    entries: Int[Tensor, " rows"]
    positions: Int[Tensor, " rows"] | None
    kinds: frozenset[int]


def _compact(chosen: Bool[Tensor, " batch"]) -> Rows | None:
    """The chosen rows; a slice if they are neighbours, None if there are none."""
    rows = chosen.nonzero().squeeze(1)
    if not len(rows):
        return None
    first, last = int(rows[0]), int(rows[-1])
    return slice(first, last + 1) if last - first + 1 == len(rows) else rows


def _on(rows: Rows, device: torch.device) -> Rows:
    return rows if isinstance(rows, slice) else rows.to(device)
