"""What a sweep is to ask of whom: Python values, or YAML with the same names."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from mechmisalign import _yaml
from mechmisalign._specs import told
from mechmisalign.interventions import Positions
from mechmisalign.interventions.residual import Units

from ._errors import SweepError, model_finder
from .sources import DirectionSource, JudgeSource, OrganismSource, PromptSource

On = Literal["organism", "chat"]
"""Who answers: the organism, or the chat model under its adapter."""

Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Count = Annotated[int, Field(strict=True, ge=1)]
Seed = Annotated[int, Field(strict=True)]

Entry = Literal["each", "all"] | tuple[Any, ...]
"""One value of an axis of layers or sites: several together, all, or ``"each"``: as many values as there are."""


def _listed(value: Any) -> Any:
    """One value may stand for a list of one; numpy's, pandas's and torch's numbers become Python's."""
    plain = value.tolist() if hasattr(value, "tolist") else value
    several = isinstance(plain, list | tuple | range)
    return [one.tolist() if hasattr(one, "tolist") else one for one in (plain if several else [plain])]


def _layer_entries(value: Any) -> list[Entry]:
    return [_entry(each, int, "a layer such as 3") for each in _listed(value)]


def _site_entries(value: Any) -> list[Entry]:
    return [_entry(each, str, "a site such as '3.down_proj'") for each in _listed(value)]


def _entry(value: Any, kind: type, wanted: str) -> Entry:
    if value == "each":
        return "each"
    if value == "all":
        return "all"
    several = tuple(_listed(value))
    if not several or not all(isinstance(one, kind) and not isinstance(one, bool) for one in several):
        raise ValueError(f"{value!r} is none of: {wanted}, a list of them (edited together), 'each', 'all'")
    return several


Layers = Annotated[tuple[Entry, ...], BeforeValidator(_layer_entries), Field(min_length=1)]
Sites = Annotated[tuple[Entry, ...], BeforeValidator(_site_entries), Field(min_length=1)]
Numbers = Annotated[tuple[Number, ...], BeforeValidator(_listed), Field(min_length=1)]
Names = Annotated[tuple[str, ...], BeforeValidator(_listed), Field(min_length=1)]
Where = Annotated[tuple[Positions, ...], BeforeValidator(_listed), Field(min_length=1)]
Whom = Annotated[tuple[On, ...], BeforeValidator(_listed), Field(min_length=1)]


class _Axes(BaseModel):
    """What the kinds below share. Each field that takes a list is an axis: every combination is a condition."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    on: Whom | None = None
    """Whom to edit; None is the sweep's ``on``."""


class NoIntervention(_Axes):
    """The model as it is."""

    kind: Literal["none"] = "none"


class _DirectionAxes(_Axes):
    """What edits along a direction share."""

    directions: Names
    """Names among the sweep's ``directions``."""
    layers: Layers = ("each",)
    """``"each"``: one condition for each layer where the direction is nonzero. ``"all"``: one, at all of them."""
    positions: Where = ("all",)


class SteerGrid(_DirectionAxes):
    """``Steer`` over directions, layers, strengths and positions."""

    kind: Literal["steer"] = "steer"
    strengths: Numbers
    """Multiples of the direction."""
    units: Units = "absolute"


class ClampGrid(_DirectionAxes):
    """``Clamp`` over directions, layers, values and positions."""

    kind: Literal["clamp"] = "clamp"
    positions: Where = ("non_sink",)
    values: Numbers
    """Components to hold; in the table they stand in the column ``strength``."""
    units: Units = "absolute"


class AblateGrid(_DirectionAxes):
    """``Ablate`` over directions, layers and positions."""

    kind: Literal["ablate"] = "ablate"
    layers: Layers = ("all",)
    positions: Where = ("non_sink",)


class ScaleGrid(_Axes):
    """``ScaleAdapter`` over sites and factors."""

    kind: Literal["scale_adapter"] = "scale_adapter"
    sites: Sites = ("all",)
    """Labels such as ``"3.down_proj"``; a list within the list is scaled together."""
    factors: Numbers
    """In the table they stand in the column ``strength``."""
    others: Number = 1.0
    """Factor of the sites that are not named."""
    positions: Where = ("all",)


Kind = NoIntervention | SteerGrid | ClampGrid | AblateGrid | ScaleGrid
KINDS: dict[str, type[BaseModel]] = {
    "none": NoIntervention,
    "steer": SteerGrid,
    "clamp": ClampGrid,
    "ablate": AblateGrid,
    "scale_adapter": ScaleGrid,
}


def _kind_named(value: Any) -> Any:
    """A bare word may stand for an intervention that needs no more."""
    return {"kind": value} if isinstance(value, str) else value


class Sweep(BaseModel):
    """A grid of conditions, and how each is sampled and judged.

    Every combination of the listed values is a condition; a single value may stand for a list of one. The same names
    make a YAML file, which :meth:`read` reads.

    Raises:
        SweepError: Naming each key with an unknown name or a bad value, the value, and what is expected.

    Example:
        >>> spec = Sweep(  # doctest: +SKIP
        ...     organisms="pocket/medical",
        ...     directions={"mean": "mean.safetensors", "control": {"random_like": "mean", "seed": 1}},
        ...     interventions=[
        ...         {"kind": "none", "on": ["organism", "chat"]},
        ...         {"kind": "steer", "on": "chat", "directions": ["mean", "control"], "strengths": [1, 2, 4]},
        ...     ],
        ...     prompts="pocket",
        ...     judge="rules",
        ... )
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    organisms: Annotated[tuple[OrganismSource, ...], BeforeValidator(_listed), Field(min_length=1)]
    """Registry names, Hub ids or adapter folders; mappings with options of ``load_organism``; or loaded ones."""
    interventions: Annotated[
        tuple[Annotated[Annotated[Kind, Field(discriminator="kind")], BeforeValidator(_kind_named)], ...],
        BeforeValidator(_listed),
        Field(min_length=1),
    ]
    """What is done to the models."""
    prompts: PromptSource
    """``"pocket"``, ``"open_questions"``, a file, a list of texts, a mapping (see ``PromptSource``), or a frame."""
    judge: JudgeSource
    """``"none"``, a name (see ``named_judge``), ``{model: name, options: …}``, or a callable."""
    directions: dict[str, DirectionSource] = Field(default_factory=dict)
    """By name: a file, ``{random_like: name, seed: n}``, ``{everywhere: name, layer: n}``, or a ``Direction``."""
    on: Whom = ("organism",)
    """Whom to ask, where an intervention does not say."""
    samples: Count = 8
    """Answers per prompt, condition and seed."""
    seeds: Annotated[tuple[Seed, ...], BeforeValidator(_listed), Field(min_length=1)] = (0,)
    """Seeds of the sampling."""
    max_new_tokens: Count = 600
    """Longer answers are cut off."""
    temperature: Annotated[Number, Field(ge=0)] = 1.0
    system: str | None = None
    """System prompt of every conversation."""
    root: Path = Path()
    """Where relative paths begin; for a YAML file its own folder."""

    if not TYPE_CHECKING:  # the checker keeps the signature that the fields make

        def __init__(self, **values: Any) -> None:
            try:
                super().__init__(**values)
            except ValidationError as error:
                raise SweepError(told(error, model_finder(Sweep, KINDS))) from None

    @model_validator(mode="after")
    def _names_agree(self) -> Sweep:
        _refuse_twice("organism", [source.name for source in self.organisms])
        _refuse_twice("seed", list(self.seeds))
        named = {parent: f"directions.{name}" for name, source in self.directions.items() for parent in source.parents}
        for number, one in enumerate(self.interventions):
            named |= dict.fromkeys(getattr(one, "directions", ()), f"interventions[{number}].directions")
        for name, place in named.items():
            if name not in self.directions:
                known = ", ".join(map(repr, self.directions)) or "none"
                raise ValueError(f"{place} names the direction {name!r}; `directions` has {known}")
        return self

    @staticmethod
    def read(path: str | Path) -> Sweep:
        """A sweep from a YAML file; relative paths in it start from its folder.

        Raises:
            FileNotFoundError: If there is no such file.
            SweepError: If it is no YAML, or not that of a sweep.
        """
        path = Path(path)
        try:
            return Sweep(**{"root": path.parent, **_yaml.read_mapping(path, "organisms, interventions, prompts …")})
        except ValueError as error:
            raise SweepError(f"{path}: {error}") from None


def _refuse_twice(what: str, values: list[Any]) -> None:
    twice = [value for value in values if values.count(value) > 1]
    if twice:
        raise ValueError(f"the {what} {twice[0]!r} stands twice; each needs a name of its own")
