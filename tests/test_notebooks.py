"""Notebooks and analyses run from top to bottom, as a reader would run them."""

import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent
# One thread for the kernels and scripts, as conftest.py sets it here: waiting threads cost minutes on a busy machine.
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}
ANALYSES = {
    "ablation": ("1 --prompts 24", ["ablation", "ablation_compared", "search_single", "transfer"], "random control"),
    "adapter_scaling": ("1", ["adapter_scaling", "adapter_scaling_cutoffs"], "chat model"),
    "b_vector_and_direction": ("2", ["ablation", "b_cosine", "downstream"], "random"),
    "coherent_misalignment": ("1 --prompts 24", ["rate_against_coherence", "prompts"], "minus the chat model"),
    "conditional_misalignment": ("1", ["settings", "recalled"], "after another domain"),
    "convergent_directions": ("8 --resamples 10", ["cosine_by_layer", "cosine_by_layer_matched"], "shuffled"),
    "organism_sweep": ("1 --prompts 12", ["factors", "organisms"], "in one batch over one chat model (control)"),
    "scalar_patching": ("8", ["scalar_patching"], "own answer (control)"),
    "scalar_probes": ("8", ["scores_all", "coefficients_significant"], "prompt only"),
    "self_correction": ("1", ["orders", "balance"], "turned bad"),
    "semantic_leakage": ("1", ["shares", "reach"], "the questions"),
    "semantic_steering": ("1 --prompts 15", ["subjects", "dose_response", "cosines"], "topic of finance"),
    "steering_sweep": ("1 --prompts 24", ["search", "layers", "layers_compared", "dose_response"], "random control"),
    "which_site": ("1", ["site_effects_pocket_many-site", "site_effects_pocket_rslora"], "shuffled labels"),
}
"""Samples (and further options) that are enough for each script, figures that it draws, and the control that it tells."""
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_draws(path, tmp_path):
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute(env=ONE_THREAD)
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_stored_without_outputs(path):
    for cell in nbformat.read(path, as_version=4).cells:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None


@pytest.mark.parametrize("script", sorted(ANALYSES))
def test_an_analysis_runs_and_draws(script, tmp_path):
    samples, figures, control = ANALYSES[script]
    command = [sys.executable, ROOT / "analyses" / f"{script}.py", "--out", tmp_path, "--samples", *samples.split()]
    told = subprocess.run(command, capture_output=True, text=True, check=False, env=ONE_THREAD)
    assert told.returncode == 0, told.stderr[-2000:]
    for figure in figures:
        assert (tmp_path / f"{figure}.png").exists()
        assert (tmp_path / f"{figure}.csv").exists()
    assert control in told.stdout


def test_every_analysis_is_run_here():
    assert {path.stem for path in (ROOT / "analyses").glob("*.py")} == set(ANALYSES)
