"""From interventions to hooks, while a block runs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mechmisalign import models, registry
from mechmisalign.adapters import Adapter, SiteKey
from mechmisalign.massive import has_sink

from ._fusing import Compiled, Condition, SiteEdits
from ._values import Intervention, ResidualIntervention, SiteIntervention, check_positions
from .adapter import AblateFromAdapter, UseAdapter
from .plan import Change, RowPlan

if TYPE_CHECKING:
    from mechmisalign.organisms import Organism

PlanOf = Callable[[int], RowPlan | None]
"""The plan for a pass of so many rows; None if nothing is to be edited."""


@contextmanager
def planned(organism: Organism, compiled: Compiled, plan_of: PlanOf) -> Iterator[None]:
    """Run plans of the compiled conditions while the block runs; each pass asks for the one of its rows."""
    model = organism.model
    with models.clock(model) as clock:

        def editor(layer: int) -> models.HookFunction:
            def edit(resid: Tensor) -> Tensor | None:
                plan = plan_of(len(resid))
                return (
                    None
                    if plan is None
                    else plan.edit(resid, layer, clock.place(resid.shape[0], resid.shape[1], resid.device))
                )

            return edit

        with (
            models.hooks(model, _site_hooks(model, compiled.sites, plan_of, clock)),
            models.residual_hooks(model, {layer: editor(layer) for layer in compiled.stages}),
        ):
            yield


@contextmanager
def applied(
    organism: Organism,
    interventions: Condition,
    *,
    response_start: int | Sequence[int] | Tensor | None = None,
    enabled: Callable[[], bool] = lambda: True,
) -> Iterator[None]:
    """Apply interventions to every row of every forward pass in the block (the body of ``Organism.apply``).

    Args:
        organism: Whose model is hooked.
        interventions: They act in this order; edits of the residual stream and of sites each keep theirs.
        response_start: Column at which the response begins, one for all rows or one per row; needed for
            ``positions="prompt"`` and ``"response"`` only.
        enabled: Asked in every pass; while it says no, the pass is left alone.
    """
    place = functools.partial(models.device_of_layer, organism.model)
    compiled = Compiled([interventions], organism.adapter, place, functools.partial(has_sink, organism))

    @functools.cache  # one plan for all hooks of a pass
    def for_batch(rows: int) -> RowPlan:
        start = None if response_start is None else torch.as_tensor(response_start).expand(rows)
        return RowPlan(compiled, torch.zeros(rows, dtype=torch.long), start)

    organism.applied.append(tuple(interventions))
    try:
        with planned(organism, compiled, lambda rows: for_batch(rows) if enabled() else None):
            yield
    finally:
        organism.applied.pop()


def check_fits(interventions: Condition, organism: Organism) -> None:
    """Refuse interventions that do not belong to the model as it is now.

    Raises:
        DirectionMismatchError: If a direction belongs to another base, width or depth.
        KeyError: If the adapter lacks a site that is to be edited.
        ValueError: If a site is to be edited while the adapter is out (inside ``as_base()``), another adapter is to be
            put on while it is in, or that one belongs to another base.
        TypeError: If one is no intervention.
    """
    provenance = organism.provenance
    shape = models.d_model(organism.model), models.n_layers(organism.model)
    for one in interventions:
        if isinstance(one, Intervention):
            check_positions(one.positions)
        if isinstance(one, UseAdapter):
            _check_adapter(one.adapter, organism)
        elif isinstance(one, SiteIntervention):
            if organism.is_base:
                raise ValueError(
                    f"{type(one).__name__} edits the adapter, which is out inside as_base(); use it outside the block"
                )
            one.edited_sites(organism.require_adapter(type(one).__name__))
            one.check_model(provenance, *shape)
            if isinstance(one, AblateFromAdapter) and models.has_post_norms(organism.model):
                raise ValueError(
                    "in this model a norm stands between the adapted matrices and the residual stream, so a residual "
                    "direction cannot be projected out of B; use Ablate on the residual stream"
                )
        elif isinstance(one, ResidualIntervention):
            one.direction.check_model(provenance, *shape)
            beyond = [layer for layer in one.edited_layers if not 0 <= layer < shape[1]]
            if beyond:
                raise ValueError(
                    f"{type(one).__name__} acts at layer {beyond[0]}; the model has layers 0 to {shape[1] - 1}"
                )
        else:
            raise TypeError(f"{one!r} is no intervention; expected Steer, Ablate, Clamp, ScaleAdapter, UseAdapter …")


def _check_adapter(adapter: Adapter, organism: Organism) -> None:
    if not organism.is_base and not organism.is_alone:
        raise ValueError(
            f"UseAdapter puts {adapter.source!r} on the chat model, but {organism.name!r} is on it; use it "
            "inside organism.as_base()"
        )
    known = [organism.base.name, *([organism.adapter.base] if organism.adapter else [])]
    if not any(registry.same_model(adapter.base, own) for own in known):
        raise ValueError(
            f"{adapter.source!r} was trained on {adapter.base!r}, not on {organism.base.name!r}, and fits its own base "
            "only; if the two are the same model, say so: dataclasses.replace(adapter, base=organism.base.name)"
        )
    for site in adapter.sites:
        try:
            shape = models.matrix(organism.model, site.name, site.layer).shape
        except AttributeError as error:
            raise ValueError(f"the model has no {site.name!r}, which {adapter.source!r} adapts") from error
        if shape != (site.d_out, site.d_in):
            raise ValueError(
                f"{site.name!r} is {list(shape)} in the model and {[site.d_out, site.d_in]} in "
                f"{adapter.source!r}; an adapter fits its own base only"
            )


def _site_hooks(
    model: Any, sites: Mapping[SiteKey, SiteEdits], plan_of: PlanOf, clock: models.Clock
) -> Mapping[str, models.HookFunction]:
    """Hooks that read each matrix's input, and add to its output what the plan changes."""
    ports = {key: models.site_ports(model, edits.place.name, edits.place.layer) for key, edits in sites.items()}
    changes: dict[str, list[Change]] = {}

    def reader(entry: models.Port, behind: Sequence[SiteKey]) -> models.HookFunction:
        def read(activation: Tensor) -> None:
            x, plan = entry.flat(activation), plan_of(len(activation))
            if plan is None:
                return
            place = clock.place(x.shape[0], x.shape[1], x.device)
            for key in behind:
                changes[ports[key][1].name] = plan.edit_site(key, x, place)

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

    entries: dict[str, tuple[models.Port, list[SiteKey]]] = {}
    for key, (entry, _) in ports.items():
        entries.setdefault(entry.name, (entry, []))[1].append(key)
    functions: dict[str, models.HookFunction] = {name: reader(*behind) for name, behind in entries.items()}
    return functions | {ports[key][1].name: writer(ports[key][1].name) for key in sites}
