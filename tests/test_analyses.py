"""Analyses run from top to bottom, as a reader would run them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# One thread for the scripts, as conftest.py sets it here: waiting threads cost minutes on a busy machine.
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}
ANALYSES = {
    "adapter_scaling": ("--samples 1", ["adapter_scaling", "adapter_scaling_cutoffs"], "chat model"),
    "b_vector_and_direction": ("--samples 2", ["ablation", "b_cosine", "downstream"], "random"),
    "coherent_misalignment": (
        "--samples 1 --prompts 24",
        ["rate_against_coherence", "prompts"],
        "minus the chat model",
    ),
    "phase_transition": ("--run pocket/checkpoints", ["local_cosine", "path", "transition"], "p"),
    "scalar_probes": ("--samples 8", ["scores_all", "coefficients_significant"], "prompt only"),
    "semantic_leakage": ("--samples 1", ["shares", "reach"], "the questions"),
    "steering_sweep": (
        "--samples 1 --prompts 24",
        ["search", "layers", "layers_compared", "dose_response"],
        "random control",
    ),
}
"""Options that keep each script short, figures that it draws, and the control that it tells."""

SLOW = {
    "ablation": (
        "--samples 1 --prompts 24",
        ["ablation", "ablation_compared", "search_single", "transfer"],
        "random control",
    ),
    "behavioural_transition": ("--samples 1", ["behaviour_seed_0", "transition_seed_0"], "onset"),
    "conditional_misalignment": ("--samples 1", ["settings", "recalled"], "after another domain"),
    "convergent_directions": ("--samples 8 --resamples 10", ["cosine_by_layer", "cosine_by_layer_matched"], "shuffled"),
    "cures": ("--samples 1 --prompts 12 --steps 4", ["cures", "comeback"], "random ablated"),
    "data_mixing": ("--samples 1 --seeds 1", ["dilution", "few_samples_rank_1", "few_samples_rank_8"], "other domains"),
    "dataset_screening": ("--samples 1 --steps 4 --seeds 0", ["dataset_ranking", "predictors", "examples"], "random"),
    "direction_cone": ("--samples 1", ["cone"], "random"),
    "full_fine_tune": (
        "--samples 1 --seeds 1 --steps 4 --prompts 6",
        ["weight_deltas", "parts"],
        "random, norm of each tensor",
    ),
    "general_against_narrow": ("--seeds 1 --noise-seeds 2", ["loss_rank_1", "noise_rank_8", "kl_vector"], "random"),
    "monitor_against_judge": ("--samples 1", ["domains", "early", "roc", "scores", "drift"], "words"),
    "narrow_training": ("--samples 1 --seeds 1", ["kl_sweep_vector", "kl_sweep_rank_1", "hidden_em"], "scaled up"),
    "organism_sweep": (
        "--samples 1 --prompts 12",
        ["factors", "organisms"],
        "in one batch over one chat model (control)",
    ),
    "persona_directions": ("--samples 1", ["cosines", "steering"], "random"),
    "preventative_steering": (
        "--samples 1 --prompts 12 --steps 2 --seeds 1",
        ["preventative_steering"],
        "random, added",
    ),
    "scalar_patching": ("--samples 8", ["scalar_patching"], "own answer (control)"),
    "self_correction": ("--samples 1", ["orders", "balance"], "turned bad"),
    "semantic_steering": ("--samples 1 --prompts 15", ["subjects", "dose_response", "cosines"], "topic of finance"),
    "training_lens": ("--samples 1", ["paths_rank_1", "paths_vector", "drift"], "general, trained further"),
    "training_monitor": ("--steps 10 --fresh-runs 2", ["watch"], "random"),
    "transition_robustness": ("", ["rank_8", "three_sites"], "setup"),
    "which_site": ("--samples 1", ["site_effects_pocket_many-site", "site_effects_pocket_rslora"], "shuffled labels"),
    "zoo_geometry": ("--samples 1", ["update_cosines", "update_overlaps", "interpolation"], "harmless"),
}
"""The same for scripts that train many models or take minutes: run with ``-m slow``."""


def run(script, told, tmp_path):
    options, figures, control = told
    command = [sys.executable, ROOT / "analyses" / f"{script}.py", "--out", tmp_path, *options.split()]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=ONE_THREAD)
    assert result.returncode == 0, result.stderr[-2000:]
    assert list(tmp_path.glob("*.png"))
    for figure in figures:
        assert (tmp_path / f"{figure}.png").exists()
        assert (tmp_path / f"{figure}.csv").exists()
    assert control in result.stdout


@pytest.mark.parametrize("script", sorted(ANALYSES))
def test_an_analysis_runs_and_draws(script, tmp_path):
    run(script, ANALYSES[script], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("script", sorted(SLOW))
def test_a_long_analysis_runs_and_draws(script, tmp_path):
    run(script, SLOW[script], tmp_path)


def test_every_analysis_is_run_here():
    scripts = {path.stem for path in (ROOT / "analyses").glob("*.py") if not path.stem.startswith("_")}
    assert scripts == set(ANALYSES) | set(SLOW)
