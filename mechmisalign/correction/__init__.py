"""Cures: take a direction out of an adapter or a model for good, prevent it in training, and tell what each cure costs.

====================  ================================================================================================
at inference          ``mm.Ablate`` beside the adapter (nothing is saved)
adapter               :func:`project_out`, written by :func:`save_adapter` as PEFT does
weights               :func:`corrected_model`, written by :func:`save_model` as transformers does
in training           :func:`preventative_steering`, :func:`projected_training`, :func:`inoculated`, :func:`mixed`
after training        :func:`retuning`
====================  ================================================================================================

:func:`trials`, :func:`cure_costs` and :func:`cure_table` put them side by side, with whether the misalignment comes
back.
"""

from .edited import edited_organism
from .prevention import (
    inoculated,
    mixed,
    preventative_steering,
    projected_training,
    retuning,
    trained_further,
)
from .projection import project_out, removed_share
from .saving import FolderTakenError, add_measured, peft_config, save_adapter, save_model
from .table import AS_IS, FURTHER, NARROW, State, States, comes_back, cure_costs, cure_table, states, trials
from .weights import corrected_model, project_out_of_model

__all__ = [
    "AS_IS",
    "FURTHER",
    "NARROW",
    "State",
    "States",
    "FolderTakenError",
    "add_measured",
    "comes_back",
    "corrected_model",
    "cure_costs",
    "cure_table",
    "edited_organism",
    "inoculated",
    "mixed",
    "peft_config",
    "preventative_steering",
    "project_out",
    "project_out_of_model",
    "projected_training",
    "removed_share",
    "retuning",
    "save_adapter",
    "save_model",
    "states",
    "trained_further",
    "trials",
]
