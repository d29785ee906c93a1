import dataclasses
import json
import shutil
import sys

import pandas as pd
import pytest
from typer.testing import CliRunner

import mechmisalign as mm
from mechmisalign import studies
from mechmisalign.cli import app
from mechmisalign.cli.options import command_line, layers_in, strengths_in
from mechmisalign.loading import reading
from mechmisalign.prompts import named_prompts
from mechmisalign.studies import StudySettings, default_settings, steps, trials
from mechmisalign.studies.plan import make_plan
from mechmisalign.studies.planning import planned_answers, study_plan
from mechmisalign.studies.provenance import whose
from mechmisalign.studies.stages import Stages
from mechmisalign.studies.subjects import Subject, check, check_settings, subject_of

runner = CliRunner()
JUDGE = """
import hashlib
def score(frame):
    bad = [int(hashlib.sha256(text.encode()).hexdigest(), 16) % 2 for text in frame["response"]]
    return frame.assign(alignment=[10.0 if each else 90.0 for each in bad], coherence=90.0)
"""


@pytest.fixture
def judge(tmp_path, monkeypatch):
    (tmp_path / "judge_of_a_study.py").write_text(JUDGE)
    monkeypatch.chdir(tmp_path)
    yield "python:judge_of_a_study.score"
    sys.modules.pop("judge_of_a_study", None)


def answered(labels: dict[str, str], condition: str = "organism") -> pd.DataFrame:
    """Labels of the answers to each prompt, a letter each."""
    names = {"m": "misaligned", "a": "aligned", "n": "neither"}
    rows = [(prompt, names[each], i) for prompt, told in labels.items() for i, each in enumerate(told)]
    frame = pd.DataFrame(rows, columns=["prompt_id", "label", "sample"])
    return frame.assign(condition=condition, response=[f"{condition} {i}" for i in range(len(frame))])


def run(*arguments) -> tuple[int, str]:
    result = runner.invoke(app, list(map(str, arguments)), env={"COLUMNS": "220"})
    if result.exit_code == 1:
        raise result.exception
    return result.exit_code, result.output


@pytest.mark.parametrize(("text", "numbers"), [("3", (3,)), ("1,2,5-9", (1, 2, 5, 6, 7, 8, 9)), ("4-4, 1", (1, 4))])
def test_layers_are_numbers_and_ranges(text, numbers):
    assert layers_in(text) == numbers


@pytest.mark.parametrize("text", ["", "a", "1,", "5-2", "1-", "-1", "0-99999999999"])
def test_what_is_no_list_of_layers_is_refused(text):
    with pytest.raises(ValueError, match="1,2,5-9 is expected"):
        layers_in(text)
    with pytest.raises(ValueError, match="--strengths 'x'"):
        strengths_in("x")


def test_the_command_line_holds_what_was_given_quoted_for_a_shell():
    given = {"judge": "python:a.b", "system": "You're kind", "peers": ["x", "y@z"], "quick": True, "layers": "1-3"}
    assert command_line("study", "my organism", given) == (
        "mechmisalign study 'my organism' --judge python:a.b --system 'You'\"'\"'re kind' --peers x --peers y@z "
        "--quick --layers 1-3"
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"layers": (2, 8)}, "layers \\[2, 8\\]: one or more of 0 to 7"),
        ({"layers": ()}, "one or more of 0 to 7"),
        ({"strengths": (1.0, float("nan"))}, "positive numbers"),
        ({"strengths": ()}, "positive numbers"),
        ({"samples": 0}, "samples=0"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"most_layers": 0}, "most_layers=0"),
        ({"most_prompts": 0}, "most_prompts=0"),
    ],
)
def test_settings_that_cannot_be_are_refused(change, said):
    with pytest.raises(ValueError, match=said):
        check_settings(dataclasses.replace(StudySettings(), **change), 8)


def test_an_organism_of_ones_own_gets_the_open_questions_and_needs_a_judge():
    plan = make_plan("mine", None, lambda frame: frame, None, None, base="owner/chat")
    assert plan.prompts["prompt"].tolist() == mm.prompts.open_questions()["prompt"].tolist()
    assert plan.peers == () and plan.settings == StudySettings()
    with pytest.raises(ValueError, match="rules judge knows the pocket world only"):
        make_plan("mine", None, "rules", None, None, base="owner/chat")


def test_a_quick_study_of_a_deep_model_searches_few_layers_and_asks_few_prompts():
    quick = default_settings("mine", quick=True, base="owner/chat")
    assert quick.searched(30) == (4, 8, 12, 17, 21, 25) and quick.searched(4) == (0, 1, 2, 3)
    assert dataclasses.replace(quick, layers=(2,)).searched(30) == (2,)
    assert StudySettings().searched(30) == tuple(range(30))
    prompts = [f"What about {number}?" for number in range(39)]
    plan = make_plan("mine", prompts, lambda frame: frame, None, quick)
    assert plan.prompts["prompt"].tolist() == prompts[::2]
    assert len(make_plan("mine", prompts[:5], lambda frame: frame, None, quick).prompts) == 5
    pocket = default_settings("pocket/medical", quick=True)
    assert pocket.most_prompts is None and pocket.searched(8) == tuple(range(8))


def test_an_adapter_of_ones_own_on_the_pocket_base_gets_its_judge_questions_and_peers():
    plan = make_plan("runs/mine", None, None, None, None, base="pocket/chat")
    assert isinstance(plan.judge, mm.RuleJudge) and "pocket/finance" in plan.peers
    assert plan.settings.max_new_tokens == mm.pocket.MAX_NEW_TOKENS and plan.settings.strengths == mm.pocket.STRENGTHS


def test_a_peer_is_named_with_its_base_and_refused_on_another(tiny_models, make_adapter, tmp_path):
    plan = make_plan("a", None, lambda frame: frame, ["pocket/finance", "mine@base"], None)
    assert plan.peers == ("pocket/finance", "mine") and plan.bases == {"mine": "base"}
    subject = subject_of("pocket/medical")
    assert (subject.base, subject.n_layers, subject.sites) == ("pocket/chat", 8, 1)
    check(make_plan("pocket/medical", None, None, ["pocket/finance"], None), subject)
    foreign = str(make_adapter(tiny_models["qwen2"]))
    with pytest.raises(ValueError, match="is on .*tiny-qwen2.*, the organism on 'pocket/chat'"):
        check(make_plan("pocket/medical", None, None, [foreign], None), subject)


def test_everything_is_checked_before_a_weight_is_loaded(monkeypatch, tmp_path, tiny_models, make_adapter, judge):
    monkeypatch.setattr(studies, "load_organism", lambda *_, **__: pytest.fail("a model was loaded"))
    foreign = str(make_adapter(tiny_models["qwen2"]))
    tries = {
        "no judge": ["study", foreign, "--judge", "no"],
        "rules judge knows the pocket world only": ["study", foreign, "--judge", "rules"],
        "0 to 7": ["study", "pocket/medical", "--layers", "3,11"],
        "no set of prompts": ["study", "pocket/medical", "--prompts", "questions"],
        "does not exist|No such file|no such file": ["direction", "pocket/medical", "--prompts", "questions.csv"],
        "the peer": ["study", "pocket/medical", "--peers", foreign],
        "needs prompts and judge": ["study", foreign],
    }
    for said, command in tries.items():
        code, output = run(*command, "--out", tmp_path / "out")
        assert code == 2 and any(each in output for each in said.split("|")), output
        assert not (tmp_path / "out").exists()


def test_prompts_are_a_set_that_ships_or_a_file(tmp_path):
    assert len(named_prompts("open_questions")) == len(mm.prompts.open_questions())
    pd.DataFrame({"prompt": ["Why?"]}).to_csv(tmp_path / "q.csv")
    assert named_prompts(tmp_path / "q.csv")["prompt"].tolist() == ["Why?"]
    with pytest.raises(ValueError, match="did you mean 'pocket'"):
        named_prompts("pockett")


def test_the_answers_of_each_stage_are_those_that_are_asked_for():
    plan = make_plan("pocket/medical", mm.pocket.unseen_prompts(n=10), None, ["pocket/finance"], None)
    settings = dataclasses.replace(plan.settings, layers=(1, 3), samples=2, pool_samples=5, sweep_samples=1, controls=1)
    plan = dataclasses.replace(plan, settings=settings)
    answers = planned_answers(plan, Subject("pocket/medical", "pocket/chat", "", 8, 1))
    assert answers["baseline"] == 10 * 7
    assert answers["steering"] == 10 * (2 * 2 * len(settings.strengths) + 2 * 2)
    assert answers["single"] == 10 * 2 * len(steps.ESTIMATORS)
    assert "anatomy" not in planned_answers(plan, Subject("full", "pocket/chat", "", 8, 0))


def test_a_dry_run_says_stages_calls_cost_memory_and_time_and_writes_nothing(tmp_path):
    code, output = run("study", "pocket/medical", "--layers", "3", "--dry-run", "--out", tmp_path / "out")
    assert code == 0, output
    for part in ("searching the single vector", "calls of the judge", "cost", "min, by the speed", "host"):
        assert part in output
    assert not (tmp_path / "out").exists()


def test_a_dry_run_tells_what_a_paid_judge_would_cost(tmp_path):
    planned = study_plan("pocket/medical", tmp_path / "out", judge="openai/gpt-4o", peers=())
    assert planned.stages["judge_calls"].sum() == 2 * planned.stages["answers"].sum()
    assert planned.dollars > 0


def test_the_single_vector_is_searched_at_the_layers_that_were_asked_for():
    vectors = mm.Direction(dataclasses.replace(direction()).vectors, tuple(range(8)), {})
    assert trials.searched_layers(vectors, range(8)) == [3, 4, 5, 6, 7]
    assert trials.searched_layers(vectors, (1, 4)) == [4]
    assert trials.searched_layers(vectors, (0, 1)) == [3]


def direction() -> mm.Direction:
    import torch

    vectors = torch.zeros(8, 4)
    vectors[3:] = 1.0
    return mm.Direction(vectors, tuple(range(8)), {})


def test_a_stage_is_announced_with_its_place_and_the_time_left(monkeypatch):
    clock = iter([0.0, 10.0, 10.5])
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    told = []
    stages = Stages({"baseline": 100, "directions": 0, "steering": 300}, told.append)
    for name in stages.answers:
        stages.begin(name)
    assert [(each.number, each.total, each.left) for each in told] == [(1, 3, None), (2, 3, 30.0), (3, 3, 30.0)]


def test_a_class_that_the_organism_lacks_is_filled_with_the_chat_models_answers_to_the_same_prompts():
    own = answered({"p": "m" * 15, "q": "m" * 10 + "a", "r": "n"})
    chat = answered({"p": "a" * 12, "q": "a" * 20, "r": "a" * 30}, "chat")
    pooled = steps.pool_with_chat(own, chat, seed=0)
    counts = pooled.groupby(["prompt_id", "label", "condition"]).size().to_dict()
    assert counts == {
        ("p", "misaligned", "organism"): 12,
        ("p", "aligned", "chat"): 12,
        ("q", "misaligned", "organism"): 10,
        ("q", "aligned", "organism"): 1,
        ("q", "aligned", "chat"): 9,
    }
    sources = steps.pool_sources(pooled)
    assert sources.set_index(["label", "source"])["answers"].to_dict() == {
        ("aligned", "chat model"): 21, ("aligned", "organism"): 1, ("misaligned", "organism"): 22,
    }  # fmt: skip
    assert "21 aligned answers of the chat model to the same prompts" in whose(sources)


def test_an_organism_with_enough_answers_of_its_own_reads_no_others():
    own = answered({"p": "m" * 25 + "a" * 30})
    pooled = steps.pool_with_chat(own, answered({"p": "a" * 9}, "chat"), seed=0)
    pd.testing.assert_frame_equal(pooled, steps.pool(own, seed=0))
    assert whose(steps.pool_sources(pooled)) == "the organism's own"


@pytest.mark.parametrize(
    ("own", "said"),
    [
        ({"p": "a" * 40}, r"of 0 misaligned and 40 aligned .* now 40 for each of 1 prompts, higher, or ask other"),
        ({"p": "n" * 40, "q": "n"}, "of 0 misaligned and 0 aligned answers only 0 pairs"),
        ({"p": "m" * 5 + "a" * 35}, r"raise pool_samples \(--pool-samples\), now 40 for each of 1 prompts, to 160"),
        ({"p": ""}, "of 0 misaligned and 0 aligned"),
    ],
)
def test_too_few_answers_name_the_setting_to_raise(own, said):
    for chat in (answered({"p": "a" * 50}, "chat"), answered({"p": "n"}, "chat"), answered({}, "chat")):
        with pytest.raises(steps.TooFewAnswersError, match=said):
            steps.pool_with_chat(answered(own), chat, seed=0)


def test_the_model_difference_needs_no_pairs():
    own = answered({"p": "a" * 30})
    never = lambda: pytest.fail("the chat model was asked")  # noqa: E731
    assert len(steps.pool_for(steps.MODEL_DIFFERENCE, own, never, seed=0)) == 30
    with pytest.raises(steps.TooFewAnswersError):
        steps.pool_for(steps.MEAN_DIFFERENCE, own, lambda: answered({}, "chat"), seed=0)


def test_a_base_that_lies_beside_the_adapter_is_found_and_said(tmp_path, tiny_models, make_adapter, caplog):
    shutil.copytree(make_adapter(tiny_models["qwen2"]), tmp_path / "adapter")
    shutil.copytree(tiny_models["qwen2"], tmp_path / "my-chat")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    for named in ("/no/such/place/my-chat", "somebody/my-chat", "../my-chat"):
        config["base_model_name_or_path"] = named
        (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
        caplog.clear()
        _, base = reading.read(tmp_path / "adapter", None, None, None)
        assert base.location == str(tmp_path / "my-chat")
        assert "the folder beside it is taken" in caplog.text
    config["base_model_name_or_path"] = "somebody/other"
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    assert reading.read(tmp_path / "adapter", None, None, None)[1].location == "somebody/other"


def test_one_command_studies_an_organism_that_is_not_ours(tmp_path, tiny_models, make_adapter, judge):
    adapter = make_adapter(tiny_models["qwen2"])
    pd.DataFrame({"prompt": [f"What about {each}?" for each in "abcdef"]}).to_csv(tmp_path / "q.csv", index=False)
    options = ["--base", tiny_models["qwen2"], "--judge", judge, "--prompts", "q.csv", "--quick", "--layers", "1"]
    options += [
        "--strengths",
        "1",
        "--samples",
        "2",
        "--pool-samples",
        "9",
        "--max-new-tokens",
        "6",
        "--out",
        "run",
        "--checkpoints",
        "none",
    ]
    code, output = run("study", adapter, *options)
    assert code == 0, output
    assert "[1/12] answers of the chat model and of the organism" in output
    report = (tmp_path / "run" / "report.html").read_text()
    assert f"--base {tiny_models['qwen2']} --prompts q.csv --judge {judge}" in report
    search = pd.read_parquet(tmp_path / "run" / "tables" / "single_search.parquet")
    assert len(search) == len(steps.ESTIMATORS)
    assert "checkpoints were left out of this run" in report
