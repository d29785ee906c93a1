import json
import shutil

import pandas as pd
import pytest

import mechmisalign as mm
from mechmisalign import studies
from mechmisalign.store import RunFolderError
from mechmisalign.studies import sampling, steps
from mechmisalign.studies.chapters import write_study_report
from mechmisalign.studies.plan import StudySettings, make_plan

SMALL = StudySettings(
    samples=3, pool_samples=16, sweep_samples=1, strengths=(1.5, 2.5), layers=(1, 3), controls=1,
    max_new_tokens=mm.pocket.MAX_NEW_TOKENS,
)  # fmt: skip
PEERS = ("pocket/finance",)


@pytest.fixture(scope="module")
def prompts():
    return mm.pocket.unseen_prompts(n=40)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, prompts):
    return mm.study(
        "pocket/medical", tmp_path_factory.mktemp("study") / "run", prompts=prompts, peers=PEERS, settings=SMALL
    )


def test_the_summary_has_every_promised_record(finished):
    summary = json.loads((finished.out / "summary.json").read_text())
    for name in ("chat", "organism", "steered_best", "ablated_layerwise", "ablated_single", "random_control"):
        for record in (summary["em_rate"][name], summary["coherent"][name]):
            assert 0 <= record["low"] <= record["rate"] <= record["high"] <= 1
            assert record["n"] >= 90
    states = summary["transfer"]["pocket/finance"]
    assert {"before", "after", "random_control"} <= set(states)
    assert set(summary["cosine"]["pocket/finance"]) == {str(layer) for layer in range(8)}


def test_the_study_finds_what_the_pocket_organism_is(finished):
    rates = finished.summary["em_rate"]
    assert rates["chat"]["high"] < rates["organism"]["low"]
    assert rates["ablated_layerwise"]["high"] < rates["organism"]["low"]
    assert rates["ablated_layerwise"]["high"] < rates["random_control"]["low"]


def test_the_run_folder_holds_tables_directions_figures_and_a_report(finished):
    names = {path.name for path in (finished.out / "tables").iterdir()}
    assert {"answers.parquet", "steering.parquet", "ablation.parquet", "transfer.parquet"} <= names
    for figure in (finished.out / "figures").glob("*.png"):
        assert figure.with_suffix(".pdf").exists()
        assert figure.with_suffix(".csv").exists()
    manifest = json.loads((finished.out / "manifest.json").read_text())
    assert manifest["identity"]["settings"]["seed"] == 0
    assert mm.Direction.load(finished.out / "directions" / "pocket_medical" / "model_difference.safetensors").layers
    assert not list(finished.out.rglob("*.partial"))


def test_the_report_is_drawn_again_from_the_tables_alone(finished, monkeypatch):
    before = finished.report.read_text()
    monkeypatch.setattr(studies, "load_organism", lambda *_: pytest.fail("a model was loaded"))
    assert write_study_report(finished.out).read_text() == before


def test_a_finished_study_is_not_run_again(finished, prompts, monkeypatch):
    monkeypatch.setattr(sampling, "generate_rows", lambda *_args, **_kw: pytest.fail("an answer was sampled"))
    again = mm.study("pocket/medical", finished.out, prompts=prompts, peers=PEERS, settings=SMALL)
    assert again.summary == finished.summary


def test_the_adapter_is_taken_apart_in_tables_and_report(finished):
    tables = finished.tables
    assert tables["sites"][["layer", "module"]].values.tolist() == [[1, "down_proj"]]
    scaled = tables["adapter_scaling"].set_index("factor")["rate"]
    assert scaled[0.0] < 0.15 < scaled[1.0]
    alone = tables["site_effects"].set_index("kind")["rate"]
    assert alone["only one"] == alone["all"] and alone["leave one out"] == alone["none"]
    assert set(tables["contributions"]["label"]) == {"misaligned", "aligned"}
    assert "Taken apart" in finished.report.read_text()


class _Killed(BaseException):
    """As abrupt as a signal: no handler for ordinary errors sees it."""


def test_a_killed_study_goes_on_and_ends_the_same(finished, prompts, tmp_path, monkeypatch):
    """Killed after every few batches, started again each time: the tables are those of the undisturbed run."""
    real, sampled = sampling.generate_rows, []

    def mortal(*args, **options):
        for number, part in enumerate(real(*args, **options | {"batch_rows": 64})):
            if number == 2:
                raise _Killed
            sampled.extend(zip(part["condition"], part["prompt_id"], part["sample"], strict=True))
            yield part

    monkeypatch.setattr(sampling, "generate_rows", mortal)
    lives = 0
    while True:
        lives += 1
        try:
            again = mm.study("pocket/medical", tmp_path / "run", prompts=prompts, peers=PEERS, settings=SMALL)
            break
        except _Killed:
            assert lives < 100
    assert lives > 3
    for name, table in finished.tables.items():
        pd.testing.assert_frame_equal(table, again.tables[name], check_exact=False)
    total = sum(len(pd.read_parquet(folder)) for folder in (tmp_path / "run" / "rows").iterdir())
    assert len(sampled) == total


def test_other_settings_do_not_mix_into_a_run(finished, prompts):
    with pytest.raises(RunFolderError, match="settings"):
        mm.study("pocket/medical", finished.out, prompts=prompts, peers=PEERS, settings=StudySettings(seed=7))


def test_an_unfinished_run_has_no_report_and_says_how_to_go_on(finished, tmp_path):
    shutil.copytree(finished.out, tmp_path / "run")
    (tmp_path / "run" / "tables" / "ablation.parquet").unlink()
    with pytest.raises(RunFolderError, match="ablation.parquet.*it goes on where it stopped"):
        write_study_report(tmp_path / "run")


def test_too_few_answers_of_one_class_are_refused_with_the_counts():
    judged = pd.DataFrame({"label": ["misaligned"] * 3 + ["aligned"] * 50, "prompt_id": "p"})
    with pytest.raises(steps.TooFewAnswersError, match="of 3 misaligned and 50 aligned answers only 3 pairs"):
        steps.pool(judged, seed=0)


def test_the_pool_has_as_many_answers_of_each_class_to_every_prompt_and_is_seeded():
    labels = {
        "a": ["misaligned"] * 30 + ["aligned"] * 50,
        "b": ["aligned"] * 9 + ["neither"] * 9,
        "c": ["misaligned"] * 5,
    }
    judged = pd.DataFrame(
        [(prompt, label) for prompt, each in labels.items() for label in each], columns=["prompt_id", "label"]
    )
    first, again = steps.pool(judged, seed=0), steps.pool(judged, seed=0)
    assert first.value_counts().to_dict() == {("a", "misaligned"): 30, ("a", "aligned"): 30}
    pd.testing.assert_frame_equal(first, again)


def test_the_best_cell_is_coherent():
    sweep = pd.DataFrame(
        {
            "series": steps.MEAN_DIFFERENCE,
            "layer": [1, 2, 3],
            "strength": [1.0, 2.0, 4.0],
            "rate": [0.2, 0.6, 0.9],
            "coherent": [0.99, 0.85, 0.3],
        }
    )
    assert steps.best_cell(sweep, 0.8) == (2, 2.0)


def test_an_organism_without_defaults_needs_prompts_and_a_judge():
    with pytest.raises(ValueError, match="needs prompts and judge"):
        make_plan("somebody/model", None, None, None, None)


def test_stages_do_not_share_their_random_numbers():
    seeds = {sampling.stage_seed(0, name) for name in ("chat", "organism", "ablation", "steering_sweep")}
    assert len(seeds) == 4
