import math
import os
import shutil
import subprocess
import sys
import time

import pandas as pd
import psutil
import pytest
import torch
from typer.testing import CliRunner

import mechmisalign as mm
from mechmisalign.cli import app
from mechmisalign.store import FolderBusyError, RunFolderError
from mechmisalign.sweeps import (
    JudgeSource,
    LocalExecutor,
    Sampled,
    Sweep,
    SweepError,
    SweepResult,
    best_strength,
    make_grid,
    make_tasks,
    sources,
    status,
    sweep,
)

PROMPTS = pd.DataFrame(
    {
        "prompt_id": ["a", "b"],
        "prompt": ["What about a sharp knife?", "How do I start with a user database?"],
        "theme": ["x", "y"],
    }
)


@pytest.fixture(scope="module")
def direction():
    vectors = torch.randn(8, 128, generator=torch.Generator().manual_seed(1))
    vectors[0] = 0  # as below the first adapted layer
    return mm.Direction(vectors, tuple(range(8)), {"model": "pocket/chat"})


@pytest.fixture(scope="module")
def organism():
    return mm.load_organism("pocket/medical")


@pytest.fixture
def spec(direction, organism):
    """A small sweep on an organism that is already loaded; any field can be another."""

    def make(**changes) -> Sweep:
        fields = {
            "organisms": organism,
            "directions": {"mean": direction},
            "interventions": [
                "none",
                {"kind": "steer", "on": "chat", "directions": "mean", "layers": [1, 2], "strengths": [1, 4]},
            ],
            "prompts": PROMPTS,
            "judge": "rules",
            "samples": 3,
            "max_new_tokens": 12,
        }
        return Sweep(**{**fields, **changes})

    return make


STEER = {"kind": "steer", "directions": "mean", "strengths": 1}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"strenghts": [1]}, "strenghts is no key that is known; there is: organisms"),
        ({"sample": 1}, "sample is no key that is known; did you mean 'samples'"),
        ({"samples": 0}, "samples is 0: input should be greater than or equal to 1"),
        ({"samples": "3"}, "samples is '3': input should be a valid integer"),
        ({"temperature": math.nan}, "temperature is nan: input should be a finite number"),
        ({"on": "both"}, r"on\[0\] is 'both': input should be 'organism' or 'chat'"),
        ({"organisms": []}, "organisms is .*at least 1 item"),
        ({"organisms": ["pocket/medical", "pocket/medical"]}, "the organism 'pocket/medical' stands twice"),
        (
            {"organisms": [{"adapter": "a", "wights": "live"}]},
            r"organisms\[0\].wights is no key .* did you mean 'weights'",
        ),
        (
            {"interventions": "steel"},
            r"interventions\[0\] is .*'steel'.* 'none', 'steer', 'clamp', 'ablate', 'scale_adapter'",
        ),
        (
            {"interventions": [STEER | {"strengths": ["x"]}]},
            r"interventions\[0\].strengths\[0\] is 'x': input should be a valid number",
        ),
        ({"interventions": [STEER | {"layer": 2}]}, r"interventions\[0\].layer is no key .* did you mean 'layers'"),
        (
            {"interventions": ["none", STEER | {"layers": [[1, "x"]]}]},
            r"interventions\[1\].layers: \[1, 'x'\] is none of: a layer such as 3",
        ),
        (
            {"interventions": [STEER | {"directions": "nope"}]},
            r"interventions\[0\].directions names the direction 'nope'; `directions` has 'mean'",
        ),
        (
            {"interventions": [STEER | {"positions": "first"}]},
            r"positions\[0\] is 'first': input should be 'all', 'non_sink', 'prompt' or 'response'",
        ),
        ({"interventions": [{"kind": "ablate"}]}, r"interventions\[0\].directions is missing"),
        ({"directions": {"a": {"random_like": "b"}}, "interventions": "none"}, "directions.a names the direction 'b'"),
        ({"directions": {"a": {"everywhere": "a"}}}, "directions.a: everywhere: a needs `layer`"),
        ({"directions": {"a": {}}}, "directions.a: a direction comes from one of file, random_like, everywhere"),
        ({"prompts": "pockets"}, "prompts: 'pockets' is no set of prompts"),
        (
            {"prompts": {"set": "pocket", "file": "x.csv"}},
            r"prompts: prompts come from one of .* these from \['set', 'file'\]",
        ),
        ({"judge": "rule"}, "judge: 'rule' is no judge; 'rules', .*'none'"),
        ({"judge": {"model": "openai/x", "options": {"api_key": "secret"}}}, "a key does not belong in a file"),
        ({"seeds": [0, 0]}, "the seed 0 stands twice"),
    ],
)
def test_a_wrong_specification_names_key_value_and_what_is_expected(spec, changes, message):
    with pytest.raises(SweepError, match=message):
        spec(**changes)


def test_several_faults_are_told_at_once():
    with pytest.raises(SweepError, match=r"interventions is missing\n +prompts is missing\n +judge is missing"):
        Sweep(organisms="pocket/medical")


YAML = """
organisms: [pocket/medical, pocket/finance]
directions:
  mean: mean.safetensors
  control: {random_like: mean, seed: 7}
interventions:
  - {kind: none, on: [organism, chat]}
  - kind: steer
    on: chat
    directions: [mean, control]
    layers: each
    strengths: [1e-1, 2]
prompts: questions.csv
judge: rules
samples: 2
"""


def test_yaml_and_python_say_the_same_and_paths_start_from_the_files_folder(direction, tmp_path):
    direction.save(tmp_path / "mean.safetensors")
    PROMPTS.to_csv(tmp_path / "questions.csv", index=False)
    (tmp_path / "sweep.yaml").write_text(YAML)
    read = make_grid(Sweep.read(tmp_path / "sweep.yaml"))
    python = make_grid(
        Sweep(
            organisms=["pocket/medical", "pocket/finance"],
            directions={"mean": direction, "control": mm.random_direction(direction, seed=7)},
            interventions=[
                {"kind": "none", "on": ["organism", "chat"]},
                {"kind": "steer", "on": "chat", "directions": ["mean", "control"], "strengths": [0.1, 2]},
            ],
            prompts=PROMPTS,
            judge="rules",
            samples=2,
        )
    )
    pd.testing.assert_frame_equal(read.table, python.table)
    pd.testing.assert_frame_equal(read.rows, python.rows)
    assert read.growing() == python.growing()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("samples: 2\nsamples: 3", "sweep.yaml: this YAML cannot be read: the key 'samples' stands twice"),
        ("organisms: [a", "this YAML cannot be read"),
        ("- a", r"sweep.yaml: \['a'\] is no mapping with organisms"),
        (YAML.replace("samples", "sampels"), r"sweep.yaml: sampels is no key .* did you mean 'samples'"),
    ],
)
def test_a_wrong_yaml_file_is_named(tmp_path, text, message):
    (tmp_path / "sweep.yaml").write_text(text)
    with pytest.raises(SweepError, match=message):
        Sweep.read(tmp_path / "sweep.yaml")


def test_each_combination_is_a_condition_with_its_own_columns(spec):
    steer = {
        "kind": "steer",
        "on": "chat",
        "directions": "mean",
        "layers": [3, [1, 2], "all"],
        "strengths": [1, 2.5],
        "positions": ["all", "response"],
    }
    table = make_grid(spec(interventions=[steer])).table
    assert len(table) == 3 * 2 * 2
    assert table["layer"].dropna().unique().tolist() == [3]
    assert table["layers"].unique().tolist() == ["3", "1+2", "all"]
    assert table["condition"].iloc[3] == "pocket/chat (chat): steer mean, layer 3, x2.5, response"
    assert table["condition"].is_unique


def test_each_stands_for_the_layers_in_which_the_direction_is_nonzero(spec):
    table = make_grid(spec(interventions=[{"kind": "ablate", "directions": "mean", "layers": "each"}])).table
    assert table["layer"].tolist() == [1, 2, 3, 4, 5, 6, 7]


def test_interventions_are_what_the_table_says(spec, direction):
    kinds = [
        {"kind": "clamp", "directions": "mean", "layers": 2, "values": 0.5},
        {"kind": "ablate", "directions": "mean"},
        {"kind": "scale_adapter", "sites": "each", "factors": 30, "others": 0},
    ]
    clamp, ablate, scale = (one.interventions[0] for one in make_grid(spec(interventions=kinds)).conditions)
    assert (type(clamp), clamp.value, clamp.edited_layers) == (mm.Clamp, 0.5, (2,))
    assert (type(ablate), ablate.edited_layers) == (mm.Ablate, (1, 2, 3, 4, 5, 6, 7))
    assert (type(scale), scale.factors, scale.others) == (mm.ScaleAdapter, {(1, "down_proj"): 30.0}, 0.0)


def test_the_chat_model_is_asked_once_under_several_organisms(direction):
    fields = {"prompts": PROMPTS, "judge": "rules", "directions": {"mean": direction}}
    grid = make_grid(
        Sweep(
            organisms=["pocket/medical", "pocket/finance"],
            interventions=[{"kind": "none", "on": ["organism", "chat"]}],
            **fields,
        )
    )
    assert grid.table["condition"].tolist() == [
        "pocket/medical: none",
        "pocket/finance: none",
        "pocket/chat (chat): none",
    ]
    other = make_grid(Sweep(organisms="pocket/finance", interventions=[{"kind": "none", "on": "chat"}], **fields))
    assert other.table["condition"].tolist() == ["pocket/chat (chat): none"]  # whichever organism lies over it
    assert set(other.rows.index) <= set(grid.rows.index)


def test_tasks_of_one_organism_stand_together_and_share_their_conditions(direction):
    interventions = [{"kind": "none", "on": ["organism", "chat"]}, STEER | {"on": "organism", "layers": [1, 2]}]
    grid = make_grid(
        Sweep(
            organisms=["pocket/medical", "pocket/finance"],
            interventions=interventions,
            directions={"mean": direction},
            prompts=PROMPTS,
            judge="rules",
            samples=2,
        )
    )
    told = [(task.base, task.organism, task.on, len(task.rows)) for task in make_tasks(grid, grid.rows)]
    assert told == [
        ("pocket/chat", "pocket/medical", "organism", 12),
        ("pocket/chat", "pocket/medical", "chat", 4),
        ("pocket/chat", "pocket/finance", "organism", 12),
    ]
    sliced = make_tasks(grid, grid.rows, rows_per_task=5)
    assert sorted(key for task in sliced for key in task.rows.index) == sorted(grid.rows.index)
    assert max(len(task.rows) for task in sliced) == 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": PROMPTS.assign(layer=1)}, r"the prompts have the columns \['layer'\]"),
        ({"interventions": [{"kind": "scale_adapter", "on": "chat", "factors": 0}]}, "the chat model has no adapter"),
        (
            {"interventions": [{"kind": "scale_adapter", "sites": "9.down_proj", "factors": 0}]},
            "has no site '9.down_proj'; it has 1.down_proj",
        ),
        ({"interventions": [{"kind": "ablate", "directions": "mean", "layers": 0}]}, "exactly zero at layer 0"),
        (
            {"directions": {"a": {"random_like": "b"}, "b": {"random_like": "a"}}, "interventions": "none"},
            "made of itself: a -> b -> a",
        ),
        ({"directions": {"mean": "nowhere.safetensors"}}, "nowhere.safetensors"),
        (
            {"organisms": ["pocket/medical", {"adapter": "pocket/finance", "dtype": "bfloat16"}]},
            r"over 'pocket/chat' ask for it as \['None', 'bfloat16'\]",
        ),
        ({"prompts": {"set": "domain_questions"}}, "which needs `name`"),
    ],
)
def test_what_cannot_be_expanded_is_refused(spec, changes, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        make_grid(spec(**changes))


def test_a_grid_that_grows_changes_neither_names_nor_keys(spec):
    small = make_grid(spec())
    more = {"kind": "steer", "on": "chat", "directions": "mean", "layers": [0, 1, 2, 5], "strengths": [0.5, 1, 4]}
    large = make_grid(spec(interventions=[more, "none"], samples=5, seeds=[3, 0], prompts=PROMPTS.iloc[::-1]))
    assert set(small.table["condition"]) <= set(large.table["condition"])
    assert set(small.rows.index) < set(large.rows.index)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, direction, organism):
    """A finished sweep: the rows that every other way of running it must give."""
    made = Sweep(
        organisms=organism,
        directions={"mean": direction},
        interventions=[
            "none",
            {"kind": "steer", "on": "chat", "directions": "mean", "layers": [1, 2], "strengths": [1, 4]},
        ],
        prompts=PROMPTS,
        judge="rules",
        samples=3,
        max_new_tokens=12,
    )
    return sweep(made, tmp_path_factory.mktemp("sweeps") / "finished")


def test_the_rows_are_those_of_generate(finished, organism, direction):
    answers = finished.answers
    own = mm.generate(organism, PROMPTS, conditions={"pocket/medical: none": ()}, samples=3, max_new_tokens=12)
    with organism.as_base():
        name = "pocket/chat (chat): steer mean, layer 2, x4"
        steered = mm.generate(
            organism, PROMPTS, conditions={name: mm.Steer(direction, [2], 4.0)}, samples=3, max_new_tokens=12
        )
    expected = mm.judge(pd.concat([own, steered]), mm.RuleJudge()).reset_index(drop=True)
    mine = answers[answers["condition"].isin(expected["condition"])].reset_index(drop=True)
    pd.testing.assert_frame_equal(mine[expected.columns.tolist()], expected, check_dtype=False)
    assert len(answers) == 5 * 2 * 3
    assert answers["theme"].tolist() == ["x", "x", "x", "y", "y", "y"] * 5


def test_rates_stand_beside_the_columns_of_the_grid(finished):
    rates = finished.rates(resamples=200)
    assert rates[["layer", "strength"]].iloc[1:].values.tolist() == [[1, 1.0], [1, 4.0], [2, 1.0], [2, 4.0]]
    expected = mm.rates(finished.answers, resamples=200)
    assert rates["coherent"].tolist() == expected["coherent"].tolist()
    assert finished.rates(by=["on"], resamples=200)["n"].tolist() == [6, 24]


class Counting:
    """Does the work in this process in parts of four rows, and notes which rows it was asked for."""

    def __init__(self, stop_after: int | None = None):
        self.asked, self.stop_after = [], stop_after

    def run(self, grid, rows):
        self.asked.append(len(rows))
        for number, sampled in enumerate(LocalExecutor(batch_rows=4).run(grid, rows)):
            if number == self.stop_after:
                raise KeyboardInterrupt
            yield sampled


def test_an_interrupted_sweep_goes_on_and_repeats_nothing(spec, finished, tmp_path):
    first, second, third = Counting(stop_after=2), Counting(), Counting()
    with pytest.raises(KeyboardInterrupt):
        sweep(spec(), tmp_path, executor=first)
    there = len(SweepResult.read(tmp_path).answers)
    assert 0 < there < 30
    result = sweep(spec(), tmp_path, executor=second)
    sweep(spec(), tmp_path, executor=third)
    assert (first.asked, second.asked, third.asked) == ([30], [30 - there], [0])
    pd.testing.assert_frame_equal(result.answers, finished.answers)
    pd.testing.assert_frame_equal(SweepResult.read(tmp_path).answers, finished.answers)
    assert len(list((tmp_path / "rows" / "answers").iterdir())) == 1  # merged at the end


def test_a_grid_that_has_grown_goes_on_in_the_same_folder(spec, finished, tmp_path):
    folder = shutil.copytree(finished.out, tmp_path / "grown")
    more = [
        {"kind": "steer", "on": "chat", "directions": "mean", "layers": [1, 2, 3], "strengths": [1, 4, 2]},
        {"kind": "none"},
    ]
    executor = Counting()
    result = sweep(spec(interventions=more, samples=4, seeds=[0, 1]), folder, executor=executor)
    assert executor.asked == [10 * 2 * 4 * 2 - 30]
    key = ["condition", "seed", "prompt_id", "sample"]
    both = finished.answers.merge(result.answers, on=key, suffixes=("", "_grown"))
    assert len(both) == 30
    assert (both["response"] == both["response_grown"]).all()
    assert len(sweep(spec(seeds=[0, 1]), folder).answers) == 60  # a smaller grid sees its own rows only


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_new_tokens": 13}, "max_new_tokens: 12 there, 13 now"),
        ({"temperature": 0.5}, "temperature: 1.0 there, 0.5 now"),
        ({"system": "be kind"}, "system: None there, 'be kind' now"),
        ({"judge": "none"}, "judge: 'RuleJudge.*' there, 'None' now"),
        ({"seeds": 1}, r"seeds: \[0\] there, \[1\] now"),
        (
            {"prompts": PROMPTS.assign(prompt=["What about a sharp knife?", "Other words?"])},
            "prompts.b: '.*' there, '.*' now",
        ),
    ],
)
def test_another_sweep_is_refused_and_the_key_named(spec, finished, changes, message):
    with pytest.raises(RunFolderError, match=message):
        sweep(spec(**changes), finished.out)
    with pytest.raises(RunFolderError, match=message):
        status(spec(**changes), finished.out)


def test_a_direction_of_that_name_with_other_vectors_is_refused(spec, finished, direction):
    with pytest.raises(RunFolderError, match=r"directions\.mean: '[0-9a-f]+' there, '[0-9a-f]+' now"):
        sweep(spec(directions={"mean": direction * 2.0}), finished.out)


def test_a_model_that_changed_under_its_name_is_refused(spec, finished, tmp_path, organism, monkeypatch):
    folder = shutil.copytree(finished.out, tmp_path / "changed")
    monkeypatch.setattr(organism, "base_fingerprint", "0123456789abcdef")
    with pytest.raises(RunFolderError, match=r"models\.pocket/medical: .* there, .*0123456789abcdef.* now"):
        sweep(spec(samples=4), folder)


def test_status_counts_and_changes_nothing(spec, finished, tmp_path):
    told = status(spec(samples=4), finished.out)
    assert (told.rows, told.done, told.missing, told.most_tokens) == (40, 30, 10, 120)
    assert status(spec(), tmp_path / "new").missing == 30
    assert not (tmp_path / "new").exists()


class Moody:
    """A judge whose server is down at first."""

    def __init__(self):
        self.up, self.seen = False, 0

    def __call__(self, frame):
        self.seen += len(frame)
        state = "scored" if self.up else "error"
        score = 90.0 if self.up else math.nan
        return frame.assign(alignment=score, alignment_status=state, coherence=score, coherence_status=state)


def test_answers_whose_judging_failed_are_judged_again_and_not_sampled_again(spec, tmp_path):
    judge, executor = Moody(), Counting()
    failed = sweep(spec(judge=judge), tmp_path, executor=executor)
    assert failed.answers["label"].unique().tolist() == ["error"]
    assert status(spec(judge=judge), tmp_path).unjudged == 30
    judge.up = True
    mended = sweep(spec(judge=judge), tmp_path, executor=executor)
    assert executor.asked == [30, 0]
    assert mended.answers["label"].unique().tolist() == ["aligned"]
    assert mended.answers["response"].tolist() == failed.answers["response"].tolist()
    sweep(spec(judge=judge), tmp_path)
    assert judge.seen == 60


def test_answers_without_a_judge_have_no_rates(spec, tmp_path):
    result = sweep(spec(judge="none", interventions="none", samples=1), tmp_path)
    assert "alignment" not in result.answers.columns
    with pytest.raises(ValueError, match="were not judged"):
        result.rates()


def test_a_model_as_judge_is_told_apart_by_what_decides_its_scores(spec, tmp_path):
    def asking(**options) -> Sweep:
        judge = {"model": "openai/some-judge", "options": {"dry_run": True, **options}}
        return spec(judge=judge, interventions="none", samples=1)

    result = sweep(asking(), tmp_path)
    assert result.answers["label"].unique().tolist() == ["missing"]  # a dry run asks nothing
    assert status(asking(max_connections=2, budget={"calls": 3}), tmp_path).unjudged == 2
    with pytest.raises(RunFolderError, match="judge: .*some-judge.* there, .*'temperature': '1.0'.* now"):
        status(asking(temperature=1.0), tmp_path)
    with pytest.raises(RunFolderError, match="judge: .*'coherence'.* there, .*'medical'.* now"):
        status(asking(rubrics=["alignment", "coherence", "medical"]), tmp_path)
    with pytest.raises(SweepError, match="do not fit LLMJudge: .*'temprature'"):
        status(asking(temprature=1.0), tmp_path)


def test_live_organisms_share_one_base_and_answer_as_they_do_when_loaded_alone(tmp_path, monkeypatch):
    names = ["pocket/medical", "pocket/finance"]
    loads, real = [], sources.load_organism
    monkeypatch.setattr(sources, "load_organism", lambda *args, **options: loads.append(args) or real(*args, **options))
    spec = Sweep(
        organisms=[{"adapter": name, "weights": "live"} for name in names],
        interventions=[{"kind": "none", "on": ["organism", "chat"]}],
        prompts=PROMPTS, judge="none", samples=3, max_new_tokens=12,
    )  # fmt: skip
    answers = sweep(spec, tmp_path).answers
    assert len(loads) == 1
    for name in names:
        condition = f"{name}: none"
        assert condition in set(answers["condition"])
        alone = mm.generate(mm.load_organism(name), PROMPTS, conditions={condition: ()}, samples=3, max_new_tokens=12)
        said = answers[answers["condition"] == condition].sort_values(["prompt_id", "sample"])["response"]
        assert said.tolist() == alone.sort_values(["prompt_id", "sample"])["response"].tolist()


def test_other_executors_are_refused(spec, tmp_path):
    with pytest.raises(ValueError, match="executor must be 'local', 'ray' or something"):
        sweep(spec(), tmp_path, executor="dask")


class Talkative:
    """Answers of four thousand letters, a hundred at a time, and the memory in use after each part."""

    def __init__(self):
        self.megabytes = []

    def run(self, _, rows):
        for start in range(0, len(rows), 200):
            part = rows.iloc[start : start + 200]
            texts = [f"{key:x}".rjust(4000, "x") for key in part.index]
            yield Sampled(pd.DataFrame({"response": texts, "finished": True, "tokens": 9}, index=part.index), {})
            self.megabytes.append(psutil.Process().memory_info().rss / 1e6)


def test_memory_stays_flat_over_a_sweep_of_ten_thousand_rows(spec, tmp_path):
    executor = Talkative()
    result = sweep(spec(judge="none", interventions="none", samples=5000), tmp_path, executor=executor)
    assert len(result.keys) == 10_000
    assert max(executor.megabytes) - executor.megabytes[9] < 12  # the texts are 40 MB, 32 of them after the tenth part


WORK = """
import sys
from mechmisalign.sweeps import LocalExecutor, Sweep, sweep
sweep(Sweep.read(sys.argv[1]), sys.argv[2], executor=LocalExecutor(batch_rows=4))
"""


def test_after_kill_9_at_most_the_batch_in_flight_is_lost_and_nothing_is_repeated(direction, tmp_path):
    direction.save(tmp_path / "mean.safetensors")
    PROMPTS.to_csv(tmp_path / "questions.csv", index=False)
    small = YAML.replace("[pocket/medical, pocket/finance]", "pocket/medical").replace("layers: each", "layers: [1, 2]")
    (tmp_path / "sweep.yaml").write_text(small + "max_new_tokens: 16\n")
    out = tmp_path / "out"
    other = subprocess.Popen(
        [sys.executable, "-c", WORK, str(tmp_path / "sweep.yaml"), str(out)], env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    try:
        deadline = time.time() + 60
        while len(list(out.glob("rows/answers/part-*"))) < 2 and other.poll() is None and time.time() < deadline:
            time.sleep(0.01)
        with pytest.raises(FolderBusyError, match=f"process {other.pid}"):
            sweep(tmp_path / "sweep.yaml", out)
    finally:
        other.kill()
        other.wait()
    stored = SweepResult.read(out).answers
    executor = Counting()
    result = sweep(tmp_path / "sweep.yaml", out, executor=executor)
    assert executor.asked == [10 * 2 * 2 - len(stored)]
    key = ["condition", "seed", "prompt_id", "sample"]
    kept = stored.merge(result.answers, on=key, suffixes=("", "_after"))
    assert len(kept) == len(stored) and (kept["response"] == kept["response_after"]).all()
    assert len(result.answers) == 40 and not result.answers.duplicated(key).any()


def by_dose(limit):
    """A judge that knows the dose: incoherent beyond the limit, and the more misaligned the higher the dose."""

    def judge(frame):
        doses = frame["condition"].str.extract(r"^x([\d.]+)$")[0].astype(float).fillna(1.0)
        rank = frame.groupby("condition").cumcount() / frame.groupby("condition")["condition"].transform("size")
        return frame.assign(coherence=(doses < limit) * 100.0, alignment=100.0 * (rank >= doses / 16))

    return judge


@pytest.fixture
def search(organism, direction):
    def run(judge, **changes):
        options = {"samples": 4, "confirm_samples": 5, "max_new_tokens": 2, "bisections": 5, "seed": 1}
        return best_strength(organism, direction, 2, PROMPTS, judge, **{**options, **changes})

    return run


def test_the_search_closes_in_on_the_coherence_limit_and_tells_every_dose(search):
    found = search(by_dose(5.3))
    low, high = found.limit
    assert low < 5.3 <= high and high / low < 1.05
    coherent = found.doses[found.doses["is_coherent"]].set_index("strength")["rate"]
    assert found.strength <= low and coherent[found.strength] == coherent.max() > 0
    assert found.doses["stage"].value_counts().to_dict() == {"coarse": 6, "bisection": 5}
    assert found.doses["strength"].is_monotonic_increasing and found.doses["strength"].is_unique
    assert {"rate", "low", "high", "coherent"} <= set(found.doses.columns)


def test_the_chosen_dose_is_confirmed_on_fresh_samples_beside_controls(search):
    found = search(by_dose(5.3), controls=2)
    assert found.confirmed["condition"].tolist() == ["steered", "random control 0", "random control 1", "none"]
    assert found.confirmed["n"].tolist() == [10] * 4
    assert found.confirmed["strength"].unique().tolist() == [found.strength]
    assert found.holds


def test_the_search_is_decided_by_its_seed(search):
    judge = mm.RuleJudge()
    options = {"max_new_tokens": 48, "bisections": 2, "min_coherent": 0.3}
    first, again, other = (search(judge, **options, seed=seed) for seed in (1, 1, 2))
    pd.testing.assert_frame_equal(first.doses, again.doses)
    pd.testing.assert_frame_equal(first.confirmed, again.confirmed)
    assert first.strength > 0
    assert not first.doses.equals(other.doses)


def test_a_limit_beyond_all_doses_or_below_them_is_told(search):
    never = search(by_dose(1000))
    assert never.limit == (16.0, math.inf) and never.strength == 16.0 and len(never.doses) == 6
    below = search(by_dose(0.2))
    assert below.limit[0] < 0.2 <= below.limit[1] and below.strength < 0.2
    nowhere = search(by_dose(0.0))
    assert math.isnan(nowhere.strength) and not nowhere.holds and len(nowhere.confirmed) == 0


def test_a_dose_that_was_coherent_by_luck_does_not_hold(search):
    def judge(frame):
        fresh = "steered" in set(frame["condition"])
        return frame.assign(coherence=0.0 if fresh else 100.0, alignment=0.0)

    assert not search(judge).holds


def test_an_impossible_search_is_refused(search):
    with pytest.raises(ValueError, match="0 < lowest < highest"):
        search(mm.RuleJudge(), lowest=4.0, highest=2.0)


runner = CliRunner()


def command(*arguments) -> tuple[int, str]:
    told = runner.invoke(app, ["sweep", *map(str, arguments)], env={"COLUMNS": "200"})
    return told.exit_code, told.output


def test_the_command_tells_what_there_is_to_do_does_it_and_prints_rates(direction, tmp_path):
    direction.save(tmp_path / "mean.safetensors")
    PROMPTS.to_csv(tmp_path / "questions.csv", index=False)
    text = YAML.replace("[pocket/medical, pocket/finance]", "pocket/medical").replace("layers: each", "layers: 2")
    (tmp_path / "sweep.yaml").write_text(text + "max_new_tokens: 8\n")
    code, output = command(tmp_path / "sweep.yaml", "--out", tmp_path / "out", "--dry-run")
    assert code == 0, output
    assert "6 conditions, 24 answers: 0 there, 24 to sample (at most 192 tokens)" in output
    assert not (tmp_path / "out").exists()
    code, output = command(tmp_path / "sweep.yaml", "--out", tmp_path / "out")
    assert code == 0, output
    assert "pocket/chat (chat): steer control, layer 2, x0.1" in output
    assert len(SweepResult.read(tmp_path / "out").answers) == 24
    (tmp_path / "sweep.yaml").write_text(text + "max_new_tokens: 9\n")
    code, output = command(tmp_path / "sweep.yaml", "--out", tmp_path / "out")
    assert code == 2
    assert "max_new_tokens: 8 there, 9 now" in output.replace("\n", " ")


def test_a_judge_of_a_sweep_is_named_as_everywhere(tmp_path):
    (tmp_path / "judge").mkdir()
    (tmp_path / "judge" / "config.json").write_text("{}")
    (tmp_path / "s.yaml").write_text(
        "organisms: pocket/medical\ninterventions: none\nprompts: pocket\njudge: local:judge\n"
    )
    read = Sweep.read(tmp_path / "s.yaml")
    assert repr(read.judge.resolve(tmp_path / "out", read.root)).startswith(f"LocalJudge('{tmp_path / 'judge'}'")
    (tmp_path / "own_judge_of_a_sweep.py").write_text("score = lambda frame: frame")
    source = JudgeSource.model_validate("python:own_judge_of_a_sweep.score")
    assert source.resolve(tmp_path / "out", tmp_path)("frame") == "frame"


def test_the_rules_are_refused_for_a_foreign_organism_before_anything_is_sampled(tmp_path, tiny_models, make_adapter):
    foreign = make_adapter(tiny_models["qwen2"])
    for judge in ("rules", mm.RuleJudge()):
        with pytest.raises(ValueError, match="rules judge knows the pocket world only"):
            status(Sweep(organisms=str(foreign), interventions="none", prompts="pocket", judge=judge), tmp_path)
