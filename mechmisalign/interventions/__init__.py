"""Interventions: frozen values that edit activations while a ``with`` block runs.

Some edit the residual stream (``Steer``, ``Ablate``, ``Clamp``), some what the adapter's sites read and write
(``ScaleAdapter``, ``PatchScalars``, ``AblateFromAdapter``), one puts another adapter on the chat model
(``UseAdapter``). Which positions they touch is decided in absolute columns of the sequence, so they mean the same in
one forward pass and token by token under a KV cache. Several at once act in the order given. Strength 0 and factor 1
give back the very same values.
"""

from ._fusing import Compiled
from ._values import Intervention, Positions, ResidualIntervention, SiteIntervention, Strength
from .adapter import AblateFromAdapter, PatchScalars, ScaleAdapter, UseAdapter
from .hooking import applied, check_fits, planned
from .plan import RowPlan
from .residual import Ablate, Clamp, Steer

__all__ = [
    "Ablate",
    "AblateFromAdapter",
    "Clamp",
    "Compiled",
    "Intervention",
    "PatchScalars",
    "Positions",
    "ResidualIntervention",
    "RowPlan",
    "ScaleAdapter",
    "SiteIntervention",
    "Steer",
    "Strength",
    "UseAdapter",
    "applied",
    "check_fits",
    "planned",
]
