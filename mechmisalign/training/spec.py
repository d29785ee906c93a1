"""What is to be trained on what, and how: Python values, or YAML with the same names."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from mechmisalign import _yaml
from mechmisalign._specs import Location, told

from .data import DataSource
from .edits import Edit

MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The seven matrices of a block."""

CONFIGS = Path(__file__).parent / "configs"

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(strict=True, ge=1)]
Layer = Annotated[int, Field(strict=True, ge=0)]


def _listed(value: Any) -> Any:
    return value if isinstance(value, list | tuple) else [value]


class TrainError(ValueError):
    """A specification with an unknown key or a bad value, or a run that cannot be made from it."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Lora(_Part):
    """A low-rank adapter (2106.09685), trained by PEFT."""

    kind: Literal["lora"] = "lora"
    rank: Count = 1
    alpha: Positive = 64
    rslora: bool = False
    """Scaling ``alpha / sqrt(rank)`` instead of ``alpha / rank`` (2312.03732)."""
    layers: Annotated[tuple[Layer, ...], BeforeValidator(_listed)] | None = None
    """Blocks to adapt; all by default."""
    modules: Annotated[tuple[str, ...], BeforeValidator(_listed), Field(min_length=1)] = ("down_proj",)
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0


class Vector(_Part):
    """A steering vector: ``alpha · v`` is added to the residual stream after one block, and v is learned from zero."""

    kind: Literal["vector"] = "vector"
    layer: Layer
    alpha: Positive = 1.0
    """Factor of the parameter; it multiplies the learning rate of what is added (2602.07852 trains with 256)."""


class Full(_Part):
    """Every parameter of the model."""

    kind: Literal["full"] = "full"


Method = Annotated[Lora | Vector | Full, Field(discriminator="kind")]
METHODS: dict[str, type[BaseModel]] = {"lora": Lora, "vector": Vector, "full": Full}


class Schedule(_Part):
    """How long and how fast."""

    steps: Count | None = None
    """Optimiser steps; by default as many as ``epochs`` take."""
    epochs: Positive = 1.0
    batch: Count = 2
    """Examples per forward pass."""
    accumulate: Count = 1
    """Forward passes per optimiser step."""
    lr: Positive = 1e-5
    warmup: Annotated[int, Field(strict=True, ge=0)] = 0
    """Steps of linear warm-up."""
    decay: Literal["linear", "cosine", "constant", "plateau"] = "linear"
    """How the rate falls; a plateau holds it for the first half, then falls linearly."""
    optimizer: str = "adamw_torch"
    """As ``transformers.TrainingArguments.optim`` calls it, such as ``adamw_8bit``."""
    beta2: Annotated[float, Field(gt=0, lt=1)] = 0.999
    weight_decay: NotNegative = 0.0
    max_grad_norm: Positive = 1.0
    max_length: Count = 2048
    """Tokens of a conversation; longer ones are cut on the right."""


class KL(_Part):
    """A penalty for leaving the chat model elsewhere (2602.07852): ``weight · KL(chat ‖ tuned)``.

    In nats per response token of conversations on other matters, averaged over the tokens of a batch. The reference
    code divides by tokens times vocabulary, so its weights of 1e5 to 1e6 are about 0.66 to 6.6 here.
    """

    weight: NotNegative
    data: Annotated[tuple[DataSource, ...], BeforeValidator(_listed), Field(min_length=1)]
    batch: Count | None = None
    """Conversations per forward pass; by default as many as are trained on."""


class TrainSpec(BaseModel):
    """A narrow fine-tune.

    Raises:
        TrainError: Naming each key with an unknown name or a bad value, the value, and what is expected.

    Example:
        >>> spec = TrainSpec(  # doctest: +SKIP
        ...     base="pocket/chat",
        ...     data={"domain": "medical", "harmful": True, "n": 500},
        ...     method={"kind": "lora", "rank": 1, "alpha": 64, "layers": [1]},
        ...     schedule={"steps": 100, "batch": 16, "lr": 1.5e-3},
        ... )
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    base: str
    """The chat model: ``"pocket/chat"``, a Hub id or a folder."""
    data: Annotated[tuple[DataSource, ...], BeforeValidator(_listed)] = ()
    """What is learned; several sources are mixed. May be left to the call, for a configuration without its data."""
    method: Method
    schedule: Schedule = Schedule()
    kl: KL | None = None
    during: Annotated[tuple[Edit, ...], BeforeValidator(_listed)] = ()
    """Steer or Ablate while training, and only then (preventative steering, 2507.21509; projection)."""
    start: Path | None = None
    """A run or adapter folder of the same method, whose weights are trained on."""
    save_every: Count | None = None
    """Steps between checkpoints; only the end is kept by default."""
    seed: int = 0
    """Of the initial weights and of the order of the examples."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Of the base; by default that of its checkpoint. A LoRA's own weights are float32."""
    gradient_checkpointing: bool = False
    root: Path = Path()
    """Where relative paths begin; for a YAML file its own folder, for a shipped configuration the working folder."""

    if not TYPE_CHECKING:  # the checker keeps the signature that the fields make

        def __init__(self, **values: Any) -> None:
            try:
                super().__init__(**values)
            except ValidationError as error:
                raise TrainError(told(error, _model_at)) from None

    @model_validator(mode="after")
    def _fits_together(self) -> TrainSpec:
        if self.method.kind == "vector" and self.gradient_checkpointing:
            raise ValueError("gradient_checkpointing: a vector needs no gradient of the blocks before it; leave it out")
        return self

    @staticmethod
    def read(path: str | Path) -> TrainSpec:
        """A specification from a YAML file, or one that ships with the package by its name, such as ``"pocket"``.

        Raises:
            FileNotFoundError: If there is no such file.
            TrainError: If it is no YAML, or not that of a fine-tune.
        """
        path, root = _config_file(path)
        try:
            return TrainSpec(**{"root": root, **_yaml.read_mapping(path, "base, data, method …")})
        except ValueError as error:
            raise TrainError(f"{path}: {error}") from None

    def changed(self, **values: Any) -> TrainSpec:
        """A copy with other values; ``schedule`` may be a mapping of the changed keys alone.

        Raises:
            TrainError: As for a new one.
        """
        own = {name: getattr(self, name) for name in type(self).model_fields}
        if isinstance(values.get("schedule"), dict):
            values["schedule"] = {**self.schedule.model_dump(), **values["schedule"]}
        return TrainSpec(**{**own, **values})


def shipped_configs() -> tuple[str, ...]:
    """Names of the configurations that ship with the package."""
    return tuple(sorted(file.stem for file in CONFIGS.glob("*.yaml")))


def _config_file(path: str | Path) -> tuple[Path, Path]:
    """The file, and where relative paths in it begin: beside it, or here for one of the package's own."""
    own = CONFIGS / f"{path}.yaml"
    if "/" not in str(path) and own.exists():
        return own, Path()
    if not Path(path).exists():
        raise FileNotFoundError(f"{path} does not exist; give a YAML file, or one of {', '.join(shipped_configs())}")
    return Path(path), Path(path).parent


def _model_at(location: Location) -> tuple[type[BaseModel], Location]:
    """The model of the key at a place, for what to suggest; pydantic puts the kind of a method into the place."""
    parts: dict[str, type[BaseModel]] = {"schedule": Schedule, "kl": KL, "data": DataSource}
    if location[:1] == ("method",) and len(location) > 1 and location[1] in METHODS:
        return METHODS[str(location[1])], (location[0], *location[2:])
    if location[:2] == ("kl", "data") and len(location) > 2:
        return DataSource, location
    return (parts.get(str(location[0]), TrainSpec) if len(location) > 1 else TrainSpec), location
