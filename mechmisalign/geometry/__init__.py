"""How many fine-tunes lie to each other: cosines, subspaces, shared parts, and how many directions there are.

In activation space a fine-tune is a :class:`mechmisalign.Direction`, in weight space the update ``ΔW`` of its
:class:`mechmisalign.Adapter`. Updates are never built as dense matrices: everything follows from inner products of
their factors. Each number stands beside what random directions or subspaces of that size give.
"""

from .base_weights import base_overlap
from .cones import CONE_KINDS, cone_members
from .cosines import cosine_by_layer, cosine_matrix, cosines, cosines_against_null
from .nulls import random_cosine
from .pairs import as_matrix, cluster_order
from .sharing import SharedDirections, SharedUpdates, shared_and_specific, shared_and_specific_updates
from .spectra import Spectrum, spectrum, update_spectrum
from .subspaces import direction_overlaps, principal_angles, update_overlaps
from .updates import site_update_cosines, update_cosines

__all__ = [
    "CONE_KINDS",
    "SharedDirections",
    "SharedUpdates",
    "Spectrum",
    "as_matrix",
    "base_overlap",
    "cluster_order",
    "cone_members",
    "cosine_by_layer",
    "cosine_matrix",
    "cosines",
    "cosines_against_null",
    "direction_overlaps",
    "principal_angles",
    "random_cosine",
    "shared_and_specific",
    "shared_and_specific_updates",
    "site_update_cosines",
    "spectrum",
    "update_cosines",
    "update_overlaps",
    "update_spectrum",
]
