"""The stages of a study, and which one is at work."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

_QUICKER_THAN = 1.0
"""Seconds: a stage that took less was read from an earlier try, and says nothing of how long the next will take."""

NAMES: Mapping[str, str] = {
    "baseline": "answers of the chat model and of the organism",
    "directions": "estimating directions",
    "steering": "steering the chat model",
    "single": "searching the single vector",
    "ablation": "ablation",
    "costs": "what it costs",
    "peers": "other organisms",
    "anatomy": "the adapter taken apart",
    "training": "training",
    "fine_tunes": "comparing fine-tunes",
    "cure": "cure",
    "watch": "monitor",
}


@dataclass(frozen=True)
class Stage:
    """One stage as it begins.

    Attributes:
        number: Its place, from 1.
        total: How many there are.
        name: What it does.
        left: Seconds until the study is done, by the stages until now; None if that is not known yet.
    """

    number: int
    total: int
    name: str
    left: float | None = None


Announce = Callable[[Stage], None]


@dataclass
class Stages:
    """Keeps the time of the stages, and tells of each as it begins.

    Attributes:
        answers: Answers of each stage, at most.
        announce: What is told; None tells nobody.
    """

    answers: Mapping[str, int] = field(default_factory=dict)
    announce: Announce | None = None
    _begun: tuple[str, float] | None = None
    _took: dict[str, float] = field(default_factory=dict)

    def begin(self, stage: str) -> None:
        """A stage begins, and with it the one before it ends."""
        now = time.monotonic()
        if self._begun is not None:
            self._took[self._begun[0]] = now - self._begun[1]
        self._begun = (stage, now)
        if self.announce is not None and stage in self.answers:
            number = list(self.answers).index(stage) + 1
            self.announce(Stage(number, len(self.answers), NAMES[stage], self._left(number - 1)))

    def _left(self, done: int) -> float | None:
        """Seconds for the answers that are to come, as fast as those until now."""
        timed = {name: took for name, took in self._took.items() if took >= _QUICKER_THAN and self.answers.get(name)}
        if not timed:
            return None
        a_second = sum(self.answers[name] for name in timed) / sum(timed.values())
        return sum(list(self.answers.values())[done:]) / a_second
