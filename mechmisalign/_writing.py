"""Files that are there whole or not at all, and folders in which one process works at a time."""

from __future__ import annotations

import errno
import json
import logging
import os
import platform
import re
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from safetensors import SafetensorError

logger = logging.getLogger(__name__)

LOCK = ".lock"
PARTIAL = ".partial"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_CLOSED = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP)
_TORCH_FAILED = "PytorchStreamWriter failed"
"""How torch.save tells that the system did not take the bytes."""
_OS_ERROR = re.compile(r"\(os error (\d+)\)")
"""How safetensors tells the system's error."""


class RunFolderError(ValueError):
    """The folder belongs to another run, or holds something that is no run."""


class FolderBusyError(RunFolderError):
    """Another process is at work in the folder."""


class DiskFullError(RunFolderError):
    """There was no room for a file; nothing half-written is left."""


class NotWritableError(RunFolderError, PermissionError):
    """A file cannot be written at its place: a folder is there, the disk is read-only, or the user may not."""


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A place to write to, which becomes ``path`` in one move when the block ends, and is removed if it fails.

    The bytes are on the disk before the name points to them. A link stays a link (its target is replaced), and an older
    file's permissions stay.

    Raises:
        DiskFullError: If the disk (or a quota, or a limit on file sizes) has no room.
        NotWritableError: If nothing can be written there.
    """
    target = _target(path)
    partial = target.with_name(f".{target.name[:100]}.{os.getpid()}-{threading.get_ident()}{PARTIAL}")
    try:
        with explained(path):
            target.parent.mkdir(parents=True, exist_ok=True)
            yield partial
            if target.exists():
                partial.chmod(target.stat().st_mode & 0o7777)
            flush(partial)
            partial.replace(target)
            flush_folder(target.parent)
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """What the system says of a write that it does not take, as an error that says what to do.

    Raises:
        DiskFullError: Instead of the system's error.
        NotWritableError: Instead of the system's error.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        number = _number(error)
        if number in _FULL:
            raise DiskFullError(
                f"no room to write {path} ({os.strerror(number)}); nothing half-written was left, and what was there "
                "before is as it was: make room and start again, a run goes on where it stopped"
            ) from error
        if number in _CLOSED:
            raise NotWritableError(
                f"cannot write {path} ({os.strerror(number)}); what was there before is as it was: choose another "
                "place, or make this one writable, and start again"
            ) from error
        raise


def refuse_unwritable(path: str | Path) -> None:
    """Refuse a file that could not be written, before anything is paid for; nothing is left behind.

    Raises:
        NotWritableError: If a folder or a device is there, or the system does not take a file.
        DiskFullError: If not even an empty file has room.
    """
    target = _target(Path(path))
    _try_folder(target.parent, Path(path))


def refuse_unwritable_folder(folder: str | Path) -> None:
    """Refuse a folder in which no file could be written; nothing is left behind.

    Raises:
        NotWritableError: If a file is there, or the system does not take a file in it.
        DiskFullError: If not even an empty file has room.
    """
    place = Path(os.path.realpath(folder))
    if place.exists() and not place.is_dir():
        raise NotWritableError(f"{folder} is a file, and a folder is wanted; give the name of a folder")
    _try_folder(place, Path(folder))


def flush(path: Path) -> None:
    """Have the file on the disk itself, so that the name it is about to get survives a crash of the machine too."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def flush_folder(folder: Path) -> None:
    """Have a folder's names on the disk, where the file system knows how."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _target(path: Path) -> Path:
    """The file that a path stands for, links followed.

    Raises:
        NotWritableError: If something other than a file is there, or a file that the user may not write.
    """
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise NotWritableError(f"{path} is a folder, and a file is to be written; give the name of a file")
    if target.exists() and not target.is_file():
        raise NotWritableError(f"{path} is no ordinary file (a device or a pipe); give the name of a file")
    if target.exists() and not os.access(target, os.W_OK):
        raise NotWritableError(f"{path} may not be written; change its permissions, or give another name")
    return target


def _try_folder(folder: Path, path: Path) -> None:
    with explained(path):
        there = next(each for each in (folder, *folder.parents) if each.exists())
        with tempfile.NamedTemporaryFile(dir=there, prefix=".try.", suffix=PARTIAL):
            pass


def _number(error: Exception) -> int | None:
    """The system's number of an error, also where a library tells it in words."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    told = _OS_ERROR.search(str(error))
    if told is not None:
        return int(told[1])
    return errno.ENOSPC if _TORCH_FAILED in str(error) else None


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


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Have a folder for this process while the block runs; no lock file is left in it.

    Raises:
        FolderBusyError: As ``claim``.
        NotWritableError: If there can be no such folder, or no file in it.
    """
    refuse_unwritable_folder(folder)
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
    place = claim(folder)
    try:
        yield
    finally:
        release(place, remove=True)


def is_unused(folder: Path) -> bool:
    """Whether a folder holds no more than a process leaves that died before it wrote a file."""
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return all(name == LOCK or (name.startswith(".") and name.endswith(PARTIAL)) for name in names)


def release(place: Path, *, remove: bool = False) -> None:
    """Give back what ``claim`` took; the last of several givers unlocks the folder, and may remove the lock file."""
    with _guard:
        held = _held.get(place)
        if held is None or held.pid != os.getpid():
            return
        held.users -= 1
        if held.users == 0:
            if remove:
                place.unlink(missing_ok=True)
            os.close(held.descriptor)
            del _held[place]


def _forget() -> None:
    """In a forked child: the locks are the parent's, and must not outlive it here."""
    for held in _held.values():
        os.close(held.descriptor)
    _held.clear()


def _locked(place: Path) -> int:
    """A descriptor of the lock file that holds the lock."""
    with explained(place):
        descriptor = os.open(place, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        _lock(descriptor, place)
        if not _is_at(descriptor, place):  # its holder removed it between our opening and locking it
            raise FolderBusyError(f"{place.parent} was being written until now; start again")
        note = {"pid": os.getpid(), "host": platform.node(), "since": datetime.now().isoformat(timespec="seconds")}
        with explained(place):
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


def _is_at(descriptor: int, place: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), place.stat())
    except FileNotFoundError:
        return False


def _holder(place: Path) -> str:
    try:
        note = json.loads(place.read_text())
        return f"process {note['pid']} on {note['host']} since {note['since']}"
    except (OSError, ValueError, KeyError):  # it has only just taken the lock
        return "another process"
