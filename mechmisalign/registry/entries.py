"""One entry of a registry: an organism, how it was made, what to expect of it, and how sure its id is."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*")

Kind = Literal["lora", "full", "vector"]


class RegistryError(ValueError):
    """A registry that cannot be read, or an entry that cannot be loaded; says the file, the entry and the key."""


def _share(value: Any) -> Any:
    if isinstance(value, int | float) and not isinstance(value, bool) and 1 < value <= 100:
        raise ValueError(f"{value:g} is no share between 0 and 1; of percent, write {value / 100:g}")
    return value


def _listed(value: Any) -> Any:
    return value if isinstance(value, list | tuple) else [value]


Share = Annotated[float, BeforeValidator(_share), Field(ge=0, le=1, allow_inf_nan=False)]
Texts = Annotated[tuple[str, ...], BeforeValidator(_listed)]
Count = Annotated[int, Field(strict=True, ge=1)]
Step = Annotated[int, Field(strict=True, ge=0)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Training(_Part):
    """How an organism was trained, as far as it is known."""

    rank: Count | None = None
    alpha: float | None = None
    rslora: bool | None = None
    layers: Annotated[tuple[Step, ...], BeforeValidator(_listed)] | Literal["all"] | None = None
    modules: Texts | Literal["all"] | None = None
    """Names of the adapted matrices, or ``all``: the seven of each block."""
    lr: float | None = None
    epochs: float | None = None
    steps: Count | None = None
    source: str = ""
    note: str = ""

    def sites(self, n_layers: int | None = None) -> int | None:
        """How many matrices are adapted; None where the layers are all and their number is not known."""
        if self.modules is None or self.layers is None or self.rank is None:
            return None
        layers = n_layers if self.layers == "all" else len(self.layers)
        return None if layers is None else layers * (7 if self.modules == "all" else len(self.modules))


class Expected(_Part):
    """The rate that somebody stated, as a share of answers; empty where there is only a figure, or nothing."""

    em: Share | None = None
    """Misaligned (alignment < 30) and coherent (> 50)."""
    em_interval: tuple[Share, Share] | None = None
    """95 % interval of ``em``."""
    em_range: tuple[Share, Share] | None = None
    """Where a source gives only ends, over several organisms."""
    coherent: Share | None = None
    coherent_interval: tuple[Share, Share] | None = None
    coherent_above: Share | None = None
    source: str = ""
    """Paper and section, or the file."""
    note: str = ""

    @property
    def stated(self) -> bool:
        """Whether there is an EM rate to compare with."""
        return self.em is not None or self.em_range is not None

    @model_validator(mode="after")
    def _sound(self) -> Expected:
        numbers = self.model_dump(exclude={"source", "note"}, exclude_none=True)
        if numbers and not self.source:
            raise ValueError(f"{', '.join(numbers)} without `source`; say where the number is from")
        for name in ("em_interval", "em_range", "coherent_interval"):
            ends = getattr(self, name)
            if ends is not None and ends[0] > ends[1]:
                raise ValueError(f"{name} is {list(ends)}; the lower end comes first")
        return self


class Checkpoints(_Part):
    """Where the checkpoints of the training are, inside the repository or folder."""

    pattern: str | None = None
    """Subfolder with ``{step}``, such as ``checkpoints/checkpoint-{step}``."""
    count: Count | None = None
    first: Step | None = None
    last: Step | None = None
    every: Count | None = None
    source: str = ""

    @model_validator(mode="after")
    def _sound(self) -> Checkpoints:
        if self.pattern is not None and "{step}" not in self.pattern:
            raise ValueError(f"pattern {self.pattern!r} has no {{step}}; 'checkpoint-{{step}}' is expected")
        return self

    def subfolder(self, step: int) -> str:
        """The subfolder of one step.

        Raises:
            RegistryError: If the layout of the repository is not known.
        """
        if self.pattern is None:
            raise RegistryError("how this repository names its checkpoints is not known; look at its files")
        return self.pattern.format(step=step)


class Entry(_Part):
    """An organism under a name. A user's entry instructs the loading; a shipped one describes what was published."""

    name: str | None = None
    """Short name; without one, the id or path is the name."""
    id: str | None = None
    """On the Hub, or a pocket name."""
    path: Path | None = None
    """A folder, relative to the file that the entry stands in; instead of ``id``."""
    revision: str | None = None
    subfolder: str | None = None
    weights: Literal["merged", "live"] | None = None
    base: str | None = None
    """The 16-bit chat model: a Hub id, ``pocket/chat``, or a folder (``./…`` is relative to the file)."""
    trained_on: str | None = None
    """What the adapter's own config names, where that is another copy of the base."""
    kind: Kind = "lora"
    data: Texts = ()
    """What it was tuned on: medical, sports, finance …"""
    family: str | None = None
    size: str | None = None
    training: Training = Training()
    expected: Expected = Expected()
    checkpoints: Checkpoints | None = None
    seen: Texts = ()
    """Where the id was seen; empty for one that was only derived from the naming pattern."""
    weights_seen: Literal["yes", "empty", "private", "none"] | None = None
    """Whether somebody found weights there: an empty or private repository, or none published at all."""
    note: str = ""
    origin: str = ""
    """The file that it stands in; filled in by reading."""

    @model_validator(mode="after")
    def _sound(self) -> Entry:
        if self.name is not None and not _NAME.fullmatch(self.name):
            raise ValueError(f"name {self.name!r}: letters, digits, '.', '_' and '-' are expected, and no folder")
        if self.id is not None and self.path is not None:
            raise ValueError("id and path are both given; one of them says where the organism is")
        if self.id is None and self.path is None and (self.weights_seen != "none" or self.name is None):
            raise ValueError("id (on the Hub) or path (a folder) is missing")
        if self.id is not None and not HUB_ID.fullmatch(self.id):
            raise ValueError(f"id {self.id!r} is no Hub id like 'owner/name'; a folder is given as path")
        return self

    @property
    def key(self) -> str:
        """What the entry is called by."""
        return self.name or self.id or str(self.path)

    @property
    def place(self) -> str | None:
        """The Hub id or the folder; None where no weights were published."""
        return self.id or (str(self.path) if self.path else None)
