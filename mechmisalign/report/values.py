"""What a report says, as frozen values: a report of sections of figures, tables, answers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import pandas as pd

from .answers import AnswerBrowser

if TYPE_CHECKING:
    from mechmisalign.plots import TokenHeatmap

Tone = Literal["plain", "good", "bad", "void"]


@dataclass(frozen=True)
class Card:
    """A key number.

    Attributes:
        label: What it is, in a few words.
        value: The number as it is to be read, "41.2 %".
        interval: Its interval, "[36.0, 46.5]".
        note: A short remark below.
        tone: "bad" for misalignment that is there, "good" for misalignment that is gone, "void" for a number that says
            nothing.
    """

    label: str
    value: str
    interval: str = ""
    note: str = ""
    tone: Tone = "plain"


@dataclass(frozen=True)
class ReportFigure:
    """A PNG, inlined, and a caption that states n and what the band or bar is."""

    png: Path
    caption: str


@dataclass(frozen=True)
class ReportTable:
    """A frame as it is to be read (see :func:`rates_table`); numbers are aligned to the right."""

    frame: pd.DataFrame
    caption: str


@dataclass(frozen=True)
class Answer:
    """What one speaker said, and how it was judged.

    Attributes:
        speaker: "chat model", "organism" …
        text: The answer, as it was sampled.
        verdict: "misaligned, alignment 0, coherence 100" …
        tone: Colour of the verdict.
    """

    speaker: str
    text: str
    verdict: str = ""
    tone: Tone = "plain"


@dataclass(frozen=True)
class Exchange:
    """One question and its answers, side by side."""

    question: str
    answers: tuple[Answer, ...]


@dataclass(frozen=True)
class Section:
    """A chapter; every part but the title may be left out.

    Attributes:
        title: Heading.
        lead: What was done and found; blank lines part paragraphs.
        exchanges: Sample answers.
        figures: Figures, side by side where there is room.
        tables: Tables.
        points: A list: caveats, steps of the method.
        code: Something to copy: the command that reproduces the run.
        heatmaps: Texts coloured token by token, each with its title as caption.
        browsers: Answers that the reader can filter, sort and open.
    """

    title: str
    lead: str = ""
    exchanges: tuple[Exchange, ...] = ()
    figures: tuple[ReportFigure, ...] = ()
    tables: tuple[ReportTable, ...] = ()
    points: tuple[str, ...] = ()
    code: str = ""
    heatmaps: tuple[TokenHeatmap, ...] = ()
    browsers: tuple[AnswerBrowser, ...] = ()


@dataclass(frozen=True)
class Report:
    """Everything that the page says.

    Attributes:
        title: Title of the page.
        question: What was asked.
        answer: The answer in one sentence, with its interval.
        cards: The key numbers.
        sections: The chapters, in order.
        footer: The last line: version, date, run folder.
        cards_note: What the key numbers are.
        warning: What a reader has to know before any number; above everything else.
    """

    title: str
    question: str
    answer: str
    cards: tuple[Card, ...] = ()
    sections: tuple[Section, ...] = ()
    footer: str = ""
    cards_note: str = ""
    warning: str = ""
