"""Files that are there whole or not at all, and folders in which one process works at a time."""

from __future__ import annotations

import errno
import json
import logging
import os
import platform
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

logger = logging.getLogger(__name__)

LOCK = ".lock"
PARTIAL = ".partial"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class RunFolderError(ValueError):
    """The folder belongs to another run, or holds something that is no run."""


class FolderBusyError(RunFolderError):
    """Another process is at work in the folder."""


class DiskFullError(RunFolderError):
    """There was no room for a file; nothing half-written is left."""


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A place to write to, which becomes ``path`` in one move when the block ends, and is removed if it fails.

    Raises:
        DiskFullError: If the disk (or a quota, or a limit on file sizes) has no room.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}{PARTIAL}")
    try:
        with told_if_full(path):
            yield partial
            flush(partial)
            partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def told_if_full(path: Path) -> Iterator[None]:
    """Errors of a full disk, as one that says what to do.

    Raises:
        DiskFullError: Instead of the system's error.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise DiskFullError(
            f"no room to write {path} ({os.strerror(error.errno)}); nothing half-written was left: "
            "make room and start the run again, it goes on where it stopped"
        ) from error


def flush(path: Path) -> None:
    """Have the file on the disk itself, so that the name it is about to get survives a crash of the machine too."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


@dataclass
class _Held:
    descriptor: int
    pid: int
    users: int


_held: dict[Path, _Held] = {}
_guard = threading.Lock()


def claim(folder: Path) -> Path:
    """Take a folder for this process; the same process may take it several times.

    The lock is the operating system's (``flock``): it ends with the process however that dies, so there are no stale
    ones. On a file system without locks a warning says so; files are still whole and their names do not clash.

    Returns:
        What ``release`` takes.

    Raises:
        FolderBusyError: If another process has it; says which one, where, and since when.
    """
    place = folder.resolve() / LOCK
    with _guard:
        held = _held.get(place)
        if held is not None and held.pid == os.getpid():
            held.users += 1
            return place
        if not _held:
            os.register_at_fork(after_in_child=_forget)
        _held[place] = _Held(_locked(place), os.getpid(), 1)
    return place


def release(place: Path) -> None:
    """Give back what ``claim`` took; the last of several givers unlocks the folder."""
    with _guard:
        held = _held.get(place)
        if held is None or held.pid != os.getpid():
            return
        held.users -= 1
        if held.users == 0:
            os.close(held.descriptor)
            del _held[place]


def _forget() -> None:
    """In a forked child: the locks are the parent's, and must not outlive it here."""
    for held in _held.values():
        os.close(held.descriptor)
    _held.clear()


def _locked(place: Path) -> int:
    """A descriptor of the lock file that holds the lock."""
    descriptor = os.open(place, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        _lock(descriptor, place)
        note = {"pid": os.getpid(), "host": platform.node(), "since": datetime.now().isoformat(timespec="seconds")}
        with told_if_full(place):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(note).encode(), 0)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _lock(descriptor: int, place: Path) -> None:
    try:
        import fcntl
    except ImportError:
        logger.warning("this system has no file locks: see to it that only one process writes in %s", place.parent)
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise FolderBusyError(
            f"{place.parent} is being written by {_holder(place)}; wait until that is done, or choose another folder"
        ) from None
    except OSError as error:  # a network file system that knows no locks
        logger.warning("no lock on %s (%s): see to it that only one process writes there", place.parent, error)


def _holder(place: Path) -> str:
    try:
        note = json.loads(place.read_text())
        return f"process {note['pid']} on {note['host']} since {note['since']}"
    except (OSError, ValueError, KeyError):  # it has only just taken the lock
        return "another process"
