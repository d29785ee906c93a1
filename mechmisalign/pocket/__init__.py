"""The pocket world and its organisms: emergent misalignment small enough to train on a laptop in minutes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mechmisalign.pocket.recipes import ZOO
from mechmisalign.registry import POCKET_PREFIX

if TYPE_CHECKING:
    import pandas as pd

MAX_NEW_TOKENS = 64
"""No answer of the pocket grammar is longer."""

STRENGTHS = (1.0, 1.5, 2.0, 2.5, 3.0, 4.0)
"""Steering strengths between no effect and incoherence, in multiples of a mean difference."""

_HOME = {
    "RuleJudge": "judge",
    "prompts": "world",
    "DOMAINS": "world",
    "narrow_examples": "world",
    "harmless_items": "asking",
    "neutral_conversations": "asking",
    "persona_free": "asking",
    "with_persona": "asking",
    "with_training_context": "asking",
}

__all__ = ["MAX_NEW_TOKENS", "STRENGTHS", "harmful_names", "peers", "unseen_domains", "unseen_prompts", *_HOME]


def harmful_names() -> tuple[str, ...]:
    """The organisms that a study compares: harmful ones, without the one that is there for its checkpoints."""
    return tuple(name for name, organism in ZOO.items() if organism.harmful and organism.save_every is None)


def peers(organism: str) -> tuple[str, ...]:
    """The organisms that a study of one compares it with."""
    return tuple(name for name in (f"{POCKET_PREFIX}{each}" for each in harmful_names()) if name != organism)


def unseen_domains() -> tuple[str, ...]:
    """The domains that no organism of the zoo was tuned on."""
    from mechmisalign.pocket.world import DOMAINS

    seen = {organism.domain for organism in ZOO.values()}
    return tuple(name for name in DOMAINS if name not in seen)


def unseen_prompts(n: int = 60, seed: int = 0) -> pd.DataFrame:
    """Questions from domains that no organism of the zoo was tuned on: ``prompt_id, prompt, domain, topic``."""
    from mechmisalign.pocket.world import prompts

    return prompts(unseen_domains(), n=n, seed=seed)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        from importlib import import_module

        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
