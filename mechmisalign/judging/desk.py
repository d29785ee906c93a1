"""What every cached judge does: look up, ask once, check the controls, fill in the columns.

A desk takes a frame of answers, finds which judgements its journal lacks, has the control answers judged, and hands
what is left to an asker (a server's model, or one in memory). Repeated answers are asked once; a score is in the
journal before it is used.
"""

from __future__ import annotations

import hashlib
import json
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import pandas as pd

from .asking import Ask, Asker, Exchange, exchanges
from .budget import rough_tokens
from .controls import Control, ControlReport, DeadJudgeError, control_report
from .journal import SCHEMA, Journal, JudgeWarning, Mode, Record
from .rubrics import Rubric
from .scores import Reply, Verdict, numbers_are_split

OnFailedControls = Literal["raise", "warn"]

_CHECKED_FOR = 3600.0
"""Seconds after which a judge object that still asks is checked again."""
_MISSING = Verdict(float("nan"), "missing")


class Desk:
    """Judges frames with an asker, a journal and controls.

    Attributes:
        report: What the judge last said of the controls; None before the first run.
    """

    def __init__(
        self,
        asker: Asker,
        rubrics: Sequence[Rubric],
        journal: Journal,
        controls: Sequence[Control],
        on_failed_controls: OnFailedControls,
    ) -> None:
        if on_failed_controls not in ("raise", "warn"):
            raise ValueError(f"on_failed_controls must be 'raise' or 'warn', got {on_failed_controls!r}")
        self.asker, self.rubrics, self.journal, self.controls = asker, tuple(rubrics), journal, tuple(controls)
        self.on_failed = on_failed_controls
        self.report: ControlReport | None = None
        self._checked: float | None = None
        self._set_mode(asker.wanted)
        self._failed: dict[str, str] = {}

    def judge(self, frame: pd.DataFrame) -> pd.DataFrame:
        """The frame with ``<rubric>`` and ``<rubric>_status`` for each rubric.

        Raises:
            ValueError: If a column is missing.
            DeadJudgeError: If the controls fail.
        """
        texts = exchanges(frame)
        self._open()
        self._failed.clear()
        keys, stopped = self._keys(texts), None
        if any(text is not None for text in texts):
            if self._missing(keys) or not self._recall():
                mode = self.asker.mode
                stopped = self.check()
                keys = keys if self.asker.mode == mode else self._keys(texts)
            stopped = stopped or self._ask(self._missing(keys), texts)
            self.journal.close()
        judged, statuses = self._filled(frame, keys)
        self._tell(statuses, stopped)
        return judged

    def recalled(self, frame: pd.DataFrame) -> pd.DataFrame:
        """The same from the journal alone: nothing is asked."""
        texts = exchanges(frame)
        self._open()
        return self._filled(frame, self._keys(texts))[0]

    def check(self) -> str | None:
        """Have the controls judged anew, unless this desk did so within the hour; settles how the model is asked.

        Returns:
            Why it stopped early, if it did.

        Raises:
            DeadJudgeError: If the controls fail, and ``on_failed_controls`` is ``raise``.
        """
        if self._checked is not None and time.monotonic() - self._checked < _CHECKED_FOR:
            return None
        self._set_mode(self.asker.wanted)
        replies: dict[tuple[str, str], Reply] = {}
        asks = self._control_asks()
        stopped = self._call(asks[:1], replies)
        if self.asker.mode == "logprobs" and any(reply.top is None for reply in replies.values()):
            self._ask_for_text("it returned none")
            for ask in self._control_asks()[:1]:
                self._record(ask, replies[ask.rubric.name, str(ask.control)], {})
        stopped = stopped or self._call(self._control_asks()[1:], replies)
        if self.asker.mode == "logprobs" and numbers_are_split(replies.values()):
            self._ask_for_text("its tokenizer splits numbers into digits")
            stopped = stopped or self._call(self._control_asks(), replies)
        if stopped is None:
            self._checked = time.monotonic()
            self._decide(self._control_report(fresh=True))
        return stopped

    def estimate(self, frame: pd.DataFrame) -> tuple[int, list[int]]:
        """Judgements to fill in, and the rough length in tokens of each call that is left, controls included."""
        texts = exchanges(frame)
        self._open()
        asks = self._asks(self._missing(self._keys(texts)), texts)
        lengths = [rough_tokens(ask.prompt) for ask in asks]
        if lengths and self._checked is None:
            lengths += [rough_tokens(ask.prompt) for ask in self._control_asks()]
        return sum(text is not None for text in texts) * len(self.rubrics), lengths

    def key(self, rubric: Rubric, prompt: str) -> str:
        """Hash of everything that decides a reply."""
        return _digest(SCHEMA, self._asked, rubric.version, prompt)

    @property
    def identity(self) -> str:
        """Hash of everything that decides scores: the model, how it is asked, and the rubrics' texts."""
        return _digest(SCHEMA, self.asker.identity(), self.asker.wanted, [rubric.version for rubric in self.rubrics])

    def _open(self) -> None:
        self.journal.refresh()
        checked = self._endpoint
        self._set_mode(self.asker.mode)
        if self._endpoint != checked:  # a model in memory that has been trained on meanwhile
            self._checked = None
        if self._checked is None:
            self._set_mode(self.journal.modes.get(self._endpoint, self.asker.wanted))

    def _set_mode(self, mode: Mode) -> None:
        self.asker.mode = mode
        identity = self.asker.identity()
        self._endpoint = _digest(identity, self.asker.wanted)
        self._asked = _digest(identity, mode, self.asker.settings(mode))

    def _keys(self, texts: Sequence[Exchange]) -> list[list[str]]:
        """Key of each row and rubric; no keys where there is no text."""
        return [
            [] if text is None else [self.key(rubric, rubric.prompt(*text)) for rubric in self.rubrics]
            for text in texts
        ]

    def _missing(self, keys: list[list[str]]) -> dict[str, tuple[int, Rubric]]:
        """What the journal lacks: key -> first row and rubric."""
        found: dict[str, tuple[int, Rubric]] = {}
        for row, own in enumerate(keys):
            for key, rubric in zip(own, self.rubrics, strict=False):
                if key not in self.journal.verdicts:
                    found.setdefault(key, (row, rubric))
        return found

    def _asks(self, missing: Mapping[str, tuple[int, Rubric]], texts: Sequence[Exchange]) -> Iterator[Ask]:
        for key, (row, rubric) in missing.items():
            yield Ask(key, rubric, rubric.prompt(*(texts[row] or ("", ""))))

    def _control_asks(self) -> list[Ask]:
        asks = []
        for rubric in self.rubrics:
            for control in self.controls:
                if rubric.name in control.expected:
                    prompt = rubric.prompt(control.question, control.answer)
                    asks.append(Ask(self.key(rubric, prompt), rubric, prompt, control.name))
        return asks

    def _ask_for_text(self, why: str) -> None:
        self._set_mode("text")
        warnings.warn(
            f"no score can be read from the log-probabilities of this judge ({why}), so scores are the numbers that it "
            "writes: coarser, and not to be mixed with probability-weighted ones",
            JudgeWarning,
            stacklevel=3,
        )

    def _call(self, asks: list[Ask], replies: dict[tuple[str, str], Reply]) -> str | None:
        def done(ask: Ask, reply: Reply | None, details: Mapping[str, Any]) -> None:
            self._record(ask, reply, details)
            if reply is not None:
                replies[ask.rubric.name, str(ask.control)] = reply

        return self.asker.ask(asks, len(asks), done) if asks else None

    def _ask(self, missing: Mapping[str, tuple[int, Rubric]], texts: Sequence[Exchange]) -> str | None:
        return self.asker.ask(self._asks(missing, texts), len(missing), self._record) if missing else None

    def _record(self, ask: Ask, reply: Reply | None, details: Mapping[str, Any]) -> None:
        record = Record(
            ask.key, self._endpoint, self.asker.mode, ask.rubric.name, ask.rubric.words, reply, ask.control,
            {"rubric_version": ask.rubric.version, **details},
        )  # fmt: skip
        verdict = self.journal.add(record)
        if verdict.status == "error":
            self._failed[ask.key] = str(details.get("reason", "the log-probabilities are none"))

    def _recall(self) -> bool:
        """Whether the journal has the controls and they will do; then they are what the report holds."""
        if self._checked is None:
            if any(ask.key not in self.journal.controls for ask in self._control_asks()):
                return False
            report = self._control_report(fresh=False)
            if not report.passed and self.on_failed == "raise":
                return False
            self._decide(report)
        return True

    def _control_report(self, *, fresh: bool) -> ControlReport:
        named = {control.name: control for control in self.controls}
        verdicts = [
            (named[str(ask.control)], ask.rubric.name, self.journal.controls.get(ask.key, _MISSING))
            for ask in self._control_asks()
        ]
        return control_report(verdicts, fresh=fresh)

    def _decide(self, report: ControlReport) -> None:
        self.report = report
        if report.passed:
            return
        reasons = Counter(self._failed[ask.key] for ask in self._control_asks() if ask.key in self._failed)
        told = str(report) + "".join(f"; {count} calls failed: {reason}" for reason, count in reasons.most_common(1))
        if self.on_failed == "raise":
            self._checked = None
            raise DeadJudgeError(
                f"{told}. A judge that misses these cannot be trusted, so no answer was sent to it. Look at the model "
                "and its replies in the journal; on_failed_controls='warn' judges all the same"
            )
        warnings.warn(f"{told}. Its scores may mean nothing", JudgeWarning, stacklevel=4)

    def _filled(self, frame: pd.DataFrame, keys: list[list[str]]) -> tuple[pd.DataFrame, Counter[str]]:
        columns: dict[str, pd.Series] = {}
        statuses: Counter[str] = Counter()
        for place, rubric in enumerate(self.rubrics):
            verdicts = [self._verdict(own[place]) if own else _MISSING for own in keys]
            found = [verdict.status for verdict in verdicts]
            scores = [verdict.score for verdict in verdicts]
            columns[rubric.name] = pd.Series(scores, index=frame.index, dtype=float)
            columns[f"{rubric.name}_status"] = pd.Series(found, index=frame.index, dtype=object)
            statuses.update(found)
        return frame.assign(**columns), statuses

    def _verdict(self, key: str) -> Verdict:
        unscored = Verdict(float("nan"), "error") if key in self._failed else _MISSING
        return self.journal.verdicts.get(key, unscored)

    def _tell(self, statuses: Counter[str], stopped: str | None) -> None:
        total = sum(statuses.values())
        told = []
        if statuses["missing"]:
            why = stopped or "those answers hold no text"
            told.append(f"{statuses['missing']} of {total} judgements are missing: {why}")
        if statuses["error"]:
            reason, _ = Counter(self._failed.values()).most_common(1)[0]
            told.append(f"{statuses['error']} of {total} judgements failed ({reason}); another run asks them again")
        if told:
            warnings.warn("; ".join(told), JudgeWarning, stacklevel=4)


class AtDesk:
    """What judges that work at a desk share."""

    _desk: Desk

    @property
    def identity(self) -> str:
        """What tells this judge from another in a run folder: its name and a hash of what decides its scores."""
        return f"{self!r} {self._desk.identity}"

    @property
    def controls_(self) -> ControlReport | None:
        """What it said of the controls; None before the first run."""
        return self._desk.report


def _digest(*values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:32]
