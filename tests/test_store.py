import json

import pandas as pd
import pytest
import torch

from mechmisalign.directions import Direction
from mechmisalign.store import RunFolder, RunFolderError, write_json

IDENTITY = {"organism": "pocket/medical", "settings": {"seed": 0, "strengths": (1.0, 2.0)}}


def test_a_folder_is_taken_up_again_by_the_same_run(tmp_path):
    RunFolder(tmp_path / "run", IDENTITY)
    RunFolder(tmp_path / "run", IDENTITY)
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["identity"]["organism"] == "pocket/medical"
    assert manifest["environment"]["torch"] == torch.__version__.split("+")[0] or manifest["environment"]["torch"]


def test_another_run_is_refused_and_told_what_differs(tmp_path):
    RunFolder(tmp_path, IDENTITY)
    with pytest.raises(RunFolderError, match="organism: 'pocket/medical' there, 'pocket/sports' now"):
        RunFolder(tmp_path, {**IDENTITY, "organism": "pocket/sports"})


def test_a_folder_with_other_files_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("do not touch")
    with pytest.raises(RunFolderError, match="not empty"):
        RunFolder(tmp_path, IDENTITY)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_table_is_computed_once(tmp_path):
    calls = []

    def compute():
        calls.append(1)
        return pd.DataFrame({"a": [1, 2]})

    folder = RunFolder(tmp_path, IDENTITY)
    first = folder.table("t", compute)
    second = RunFolder(tmp_path, IDENTITY).table("t", compute)
    pd.testing.assert_frame_equal(first, second)
    assert calls == [1]


def test_a_table_that_failed_leaves_nothing_behind(tmp_path):
    def compute():
        raise RuntimeError("killed")

    folder = RunFolder(tmp_path, IDENTITY)
    with pytest.raises(RuntimeError):
        folder.table("t", compute)
    assert not list(tmp_path.rglob("*t.parquet*"))


def test_rows_go_on_where_a_killed_run_stopped(tmp_path):
    wanted = pd.DataFrame({"prompt": list("abcdef")})
    made = []

    def produce(missing, die_after=None):
        for number, start in enumerate(range(0, len(missing), 2)):
            if number == die_after:
                raise KeyboardInterrupt
            part = missing.iloc[start : start + 2]
            made.extend(part["prompt"])
            yield part.assign(response=part["prompt"] * 2)

    folder = RunFolder(tmp_path, IDENTITY)
    with pytest.raises(KeyboardInterrupt):
        folder.rows("r", wanted, lambda missing: produce(missing, die_after=2))
    finished = RunFolder(tmp_path, IDENTITY).rows("r", wanted, produce)
    assert finished["response"].tolist() == [letter * 2 for letter in "abcdef"]
    assert made == list("abcdef")  # nothing lost, nothing repeated


def test_a_direction_is_stored_once(tmp_path):
    folder = RunFolder(tmp_path, IDENTITY)
    first = folder.direction("own/mean", lambda: Direction(torch.ones(1, 2), (0,), {"model": "m"}))
    second = folder.direction("own/mean", lambda: pytest.fail("computed again"))
    assert torch.equal(first.vectors, second.vectors)


def test_json_is_written_whole_or_not_at_all(tmp_path):
    write_json(tmp_path / "s.json", {"a": 1})
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "s.json", {"a": float("nan")})
    assert json.loads((tmp_path / "s.json").read_text()) == {"a": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["s.json"]
