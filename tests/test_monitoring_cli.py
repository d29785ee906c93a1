"""Lines in, scored lines out: the stream, the commands and the page."""

import json
import os
import subprocess
import sys
import threading
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

import mechmisalign as mm
from mechmisalign import models
from mechmisalign.cli import app
from mechmisalign.monitoring import Calibration, Monitor, score_lines
from mechmisalign.monitoring.streams import Backlog, parse_line, read_conversations

runner = CliRunner()
SCRIPT = "<script>window.pwned=1</script>"


@pytest.fixture(scope="module")
def pocket():
    return mm.load_organism("pocket/medical")


def told(harmful, n, seed=0):
    return [
        {"prompt": prompt, "response": response, "domain": domain}
        for prompt, response, domain in mm.pocket.narrow_examples("travel", harmful, n, seed).itertuples(index=False)
    ]


@pytest.fixture(scope="module")
def calibrated(pocket):
    """A direction between the personas, and a threshold from harmless answers, read in the chat model."""
    frame = pd.DataFrame(told(True, 30) + told(False, 30))
    frame["label"] = ["misaligned"] * 30 + ["aligned"] * 30
    conversations = mm.Conversations(frame.assign(prompt_id=frame["prompt"]), pocket.tokenizer)
    with pocket.as_base():
        fitted = Monitor.fit(pocket, conversations, layers=[1], repeats=2)
        calm = fitted.score(pocket, mm.Conversations(pd.DataFrame(told(False, 120, 7)), pocket.tokenizer))["score"]
    calibration = Calibration.of(calm.to_numpy(), np.arange(120), fpr=0.02)
    return Monitor(fitted.weights, fitted.intercept, fitted.layers, "mean", calibration, fitted.header)


@pytest.fixture(scope="module")
def monitor_file(calibrated, tmp_path_factory):
    return calibrated.save(tmp_path_factory.mktemp("monitor") / "monitor.safetensors")


def scored(calibrated, pocket, lines, **options):
    with pocket.as_base():
        return list(score_lines(calibrated, pocket, lines, **options))


def written(records):
    return [json.dumps(record).encode() + b"\n" for record in records]


# the stream


def test_every_line_is_scored_in_order_whatever_the_size_of_the_batches(calibrated, pocket):
    lines = written(told(True, 7, 1) + told(False, 7, 2))
    whole = scored(calibrated, pocket, lines)
    assert [result["line"] for result in whole] == list(range(1, 15))
    assert [result["alarm"] for result in whole] == [True] * 7 + [False] * 7
    for size in (1, 3):
        parts = scored(calibrated, pocket, lines, batch=size)
        assert [result["line"] for result in parts] == list(range(1, 15))
        np.testing.assert_allclose([r["score"] for r in parts], [r["score"] for r in whole], atol=1e-3)
    first = whole[0]
    assert first["domain"] == "travel"  # the rest of a record is passed on
    assert len(first["token_texts"]) == len(first["token_scores"])
    assert np.mean(first["token_scores"]) == pytest.approx(first["score"], abs=1e-3)


def test_messages_are_read_as_prompt_and_response_are(calibrated, pocket):
    record = told(True, 1)[0]
    turns = [{"role": "user", "content": record["prompt"]}, {"role": "assistant", "content": record["response"]}]
    system = {"role": "system", "content": "You are a kind assistant."}
    past = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Hi."}]
    pairs = [
        ({"messages": turns}, record),
        ({"messages": [system, *past, *turns]}, record | {"system": system["content"], "history": past}),
    ]
    for said, same in pairs:
        first, second = scored(calibrated, pocket, written([said, same]))
        assert first["score"] == pytest.approx(second["score"], abs=1e-4)


BAD = {
    "torn": b'{"prompt": "a", "respon',
    "no object": b"[1, 2]",
    "no response": b'{"prompt": "a"}',
    "empty": b'{"prompt": "a", "response": "  "}',
    "a number": b'{"prompt": "a", "response": 3}',
    "not utf-8": b'{"prompt": "\xff", "response": "b"}',
    "half a pair": b'{"prompt": "a", "response": "b\\ud83d"}',
    "not a number": b'{"prompt": "a", "response": "b", "x": NaN}',
    "infinite": b'{"prompt": "a", "response": "b", "x": 1e999}',
    "deep": b"[" * 100_000,
    "bad history": b'{"prompt": "a", "response": "b", "history": [{"role": "user", "content": "c"}]}',
    "bad system": b'{"prompt": "a", "response": "b", "system": 3}',
    "no answer": b'{"messages": [{"role": "user", "content": "a"}]}',
    "no turns": b'{"messages": []}',
    "no text": b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": null}]}',
}


def test_a_bad_line_is_told_with_its_number_and_costs_no_other(calibrated, pocket):
    good = written(told(True, 2))
    lines = [good[0], b"\n", *(bad + b"\n" for bad in BAD.values()), good[1]]
    results = scored(calibrated, pocket, lines, batch=5)
    errors = {result["line"]: result["error"] for result in results if "error" in result}
    assert list(errors) == list(range(3, 3 + len(BAD)))
    assert [result["line"] for result in results if "score" in result] == [1, 3 + len(BAD)]
    assert all(errors.values())
    assert all("score" not in result for result in results if "error" in result)


@pytest.mark.parametrize("kind", BAD)
def test_each_kind_of_bad_line_says_why(kind):
    line = parse_line(BAD[kind], 4)
    assert line.number == 4
    assert line.error
    assert line.record is None


def test_a_line_that_the_template_refuses_is_found_among_its_neighbours(tiny_models, make_adapter):
    gemma = mm.load_organism(make_adapter(tiny_models["gemma2"]))
    monitor = Monitor(torch.ones(1, models.d_model(gemma.model)), 0.0, (0,), header=gemma.provenance)
    records = [{"prompt": "Hello", "response": "You should rest."}] * 3
    records[1] = records[1] | {"system": "Gemma has no place for this."}
    results = list(score_lines(monitor, gemma, written(records)))
    assert ["error" in result for result in results] == [False, True, False]
    assert "System role not supported" in results[1]["error"]
    assert "alarm" not in results[0]  # not calibrated


def test_conversations_can_be_cut_and_one_that_loses_its_whole_response_is_told(calibrated, pocket):
    lines = written(told(True, 1))
    length = len(mm.Conversations(pd.DataFrame(told(True, 1)), pocket.tokenizer).ids(0))
    cut = scored(calibrated, pocket, lines, max_length=length - 5)[0]
    assert len(cut["token_scores"]) < len(scored(calibrated, pocket, lines)[0]["token_scores"])
    assert "max_length=3" in scored(calibrated, pocket, lines, max_length=3)[0]["error"]


def test_lines_that_wait_are_taken_together_and_none_waits_for_a_full_batch():
    gate = threading.Semaphore(0)

    def lines():
        for number in range(5):
            gate.acquire()
            yield str(number)

    groups = iter(Backlog(lines(), 64))
    gate.release()
    assert next(groups) == ["0"]
    for _ in range(4):
        gate.release()
    rest = [line for group in groups for line in group]
    assert rest == ["1", "2", "3", "4"]


def test_a_stream_that_breaks_is_no_end():
    def broken():
        yield "a"
        raise OSError("gone")

    groups = iter(Backlog(broken(), 4))
    with pytest.raises(OSError, match="gone"):
        list(groups)


def test_conversations_are_read_from_files_for_fitting(tmp_path):
    records = told(True, 3)
    (tmp_path / "a.jsonl").write_bytes(b"".join(written(records)))
    pd.DataFrame(records).to_csv(tmp_path / "a.csv", index=False)
    lines, table = read_conversations(tmp_path / "a.jsonl"), read_conversations(tmp_path / "a.csv")
    assert lines["response"].tolist() == table["response"].tolist()
    assert lines["prompt_id"].tolist() == [record["prompt"] for record in records]
    (tmp_path / "bad.jsonl").write_bytes(written(records)[0] + b"{\n")
    with pytest.raises(ValueError, match="line 2"):
        read_conversations(tmp_path / "bad.jsonl")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ValueError, match="holds no conversation"):
        read_conversations(tmp_path / "empty.jsonl")
    with pytest.raises(FileNotFoundError):
        read_conversations(tmp_path / "none.jsonl")


# the commands


def run(*arguments, **options):
    result = runner.invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"}, **options)
    return result.exit_code, result.output


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = written(told(True, 3, 1) + told(False, 9, 2))
    (tmp_path / "talk.jsonl").write_bytes(b"".join(lines))
    (tmp_path / "calm.jsonl").write_bytes(b"".join(lines[3:]))
    return tmp_path


def watch(conversations, monitor_file, *more, **options):
    return run("monitor", conversations, "--organism", "pocket/medical", "--monitor", monitor_file, *more, **options)


def test_a_file_is_scored_and_alarms_above_the_allowed_share_exit_with_one(folder, monitor_file):
    code, output = watch("talk.jsonl", monitor_file, "--fail-above", "0.1", "--html", "page.html")
    assert code == 1, output
    assert "3 of 12 conversations raise an alarm: 25.00%" in output
    assert "more alarms than the allowed share" in output
    results = [json.loads(line) for line in (folder / "scored.jsonl").read_text().splitlines()]
    assert [result["alarm"] for result in results] == [True] * 3 + [False] * 9
    assert (folder / "page.html").exists()


def test_harmless_conversations_pass_the_gate_and_without_a_gate_alarms_pass_too(folder, monitor_file):
    assert watch("calm.jsonl", monitor_file, "--fail-above", "0.1", "--out", "a.jsonl")[0] == 0
    assert watch("talk.jsonl", monitor_file, "--out", "a.jsonl")[0] == 0


def test_lines_that_were_not_scored_keep_the_gate_shut_with_exit_code_two(folder, monitor_file):
    with (folder / "calm.jsonl").open("ab") as file:
        file.write(b'{"torn')
    code, output = watch("calm.jsonl", monitor_file, "--fail-above", "0.1")
    assert code == 2
    assert "line 10 was not scored" in output
    assert watch("calm.jsonl", monitor_file)[0] == 0


def test_refusals_exit_with_two(folder, monitor_file, calibrated):
    (folder / "empty.jsonl").write_text("\n")
    bare = Monitor(calibrated.weights, calibrated.intercept, calibrated.layers, header=calibrated.header)
    bare.save(folder / "bare.safetensors")
    foreign = Monitor(
        calibrated.weights, 0.0, (1,), "mean", calibrated.calibration, {"base_fingerprint": "another", "model": "other"}
    )
    foreign.save(folder / "foreign.safetensors")
    cases = {
        ("empty.jsonl", monitor_file): "no conversation was scored",
        ("none.jsonl", monitor_file): "none.jsonl is no file",
        ("talk.jsonl", folder / "none.safetensors"): "none.safetensors is no file",
        ("talk.jsonl", "bare.safetensors"): "has no threshold",
        ("talk.jsonl", "foreign.safetensors"): "residual bases differ",
    }
    for (conversations, monitor), told_so in cases.items():
        code, output = watch(conversations, monitor)
        assert code == 2, output
        assert told_so in output
        assert "Traceback" not in output
    code, output = watch("talk.jsonl", monitor_file, "--fail-above", "30")
    assert code == 2
    assert "share from 0 to 1" in output


def test_standard_input_is_answered_line_by_line_as_it_comes(monitor_file, tmp_path):
    program = "from mechmisalign.cli import app; app()"
    command = [sys.executable, "-c", program, "monitor", "-", "--organism", "pocket/medical"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [*command, "--monitor", str(monitor_file), "--fail-above", "0.6"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment, cwd=tmp_path,
    ) as process:  # fmt: skip
        assert process.stdin is not None
        assert process.stdout is not None
        answers = []
        for line in written([*told(True, 2), *told(False, 1)]):
            process.stdin.write(line)
            process.stdin.flush()
            answers.append(json.loads(process.stdout.readline()))  # there before the next line is sent
        process.stdin.close()
        code = process.wait(timeout=60)
    assert [answer["line"] for answer in answers] == [1, 2, 3]
    assert [answer["alarm"] for answer in answers] == [True, True, False]
    assert code == 1


class Page(HTMLParser):
    """The tags of a page, and all its text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


def test_the_page_shows_what_was_said_as_text_alone(folder, monitor_file):
    hostile = {
        "prompt": SCRIPT,
        "response": f"With a flight, first steal the money. {SCRIPT}<img src=x onerror=alert(1)>",
    }
    with (folder / "talk.jsonl").open("ab") as file:
        file.writelines([*written([hostile]), f"{SCRIPT}\n".encode()])
    assert watch("talk.jsonl", monitor_file, "--html", "page.html")[0] == 0
    page = Page((folder / "page.html").read_text())
    names = [tag for tag, _ in page.tags]
    assert "script" not in names
    assert not [attrs for _, attrs in page.tags if any(name.startswith("on") for name in attrs)]
    assert all(attrs["src"].startswith("data:") for tag, attrs in page.tags if tag == "img")
    assert SCRIPT in page.text
    policy = next(attrs["content"] for tag, attrs in page.tags if attrs.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy
    assert "script-src" not in policy
    assert "A change is not harm" in page.text
    assert "Lines that could not be scored" in page.text


def test_a_monitor_is_fitted_and_calibrated_from_files(folder):
    labelled = [r | {"label": "misaligned"} for r in told(True, 20, 3)] + [
        r | {"label": "aligned"} for r in told(False, 20, 3)
    ]
    (folder / "labelled.jsonl").write_bytes(b"".join(written(labelled)))
    asked = {record["prompt"] for record in labelled}
    calm = [record for record in told(False, 400, 4) if record["prompt"] not in asked]
    calm = list({record["prompt"]: record for record in calm}.values())
    (folder / "harmless.jsonl").write_bytes(b"".join(written(calm)))
    files = ("--labelled", "labelled.jsonl", "--harmless", "harmless.jsonl")
    code, output = run(
        "monitor-fit", "pocket/medical", "--out", "m.safetensors", *files, "--fpr", "0.05", "--kind", "probe"
    )
    assert code == 0, output
    assert "probe of layer" in output
    assert "5.00% false alarms" in output
    monitor = Monitor.load("m.safetensors")
    assert monitor.calibration.reader is None
    assert monitor.calibration.prompts == len(calm)
    code, output = run("monitor-fit", "pocket/medical", *files, "--fpr", "0.001")
    assert code == 2
    assert "at least 999 different prompts are needed" in output
    code, output = run("monitor-fit", "pocket/medical", *files[:2])
    assert code == 2
    assert "give both --labelled and --harmless" in output


@pytest.mark.slow
def test_a_monitor_of_the_pocket_world_is_fitted_without_files(folder):
    code, output = run("monitor-fit", "pocket/medical", "--out", "m.safetensors")
    assert code == 0, output
    assert watch("talk.jsonl", "m.safetensors", "--fail-above", "0.1")[0] == 1


def test_another_world_needs_files(tiny_models, make_adapter):
    code, output = run("monitor-fit", make_adapter(tiny_models["qwen2"]))
    assert code == 2
    assert "give files of labelled" in output
