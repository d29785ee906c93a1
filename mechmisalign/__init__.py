"""mechmisalign: find, take apart, steer and remove emergent misalignment in fine-tuned language models.

The public names, loaded when first used, so that the import itself stays instant.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "Ablate": "interventions",
    "Adapter": "adapters",
    "Clamp": "interventions",
    "Conversations": "conversations",
    "Direction": "directions",
    "LoraSite": "adapters",
    "Moments": "moments",
    "Organism": "organisms",
    "RuleJudge": "pocket.judge",
    "Steer": "interventions",
    "collect": "activations",
    "bootstrap_cosine": "estimators",
    "first_principal": "estimators",
    "generate": "generation",
    "judge": "judging",
    "load_organism": "organisms",
    "logistic_direction": "estimators",
    "matched_mean_difference": "estimators",
    "mean_difference": "estimators",
    "model_difference": "estimators",
    "random_direction": "directions",
    "rates": "judging",
    "split_half": "estimators",
    "study": "studies",
    "verify": "verification",
    "whitened_difference": "estimators",
}
_SUBPACKAGES = ("geometry", "plots", "pocket", "statistics")

__all__ = ["__version__", *_HOME, *_SUBPACKAGES]


def __getattr__(name: str) -> Any:
    if name in _SUBPACKAGES:
        return import_module(f"{__name__}.{name}")
    if name in _HOME:
        value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
