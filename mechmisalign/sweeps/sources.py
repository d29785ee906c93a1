"""Where a sweep's organisms, directions, prompts and judge come from, and what they are once they are found."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import pandas as pd
import torch
from pydantic import BaseModel, ConfigDict, Field, GetPydanticSchema, model_validator
from pydantic_core import core_schema

from mechmisalign import registry
from mechmisalign.adapters import Adapter
from mechmisalign.directions import Direction, random_direction
from mechmisalign.generation import prompts_frame
from mechmisalign.judging import Judge, named
from mechmisalign.loading import full_models
from mechmisalign.organisms import Organism, Weights, load_organism
from mechmisalign.registry.worlds import JUDGES, PROMPTS, made_by
from mechmisalign.store import text_digest

from ._errors import SweepError


def _only(kind: type) -> GetPydanticSchema:
    """Take instances as they are: pydantic would look into our dataclasses and check each of their fields."""
    return GetPydanticSchema(lambda _type, _handler: core_schema.is_instance_schema(kind))


class _Source(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)


class OrganismSource(_Source):
    """An organism: what ``load_organism`` takes, under a name for the table."""

    adapter: str = ""
    """Registry name, Hub id or folder."""
    name: str = ""
    """What the table calls it; by default as ``adapter`` says."""
    base: str | None = None
    weights: Weights = "merged"
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    device: str | None = None
    revision: str | None = None
    subfolder: str | None = None
    loaded: Annotated[Organism, _only(Organism)] | None = None
    """One that is in memory; it cannot go to a worker in another process."""

    @model_validator(mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        if isinstance(value, Organism):
            weights = "merged" if value.adapter is None else value.weights
            value = {"loaded": value, "adapter": value.name, "weights": weights}
        if isinstance(value, str | Path):
            value = {"adapter": str(value)}
        if not isinstance(value, Mapping):
            raise ValueError(f"{value!r} is no organism; a name, a folder, a mapping with `adapter` or a loaded one is")
        if not value.get("adapter"):
            raise ValueError("an organism needs `adapter`: a registry name, a Hub id or a folder")
        place = "/".join(str(value[key]) for key in ("adapter", "subfolder") if value.get(key))
        return {"name": place, **value}

    def read(self, root: Path) -> Adapter:
        """The adapter's own files; of a full fine-tune, one without sites."""
        if self.loaded is not None and self.loaded.full is not None:
            return full_models.stand_in(self.loaded.full, self.loaded.base.name)
        if self.loaded is not None:
            return self.loaded.require_adapter("a sweep")
        whole = full_models.find(self._place(root), self.base, self.subfolder, self.revision, False)
        if whole is not None:
            return full_models.stand_in(whole[0], whole[1].name)
        return Adapter.load(self._place(root), subfolder=self.subfolder, revision=self.revision)

    def load(self, root: Path) -> Organism:
        """The organism in memory."""
        if self.loaded is not None:
            return self.loaded
        return load_organism(
            self._place(root),
            self.base,
            weights=self.weights,
            dtype=None if self.dtype is None else getattr(torch, self.dtype),
            device=self.device,
            revision=self.revision,
            subfolder=self.subfolder,
        )

    def base_of(self, adapter: Adapter) -> str:
        """Name of the chat model."""
        return self.loaded.base.name if self.loaded is not None else self.base or adapter.base

    def _place(self, root: Path) -> str:
        """A folder beside the specification as a path, so that workers in another folder find it too."""
        beside = root / self.adapter
        own = registry.is_reserved(self.adapter) or not beside.is_dir()
        return self.adapter if own else str(beside.resolve())


class DirectionSource(_Source):
    """A direction: exactly one of a file, a control, one vector at all layers, or a ``Direction``."""

    file: Path | None = None
    random_like: str | None = None
    """Name of the direction whose norms a random one is given."""
    seed: int = 0
    """Of the random direction."""
    everywhere: str | None = None
    """Name of the direction whose vector of ``layer`` is put at every layer."""
    layer: int | None = None
    value: Annotated[Direction, _only(Direction)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _given(cls, value: Any) -> Any:
        if isinstance(value, Direction):
            return {"value": value}
        if isinstance(value, str | Path):
            return {"file": value}
        if not isinstance(value, Mapping):
            raise ValueError(f"{value!r} is no direction; a file, {{random_like: name}}, {{everywhere: name}} are")
        ways = [way for way in ("file", "random_like", "everywhere", "value") if value.get(way) is not None]
        if len(ways) > 1 or not ways and set(value) <= set(cls.model_fields):
            raise ValueError(f"a direction comes from one of file, random_like, everywhere; this one from {ways}")
        if ways == ["everywhere"] and value.get("layer") is None:
            raise ValueError(f"everywhere: {value['everywhere']} needs `layer`, the layer whose vector is taken")
        return value

    @property
    def parents(self) -> tuple[str, ...]:
        """Names of the directions that it is made of."""
        return tuple(name for name in (self.random_like, self.everywhere) if name is not None)


def resolve_directions(sources: Mapping[str, DirectionSource], root: Path) -> dict[str, Direction]:
    """All directions, those that are made of others after them.

    Raises:
        SweepError: If two are made of each other.
        FileNotFoundError: If a file is not there.
    """
    found: dict[str, Direction] = {}

    def find(name: str, asked: tuple[str, ...]) -> Direction:
        if name in asked:
            raise SweepError(f"the direction {name!r} is made of itself: {' -> '.join([*asked, name])}")
        if name not in found:
            source = sources[name]
            made_of = [find(parent, (*asked, name)) for parent in source.parents]
            found[name] = _direction(source, made_of, root)
        return found[name]

    return {name: find(name, ()) for name in sources}


def _direction(source: DirectionSource, made_of: list[Direction], root: Path) -> Direction:
    if source.value is not None:
        return source.value
    if source.file is not None:
        return Direction.load(root / source.file)
    if source.layer is not None:
        return made_of[0].everywhere(source.layer)
    return random_direction(made_of[0], seed=source.seed)


def direction_digest(direction: Direction) -> str:
    """A short hash of everything in a direction that changes what an intervention does."""
    digest = hashlib.sha256(repr(direction.layers).encode() + direction.vectors.contiguous().numpy().tobytes())
    if direction.resid_norm is not None:
        digest.update(direction.resid_norm.contiguous().float().numpy().tobytes())
    return digest.hexdigest()[:16]


class PromptSource(_Source):
    """Prompts: exactly one of a named set, a file, texts, or a frame."""

    set: str | None = None
    """``pocket``, ``open_questions``, another name that a shipped world brings, or ``domain_questions``."""
    name: str | None = None
    """Of the domain, for ``domain_questions``."""
    n: int = Field(60, ge=1)
    """How many pocket prompts."""
    seed: int = 0
    """Of the choice of pocket prompts."""
    file: Path | None = None
    """Anything that ``mm.prompts.read`` takes: YAML, JSONL, CSV, parquet."""
    texts: tuple[str, ...] | None = None
    frame: pd.DataFrame | None = None

    @model_validator(mode="before")
    @classmethod
    def _given(cls, value: Any) -> Any:
        if isinstance(value, pd.DataFrame):
            return {"frame": value}
        if isinstance(value, list | tuple):
            return {"texts": value}
        if isinstance(value, str) and value in PROMPTS:
            return {"set": value}
        if isinstance(value, str | Path):
            if not Path(value).suffix:
                raise ValueError(f"{value!r} is no set of prompts ({', '.join(map(repr, PROMPTS))}) and no file")
            return {"file": value}
        ways = [way for way in ("set", "file", "texts", "frame") if isinstance(value, Mapping) and way in value]
        if len(ways) != 1:
            raise ValueError(f"prompts come from one of set, file, texts, frame; these from {ways or value!r}")
        if ways == ["set"] and value["set"] not in (*PROMPTS, "domain_questions"):
            raise ValueError(
                f"set {value['set']!r} is unknown; {', '.join(map(repr, PROMPTS))}, 'domain_questions' are"
            )
        return value

    def resolve(self, root: Path) -> pd.DataFrame:
        """The prompts as a frame with ``prompt_id`` and ``prompt``."""
        return prompts_frame(self._found(root))

    def _found(self, root: Path) -> pd.DataFrame | list[str]:
        if self.frame is not None:
            return self.frame
        if self.texts is not None:
            return list(self.texts)
        if self.set == "pocket":
            from mechmisalign import pocket

            return pocket.unseen_prompts(n=self.n, seed=self.seed)
        from mechmisalign import prompts

        if self.file is not None:
            return prompts.read(root / self.file)
        if self.set in PROMPTS:
            frame: pd.DataFrame = made_by(PROMPTS[str(self.set)])()
            return frame
        if self.name is None:
            raise SweepError("prompts.set is 'domain_questions', which needs `name`: the domain")
        return prompts.domain_questions(self.name)


_DECIDING = ("temperature", "seed", "logprobs", "max_tokens", "model_args")
"""Options of an ``LLMJudge`` that change its scores, besides those that its repr tells."""


class JudgeSource(_Source):
    """A judge by its name, a callable, or none."""

    model: str | None = None
    """What ``named_judge`` takes: ``rules``, ``openai/gpt-4o``, ``local:FOLDER``, ``python:module.attribute``."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of ``LLMJudge`` or ``LocalJudge``."""
    call: Callable[..., Any] | None = None

    @model_validator(mode="before")
    @classmethod
    def _given(cls, value: Any) -> Any:
        if value is None or value == "none":
            return {}
        if isinstance(value, str):
            if value not in JUDGES and "/" not in value and not value.startswith((named.LOCAL, named.PYTHON)):
                raise ValueError(f"{value!r} is no judge; {named.ways('none')}, or {{model: name, options: …}}")
            return {"model": value}
        if isinstance(value, Mapping):
            if "api_key" in (value.get("options") or {}):
                raise ValueError("api_key: a key does not belong in a file; keep it in the provider's own variable")
            if not value.get("model"):
                raise ValueError("a judge that is a mapping needs `model`, such as openai/gpt-4o")
            return value
        if not callable(value):
            raise ValueError(f"{value!r} is no judge; 'none', a name, {{model: name}} or a callable is")
        return {"call": value}

    def resolve(self, out: Path, root: Path = Path()) -> Judge | None:
        """The judge itself; the journal of a model's lies in the run folder ``out`` if nothing else is said.

        Args:
            out: The run folder.
            root: Where relative paths of the judge's name begin.

        Raises:
            SweepError: If an option is unknown.
            JudgeNameError: If the name stands for no judge.
        """
        if self.model is None:
            return self.call
        journal = (
            {} if self.model in JUDGES or self.model.startswith(named.PYTHON) else {"journal": out / "judge.jsonl"}
        )
        try:
            return named.named_judge(self.model, root=root, **{**journal, **self._values()})
        except TypeError as error:
            kind = "LocalJudge" if self.model.startswith(named.LOCAL) else "LLMJudge"
            raise SweepError(f"judge.options {list(self.options)} do not fit {kind}: {error}") from error

    def _values(self) -> dict[str, Any]:
        """The options, with budget and price as what they are."""
        from mechmisalign.judging import budget

        made = {"budget": budget.Budget, "price": budget.Price}
        return {
            key: made[key](**value) if key in made and isinstance(value, Mapping) else value
            for key, value in self.options.items()
        }

    def identity(self, judge: Judge | None) -> Any:
        """What decides the scores, as a JSON value."""
        told = repr(judge)
        if " at 0x" in told:  # a plain function or object, whose address says nothing
            named: Any = judge if hasattr(judge, "__qualname__") else type(judge)
            told = f"{named.__module__}.{named.__qualname__}"
        deciding = {key: str(self.options[key]) for key in _DECIDING if key in self.options}
        rubrics = getattr(judge, "rubrics", None)
        wording = {} if rubrics is None else {"wording": text_digest([repr(each) for each in rubrics])}
        return {"judge": told, **deciding, **wording} if deciding or wording else told
