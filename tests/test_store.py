import errno
import gc
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch

from mechmisalign.directions import Direction
from mechmisalign.store import (
    DiskFullError,
    FolderBusyError,
    Parts,
    RunFolder,
    RunFolderError,
    TornPartError,
    read_manifest,
    write_json,
)

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


def test_what_may_grow_grows_and_must_not_change(tmp_path):
    RunFolder(tmp_path, IDENTITY, {"directions": {"mean": "aa"}}).close()
    RunFolder(tmp_path, IDENTITY, {"directions": {"control": "bb"}, "prompts": {"p1": "cc"}}).close()
    there = read_manifest(tmp_path)
    assert there["growing"] == {"directions": {"mean": "aa", "control": "bb"}, "prompts": {"p1": "cc"}}
    with pytest.raises(RunFolderError, match=r"directions\.mean: 'aa' there, 'zz' now"):
        RunFolder(tmp_path, IDENTITY, {"directions": {"mean": "zz", "other": "dd"}})
    assert read_manifest(tmp_path) == there  # a refusal changes nothing


def test_a_manifest_that_cannot_be_read_is_named(tmp_path):
    RunFolder(tmp_path, IDENTITY).close()
    (tmp_path / "manifest.json").write_text('{"identity": ')
    with pytest.raises(RunFolderError, match=r"manifest\.json cannot be read"):
        RunFolder(tmp_path, IDENTITY)


HOLD = """
import sys, time
from mechmisalign.store import RunFolder
folder = RunFolder(sys.argv[1], {"a": 1})
print("held", flush=True)
time.sleep(60)
"""


def test_a_second_process_is_told_who_is_at_work_and_gets_the_folder_when_that_is_killed(tmp_path):
    first = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert first.stdout.readline() == "held\n"
        before = sorted(path.name for path in tmp_path.rglob("*"))
        with pytest.raises(FolderBusyError, match=f"being written by process {first.pid} on "):
            RunFolder(tmp_path, {"a": 1})
        assert sorted(path.name for path in tmp_path.rglob("*")) == before
    finally:
        first.kill()  # no clean-up of its own
        first.wait()
    with RunFolder(tmp_path, {"a": 1}) as folder:
        assert folder.table("t", lambda: pd.DataFrame({"a": [1]}))["a"].tolist() == [1]


def test_a_folder_is_given_back_when_it_is_closed_or_collected(tmp_path):
    def is_free() -> bool:
        program = "import sys, pathlib; from mechmisalign._writing import claim; claim(pathlib.Path(sys.argv[1]))"
        return subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True).returncode == 0

    first, second = RunFolder(tmp_path, {"a": 1}), RunFolder(tmp_path, {"a": 1})  # one process may take it twice
    first.close()
    assert not is_free()
    del second
    gc.collect()
    assert is_free()


def rows(start: int, stop: int) -> pd.DataFrame:
    index = pd.Index(range(start, stop), name="row")
    return pd.DataFrame({"response": [f"answer {i}" for i in index], "score": [i / 2 for i in index]}, index=index)


@pytest.fixture
def parts(tmp_path) -> Parts:
    stored = Parts(tmp_path / "answers")
    for start in (0, 4, 8):
        stored.add(rows(start, start + 4))
    return stored


def test_parts_come_back_as_they_were_stored(parts):
    pd.testing.assert_frame_equal(parts.read(), rows(0, 12))
    assert parts.read(without=["response"]).columns.tolist() == ["score"]
    assert parts.keys().tolist() == list(range(12))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, empty])
def test_a_damaged_part_is_named_and_set_aside_and_its_rows_are_missing(parts, damage, caplog):
    damaged = sorted(parts.folder.glob("part-*"))[1]
    damage(damaged)
    with pytest.raises(TornPartError, match=damaged.name):
        parts.read()
    assert parts.keys(mend=False).tolist() == [0, 1, 2, 3, 8, 9, 10, 11]
    assert damaged.exists()
    assert parts.keys().tolist() == [0, 1, 2, 3, 8, 9, 10, 11]
    assert damaged.name in caplog.text
    assert damaged.with_name(damaged.name + ".corrupt").exists()  # nothing is lost in silence
    parts.add(rows(4, 8))
    pd.testing.assert_frame_equal(parts.read().sort_index(), rows(0, 12))


def test_rows_of_a_damaged_part_are_produced_again(tmp_path):
    wanted = pd.DataFrame({"prompt": list("abcdef")})
    asked = []

    def produce(missing):
        asked.append(missing["prompt"].tolist())
        yield missing.iloc[:3].assign(response="x")
        yield missing.iloc[3:].assign(response="x")

    folder = RunFolder(tmp_path, IDENTITY)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Parts, "compact", lambda _: None)
        folder.rows("r", wanted, produce)
    truncate(sorted((tmp_path / "rows" / "r").glob("part-*"))[0])
    assert len(folder.rows("r", wanted, produce)) == 6
    assert asked == [list("abcdef"), list("abc")]


def test_a_part_without_a_hash_in_its_name_is_still_read(tmp_path):
    (tmp_path / "answers").mkdir()
    rows(0, 3).to_parquet(tmp_path / "answers" / "part-00000.parquet")
    parts = Parts(tmp_path / "answers")
    pd.testing.assert_frame_equal(parts.read(), rows(0, 3))
    truncate(tmp_path / "answers" / "part-00000.parquet")
    assert len(parts.keys()) == 0


def test_a_torn_table_is_set_aside_and_computed_again(tmp_path, caplog):
    folder = RunFolder(tmp_path, IDENTITY)
    folder.table("t", lambda: pd.DataFrame({"a": [1, 2]}))
    truncate(tmp_path / "tables" / "t.parquet")
    assert folder.table("t", lambda: pd.DataFrame({"a": [3]}))["a"].tolist() == [3]
    assert "t.parquet" in caplog.text
    assert (tmp_path / "tables" / "t.parquet.corrupt").exists()


def test_many_parts_become_one_with_the_same_rows(parts):
    before = parts.read()
    parts.compact()
    assert len(list(parts.folder.iterdir())) == 1
    pd.testing.assert_frame_equal(parts.read().sort_index(), before)


def test_parts_whose_columns_differ_can_be_merged(tmp_path):
    parts = Parts(tmp_path)
    parts.add(pd.DataFrame({"a": [None, None], "n": [1, 2]}, index=[0, 1]))
    parts.add(pd.DataFrame({"a": ["x"], "n": [1.5], "new": ["y"]}, index=[2]))
    parts.compact()
    merged = parts.read().sort_index()
    assert merged["n"].tolist() == [1.0, 2.0, 1.5]
    assert merged["a"].isna().tolist() == [True, True, False]
    assert merged["new"].isna().tolist() == [True, True, False]


@pytest.mark.parametrize("compacted", [False, True])
def test_of_a_key_that_stands_twice_the_latest_row_counts(parts, compacted):
    parts.add(rows(2, 6).assign(score=-1.0))
    if compacted:
        parts.compact()
    scores = parts.read()["score"].sort_index()
    assert scores.tolist() == [0.0, 0.5, -1.0, -1.0, -1.0, -1.0, 3.0, 3.5, 4.0, 4.5, 5.0, 5.5]


def test_a_crash_between_merging_and_removing_loses_and_repeats_nothing(parts, tmp_path):
    small = tmp_path / "small"
    shutil.copytree(parts.folder, small)
    parts.compact()
    for part in small.iterdir():
        shutil.copy(part, parts.folder)
    assert parts.keys().tolist() and sorted(parts.keys()) == list(range(12))
    pd.testing.assert_frame_equal(parts.read().sort_index(), rows(0, 12))


def full_disk(*_arguments, **_options):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_is_said_and_leaves_nothing_and_the_run_goes_on_afterwards(tmp_path, monkeypatch):
    wanted = pd.DataFrame({"prompt": list("abcd")})

    def produce(missing):
        for start in range(0, len(missing), 2):
            if start == 2:
                monkeypatch.setattr(Path, "write_bytes", full_disk)
            yield missing.iloc[start : start + 2].assign(response="x")

    folder = RunFolder(tmp_path, IDENTITY)
    with pytest.raises(DiskFullError, match=r"no room to write .*rows/r/part-00001.*goes on where it stopped"):
        folder.rows("r", wanted, produce)
    monkeypatch.undo()
    assert len(list((tmp_path / "rows" / "r").iterdir())) == 1
    asked = []
    finished = folder.rows(
        "r", wanted, lambda missing: asked.extend(missing["prompt"]) or iter([missing.assign(response="x")])
    )
    assert (asked, len(finished)) == (["c", "d"], 4)


LIMITED = """
import resource, sys, signal
import numpy as np, pandas as pd
from mechmisalign.store import DiskFullError, Parts, write_json
from pathlib import Path
parts = Parts(Path(sys.argv[1]))
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
parts.add(pd.DataFrame({"x": np.random.default_rng(0).random(1000)}))  # 8 kB
try:
    parts.add(pd.DataFrame({"x": np.random.default_rng(0).random(10_000)}, index=range(1000, 11_000)))
except DiskFullError as error:
    print("told:", error)
parts.add(pd.DataFrame({"x": np.random.default_rng(0).random(1000)}, index=range(20_000, 21_000)))
parts.add(pd.DataFrame({"x": np.random.default_rng(0).random(1000)}, index=range(30_000, 31_000)))
parts.compact()  # 24 kB: no room
print(len(parts.read()), sorted(path.suffix for path in parts.folder.iterdir()))
"""


def test_a_real_limit_on_file_sizes_is_told_and_merging_is_put_off(tmp_path):
    done = subprocess.run([sys.executable, "-c", LIMITED, str(tmp_path)], capture_output=True, text=True)
    told, left = done.stdout.splitlines()
    assert told.startswith("told: no room to write"), done.stderr
    assert left == "3000 ['.parquet', '.parquet', '.parquet']"
    assert "were not merged" in done.stderr


def test_what_a_killed_process_left_half_written_is_cleared_away(parts, tmp_path):
    (parts.folder / ".part-00003-0123456789abcdef.parquet.4242.partial").write_bytes(b"half")
    assert len(parts.keys()) == 12
    assert not list(parts.folder.glob("*.partial"))
    unborn = tmp_path / "unborn"
    unborn.mkdir()
    (unborn / ".lock").write_text("{}")
    (unborn / ".manifest.json.4242.partial").write_text("{")
    RunFolder(unborn, IDENTITY)  # killed before it was anything: no foreign files


def test_other_errors_of_the_system_pass_unchanged(parts, monkeypatch):
    def refused(*_arguments):
        raise PermissionError(errno.EACCES, "no")

    monkeypatch.setattr(Path, "write_bytes", refused)
    with pytest.raises(PermissionError):
        parts.add(rows(20, 21))
