"""Interventions: frozen values that edit activations while a ``with`` block runs.

Some edit the residual stream (``Steer``, ``Ablate``, ``Clamp``), some what the adapter's sites read and write
(``ScaleAdapter``, ``PatchScalars``, ``AblateFromAdapter``). Which positions they touch is decided in absolute columns
of the sequence, so they mean the same in one forward pass and token by token under a KV cache. Several at once act in
the order given. Strength 0 and factor 1 give back the very same values.
"""

from ._values import Intervention, Positions, ResidualIntervention, SiteIntervention, Strength
from .adapter import AblateFromAdapter, PatchScalars, ScaleAdapter
from .plan import RowPlan, applied, check_fits, planned
from .residual import Ablate, Clamp, Steer

__all__ = [
    "Ablate",
    "AblateFromAdapter",
    "Clamp",
    "Intervention",
    "PatchScalars",
    "Positions",
    "ResidualIntervention",
    "RowPlan",
    "ScaleAdapter",
    "SiteIntervention",
    "Steer",
    "Strength",
    "applied",
    "check_fits",
    "planned",
]
