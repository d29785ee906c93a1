"""Sweeps: a grid of conditions, sampled and judged into one tidy table, on this machine or on many.

A sweep is organisms x interventions (kind, direction, layer, strength, positions) x prompts x samples x seeds, written
in Python (:class:`Sweep`) or as YAML. It runs into a folder that can be left and taken up again, and that takes a grid
that has grown. Which executor does the work, in which pieces and in which order, changes no row.
"""

from ._errors import SweepError
from .executors import Executor, LocalExecutor
from .grid import Condition, Grid, make_grid
from .ray_executor import RayExecutor, WorkersLostError
from .running import SweepResult, SweepStatus, status, sweep
from .search import StrengthSearch, best_strength
from .sources import DirectionSource, JudgeSource, OrganismSource, PromptSource
from .spec import AblateGrid, ClampGrid, NoIntervention, ScaleGrid, SteerGrid, Sweep
from .work import Job, Sampled, Task, Workplace, make_job, make_tasks

__all__ = [
    "AblateGrid",
    "ClampGrid",
    "Condition",
    "DirectionSource",
    "Executor",
    "Grid",
    "Job",
    "JudgeSource",
    "LocalExecutor",
    "NoIntervention",
    "OrganismSource",
    "PromptSource",
    "RayExecutor",
    "Sampled",
    "ScaleGrid",
    "SteerGrid",
    "StrengthSearch",
    "Sweep",
    "SweepError",
    "SweepResult",
    "SweepStatus",
    "Task",
    "WorkersLostError",
    "Workplace",
    "best_strength",
    "make_grid",
    "make_job",
    "make_tasks",
    "status",
    "sweep",
]
