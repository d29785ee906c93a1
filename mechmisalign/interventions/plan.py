"""From interventions to hooks: which rows and positions of a batch they touch, in cached and uncached passes alike."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechmisalign import models
from mechmisalign.adapters import Adapter, LoraSite

from ._values import Intervention, ResidualIntervention, SiteIntervention
from .adapter import AblateFromAdapter

if TYPE_CHECKING:
    from mechmisalign.organisms import Organism

Condition = Sequence[Intervention]


class RowPlan:
    """Which interventions act on which rows of a batch; rows can leave it while a generation runs.

    Args:
        conditions: The interventions of each condition.
        row_conditions: The condition of each row, in ascending order, so that each condition is one slice.
        response_start: The column at which each row's response begins, ``[batch]``; None if nobody asked.
        adapter: The adapter whose sites may be edited.
    """

    def __init__(
        self,
        conditions: Sequence[Condition],
        row_conditions: Tensor,
        response_start: Tensor | None,
        adapter: Adapter | None = None,
    ) -> None:
        self.conditions = conditions
        self.row_conditions = row_conditions.cpu()
        self.response_start = response_start
        self._sites_of = {
            id(one): {site.key for site in one.edited_sites(adapter)}
            for condition in conditions
            for one in condition
            if isinstance(one, SiteIntervention) and adapter is not None
        }
        self._slices = self._sliced()

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows of the current batch only."""
        self.row_conditions = self.row_conditions[rows.cpu()]
        if self.response_start is not None:
            self.response_start = self.response_start[rows.to(self.response_start.device)]
        self._slices = self._sliced()

    def edit(self, resid: Tensor, layer: int, columns: Tensor) -> Tensor | None:
        """The residual stream of the whole batch after every intervention on its own rows, or None if nothing acts."""
        acting = [
            (rows, one)
            for rows, condition in self._slices
            for one in condition
            if isinstance(one, ResidualIntervention) and layer in one.edited_layers
        ]
        if not acting:
            return None
        edited = resid.clone()
        for rows, one in acting:
            chosen = self._chosen(one, rows, columns)
            new = one(edited[rows], layer)
            edited[rows] = new if chosen is None else torch.where(chosen, new, edited[rows])
        return edited

    def edit_site(
        self, site: LoraSite, x: Float[Tensor, "batch pos d_in"], columns: Tensor, positions: Int[Tensor, "batch pos"]
    ) -> list[tuple[slice, Float[Tensor, "rows pos d_out"]]]:
        """What is to be added to a matrix's output, for each slice of rows on which something acts."""
        gauged = site.gauged
        A, W = gauged.A.to(x.device), gauged.scaling * gauged.B.to(x.device)
        changes = []
        for rows, condition in self._slices:
            acting = [
                one
                for one in condition
                if isinstance(one, SiteIntervention) and site.key in self._sites_of.get(id(one), ())
            ]
            if not acting:
                continue
            own = scalars = x[rows].float() @ A.T
            written = W
            for one in acting:
                chosen = self._chosen(one, rows, columns)
                new = one.read(scalars, site, positions[rows])
                scalars = new if chosen is None else torch.where(chosen, new, scalars)
                written = one.write(written, site)
            change = (scalars - own) @ written.T  # exactly zero where a scalar is left alone
            changes.append((rows, change if written is W else change + own @ (written - W).T))
        return changes

    def _chosen(self, one: Intervention, rows: slice, columns: Tensor) -> Bool[Tensor, "rows pos 1"] | None:
        """The positions that it touches; None for all of them."""
        if one.positions == "all":
            return None
        if self.response_start is None:
            raise ValueError(
                f"positions={one.positions!r} needs to know where the response begins: "
                "pass response_start=<column, or one per row> to apply()"
            )
        in_response = columns >= self.response_start[rows, None].to(columns.device)
        return (in_response if one.positions == "response" else ~in_response).unsqueeze(-1)

    def _sliced(self) -> list[tuple[slice, Condition]]:
        bounds = torch.searchsorted(self.row_conditions, torch.arange(len(self.conditions) + 1)).tolist()
        return [
            (slice(start, stop), condition)
            for start, stop, condition in zip(bounds, bounds[1:], self.conditions, strict=False)
            if stop > start and condition
        ]


@contextmanager
def planned(organism: Organism, plan: RowPlan) -> Iterator[None]:
    """Run the plan's interventions while the block runs."""
    everything = [one for condition in plan.conditions for one in condition]
    with _hooked(organism, everything, lambda _rows: plan):
        yield


@contextmanager
def applied(
    organism: Organism,
    interventions: Condition,
    *,
    response_start: int | Sequence[int] | Tensor | None = None,
) -> Iterator[None]:
    """Apply interventions to every row of every forward pass in the block (the body of ``Organism.apply``).

    Args:
        organism: Whose model is hooked.
        interventions: They act in this order; edits of the residual stream and of sites each keep theirs.
        response_start: Column at which the response begins, one for all rows or one per row; needed for
            ``positions="prompt"`` and ``"response"`` only.
    """

    @functools.cache  # one plan for all hooks of a pass: a plan asks every intervention for its sites
    def for_batch(rows: int) -> RowPlan:
        start = None if response_start is None else torch.as_tensor(response_start).expand(rows)
        return RowPlan([interventions], torch.zeros(rows, dtype=torch.long), start, organism.adapter)

    with _hooked(organism, interventions, for_batch):
        yield


def check_fits(interventions: Condition, organism: Organism) -> None:
    """Refuse interventions that do not belong to the model as it is now.

    Raises:
        DirectionMismatchError: If a direction belongs to another base, width or depth.
        KeyError: If the adapter lacks a site that is to be edited.
        ValueError: If a site is to be edited while the adapter is out (inside ``as_base()``).
        TypeError: If one is no intervention.
    """
    provenance = organism.provenance
    shape = models.d_model(organism.model), models.n_layers(organism.model)
    for one in interventions:
        if isinstance(one, SiteIntervention):
            if organism.is_base:
                raise ValueError(
                    f"{type(one).__name__} edits the adapter, which is out inside as_base(); use it outside the block"
                )
            one.edited_sites(organism.adapter)
            one.check_model(provenance, *shape)
            if isinstance(one, AblateFromAdapter) and models.has_post_norms(organism.model):
                raise ValueError(
                    "in this model a norm stands between the adapted matrices and the residual stream, so a residual "
                    "direction cannot be projected out of B; use Ablate on the residual stream"
                )
        elif isinstance(one, ResidualIntervention):
            one.direction.check_model(provenance, *shape)
        else:
            raise TypeError(f"{one!r} is no intervention; expected Steer, Ablate, Clamp, ScaleAdapter …")


@contextmanager
def _hooked(organism: Organism, interventions: Condition, plan_of: Callable[[int], RowPlan]) -> Iterator[None]:
    model = organism.model
    with models.clock(model) as clock:

        def editor(layer: int) -> models.HookFunction:
            return lambda resid: plan_of(len(resid)).edit(resid, layer, clock.columns(resid.shape[1], resid.device))

        on_residual = [one for one in interventions if isinstance(one, ResidualIntervention)]
        layers = sorted({layer for one in on_residual for layer in one.edited_layers})
        on_sites = [one for one in interventions if isinstance(one, SiteIntervention)]
        sites = {site.key: site for one in on_sites for site in one.edited_sites(organism.adapter)}
        with (
            models.hooks(model, _site_hooks(model, tuple(sites.values()), plan_of, clock)),
            models.residual_hooks(model, {layer: editor(layer) for layer in layers}),
        ):
            yield


def _site_hooks(
    model: Any, sites: Sequence[LoraSite], plan_of: Callable[[int], RowPlan], clock: models.Clock
) -> Mapping[str, models.HookFunction]:
    """Hooks that read each matrix's input, and add to its output what the plan changes."""
    ports = {site.key: models.site_ports(model, site.name, site.layer) for site in sites}
    changes: dict[str, list[tuple[slice, Tensor]]] = {}

    def reader(entry: models.Port, behind: Sequence[LoraSite]) -> models.HookFunction:
        def read(activation: Tensor) -> None:
            x, plan = entry.flat(activation), plan_of(len(activation))
            columns = clock.columns(x.shape[1], x.device)
            positions = clock.positions(x.shape[0], x.shape[1], x.device)
            for site in behind:
                changes[ports[site.key][1].name] = plan.edit_site(site, x, columns, positions)

        return read

    def writer(name: str) -> models.HookFunction:
        def write(output: Tensor) -> Tensor | None:
            todo = changes.pop(name, [])
            if not todo:
                return None
            edited = output.clone()
            for rows, change in todo:
                edited[rows] = edited[rows] + change.to(output).view(edited[rows].shape)
            return edited

        return write

    functions: dict[str, models.HookFunction] = {}
    for entry in {ports[site.key][0].name: ports[site.key][0] for site in sites}.values():
        functions[entry.name] = reader(entry, [site for site in sites if ports[site.key][0].name == entry.name])
    return functions | {ports[site.key][1].name: writer(ports[site.key][1].name) for site in sites}
