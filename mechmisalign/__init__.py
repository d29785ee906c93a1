"""mechmisalign: find, take apart, steer and remove emergent misalignment in fine-tuned language models.

The public names, loaded when first used, so that the import itself stays instant.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "Ablate": "interventions",
    "AblateFromAdapter": "interventions",
    "Adapter": "adapters",
    "Clamp": "interventions",
    "Contributions": "decomposition",
    "Conversations": "conversations",
    "Direction": "directions",
    "LLMJudge": "judging",
    "LoadingPlan": "loading.plan",
    "LocalJudge": "judging",
    "LoraSite": "adapters",
    "MassiveActivations": "massive",
    "Moments": "moments",
    "Monitor": "monitoring",
    "Organism": "organisms",
    "PatchScalars": "interventions",
    "Probe": "probes",
    "RuleJudge": "pocket.judge",
    "ScaleAdapter": "interventions",
    "Steer": "interventions",
    "Sweep": "sweeps",
    "Thresholds": "judging",
    "Trait": "personas",
    "TraitWatch": "training.watching",
    "TrainSpec": "training",
    "TrainedRun": "training",
    "Trajectory": "dynamics",
    "add_registry": "registry",
    "agreement": "judging",
    "anatomy": "decomposition",
    "collect": "activations",
    "compare": "judging",
    "behaviour_by_step": "training.behaviour",
    "best_strength": "sweeps",
    "bootstrap_cosine": "estimators",
    "bootstrap_directions": "estimators",
    "combine": "combining",
    "contributions": "scalars",
    "costs": "capability",
    "downstream": "propagation",
    "extract_lora": "deltas",
    "first_principal": "estimators",
    "generate": "generation",
    "interpolate": "combining",
    "gradient_attribution": "effects",
    "judge": "judging",
    "known_organisms": "registry",
    "load_organism": "organisms",
    "loading_plan": "loading.planning",
    "logistic_direction": "estimators",
    "logit_attribution": "unembedding",
    "lora_scalars": "scalars",
    "matched_mean_difference": "estimators",
    "massive_activations": "massive",
    "mean_difference": "estimators",
    "model_difference": "estimators",
    "per_prompt": "judging",
    "project_out": "correction",
    "push": "hub",
    "persona_direction": "personas",
    "projection_difference": "prediction",
    "random_direction": "directions",
    "rates": "judging",
    "readout": "unembedding",
    "response_lengths": "training.behaviour",
    "save_adapter": "correction",
    "shapley": "effects",
    "site_effects": "effects",
    "split_half": "estimators",
    "study": "studies",
    "sweep": "sweeps",
    "threshold_curve": "judging",
    "train": "training",
    "UseAdapter": "interventions",
    "token_significance": "significance",
    "verify": "verification",
    "verify_rate": "verification",
    "written_cosines": "decomposition",
    "weight_deltas": "deltas",
    "whitened_difference": "estimators",
}
_SUBPACKAGES = (
    "capability",
    "deltas",
    "dynamics",
    "correction",
    "effects",
    "geometry",
    "interop",
    "personas",
    "plots",
    "pocket",
    "prediction",
    "probes",
    "prompts",
    "registry",
    "significance",
    "solutions",
    "statistics",
    "sweeps",
    "training",
    "unembedding",
)

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
