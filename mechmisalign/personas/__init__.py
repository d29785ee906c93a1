"""Persona directions: which way the residual stream moves when a system prompt asks for a trait (2507.21509).

A ``Trait`` says what is meant, in pairs of system prompts for and against it. The chat model answers the trait's
questions under each; a judge may confirm that the answers show the trait, or lack it; the direction is the difference
of their mean residual streams. It needs no fine-tune, so it can be had before one.
"""

from .controls import direction_controls, shuffled_sign
from .extraction import AGAINST, FOR, persona_answers, persona_direction, persona_moments
from .judging import OppositeOfAlignment
from .traits import Trait, TraitError

__all__ = [
    "AGAINST",
    "FOR",
    "OppositeOfAlignment",
    "Trait",
    "TraitError",
    "direction_controls",
    "persona_answers",
    "persona_direction",
    "persona_moments",
    "shuffled_sign",
]
