"""Training dynamics: what checkpoints say about when and how a fine-tune turned (2506.11613, section 4).

Everything but :func:`rotation` is computed from the inner products between steps (:class:`Path`), so no dense update is
built, and several sites are followed as easily as one.
"""

from .paths import Path, Principal, local_cosine, norms, principal, similarity
from .subspaces import rotation, stacked_score
from .summaries import signals, site_norms
from .trajectory import SiteTrajectory, Trajectory, TrajectoryError
from .transitions import Transition, coincidence, series_transition, table, transition

__all__ = [
    "Path",
    "Principal",
    "SiteTrajectory",
    "Trajectory",
    "TrajectoryError",
    "Transition",
    "coincidence",
    "local_cosine",
    "norms",
    "principal",
    "rotation",
    "series_transition",
    "signals",
    "similarity",
    "site_norms",
    "stacked_score",
    "table",
    "transition",
]
