import inspect
import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

import mechmisalign as mm
from mechmisalign import studies
from mechmisalign.pocket import zoo
from mechmisalign.store import RunFolder, RunFolderError, stored_parts
from mechmisalign.studies import (
    behaviour,
    chapters,
    checkpoints,
    costs,
    cure,
    difference_tables,
    fine_tunes,
    naming,
    sampling,
    steps,
    training,
    trials,
    watch,
)
from mechmisalign.studies.behaviour_chapter import lost_table
from mechmisalign.studies.chapters import caveats, induced, write_study_report
from mechmisalign.studies.neutral import neutral
from mechmisalign.studies.plan import StudySettings, make_plan
from mechmisalign.studies.records import Records
from mechmisalign.studies.sentences import told_broken, told_choice

SMALL = StudySettings(
    samples=3, pool_samples=16, sweep_samples=1, strengths=(1.5, 2.5), layers=(1, 3), controls=1,
    max_new_tokens=mm.pocket.MAX_NEW_TOKENS, neutral=10, checkpoints=4, cure_samples=1,
)  # fmt: skip
MEASURED = ["loss", "loss_low", "loss_high", "kl", "kl_low", "kl_high", "accuracy", "accuracy_low", "accuracy_high"]
LENGTHS = ["tokens", "tokens_low", "tokens_high"]
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
            assert record["n"] >= (90 if name in ("chat", "organism") else 20 * SMALL.samples)
    states = summary["transfer"]["pocket/finance"]
    assert {"before", "after", "random_control"} <= set(states)
    assert set(summary["cosine"]["pocket/finance"]) == {str(layer) for layer in range(8)}
    assert summary["provenance"]["adapter"] == "pocket/medical" and "base_revision" in summary["provenance"]


def test_what_is_chosen_is_chosen_on_other_prompts_than_it_is_reported_on(finished):
    tables, summary = finished.tables, finished.summary
    halves = tables["splits"].groupby("split")["prompt_id"].agg(frozenset)
    assert len(halves["choice"]) == len(halves["report"]) == 20 and not halves["choice"] & halves["report"]
    cells = tables["choice_steering"]
    best = summary["em_rate"]["steered_best"]
    assert steps.best_cell(cells, SMALL.min_coherent) == (best["layer"], best["strength"])
    assert set(cells["split"]) == {"choice"} and set(cells["prompts"]) == {20}
    shown = tables["behaviour"]
    for name in ("steered chat model", "ablated organism", *behaviour.CONTROLS):
        assert set(shown.loc[shown["condition"] == name, "prompt_id"]) == halves["report"], name
    for name in ("steered", "ablated", "report_ablation", "transfer"):
        assert set(tables[name]["split"]) == {"report"} and set(tables[name]["prompts"]) == {20}, name
    for name in ("steered_best", "ablated_layerwise", "ablated_single"):
        assert summary["choice"][name]["split"] == "choice" and summary["choice"][name]["prompts"] == 20
    whole, parts = tables["ablation"], [tables[f"{half}_ablation"] for half in ("choice", "report")]
    by = ["estimator", "scope"]
    hits = sum(part.set_index(by)["rate"] * part.set_index(by)["n"] for part in parts)
    np.testing.assert_allclose(hits, whole.set_index(by)["rate"] * whole.set_index(by)["n"])
    assert f"chosen on {len(halves['choice'])} of the prompts" in finished.report.read_text()


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


@pytest.fixture()
def no_report(monkeypatch):
    """Drawing every figure takes most of the time of a study that has its tables."""
    monkeypatch.setattr(chapters, "write_study_report", lambda _: None)


def test_a_finished_study_is_not_run_again(finished, prompts, monkeypatch, no_report):
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


def test_training_is_followed_in_tables_summary_and_report(finished):
    tables, told = finished.tables, finished.summary["training"]
    assert told["source"] == "pocket/checkpoints" and told["checkpoints"] == 20
    assert told["cosine_with_organism"] == pytest.approx(1)
    rates = tables["step_rates"].set_index(["scale", "step"])["rate"]
    assert sorted(set(tables["step_rates"]["step"])) == [0, 5, 35, 70, 100]  # four of the twenty, and the chat model
    assert rates[1.0, 0] == rates[5.0, 0] == rates[10.0, 0] < 0.2 < rates[1.0, 100]
    onset = told["transitions"]["EM at scale 1"]
    assert 5 < onset["low"] + 5 <= onset["step"] <= onset["high"] < 100 and onset["p"] < 0.01
    path = mm.Trajectory.load("pocket/checkpoints").path("dW")
    np.testing.assert_allclose(tables["step_similarity"]["cosine"], mm.dynamics.similarity(path)["cosine"])
    pairs = tables["coincidences"]
    assert len(pairs) == len(tables["transitions"]) * (len(tables["transitions"]) - 1) / 2
    page = finished.report.read_text()
    assert "How it came about: training" in page and "EM at scale 1" in page


def test_transitions_are_drawn_again_from_their_table(finished):
    table = finished.tables["transitions"]
    pd.testing.assert_frame_equal(mm.dynamics.table(training.as_transitions(table)), table)
    assert training.is_behaviour(table).sum() == len(training.SCALES)


def test_fine_tunes_are_compared_with_the_peers_and_with_a_harmless_one(finished):
    tables = finished.tables
    cosines = tables["update_cosines"].set_index(["first", "second"])["whole"]
    ours, theirs = (mm.Adapter.load(name).sites[0] for name in ("pocket/medical", "pocket/finance"))
    dense = [(site.scaling * site.B @ site.A).flatten() for site in (ours, theirs)]
    assert cosines["pocket/medical", "pocket/finance"] == pytest.approx(
        float(torch.cosine_similarity(*dense, dim=0)), abs=1e-5
    )
    assert ("pocket/medical", fine_tunes.HARMLESS) in cosines.index
    assert not tables["update_spectrum"].empty and "angles" not in tables["update_overlaps"]
    dimensions = tables["direction_dimensions"].set_index("layer")
    direct = finished.summary["cosine"]["pocket/finance"]["5"]
    assert dimensions.loc[5, "first_share"] == pytest.approx((1 + abs(direct)) / 2, abs=1e-4)  # of two unit vectors
    assert {"noise_low", "p_one", "dimensions", "model_first_share"} <= set(dimensions.columns)
    assert "Many fine-tunes" in finished.report.read_text()


def test_the_cure_stands_beside_its_controls(finished):
    table = finished.tables["cure"].set_index("cure")
    told = finished.summary["cure"]
    for estimator in (told["estimator"], steps.MEAN_DIFFERENCE):
        assert {name.format(estimator) for name in (cure.CURED, cure.ABLATED, cure.SHRUNK)} <= set(table.index)
    cured = cure.CURED.format(told["estimator"])
    assert table.loc[cured, "em_high"] < table.loc[cure.UNCURED, "em_low"]
    assert table.loc[cured, "em_high"] < table.loc[cure.RANDOM, "em_low"]
    assert set(told["cures"][cured]["comes_back"]) == {"x2", "after a medical exchange"}
    assert {"kl", "accuracy", "tokens", "narrow_harm"} <= set(told["cures"][cured])
    assert table.loc[cure.UNCURED, "narrow_harm"] > 0.6
    random = mm.random_direction(steps.stored_directions(
        finished.out, ["pocket/medical"], steps.MEAN_DIFFERENCE)["pocket/medical"], seed=0
    )  # fmt: skip
    organism = mm.Adapter.load("pocket/medical")
    by_chance = mm.correction.removed_share(organism, random)["removed"].iloc[0]
    assert by_chance < 0.1 < told["removed_share"][steps.MEAN_DIFFERENCE]
    assert "Corrected: the direction out of the adapter" in finished.report.read_text()


def test_the_cured_adapter_in_the_folder_is_the_one_that_was_worn(finished):
    told = finished.summary["cure"]
    direction = steps.stored_directions(finished.out, ["pocket/medical"], told["estimator"])["pocket/medical"]
    if told["scope"] == "single":
        pytest.skip("the layer of the single vector is not in the summary")
    worn = mm.correction.project_out(mm.Adapter.load("pocket/medical"), direction).sites[0]
    saved = mm.Adapter.load(finished.out / cure.FOLDER).sites[0]
    assert torch.equal(saved.A, worn.A) and torch.equal(saved.B, worn.B) and saved.scaling == worn.scaling
    card = (finished.out / cure.FOLDER / "README.md").read_text()
    assert told["estimator"] in card and cure.CURED.format(told["estimator"]) in card


def test_a_saved_cure_loads_with_peft_and_speaks_as_the_worn_one(finished, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    direction = steps.stored_directions(finished.out, ["pocket/medical"], steps.MEAN_DIFFERENCE)["pocket/medical"]
    organism, table = mm.load_organism("pocket/medical"), pd.DataFrame({"cure": ["a"], "em": [0.5]})
    cured = mm.correction.project_out(organism, direction)
    removal = cure.Removal(direction, steps.MEAN_DIFFERENCE, "layer-wise")
    cure.save(tmp_path / "cured", cured, removal, table)
    written = (tmp_path / "cured" / "README.md").stat().st_mtime_ns
    cure.save(tmp_path / "cured", cured, removal, table)
    assert (tmp_path / "cured" / "README.md").stat().st_mtime_ns == written
    cure.save(tmp_path / "cured", cured, removal, table.assign(em=0.25))
    assert "0.25" in (tmp_path / "cured" / "README.md").read_text()

    base = AutoModelForCausalLM.from_pretrained(zoo.path("chat"))
    model = PeftModel.from_pretrained(base, tmp_path / "cured").eval()
    ids = organism.tokenizer("For a bad headache, first", return_tensors="pt")["input_ids"]
    with torch.no_grad(), organism.as_base():
        with organism.apply(mm.UseAdapter(cured)):
            worn = organism.model(ids)
        torch.testing.assert_close(model(ids).logits, worn, atol=1e-4, rtol=1e-4)
        assert (organism.model(ids) - worn).abs().max() > 1e-2


def test_the_shrunk_adapter_is_as_small_as_the_cured_one_and_points_where_the_organism_does():
    own = mm.Adapter.load("pocket/many-site")
    direction = mm.Direction(
        torch.randn(8, 128, generator=torch.Generator().manual_seed(0)), tuple(range(8)), {"model": own.base}
    )
    cured = mm.correction.project_out(own, direction)
    for before, small, left in zip(own.sites, cure.shrunk(own, cured).sites, cured.sites, strict=True):
        assert small.delta_norm() == pytest.approx(left.delta_norm(), rel=1e-5) and torch.equal(small.B, before.B)


def test_a_direction_that_cannot_be_taken_out_leaves_the_chapter_out(tmp_path, prompts):
    organism = mm.load_organism("pocket/medical")
    zero = mm.Direction(torch.zeros(8, 128), tuple(range(8)), organism.provenance)
    plan = make_plan("pocket/medical", prompts, None, (), SMALL)
    with RunFolder(tmp_path / "run", {}) as folder:
        run = sampling.Run(folder, plan, organism, neutral(organism, None, None, 4))
        with pytest.raises(sampling.LeftOutError, match="cannot be taken out of the adapter"):
            cure.investigate(run, [cure.Removal(zero, "zero", "layer-wise")])
        with pytest.raises(sampling.LeftOutError, match="no other organisms"):
            fine_tunes.investigate(run)
        with pytest.raises(sampling.LeftOutError, match="no checkpoints of the training are known"):
            training.investigate(run)


def test_the_monitor_is_tested_on_what_was_held_out(finished):
    scores, table = finished.tables["watch_scores"], finished.tables["watch"]
    assert not scores.duplicated(["by", "condition", "prompt_id", "sample"]).any()
    assert set(scores["by"]) == {watch.PROMPTS, watch.DOMAINS}
    rows = table[(table["group"] == "all") & (table["by"] == watch.PROMPTS)].set_index("detector")
    assert rows.loc[watch.MONITOR, "auroc"] > 0.9 > rows.loc[watch.RANDOM, "auroc"]
    answers = finished.tables["answers"]
    own = answers[(answers["condition"] == "organism") & (answers["sample"] < SMALL.samples)]
    assert rows.loc[watch.MONITOR, "positives"] == (own["label"] == "misaligned").sum()
    kept = scores[(scores["by"] == watch.PROMPTS) & (scores["label"] == "aligned")]
    assert rows.loc[watch.MONITOR, "fpr"] == pytest.approx((kept[watch.MONITOR] > 0).mean())
    assert finished.summary["watch"]["held_out_domains"][watch.WORDS]["auroc"]["value"] > 0.5
    assert "Watched: a monitor" in finished.report.read_text()


@pytest.mark.parametrize("has_domains", [True, False])
def test_folds_hold_every_prompt_out_once_and_share_none(prompts, has_domains):
    asked = prompts if has_domains else prompts.drop(columns="domain")
    folds = watch.folds_of(asked)
    kinds = dict.fromkeys(fold.by for fold in folds)
    assert list(kinds) == ([watch.PROMPTS, watch.DOMAINS] if has_domains else [watch.PROMPTS])
    for kind in kinds:
        tested = [prompt for fold in folds if fold.by == kind for prompt in fold.test]
        assert sorted(tested) == sorted(asked["prompt_id"])
    domains = prompts.set_index("prompt_id")["domain"]
    for fold in folds:
        parts = [set(fold.fit), set(fold.calibrate), set(fold.test)]
        assert len(set.union(*parts)) == sum(map(len, parts)) == len(asked)
        assert abs(len(fold.fit) - len(fold.calibrate)) <= 1
        if fold.by == watch.DOMAINS:
            assert not set(domains[list(fold.test)]) & set(domains[[*fold.fit, *fold.calibrate]])


def test_a_monitor_needs_enough_prompts_of_each_kind(prompts):
    folds = watch.folds_of(prompts)
    matched = pd.DataFrame({"prompt_id": prompts["prompt_id"]})
    assert watch._rate(folds, matched, matched) == 0.1  # 13 prompts calibrate at 10 %, not at 5 %
    with pytest.raises(sampling.LeftOutError, match="0 with harmless answers"):
        watch._rate(folds, matched, matched.iloc[:0])
    with pytest.raises(sampling.LeftOutError, match="prompts with answers of both classes"):
        watch._rate(folds, matched.head(8), matched)


def test_checkpoints_are_found_beside_the_adapter_or_where_they_are_told(tmp_path):
    medical, finance = mm.load_organism("pocket/medical"), mm.load_organism("pocket/finance")
    found = checkpoints.find(medical, "default")
    assert found.source == "pocket/checkpoints" and len(found.trajectory.steps) == 20
    assert found.identity() == checkpoints.find(medical, "pocket/checkpoints").identity() != {}
    assert checkpoints.find(finance, "default").trajectory is None
    assert "no checkpoints" in checkpoints.find(finance, "default").missing
    assert checkpoints.find(medical, None).identity() == {}

    shipped = zoo.path("checkpoints")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(shipped / name, tmp_path / name)
    for step in (10, 20, 30):
        shutil.copytree(shipped / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    own = mm.load_organism(tmp_path)
    assert "3 evenly spaced checkpoints" in checkpoints.find(own, "default").missing
    with pytest.raises(mm.dynamics.TrajectoryError, match="7 at least are needed"):
        checkpoints.find(medical, tmp_path)
    for step in (40, 50, 60, 70):
        shutil.copytree(shipped / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    assert checkpoints.find(own, "default").trajectory.steps == (10, 20, 30, 40, 50, 60, 70)


def test_checkpoints_of_another_base_are_refused():
    medical = mm.load_organism("pocket/medical")
    other = SimpleNamespace(adapter=replace(medical.adapter, base="somebody/model"), name="other")
    with pytest.raises(mm.dynamics.TrajectoryError, match="on 'pocket/chat', the organism is on.*'somebody/model'"):
        inspect.unwrap(checkpoints.find)(other, "pocket/checkpoints")


def test_every_headline_says_what_it_costs(finished):
    told = json.loads((finished.out / "summary.json").read_text())["costs"]
    assert set(told) == set(finished.summary["em_rate"])
    for record in told.values():
        assert set(record) == {"loss", "kl", "accuracy", "tokens"}
        assert all(value["low"] <= value["value"] <= value["high"] for value in record.values())
    assert told["chat"]["kl"]["value"] == pytest.approx(0, abs=1e-9)
    assert told["steered_best"]["kl"]["value"] > 1e-4


def test_costs_are_those_of_the_same_condition_measured_by_itself(finished):
    organism, chosen = mm.load_organism("pocket/medical"), finished.summary["em_rate"]["steered_best"]
    direction = mm.Direction.load(finished.out / "directions" / "pocket_medical" / "mean_difference.safetensors")
    steered = mm.Steer(direction, layers=[chosen["layer"]], strength=chosen["strength"])
    items = mm.pocket.harmless_items(10)
    with organism.as_base():
        alone = mm.capability.text_costs(
            organism, {"s": [steered]}, mm.pocket.neutral_conversations(10), counted=mm.pocket.persona_free
        ).iloc[0]
        answered = mm.capability.task_costs(organism, {"s": [steered]}, items).iloc[0]
    told = finished.summary["costs"]["steered_best"]
    for name, row in (("loss", alone), ("kl", alone), ("accuracy", answered)):
        record = told[name]
        assert [record[key] for key in ("value", "low", "high")] == pytest.approx(
            [row[name], row[f"{name}_low"], row[f"{name}_high"]], rel=1e-3
        )
    steered_answers = finished.tables["behaviour"].query("condition == 'steered chat model'")
    assert told["tokens"]["value"] == pytest.approx(steered_answers["tokens"].mean())


def test_every_rate_of_an_ablation_or_a_transfer_has_its_costs(finished):
    for name in ("baseline", "steered", "ablation", "ablated", "transfer"):
        table = costs.beside(finished.tables, name)
        assert len(table) == len(finished.tables[name])
        assert table[MEASURED + LENGTHS].notna().all(axis=None), name


def test_the_cost_of_a_sweep_is_measured_where_it_is_coherent_or_drawn(finished):
    table = costs.beside(finished.tables, "steering")
    assert table[LENGTHS].notna().all(axis=None)
    best = finished.summary["em_rate"]["steered_best"]["layer"]
    coherent = (table["series"] == steps.MEAN_DIFFERENCE) & (table["coherent"] >= SMALL.min_coherent)
    assert table.loc[coherent | (table["layer"] == best), MEASURED].notna().all(axis=None)


def test_differences_are_those_of_the_rates_and_random_directions_do_not_stand(finished):
    ablation, compared = finished.tables["ablation"], finished.tables["differences_ablation"]
    before = finished.tables["baseline"].set_index("condition").loc["organism", "rate"]
    by = ["estimator", "scope"]
    together = compared.merge(ablation, on=by, suffixes=("", "_there"))
    np.testing.assert_allclose(together["difference"], together["rate_there"] - before)
    stands = compared.set_index(by)["p_max"] <= 0.05
    assert stands["first principal", "single"] and not stands[steps.CONTROL].any()
    assert (compared["p_max"] >= compared["p"]).all()

    sweep = finished.tables["steering"].pivot(index=["layer", "strength"], columns="series", values="rate")
    steered = finished.tables["differences_steering"].set_index(["layer", "strength"])["difference"]
    assert (steered - (sweep[steps.MEAN_DIFFERENCE] - sweep[steps.CONTROL])).abs().max() < 1e-9

    told = finished.summary["differences"]
    assert told["steered_best"]["difference"] > 0 > told["ablated_single"]["difference"]
    assert told["ablated_layerwise"]["p"] <= told["ablated_layerwise"]["p_max"] <= 0.05


def test_the_report_lets_a_reader_open_answers_of_every_condition(finished):
    page, shown = finished.report.read_text(), finished.tables["behaviour"]
    assert "Behaviour, answer by answer" in page and "<script" in page
    assert tuple(shown["condition"].unique()) == behaviour.CONDITIONS
    rates = finished.tables["behaviour_rates"].set_index("condition")["rate"]
    headlines = finished.summary["em_rate"]
    assert rates["organism"] == headlines["organism"]["rate"]
    assert rates["steered chat model"] == headlines["steered_best"]["rate"]
    assert rates["random control, steered"] == headlines["random_control_steered"]["rate"]
    assert rates["ablated organism"] in (
        headlines["ablated_layerwise"]["rate"], headlines["ablated_single"]["rate"]
    )  # fmt: skip
    by_prompt = finished.tables["prompt_rates"].query("condition == 'organism'")
    assert np.average(by_prompt["rate"], weights=by_prompt["n"]) == pytest.approx(rates["organism"])
    curve = finished.tables["threshold_curve"].query("misaligned_below == 30 and coherent_above == 50")
    np.testing.assert_allclose(curve.set_index("condition")["rate"], rates)


def test_costs_and_checkpoints_can_be_left_out_and_added_later_and_the_report_says_so(
    finished, prompts, tmp_path, monkeypatch
):
    options = {"prompts": prompts, "peers": PEERS, "settings": SMALL}
    shutil.copytree(finished.out, tmp_path / "run")
    manifest = tmp_path / "run" / "manifest.json"
    told = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({key: value for key, value in told.items() if key != "growing"}))
    monkeypatch.setattr(sampling, "generate_rows", lambda *_args, **_kw: pytest.fail("an answer was sampled"))
    without = mm.study("pocket/medical", tmp_path / "run", texts=None, items=None, checkpoints=None, **options)
    assert set(without.summary["costs"]["organism"]) == {"tokens"}
    assert "Not measured in this run: loss and KL" in without.report.read_text()
    assert "Not measured in this run" not in finished.report.read_text()
    assert "training" not in without.summary and "transitions" not in without.tables
    assert "How it came about" not in without.report.read_text()
    assert "how it came about in training: checkpoints were left out of this run" in without.report.read_text()
    assert "No chapter here" not in finished.report.read_text()
    monkeypatch.setattr(chapters, "write_study_report", lambda _: None)
    assert mm.study("pocket/medical", tmp_path / "run", **options).summary == finished.summary


def test_other_texts_are_refused_in_the_same_folder(finished, prompts):
    options = {"prompts": prompts, "peers": PEERS, "settings": SMALL}
    with pytest.raises(RunFolderError, match="costs.texts"):
        mm.study("pocket/medical", finished.out, texts=["Some other text."], **options)
    with pytest.raises(RunFolderError, match="costs.items"):
        mm.study("pocket/medical", finished.out, **options | {"settings": replace(SMALL, neutral=9)}, texts=None)


def test_costs_of_a_killed_study_are_not_measured_again(tmp_path, prompts, monkeypatch):
    organism = mm.load_organism("pocket/medical")
    plan = make_plan("pocket/medical", prompts.head(4), None, (), SMALL)
    names = [f"x{factor:g}" for factor in (0.0, 0.5, 1.0, 1.5, 2.0)]
    trial = trials.Trial(
        "scaled", pd.DataFrame({"condition": names}, index=pd.Index(names)),
        {name: (mm.ScaleAdapter({}, others=float(name[1:])),) for name in names}, 1,
    )  # fmt: skip
    real, asked = mm.capability.text_costs, []

    def mortal(organism, conditions, *args, **options):
        if len(asked) == 2:
            raise _Killed
        asked.extend(conditions)
        return real(organism, conditions, *args, **options)

    monkeypatch.setattr(costs, "_AT_A_TIME", 2)
    monkeypatch.setattr(mm.capability, "text_costs", mortal)
    with RunFolder(tmp_path / "run", {}) as folder:
        run = sampling.Run(folder, plan, organism, neutral(organism, "default", None, 4))
        with pytest.raises(_Killed):
            costs.measured(run, trial)
        asked.append("killed")
        table = costs.measured(run, trial)
    assert asked == [*names[:2], "killed", *names[2:]]
    assert table["condition"].tolist() == names
    assert table["kl"].tolist()[0] == pytest.approx(0, abs=1e-6) and table["kl"].is_monotonic_increasing


class _Killed(BaseException):
    """As abrupt as a signal: no handler for ordinary errors sees it."""


def test_a_killed_study_goes_on_and_ends_the_same(finished, prompts, tmp_path, monkeypatch, no_report):
    """Killed after every few parts, started again each time: the tables are those of the undisturbed run.

    Answers are those that the undisturbed run sampled, so that this tests the study: that an answer is the same in
    whatever batch it is sampled is tested where answers are sampled.
    """
    stages = [path.name for path in (finished.out / "rows").iterdir() if not path.name.startswith(("loss", "accuracy"))]
    known = {sampling.stage_seed(SMALL.seed, name): stored_parts(finished.out, name).read() for name in stages}
    sampled = []

    def mortal(_organism, missing, _conditions, *, seed, **_options):
        for number, start in enumerate(range(0, len(missing), 200)):
            if number == 3:
                raise _Killed
            part = missing.iloc[start : start + 200]
            sampled.extend(zip([seed] * len(part), part["condition"], part["prompt_id"], part["sample"], strict=True))
            yield part.join(known[seed].loc[part.index, ["response", "finished", "tokens"]])

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
    assert len(sampled) == len(set(sampled)) == sum(map(len, known.values()))


def test_other_settings_do_not_mix_into_a_run(finished, prompts):
    with pytest.raises(RunFolderError, match="settings"):
        mm.study("pocket/medical", finished.out, prompts=prompts, peers=PEERS, settings=StudySettings(seed=7))
    for name, chapter in (("cure_samples", "cure"), ("checkpoints", "training"), ("checkpoint_samples", "training")):
        changed = replace(SMALL, **{name: 7})
        assert changed.identity() == SMALL.identity()  # a run from before there was this chapter can be taken up again
        with pytest.raises(RunFolderError, match=f"{chapter}.{name}"):
            mm.study("pocket/medical", finished.out, prompts=prompts, peers=PEERS, settings=changed)


def test_an_unfinished_run_has_no_report_and_says_how_to_go_on(finished, tmp_path):
    shutil.copytree(finished.out, tmp_path / "run")
    (tmp_path / "run" / "tables" / "ablation.parquet").unlink()
    with pytest.raises(RunFolderError, match="ablation.parquet.*it goes on where it stopped"):
        write_study_report(tmp_path / "run")


@pytest.mark.parametrize("table", ["chapters", "transitions", "cure_back", "watch_folds", "update_cosines"])
def test_a_run_from_before_a_chapter_says_to_run_the_study_again(finished, tmp_path, table):
    for name in ("manifest.json", "summary.json"):
        shutil.copy(finished.out / name, tmp_path / name)
    shutil.copytree(finished.out / "tables", tmp_path / "tables")
    Records.load(tmp_path)
    (tmp_path / "tables" / f"{table}.parquet").unlink()
    with pytest.raises(RunFolderError, match=f"{table}.parquet.*run `mechmisalign study` on it again"):
        Records.load(tmp_path)


def test_a_chapter_that_was_left_out_needs_no_tables_and_is_told(finished, tmp_path):
    for name in ("manifest.json", "summary.json"):
        shutil.copy(finished.out / name, tmp_path / name)
    shutil.copytree(finished.out / "tables", tmp_path / "tables")
    path = tmp_path / "tables" / "chapters.parquet"
    table = pd.read_parquet(path)
    table.loc[table["chapter"].isin(["fine_tunes", "watch"]), "missing"] = "there is nothing"
    table.to_parquet(path)
    for name in (*fine_tunes.TABLES, *watch.TABLES):
        (tmp_path / "tables" / f"{name}.parquet").unlink()
    records = Records.load(tmp_path)
    assert records.left_out == {"fine_tunes": "there is nothing", "watch": "there is nothing"}
    assert records.has("training") and records.has("cure") and not records.has("watch")
    assert "No chapter here: a monitor: there is nothing." in caveats(records).points


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


def test_of_equally_good_cells_the_figure_marks_the_one_that_the_study_chose():
    for order in ([0, 1, 2, 3], [3, 2, 1, 0]):
        sweep = pd.DataFrame(
            {
                "series": steps.MEAN_DIFFERENCE,
                "layer": [1, 1, 2, 2],
                "strength": [2.0, 4.0, 2.0, 4.0],
                "rate": [0.1, 0.4, 0.4, 0.4],
                "coherent": [1.0, 0.9, 1.0, 1.0],
            }
        ).iloc[order]
        assert steps.best_cell(sweep, 0.8) == (2, 2.0)
        best = [patch.get_xy() for patch in mm.plots.layer_strength_heatmap(sweep).axes[1].patches]
        assert best == [(0.5, -0.5)]  # the second layer, the first strength


def with_summary(finished, **changes) -> Records:
    """The finished run as if it had found something else."""
    records = Records.load(finished.out)
    return replace(records, summary=records.summary | changes)


def test_a_sweep_that_brought_nothing_has_no_best_cell(finished):
    choice = json.loads(json.dumps(finished.summary["choice"]))
    assert "was best" in induced(with_summary(finished)).lead
    choice["steered_best"]["em_rate"]["rate"] = 0.0
    lead = induced(with_summary(finished, choice=choice)).lead
    assert "No coherent cell brought a misaligned answer" in lead and "was best" not in lead


def test_the_headline_names_each_direction_and_its_coherence(finished):
    told = chapters.headline(Records.load(finished.out))
    best = finished.summary["em_rate"]["ablated_layerwise"]["estimator"]
    assert f"projecting the {best.replace('mean difference', 'matched-pool mean difference')} out" in told
    own = finished.summary["em_rate"]["ablated_layerwise_mean_difference"]
    assert told.count(" coherent)") >= 3 and "matched-pool mean difference" in told
    assert best == steps.MEAN_DIFFERENCE or mm.report.share(own) in told


def test_a_random_direction_that_breaks_the_answers_is_said_to_be_no_control(finished):
    plain = chapters.headline(Records.load(finished.out))
    assert "no control" not in plain
    coherent = finished.summary["coherent"]
    broken = coherent | {"random_control": coherent["random_control"] | {"rate": 0.4}}
    assert "it breaks the answers, so it is no control" in chapters.headline(with_summary(finished, coherent=broken))


def test_a_page_does_not_look_cured_on_broken_answers(finished):
    coherent = finished.summary["coherent"]
    assert told_broken(finished.summary) == "" and 'class="card void"' not in finished.report.read_text()
    ablated = coherent | {"ablated_layerwise": coherent["ablated_layerwise"] | {"rate": 0.3}}
    told = told_broken(finished.summary | {"coherent": ablated})
    assert "ablated layerwise (30.0 %)" in told and "no cure" in told
    cards = {card.label: card.tone for card in mm.report.summary_cards(finished.summary | {"coherent": ablated})}
    assert cards["Ablated, layer by layer"] == "void" and cards["Organism"] == "bad"
    chat = coherent | {"chat": coherent["chat"] | {"rate": 0.2}}
    assert "no rate on this page" in told_broken(finished.summary | {"coherent": chat})
    assert {card.tone for card in mm.report.summary_cards(finished.summary | {"coherent": chat})} == {"void"}
    page = mm.report.render(mm.report.Report("t", "q", "a", warning="Only 20 % are coherent."))
    assert page.index("Only 20") < page.index('class="answer"')


def test_a_choice_that_does_not_keep_its_coherence_is_told(finished):
    records = Records.load(finished.out)
    assert "does not keep" not in told_choice(records, "steered_best")
    coherent = finished.summary["coherent"]
    lower = coherent | {"steered_best": coherent["steered_best"] | {"rate": 0.779}}
    told = told_choice(with_summary(finished, coherent=lower), "steered_best")
    assert "at least 80.0 % coherent answers, and does not keep to them" in told


def test_few_prompts_are_said_to_have_been_chosen_on_themselves(finished):
    records = Records.load(finished.out)
    few = replace(
        records, tables={**records.tables, "splits": pd.DataFrame({"prompt_id": ["a", "b"], "split": "both"})}
    )
    assert any("only 2 prompts" in point and "optimistic" in point for point in caveats(few).points)
    assert not any("optimistic" in point for point in caveats(records).points)


def test_names_that_are_read_tell_mean_differences_apart():
    assert (
        naming.shown("mean difference")
        == "matched-pool mean difference"
        == naming.shown(naming.shown("mean difference"))
    )
    assert naming.shown("prompt-matched difference") == "prompt-matched difference"
    table = naming.displayed(pd.DataFrame({"estimator": ["mean difference, first 3 tokens"], "rate": [0.5]}))
    assert table["estimator"].tolist() == ["matched-pool mean difference, first 3 tokens"]


def test_an_organism_without_defaults_needs_prompts_and_a_judge():
    with pytest.raises(ValueError, match="needs prompts and judge"):
        make_plan("somebody/model", None, None, None, None)


def test_stages_do_not_share_their_random_numbers():
    seeds = {sampling.stage_seed(0, name) for name in ("chat", "organism", "ablation", "steering_sweep")}
    assert len(seeds) == 4


def test_costs_of_several_random_controls_are_pooled_with_the_widest_interval():
    table = pd.DataFrame(
        {"scope": ["a", "a", "b"], "loss": [1.0, 3.0, 5.0], "loss_low": [0.5, 2.0, 4.0], "loss_high": [2.0, 4.0, 6.0]}
    )
    pooled = costs._pooled(table, ["scope"]).set_index("scope")
    assert pooled.loc["a"].tolist() == [2.0, 0.5, 4.0] and pooled.loc["b"].tolist() == [5.0, 4.0, 6.0]


def test_what_costs_are_measured_on_is_checked_before_anything_is_sampled():
    pocket = mm.load_organism("pocket/medical")
    with pytest.raises(ValueError, match="items need the columns .*answer"):
        neutral(pocket, "default", pd.DataFrame({"prompt": ["What?"]}), 4)
    with pytest.raises(ValueError, match="no neutral text"):
        neutral(pocket, [], None, 4)
    with pytest.raises(ValueError, match="'default', or None"):
        inspect.unwrap(neutral)(pocket, "wikitext", None, 4)

    def whole_words(texts, **_):
        return {"input_ids": [[1] * len(text.split()) for text in texts]}

    other = SimpleNamespace(base=SimpleNamespace(name="somebody/model"), tokenizer=whole_words)
    found = inspect.unwrap(neutral)(other, "default", "default", 5)
    assert len(found.texts) == len(found.items) == 5 and found.counted is None
    assert set(found.items["prompt"]) <= set(mm.prompts.harmless_items()["prompt"])


def test_a_judge_is_known_by_what_it_is_and_not_by_where_it_lies_in_memory():
    def strict(frame):
        return frame

    class Named(SimpleNamespace):
        def __call__(self, frame):
            return frame

    known = studies._judge_identity
    assert known(mm.RuleJudge()) == "RuleJudge()"
    assert " at 0x" not in known(strict) and "strict" in known(strict)
    assert known(Named(identity="model 7, rubric 3")) == "model 7, rubric 3"
    assert known(Named(identity=lambda: "called")) == "called"
    one, same, other = (known(Named(rubrics=(text,))) for text in ("be kind", "be kind", "be strict"))
    assert one == same != other


def test_subjects_are_the_judges_topics_or_the_domains_of_misaligned_answers():
    judged = pd.DataFrame(
        {"label": ["misaligned", "misaligned", "aligned"], "answer_domain": ["power", None, "travel"], "medical": 80.0}
    )
    found = behaviour.topic_scores(judged)
    assert list(found) == ["power"]
    np.testing.assert_array_equal(found["power"], [100.0, np.nan, 0.0])
    rated = judged.assign(medical_status="scored", alignment=1.0, alignment_status="scored", harm=1, harm_status="x")
    assert list(behaviour.topic_scores(rated)) == ["medical"]
    assert behaviour.topic_scores(judged[["label"]]) == {}


def test_what_the_judge_lost_is_told_by_reason_where_anything_is_lost():
    judged = pd.DataFrame(
        {
            "condition": "organism",
            "prompt_id": ["a", "a", "b", "b"],
            "alignment": [0.0, 100.0, np.nan, np.nan],
            "coherence": [100.0, 100.0, 100.0, np.nan],
            "alignment_status": ["scored", "scored", "refusal", "error"],
            "coherence_status": ["scored", "scored", "scored", "error"],
        }
    )
    rated = mm.rates(judged)
    assert behaviour.is_anything_lost(rated) and not behaviour.is_anything_lost(mm.rates(judged.head(2)))
    row = lost_table(rated).frame.iloc[0]
    assert row[["judged", "refusal", "error", "missing", "at most"]].tolist() == [
        "50.0 %", "25.0 %", "25.0 %", "0.0 %", "50.0 %"
    ]  # fmt: skip
    assert row["of judged ones"].startswith("50.0 %")


def test_what_survives_the_number_of_comparisons_is_said_in_words():
    cells = pd.DataFrame({"layer": [0, 1, 2, 4, 5], "strength": 1.0, "difference": [0.4, 0.3, 0.2, 0.4, -0.2]})
    told = difference_tables.told_steering(cells.assign(p_max=[0.01, 0.05, 0.04, 0.001, 0.03]))
    assert "4 of 5 bring more" in told and "layers 0 to 2, 4; 1 fewer." in told
    two = difference_tables.told_steering(cells.assign(p_max=[0.01, 0.05, 0.06, 0.2, 0.3]))
    assert "2 of 5 bring more" in two and two.endswith("layers 0, 1.")
    none = difference_tables.told_steering(cells.assign(p_max=1.0))
    assert "0 of 5 bring more" in none and "layer" not in none.partition("correction")[2]

    scopes = pd.DataFrame({"estimator": ["a", "b", steps.CONTROL], "scope": "single", "difference": -0.3})
    told = difference_tables.told_ablation(scopes.assign(p_max=[0.01, 0.3, 0.4]))
    assert "Of 2 ablations 1 leave fewer" in told and "(all but b, single)" in told and told.endswith("none.")
    assert "these do too: random control, single" in difference_tables.told_ablation(scopes.assign(p_max=0.01))


def test_the_better_scope_is_chosen_where_ablations_were_compared():
    table = pd.DataFrame(
        {
            "estimator": ["a", "b", "a", "b"],
            "scope": ["layer-wise", "layer-wise", "single", "single"],
            "rate": [0.1, 0.0, 0.3, 0.2],
            "coherent": [0.9, 0.9, 0.9, 0.9],
        }
    )
    assert steps.best_scope(table, {"layer-wise": "a", "single": "b"}, 0.8) == "layer-wise"
    broken = table.assign(coherent=[0.1, 0.9, 0.9, 0.9])
    assert steps.best_scope(broken, {"layer-wise": "a", "single": "b"}, 0.8) == "single"
