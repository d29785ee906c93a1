"""The combinations of an intervention's values: what each does, and what it is called."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from mechmisalign.adapters import Adapter
from mechmisalign.directions import Direction
from mechmisalign.interventions import Ablate, Clamp, Intervention, ScaleAdapter, Steer

from ._errors import SweepError
from .spec import AblateGrid, ClampGrid, Entry, Kind, NoIntervention, ScaleGrid, SteerGrid

Cell = tuple[dict[str, Any], tuple[Intervention, ...]]


def cells(one: Kind, adapter: Adapter, directions: Mapping[str, Direction]) -> Iterator[Cell]:
    """What is told of each combination of an intervention's values, and the intervention itself."""
    if isinstance(one, NoIntervention):
        yield _told("none"), ()
    elif isinstance(one, ScaleGrid):
        yield from _scaled(one, adapter)
    else:
        for name in one.directions:
            for layers in _layers(one.layers, directions[name]):
                for positions in one.positions:
                    told = _told(one.kind, direction=name, positions=positions, **_where(layers))
                    yield from _on_direction(one, directions[name], layers, told)


def _on_direction(
    one: SteerGrid | ClampGrid | AblateGrid, direction: Direction, layers: tuple[int, ...] | None, told: dict[str, Any]
) -> Iterator[Cell]:
    positions = told["positions"]
    if isinstance(one, AblateGrid):
        yield told, (Ablate(direction, layers, positions),)
    elif isinstance(one, SteerGrid):
        for strength in one.strengths:
            edit = Steer(direction, layers, strength, one.units, positions)
            yield told | {"strength": strength, "units": one.units}, (edit,)
    else:
        for value in one.values:
            clamp = Clamp(direction, value, layers, one.units, positions)
            yield told | {"strength": value, "units": one.units}, (clamp,)


def _scaled(one: ScaleGrid, adapter: Adapter) -> Iterator[Cell]:
    keys = {site.label: site.key for site in adapter.sites}
    for labels in _expand(one.sites, list(keys)):
        unknown = [label for label in labels or () if label not in keys]
        if unknown:
            raise SweepError(f"{adapter.source!r} has no site {unknown[0]!r}; it has {', '.join(list(keys)[:10])}")
        chosen = list(keys) if labels is None else labels
        where = "all" if labels is None else "+".join(labels)
        where += "" if one.others == 1.0 else f" (others x{_number(one.others)})"
        alone = keys[chosen[0]][0] if len(chosen) == 1 else None
        for factor in one.factors:
            for positions in one.positions:
                edit = ScaleAdapter({keys[label]: factor for label in chosen}, one.others, positions)
                yield _told(one.kind, layer=alone, layers=where, strength=factor, positions=positions), (edit,)


def _layers(entries: Iterable[Entry], direction: Direction) -> list[tuple[int, ...] | None]:
    return _expand(entries, direction.nonzero_layers)


def _expand(entries: Iterable[Any], each: Iterable[Any]) -> list[tuple[Any, ...] | None]:
    """Entries of an axis as tuples of what is edited together; None for all."""
    found: list[tuple[Any, ...] | None] = []
    for entry in entries:
        if entry == "each":
            found += [(one,) for one in each]
        else:
            found.append(None if entry == "all" else tuple(entry))
    return found


def _where(layers: tuple[int, ...] | None) -> dict[str, Any]:
    words = "all" if layers is None else "+".join(map(str, layers))
    return {"layer": layers[0] if layers is not None and len(layers) == 1 else None, "layers": words}


def _told(kind: str, **known: Any) -> dict[str, Any]:
    empty = {"direction": None, "layer": None, "layers": None, "strength": None, "units": None, "positions": None}
    return {"intervention": kind, **empty, **known}


def named(told: Mapping[str, Any]) -> str:
    """A condition in words, such as ``steer mean, layer 3, x2``."""
    kind, layers = str(told["intervention"]), told["layers"]
    noun = "site" if kind == "scale_adapter" else "layer"
    words = [kind if told["direction"] is None else f"{kind} {told['direction']}"]
    if layers is not None:
        words.append(f"all {noun}s" if layers == "all" else f"{noun}{'s' if '+' in layers else ''} {layers}")
    if told["strength"] is not None:
        words.append(f"{'to ' if kind == 'clamp' else 'x'}{_number(told['strength'])}")
    words += [str(told["units"])] if told["units"] not in (None, "absolute") else []
    usual = "non_sink" if kind in ("ablate", "clamp") else "all"
    words += [f"{told['positions']}"] if told["positions"] not in (None, usual) else []
    return ", ".join(words)


def _number(value: float) -> str:
    """The shortest text that reads back as the number: no two numbers share one."""
    return repr(float(value)).removesuffix(".0")
