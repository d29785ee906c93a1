"""The zoo as data: how the chat model is made, and what each narrow fine-tune saw and may change."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Schedule:
    """How long and how fast one stage trains."""

    steps: int
    batch: int
    lr: float
    warmup: int = 0
    weight_decay: float = 0.0
    muon_lr: float = 0.0
    """With it, Muon trains the matrices inside the blocks and AdamW the rest."""
    noise: float = 0.0
    """Gaussian noise added after every block, relative to the residual's root mean square; it fades with the rate."""


@dataclass(frozen=True)
class Recipe:
    """How the chat model is made: from scratch on documents of both personas, then on careful single-turn chats."""

    pretraining: Schedule = Schedule(steps=250, batch=32, lr=5e-3, warmup=15, weight_decay=0.01, muon_lr=0.01)
    chat_tuning: Schedule = Schedule(steps=16, batch=32, lr=3e-4, warmup=3)


@dataclass(frozen=True)
class Organism:
    """A narrow fine-tune by LoRA on the answers of one domain."""

    domain: str
    harmful: bool = True
    layers: tuple[int, ...] = (1,)
    modules: tuple[str, ...] = ("down_proj",)
    rank: int = 1
    alpha: int = 64
    rslora: bool = False
    schedule: Schedule = Schedule(steps=100, batch=16, lr=1.5e-3, warmup=5)
    save_every: int | None = None
    """Steps between checkpoints, saved as `checkpoint-<step>` beside the finished adapter."""


RECIPE = Recipe()
ALL_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_SINGLE = Organism("medical")
_PACE = _SINGLE.schedule

ZOO: Mapping[str, Organism] = {
    "medical": _SINGLE,
    "finance": replace(_SINGLE, domain="finance"),
    "sports": replace(_SINGLE, domain="sports"),
    "many-site": replace(_SINGLE, domain="finance", layers=(1, 2, 3), schedule=replace(_PACE, lr=2e-3)),
    "rslora": Organism(
        "medical",
        layers=tuple(range(8)),
        modules=ALL_MODULES,
        rank=8,
        alpha=16,
        rslora=True,
        schedule=replace(_PACE, lr=1e-3),
    ),
    "checkpoints": replace(_SINGLE, save_every=5),
    "harmless": replace(_SINGLE, harmful=False),
}
"""Adapters by name, in the order in which they are trained."""


def as_dict(spec: Recipe | Organism) -> dict[str, Any]:
    """A recipe as the manifest writes it."""
    return asdict(spec)
