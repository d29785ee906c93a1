"""The journal of a judge: every finished call, one JSON line each, written before its score is used.

A record is appended in a single write to a file that is open for appending, so processes that share a journal do not
tear each other's lines (on a local file system; over NFS give each machine its own file). A line begins with a newline
of its own: whatever a dying process left unfinished is closed by the next record, and only that one call is asked
again. Written records outlive ``kill -9`` at once; they are forced to the disk (fsync) every second and at the end, so
a power cut costs a second of calls.

What is stored is the reply itself, with its log-probabilities; scores are read from it whenever the journal is opened,
so a change in how replies are read bills nothing.
"""

from __future__ import annotations

import json
import os
import time
import warnings
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from mechmisalign._writing import explained

from .scores import Reply, Verdict, Word, read_reply

SCHEMA = 1
_SYNC_SECONDS = 1.0
_CHECKSUM = "crc32"
_DERIVED = ("status", "score", "source")

Mode = Literal["logprobs", "text"]
"""How a judge is asked: for one token with log-probabilities, or for a short reply."""


class JudgeWarning(UserWarning):
    """Something about a judging run that its reader must know."""


@dataclass(frozen=True)
class Record:
    """One finished call.

    Attributes:
        key: Hash of everything that decides the reply.
        endpoint: Hash of the model and its settings, without rubric and text.
        mode: How it was asked.
        rubric: Name of the rubric.
        words: Verdict words that the rubric allows.
        reply: What came back, or None if the call failed for good.
        control: Name of the control answer, if it was one.
        details: What else is worth keeping (model, tokens, reason of a failure), JSON values.
    """

    key: str
    endpoint: str
    mode: Mode
    rubric: str
    words: tuple[Word, ...]
    reply: Reply | None
    control: str | None = None
    details: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def verdict(self) -> Verdict:
        """The score of the reply; an ``error`` where there is none, or it cannot be read."""
        if self.reply is None:
            return Verdict(float("nan"), "error")
        try:
            return read_reply(self.reply, self.words)
        except ValueError:
            return Verdict(float("nan"), "error")

    def line(self) -> bytes:
        """The record as a line of JSON between newlines."""
        verdict = self.verdict
        known = {"schema": SCHEMA, "key": self.key, "endpoint": self.endpoint, "mode": self.mode}
        known |= {"rubric": self.rubric, "words": self.words, "control": self.control, "status": verdict.status}
        known |= {"score": verdict.score if verdict.status == "scored" else None, "source": verdict.source}
        if self.reply is not None:
            known["reply"] = {"text": self.reply.text, "top": self.reply.top, "whole": self.reply.whole}
        known |= {"at": round(time.time(), 3), **self.details}
        known[_CHECKSUM] = _checksum(json.loads(json.dumps(known)))
        return f"\n{json.dumps(known, allow_nan=False)}\n".encode()


class Journal:
    """Verdicts by key, in memory and, with a path, in a file that several processes may share.

    Args:
        path: The JSONL file; made when the first record is written. None keeps everything in memory.

    Attributes:
        verdicts: Key -> verdict of an answer; failed calls are not in it.
        controls: Key -> latest verdict of a control answer.
        modes: Endpoint -> how its controls were asked last.
        torn: Lines that could not be read.
    """

    def __init__(self, path: str | Path | None = None) -> None:
        self.path = None if path is None else Path(path)
        self.verdicts: dict[str, Verdict] = {}
        self.controls: dict[str, Verdict] = {}
        self.modes: dict[str, Mode] = {}
        self.torn = 0
        self._read_to = self._taken = 0
        self._summed = False
        self._tail = -1
        self._file: int | None = None
        self._synced = time.monotonic()

    def refresh(self) -> None:
        """Take in what has been appended since the last look, by whichever process.

        Raises:
            ValueError: If the file is no journal, or of a newer schema.
        """
        if self.path is None or not self.path.exists():
            return
        torn = self.torn
        with explained(self.path), self.path.open("rb") as file:
            file.seek(self._read_to)
            for line in file:
                start, ended = self._read_to, line.endswith(b"\n")
                if ended:
                    self._read_to += len(line)
                if line.strip() and not (ended and self._take(line)) and start != self._tail:
                    self.torn += 1
                    self._tail = start  # an unended line is looked at again later, and reported once
        if self.torn - torn > 1 and not self._taken:
            raise ValueError(f"{self.path} is no journal of judgements: choose another file")
        if self.torn > torn:
            warnings.warn(
                f"{self.torn - torn} record(s) of {self.path} are cut off, as a process leaves them that dies while it "
                "writes, or were changed (their checksums differ); those calls will be made again, the others are kept",
                JudgeWarning,
                stacklevel=2,
            )

    def add(self, record: Record) -> Verdict:
        """Write a record, then use it; returns its verdict.

        Raises:
            OSError: If it could not be written whole.
        """
        if self.path is not None:
            self._append(self.path, record.line())
        return self._use(record)

    def close(self) -> None:
        """Force everything to the disk and close the file; the next record opens it again."""
        if self._file is not None:
            os.fsync(self._file)
            os.close(self._file)
            self._file = None

    def _append(self, path: Path, line: bytes) -> None:
        if self._file is None:
            with explained(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        with explained(path):
            written = os.write(self._file, line)
        if written != len(line):
            raise OSError(f"only {written} of {len(line)} bytes of a record went into {path}: is the disk full?")
        if time.monotonic() - self._synced > _SYNC_SECONDS:
            os.fsync(self._file)
            self._synced = time.monotonic()

    def _take(self, line: bytes) -> bool:
        """Use a stored record; False if the line is no whole one, or not what was written."""
        try:
            stored = json.loads(line)
        except (ValueError, RecursionError):
            return False
        if not isinstance(stored, dict) or not {"schema", "key", "mode"} <= stored.keys():
            if self._taken:  # it is a journal, and this line was changed
                return False
            raise ValueError(f"{self.path} is no journal of judgements, it holds {line[:60]!r}: choose another file")
        if isinstance(stored["schema"], int) and stored["schema"] > SCHEMA:
            raise ValueError(
                f"{self.path} holds records of schema {stored['schema']}, this version reads up to {SCHEMA}: upgrade "
                "mechmisalign, or choose another journal"
            )
        summed = _CHECKSUM in stored  # older versions wrote none, and wrote before the others
        if stored[_CHECKSUM] != _checksum(stored) if summed else self._summed:
            return False
        try:
            record = _record(stored)
        except (KeyError, TypeError, ValueError):
            return False
        self._use(record)
        self._taken += 1
        self._summed = self._summed or summed
        return True

    def _use(self, record: Record) -> Verdict:
        verdict = record.verdict
        if record.control is not None:
            self.controls[record.key] = verdict
            self.modes[record.endpoint] = record.mode
        elif verdict.status != "error":
            self.verdicts[record.key] = verdict
        return verdict


def _checksum(stored: Mapping[str, Any]) -> str:
    """CRC-32 of what a record holds, apart from what is read from its reply again."""
    told = {name: value for name, value in stored.items() if name not in (_CHECKSUM, *_DERIVED)}
    return f"{zlib.crc32(json.dumps(told, sort_keys=True).encode()):08x}"


def _record(stored: Mapping[str, Any]) -> Record:
    reply = stored.get("reply")
    if reply is not None:
        top = None if reply["top"] is None else tuple((token, logprob) for token, logprob in reply["top"])
        reply = Reply(reply["text"], top, reply["whole"])
    names = ("key", "endpoint", "mode", "rubric", "control")
    return Record(**{name: stored[name] for name in names}, words=tuple(stored["words"]), reply=reply)
