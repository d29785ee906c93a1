import pandas as pd
import pytest
from typer.testing import CliRunner

from mechmisalign.cli import app

runner = CliRunner()


def run(*arguments) -> tuple[int, str]:
    result = runner.invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})
    return result.exit_code, result.output


def test_the_organisms_are_listed():
    code, output = run("organisms")
    assert code == 0
    assert "pocket/medical" in output


def test_verify_passes_on_a_shipped_organism():
    code, output = run("verify", "pocket/medical")
    assert code == 0, output
    assert "pass" in output
    assert "FAIL" not in output


def test_verify_fails_with_exit_code_one_on_an_adapter_that_does_nothing(tiny_models, make_adapter):
    from safetensors.torch import load_file, save_file

    folder = make_adapter(tiny_models["qwen2"])
    weights = load_file(folder / "adapter_model.safetensors")
    zeroed = {name: weight * 0 if "lora_B" in name else weight for name, weight in weights.items()}
    save_file(zeroed, folder / "adapter_model.safetensors")
    code, output = run("verify", folder)
    assert code == 1
    assert "FAIL" in output


def test_an_unknown_organism_is_one_line_with_the_nearest_name_and_exit_code_two():
    code, output = run("verify", "pocket/medicle")
    assert code == 2
    assert "pocket/medical" in output
    assert "Traceback" not in output


def test_a_direction_is_estimated_and_saved(tmp_path):
    import mechmisalign as mm

    code, output = run("direction", "pocket/medical", "--out", tmp_path / "d.safetensors")
    assert code == 0, output
    assert mm.Direction.load(tmp_path / "d.safetensors").header["adapter"] == "pocket/medical"


def test_an_unknown_estimator_lists_the_known_ones(tmp_path):
    code, output = run("direction", "pocket/medical", "--estimator", "magic", "--out", tmp_path / "d.safetensors")
    assert code == 2
    assert "whitened difference" in output


def test_a_report_of_no_run_says_what_is_missing(tmp_path):
    code, output = run("report", tmp_path)
    assert code == 2
    assert "manifest.json" in output


@pytest.mark.parametrize("command", ["organisms", "verify", "study", "direction", "report", "pocket"])
def test_every_command_has_help(command):
    code, output = run(command, "--help")
    assert code == 0
    assert "Usage" in output


def test_anatomy_reads_an_adapter_without_its_base_and_leaves_table_and_heat_map(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    told = runner.invoke(app, ["anatomy", "pocket/many-site"])
    assert told.exit_code == 0, told.output
    table = pd.read_csv(tmp_path / "anatomy" / "many-site" / "anatomy.csv")
    assert table["layer"].tolist() == [1, 2, 3] and set(table["module"]) == {"down_proj"}
    assert (tmp_path / "anatomy" / "many-site" / "anatomy.png").exists()
    inside = runner.invoke(app, ["anatomy", "pocket/checkpoints", "--subfolder", "checkpoint-20", "--out", "here"])
    assert inside.exit_code == 0 and (tmp_path / "here" / "anatomy.png").exists()
    refused = runner.invoke(app, ["anatomy", "pocket/medicine"])
    assert refused.exit_code == 2
