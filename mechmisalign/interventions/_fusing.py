"""Conditions, made ready once for every batch that they will meet.

A batch holds rows of many conditions, and a sweep may hold dozens. Edits of the same form (steering, ablation,
clamping; scaling of a site; another adapter) become tables with one entry per condition, so that a layer is edited by a
few tensor operations whatever the number of conditions. What has another form is called on its own rows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechmisalign.adapters import Adapter, LoraSite, SiteKey

from ._values import Intervention, Positions, ResidualIntervention, SiteIntervention, Terms, one_number
from .adapter import ScaleAdapter, UseAdapter

Condition = Sequence[Intervention]

NOWHERE = -1
"""A condition that a table has no entry for."""

POSITIONS: Mapping[Positions, int] = {"all": 0, "prompt": 1, "response": 2, "non_sink": 3}


@dataclass(frozen=True)
class Table:
    """What conditions have in common in form, and the entry of each.

    What rows are looked up with is on the CPU, what they are edited with where the layer computes.

    Attributes:
        entry_of: The entry of each condition, or ``NOWHERE``.
        positions: Code of the positions of each entry (``POSITIONS``).
    """

    entry_of: Int[Tensor, " condition"]
    positions: Int[Tensor, " entry"]


@dataclass(frozen=True)
class ResidualTable(Table):
    """Fused edits ``x' = x + add + (value - x·unit) unit``; None where no entry has such a term."""

    add: Float[Tensor, "entry d_model"] | None
    unit: Float[Tensor, "entry d_model"] | None
    value: Float[Tensor, " entry"]

    def edit(self, x: Float[Tensor, "rows pos d_model"], entries: Int[Tensor, " rows"]) -> Tensor:
        """The edited rows, a new tensor."""
        edited = x
        if self.add is not None:
            edited = x + _rows(self.add, entries).to(x)[:, None]
        if self.unit is not None:
            unit = _rows(self.unit, entries).to(x)
            value = _rows(self.value, entries).to(x)[:, None, None]
            component = x @ unit[0][:, None] if len(unit) == 1 else x @ unit[:, :, None]
            edited = edited + (value - component) * unit[:, None]
        return edited


@dataclass(frozen=True)
class ScaleTable(Table):
    """Fused scalings of one site: what it writes is multiplied by ``factor``."""

    factor: Float[Tensor, " entry"]


@dataclass(frozen=True)
class Stage:
    """The first, second … edit of every condition at one place: fused, and those of other forms one by one."""

    fused: ResidualTable | None
    others: tuple[tuple[Table, ResidualIntervention], ...]


@dataclass(frozen=True)
class Factors:
    """A site's factors where its layer computes, float32.

    Attributes:
        site: The site.
        A: What it reads scalars with.
        W: What it writes them with, ``scaling · B``.
    """

    site: LoraSite
    A: Float[Tensor, "rank d_in"]
    W: Float[Tensor, "d_out rank"]

    @staticmethod
    def of(site: LoraSite, device: torch.device) -> Factors:
        """The factors of a site, moved once."""
        A, B = (factor.to(device, torch.float32) for factor in (site.A, site.B))
        return Factors(site, A, site.scaling * B)


@dataclass(frozen=True)
class SiteEdits:
    """All edits of one adapted matrix.

    Attributes:
        own: The organism's own site, in the gauge in which scalars are told; None where only other adapters have one.
        scale: Conditions that only scale it.
        others: Edits of other forms, in order, for each condition that has such.
        borrowed: For each adapter that is put on: its site, and by condition what it is multiplied with.
    """

    own: Factors | None
    scale: ScaleTable | None
    others: tuple[tuple[tuple[Table, SiteIntervention], ...], ...]
    borrowed: tuple[tuple[Factors, ScaleTable], ...]

    @property
    def place(self) -> LoraSite:
        """A site that names the matrix."""
        return self.borrowed[0][0].site if self.own is None else self.own.site


class Compiled:
    """The conditions of a run as tables by layer and by site.

    Args:
        conditions: The interventions of each condition.
        adapter: The adapter whose sites may be edited.
        place: Where a layer computes.
        sink: Asked once, and only where an edit is to leave it out: does the model make the first token a sink?
    """

    def __init__(
        self,
        conditions: Sequence[Condition],
        adapter: Adapter | None,
        place: Callable[[int], torch.device],
        sink: Callable[[], bool],
    ) -> None:
        self._place = functools.cache(place)
        leaves_out = any(one.positions == "non_sink" for condition in conditions for one in condition)
        self._sink = leaves_out and sink()
        self.conditions = [tuple(condition) for condition in conditions]
        self.stages = {layer: self._stages(layer) for layer in self._layers()}
        self.sites = self._sites(adapter)

    def _layers(self) -> list[int]:
        return sorted(
            {layer for ones in map(_on_residual, self.conditions) for one in ones for layer in one.edited_layers}
        )

    def _stages(self, layer: int) -> list[Stage]:
        acting = [
            [one for one in _on_residual(condition) if layer in one.edited_layers] for condition in self.conditions
        ]
        return [
            self._stage({code: ones[depth] for code, ones in enumerate(acting) if len(ones) > depth}, layer)
            for depth in range(max(map(len, acting)))
        ]

    def _sites(self, adapter: Adapter | None) -> dict[SiteKey, SiteEdits]:
        own: dict[SiteKey, dict[int, list[SiteIntervention]]] = {}
        sites: dict[SiteKey, LoraSite] = {}
        borrowed: dict[SiteKey, dict[int, tuple[LoraSite, dict[int, float]]]] = {}
        for code, condition in enumerate(self.conditions):
            for one in condition:
                if isinstance(one, UseAdapter):
                    for site in one.adapter.sites:
                        _, factors = borrowed.setdefault(site.key, {}).setdefault(id(one.adapter), (site, {}))
                        factors[code] = factors.get(code, 0.0) + one.scale
                elif isinstance(one, SiteIntervention) and adapter is not None:
                    for site in one.edited_sites(adapter):
                        sites[site.key] = site.gauged
                        own.setdefault(site.key, {}).setdefault(code, []).append(one)
        return {
            key: self._site_edits(sites.get(key), own.get(key, {}), borrowed.get(key, {}).values())
            for key in sorted({*own, *borrowed})
        }

    def _site_edits(
        self,
        site: LoraSite | None,
        acting: Mapping[int, Sequence[SiteIntervention]],
        borrowed: Iterable[tuple[LoraSite, Mapping[int, float]]],
    ) -> SiteEdits:
        factors = {} if site is None else {code: _factor(ones, site, self._code) for code, ones in acting.items()}
        scaled = {code: factor for code, factor in factors.items() if factor is not None}
        others = [(code, ones) for code, ones in acting.items() if code not in scaled]
        return SiteEdits(
            None if site is None else Factors.of(site, self._place(site.layer)),
            None if site is None or not scaled else self._scale_table(scaled, site.layer),
            tuple(tuple((self._table({code: one}), one) for one in ones) for code, ones in others),
            tuple((Factors.of(one, self._place(one.layer)), self._scale_table(by, one.layer)) for one, by in borrowed),
        )

    def _scale_table(self, factors: Mapping[int, float], layer: int) -> ScaleTable:
        values = torch.tensor(list(factors.values()), dtype=torch.float32, device=self._place(layer))
        return ScaleTable(self._entries(factors), torch.zeros(len(factors), dtype=torch.long, device="cpu"), values)

    def _table(self, acting: Mapping[int, Intervention]) -> Table:
        codes = [self._code(one) for one in acting.values()]
        return Table(self._entries(acting), torch.tensor(codes, dtype=torch.long, device="cpu"))

    def _code(self, one: Intervention) -> int:
        return POSITIONS["all" if one.positions == "non_sink" and not self._sink else one.positions]

    def _stage(self, acting: Mapping[int, ResidualIntervention], layer: int) -> Stage:
        terms: dict[int, Terms] = {}
        for code, one in acting.items():
            found = one.terms(layer) if hasattr(one, "terms") else None
            if found is not None:
                terms[code] = found
        others = tuple((self._table({code: one}), one) for code, one in acting.items() if code not in terms)
        if not terms:
            return Stage(None, others)
        touched = self._table({code: acting[code] for code in terms})
        fused = ResidualTable(
            touched.entry_of,
            touched.positions,
            _stacked([term.add for term in terms.values()], self._place(layer)),
            _stacked([term.unit for term in terms.values()], self._place(layer)),
            torch.tensor([term.value for term in terms.values()], dtype=torch.float32, device=self._place(layer)),
        )
        return Stage(fused, others)

    def _entries(self, codes: Iterable[int]) -> Int[Tensor, " condition"]:
        entry_of = torch.full((len(self.conditions),), NOWHERE, device="cpu")
        for entry, code in enumerate(codes):
            entry_of[code] = entry
        return entry_of


def _stacked(vectors: Sequence[Tensor | None], device: torch.device) -> Tensor | None:
    """One row per entry, zero where an entry has no such term; None if none has."""
    there = [vector for vector in vectors if vector is not None]
    if not there:
        return None
    rows = [torch.zeros_like(there[0]) if vector is None else vector for vector in vectors]
    return torch.stack(rows).to(device)


def _on_residual(condition: Condition) -> list[ResidualIntervention]:
    return [one for one in condition if isinstance(one, ResidualIntervention)]


def _factor(ones: Sequence[SiteIntervention], site: LoraSite, code: Callable[[Intervention], int]) -> float | None:
    """The product of the factors, if everything only scales the site, at all positions and by one number."""
    product = 1.0
    for one in ones:
        if not isinstance(one, ScaleAdapter) or code(one) != POSITIONS["all"]:
            return None
        factor = one_number(one.factors.get(site.key, one.others))
        if factor is None:
            return None
        product *= factor
    return product


def _rows(table: Tensor, entries: Tensor) -> Tensor:
    return table if len(table) == 1 else table[entries]
