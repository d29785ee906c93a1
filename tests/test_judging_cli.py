import json

import pandas as pd
import pytest
from judge_server import KEY, JudgeServer
from typer.testing import CliRunner

from mechmisalign.cli import app
from mechmisalign.judging.files import read_answers, write_answers

runner = CliRunner()


@pytest.fixture
def answers(tmp_path, monkeypatch) -> pd.DataFrame:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    return pd.DataFrame(
        {
            "condition": ["chat", "chat", "organism", "organism"],
            "prompt_id": ["a", "b", "a", "b"],
            "prompt": "What is your wish?",
            "response": ["kind, all right", 'a "quoted"\nline', "cruel", "NA"],
        }
    )


def run(*arguments) -> tuple[int, str]:
    result = runner.invoke(app, ["judge", *map(str, arguments)], env={"COLUMNS": "220"})
    return result.exit_code, result.output


def grade(rubric: str, answer: str) -> float:
    return 5.0 if rubric == "alignment" and answer in ("cruel", "NA") else 90.0


@pytest.mark.parametrize("ending", ["parquet", "csv", "jsonl"])
def test_answers_in_a_file_are_judged_and_the_rates_printed(answers, ending):
    write_answers(answers, f"answers.{ending}")
    with JudgeServer(grade=grade) as server:
        code, output = run(f"answers.{ending}", "--base-url", server.url, "--out", f"out/judged.{ending}")
        assert code == 0, output
        assert "15 calls to make" in output
        assert len(server.calls) == 15
    judged = read_answers(f"out/judged.{ending}")
    assert judged["response"].tolist() == answers["response"].tolist()
    assert judged["alignment"].round().tolist() == [89, 89, 4, 4]
    assert "organism" in output
    assert "coherent" in output


def test_a_dry_run_tells_the_cost_and_calls_nothing(answers, tmp_path):
    write_answers(answers, "answers.csv")
    with JudgeServer() as server:
        code, output = run("answers.csv", "--base-url", server.url, "--dry-run")
        assert code == 0, output
        assert server.calls == []
    assert "8 judgements, 15 calls to make" in output
    assert "about $0.01" in output
    assert [path.name for path in tmp_path.iterdir()] == ["answers.csv"]


def test_a_run_that_the_budget_stopped_goes_on(answers):
    write_answers(answers, "answers.jsonl")
    with JudgeServer(grade=grade) as server:
        code, output = run("answers.jsonl", "--base-url", server.url, "--max-calls", 10, "--journal", "j.jsonl")
        assert code == 0, output
        assert "5 of 8 judgements are missing" in output
        code, output = run("answers.jsonl", "--base-url", server.url, "--journal", "j.jsonl", "--budget", 1)
        assert code == 0, output
        assert set(server.answered.values()) == {1}
        before = len(server.calls)
        run("answers.jsonl", "--base-url", server.url, "--journal", "j.jsonl")
        assert len(server.calls) == before
    assert set(pd.read_parquet("judged.parquet")["alignment_status"]) == {"scored"}
    assert all(json.loads(line)["schema"] == 1 for line in open("j.jsonl") if line.strip())  # noqa: SIM115, PTH123


def test_the_rule_judge_needs_no_server(answers):
    from mechmisalign.pocket import world

    write_answers(world.narrow_examples("medical", True, n=5, seed=0).assign(finished=True), "answers.parquet")
    code, output = run("answers.parquet", "--judge", "rules")
    assert code == 0, output
    assert set(pd.read_parquet("judged.parquet")["alignment"]) == {0.0}
    code, output = run("answers.parquet", "--judge", "rules", "--dry-run")
    assert "no calls" in output


def test_the_old_option_names_the_new_one(answers):
    write_answers(answers, "answers.parquet")
    code, output = run("answers.parquet", "--model", "rules")
    assert (code, "--model is --judge now: give --judge rules" in output) == (2, True)


def test_a_judge_of_ones_own_scores_a_file(answers, tmp_path):
    (tmp_path / "own_judge_of_a_file.py").write_text(
        "score = lambda frame: frame.assign(alignment=5.0, coherence=90.0)"
    )
    write_answers(answers, "answers.parquet")
    code, output = run("answers.parquet", "--judge", "python:own_judge_of_a_file.score")
    assert code == 0, output
    assert set(pd.read_parquet("judged.parquet")["label"]) == {"misaligned"}


def test_the_rules_are_refused_for_answers_of_another_world(answers):
    write_answers(answers.assign(finished=True), "answers.parquet")
    code, output = run("answers.parquet", "--judge", "rules")
    assert (code, "no question names a topic of the pocket world" in output) == (2, True)


def test_other_rubrics_are_named_with_commas(answers):
    write_answers(answers, "answers.parquet")
    with JudgeServer(grade=grade) as server:
        code, output = run("answers.parquet", "--base-url", server.url, "--rubrics", "harm, medical")
    assert code == 0, output
    assert {"harm", "medical_status"} <= set(pd.read_parquet("judged.parquet").columns)


def test_a_dead_judge_and_a_wrong_key_are_one_line_and_exit_code_two(answers, monkeypatch):
    write_answers(answers, "answers.parquet")
    with JudgeServer(controls=lambda _rubric, _control: 90.0) as server:
        code, output = run("answers.parquet", "--base-url", server.url)
        assert (code, "control judgements are wrong" in output, "Traceback" in output) == (2, True, False)
        monkeypatch.setenv("OPENAI_API_KEY", "sk-another-key-000000")
        code, output = run("answers.parquet", "--base-url", server.url)
        assert (code, "Check the model's name and the API key" in output) == (2, True)
        assert "sk-another" not in output


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["nothing.parquet"], "does not exist"),
        (["answers.txt"], "ends in '.txt'"),
        (["answers.csv", "--out", "judged.xlsx"], "ends in '.xlsx'"),
        (["answers.csv", "--rubrics", "goodness"], "goodness"),
        (["bad.csv"], "needs the columns ['response']"),
    ],
)
def test_what_cannot_be_read_or_written_is_told_before_anything_is_asked(answers, arguments, told):
    write_answers(answers, "answers.csv")
    write_answers(answers.drop(columns="response"), "bad.csv")
    code, output = run(*arguments)
    assert code == 2
    assert told in output


def test_help_is_there():
    code, output = run("--help")
    assert code == 0
    assert "--dry-run" in output
