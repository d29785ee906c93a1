"""A judging process that is killed: what was written is never asked again, whatever the moment."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
from judge_server import KEY, JudgeServer

from mechmisalign.judging import JudgeWarning, LLMJudge

PROGRAM = """
import os, sys
import pandas as pd
from inspect_ai.model import get_model
from mechmisalign.judging import LLMJudge

get_model("openai/gpt-4o", memoize=False)  # imported once: each judging process is a fork of this one
print("ready", flush=True)
for line in sys.stdin:
    what, *words = line.split()
    if what == "wait":
        print(os.waitpid(int(words[0]), 0)[1], flush=True)
        continue
    child = os.fork()
    if child:
        print(child, flush=True)
        continue
    url, journal, answers = words
    frame = pd.DataFrame({"prompt": "q", "response": [f"answer {n}" for n in range(int(answers))]})
    judged = LLMJudge("openai/gpt-4o", base_url=url, journal=journal, max_connections=4)(frame)
    os._exit(0 if set(judged["alignment_status"]) == {"scored"} else 1)
"""


class Judging:
    """Judging processes that can be started in a moment."""

    def __init__(self) -> None:
        environment = os.environ | {"OPENAI_API_KEY": KEY}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.parent = subprocess.Popen([sys.executable, "-c", PROGRAM], env=environment, **pipes)
        assert self.parent.stdout.readline() == "ready\n"

    def say(self, *words: object) -> int:
        self.parent.stdin.write(" ".join(map(str, words)) + "\n")
        self.parent.stdin.flush()
        return int(self.parent.stdout.readline())

    def start(self, server: JudgeServer, journal: Path, answers: int) -> int:
        return self.say("start", server.url, journal, answers)

    def wait(self, child: int) -> int:
        return self.say("wait", child)


@pytest.fixture(scope="module")
def judging():
    processes = Judging()
    yield processes
    processes.parent.stdin.close()
    assert processes.parent.wait(30) == 0


def wait_until(condition, seconds: float = 60.0) -> None:
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.005)


def written(journal: Path) -> int:
    text = journal.read_text() if journal.exists() else ""
    return sum(line.endswith("}") and '"control": null' in line for line in text.split("\n"))


@pytest.mark.filterwarnings("ignore::mechmisalign.judging.JudgeWarning")
def test_killing_the_process_again_and_again_bills_nothing_twice_that_was_written(judging, tmp_path):
    journal, answers = tmp_path / "j.jsonl", 60
    with JudgeServer(latency=0.01) as server:
        for milestone in (7, 31, 62):
            child = judging.start(server, journal, answers)
            wait_until(lambda: written(journal) >= milestone)  # noqa: B023
            os.kill(child, signal.SIGKILL)
            assert judging.wait(child) == signal.SIGKILL
        known = written(journal)
        paid = sum(server.answered.values())
        frame = pd.DataFrame({"prompt": "q", "response": [f"answer {n}" for n in range(answers)]})
        judged = LLMJudge("openai/gpt-4o", base_url=server.url, api_key=KEY, journal=journal)(frame)
        last = sum(server.answered.values()) - paid
    assert set(judged["alignment_status"]) | set(judged["coherence_status"]) == {"scored"}
    assert last == 2 * answers - known
    assert sum(server.answered.values()) - 2 * answers <= 3 * 4  # at most what was in flight at each kill


def test_a_record_that_was_cut_in_half_is_the_only_one_asked_again(tmp_path):
    journal = tmp_path / "j.jsonl"
    frame = pd.DataFrame({"prompt": "q", "response": [f"answer {n}" for n in range(10)]})
    with JudgeServer() as server:
        LLMJudge("openai/gpt-4o", base_url=server.url, api_key=KEY, journal=journal)(frame)
        journal.write_bytes(journal.read_bytes()[:-40])
        before = sum(server.answered.values())
        with pytest.warns(JudgeWarning, match="cut off"):
            LLMJudge("openai/gpt-4o", base_url=server.url, api_key=KEY, journal=journal)(frame)
        assert sum(server.answered.values()) == before + 1


def test_two_processes_on_one_journal_leave_one_whole_journal(judging, tmp_path):
    journal, answers = tmp_path / "j.jsonl", 40
    with JudgeServer(latency=0.005) as server:
        children = [judging.start(server, journal, answers) for _ in range(2)]
        assert [judging.wait(child) for child in children] == [0, 0]
        before = len(server.calls)
        frame = pd.DataFrame({"prompt": "q", "response": [f"answer {n}" for n in range(answers)]})
        LLMJudge("openai/gpt-4o", base_url=server.url, api_key=KEY, journal=journal)(frame)
        assert len(server.calls) == before
