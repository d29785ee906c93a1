"""Writing files: whole or not at all, with what the system refuses told as what to do."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest
import torch

import mechmisalign as mm
from mechmisalign._writing import (
    DiskFullError,
    FolderBusyError,
    NotWritableError,
    claim,
    claimed,
    explained,
    is_unused,
    refuse_unwritable,
    refuse_unwritable_folder,
    release,
    whole,
)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def direction() -> mm.Direction:
    return mm.Direction(torch.ones(1, 4), (0,), {"model": "m"})


def failing(number: int):
    def fail(*_given, **_named):
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize(
    ("number", "kind"),
    [(errno.ENOSPC, DiskFullError), (errno.EDQUOT, DiskFullError), (errno.EFBIG, DiskFullError)]
    + [(errno.EROFS, NotWritableError), (errno.EACCES, NotWritableError)],
)
@pytest.mark.parametrize("save", [lambda path: direction().save(path), lambda path: write(path)])
def test_what_the_disk_refuses_leaves_the_old_file_and_nothing_else(number, kind, save, tmp_path, monkeypatch):
    path = tmp_path / "d.safetensors"
    save(path)
    before = path.read_bytes()
    monkeypatch.setattr(Path, "write_bytes", failing(number))
    with pytest.raises(kind, match=r"d\.safetensors .*as it was: .*start again"):
        save(path)
    assert path.read_bytes() == before
    assert names(tmp_path) == ["d.safetensors"]


def write(path: Path) -> None:
    with whole(path) as partial:
        partial.write_bytes(b"text")


def test_a_limit_on_file_sizes_is_told(tmp_path):
    resource = pytest.importorskip("resource")
    import signal

    old, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1024, old[1]))
        with pytest.raises(DiskFullError, match="big.safetensors"):
            mm.Direction(torch.ones(8, 512), tuple(range(8)), {}).save(tmp_path / "big.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    "told",
    [
        "I/O error: No space left on device (os error 28)",
        "[enforce fail] . PytorchStreamWriter failed writing file data/0: file write failed",
    ],
)
def test_a_full_disk_that_a_library_tells_in_words_is_known(told, tmp_path):
    with pytest.raises(DiskFullError, match="no room"), explained(tmp_path):
        raise RuntimeError(told)


def test_other_errors_pass_unchanged(tmp_path):
    with pytest.raises(RuntimeError, match="something else"), explained(tmp_path):
        raise RuntimeError("something else")


def test_file_and_folder_are_on_the_disk_before_the_name_counts(tmp_path, monkeypatch):
    seen = []
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(
        os, "fsync", lambda number: seen.append(stat.S_ISDIR(os.fstat(number).st_mode)) or fsync(number)
    )
    monkeypatch.setattr(Path, "replace", lambda self, target: seen.append("moved") or replace(self, target))
    write(tmp_path / "a")
    assert seen == [False, "moved", True]


def test_a_link_stays_a_link_and_permissions_stay(tmp_path):
    real, link = tmp_path / "real", tmp_path / "link"
    real.write_text("old")
    real.chmod(0o640)
    link.symlink_to(real)
    write(link)
    assert link.is_symlink()
    assert real.read_bytes() == b"text"
    assert stat.S_IMODE(real.stat().st_mode) == 0o640


@pytest.mark.parametrize("prepare", [lambda path: path.mkdir(), lambda path: os.mkfifo(path)])
def test_a_folder_or_a_pipe_is_no_file_to_write(prepare, tmp_path):
    path = tmp_path / "there"
    prepare(path)
    for refused in (write, refuse_unwritable):
        with pytest.raises(NotWritableError, match="give the name of a file"):
            refused(path)
    assert path.exists()


def test_trying_a_place_leaves_nothing_behind(tmp_path):
    refuse_unwritable(tmp_path / "new" / "file")
    refuse_unwritable_folder(tmp_path / "new")
    assert names(tmp_path) == []


def test_a_place_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotWritableError, match="a folder is wanted"):
        refuse_unwritable_folder(tmp_path / "file")
    with pytest.raises(NotWritableError, match="cannot write"):
        refuse_unwritable(tmp_path / "file" / "x")


def test_a_claimed_folder_keeps_no_lock_and_is_busy_meanwhile(tmp_path):
    folder = tmp_path / "run"
    with claimed(folder):
        assert is_unused(folder)
        process = os.fork()
        if process == 0:
            try:
                claim(folder)
            except FolderBusyError:
                os._exit(7)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 7
    assert names(folder) == []


def test_a_lock_that_was_removed_while_it_was_opened_is_not_taken(tmp_path, monkeypatch):
    import mechmisalign._writing as writing

    lock = writing._lock
    monkeypatch.setattr(writing, "_lock", lambda number, place: (lock(number, place), place.unlink()))
    with pytest.raises(FolderBusyError, match="until now"):
        release(claim(tmp_path))
