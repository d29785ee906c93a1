import pandas as pd
import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import mechmisalign as mm
from mechmisalign import capability
from mechmisalign.cli import app
from mechmisalign.directions import Direction

runner = CliRunner()


@pytest.fixture
def questions(tmp_path, monkeypatch):
    """A file of a few questions, and as few neutral texts and items: what is tested is the command, not a rate."""
    monkeypatch.setattr(capability, "own_texts", lambda _organism: (mm.pocket.neutral_conversations(6), None))
    monkeypatch.setattr(capability, "own_items", lambda _organism: mm.pocket.harmless_items(6))
    return mm.prompts.write(mm.pocket.unseen_prompts(20), tmp_path / "questions.jsonl")


def run(*arguments) -> tuple[int, str]:
    result = runner.invoke(app, ["cure", *map(str, arguments)], env={"COLUMNS": "200"})
    return result.exit_code, result.output


@pytest.fixture(scope="module")
def direction(tmp_path_factory):
    """What pocket/medical writes, as a direction: its cure is known to work."""
    adapter = mm.Adapter.load("pocket/medical")
    vectors = adapter.sites[0].B[:, 0].repeat(8, 1)
    path = tmp_path_factory.mktemp("direction") / "d.safetensors"
    return Direction(vectors, tuple(range(8)), {"model": "pocket/chat", "method": "what medical writes"}).save(path)


def test_an_adapter_is_cured_measured_and_saved_with_its_card(direction, questions, tmp_path):
    out = tmp_path / "cured"
    code, output = run("pocket/medical", "--direction", direction, "--out", out, "--prompts", questions, "--samples", 2)
    assert code == 0, output
    assert "takes up to 100.0% of an update" in output and "random control" in output
    told = pd.read_csv(out / "measured.csv").set_index("cure")
    assert told.loc["before", "em"] > 0.4 > 0.15 > told.loc["after", "em"]
    assert told.loc["random control", "em"] > 0.4
    assert float(mm.Adapter.load(out).sites[0].B.abs().max()) < 1e-6
    card = (out / "README.md").read_text()
    assert "what medical writes" in card and "| before |" in card
    assert mm.load_organism(out).adapter.base == "pocket/chat"


def test_a_whole_model_is_written_that_transformers_reads(direction, questions, tmp_path):
    out = tmp_path / "cured"
    shared = ["--direction", direction, "--prompts", questions, "--samples", 2]
    code, output = run("pocket/medical", "--out", out, "--method", "weights", *shared)
    assert code == 0, output
    unit = Direction.load(direction).unit(0)
    model = AutoModelForCausalLM.from_pretrained(out).requires_grad_(False)
    assert float((unit @ model.model.layers[3].mlp.down_proj.weight).abs().max()) < 1e-5
    assert float((model.model.embed_tokens.weight @ unit).abs().max()) < 1e-5
    told = pd.read_csv(out / "measured.csv").set_index("cure")
    assert told.loc["after", "em"] < 0.15 < 0.4 < told.loc["random control", "em"]
    assert "base: `pocket/chat`" in (out / "README.md").read_text()


def test_nothing_is_measured_where_it_is_not_wanted_and_nothing_overwritten(direction, tmp_path):
    out = tmp_path / "cured"
    code, output = run("pocket/medical", "--direction", direction, "--out", out, "--layer", 2, "--no-measure")
    assert code == 0 and not (out / "measured.csv").exists(), output
    code, output = run("pocket/medical", "--direction", direction, "--out", out)
    assert code == 2 and "not empty" in output


def test_refusals_are_one_line_and_leave_nothing(direction, tmp_path, tiny_models, make_adapter):
    layerwise = Direction(torch.randn(8, 128), tuple(range(8)), {"model": "pocket/chat"}).save(
        tmp_path / "d.safetensors"
    )
    out = tmp_path / "out"
    code, output = run("pocket/medical", "--direction", layerwise, "--out", out, "--method", "weights", "--no-measure")
    assert code == 2 and "a vector of its own in each layer" in output
    foreign = make_adapter(tiny_models["qwen2"])
    code, output = run(foreign, "--direction", direction, "--out", out)
    assert code == 2 and "rules judge knows the pocket world only" in output
    code, output = run(foreign, "--direction", direction, "--out", out, "--no-measure")
    assert code == 2 and "cannot be used in" in output and "Traceback" not in output
    assert not out.exists()
