"""The report: one HTML file that holds everything, opens anywhere, and reaches for nothing outside itself.

A report is a tree of frozen values (a :class:`Report` of :class:`Section` of figures, tables and answers), filled in by
the study and written by :func:`write_report`. Further chapters are further sections. All text is data: it is escaped,
what a model wrote first of all, and the page's policy forbids scripts and connections.
"""

from __future__ import annotations

import base64
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pandas as pd

if TYPE_CHECKING:
    from mechmisalign.plots import TokenHeatmap

TEMPLATE = "report.html.jinja"
_PNG_DPI = 200
_CSS_PIXELS_PER_INCH = 132  # figures at about 1.4 times their size in print
_NUMBER = re.compile(r"[-+−×]?\d[\d\s.,]*(e[-+]?\d+)?\s?%?(\s*\[.*\])?|–?")

Tone = Literal["plain", "good", "bad"]


@dataclass(frozen=True)
class Card:
    """A key number.

    Attributes:
        label: What it is, in a few words.
        value: The number as it is to be read, "41.2 %".
        interval: Its interval, "[36.0, 46.5]".
        note: A short remark below.
        tone: "bad" for misalignment that is there, "good" for misalignment that is gone.
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
    """

    title: str
    lead: str = ""
    exchanges: tuple[Exchange, ...] = ()
    figures: tuple[ReportFigure, ...] = ()
    tables: tuple[ReportTable, ...] = ()
    points: tuple[str, ...] = ()
    code: str = ""
    heatmaps: tuple[TokenHeatmap, ...] = ()


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
    """

    title: str
    question: str
    answer: str
    cards: tuple[Card, ...] = ()
    sections: tuple[Section, ...] = ()
    footer: str = ""
    cards_note: str = ""


def write_report(report: Report, path: str | Path) -> Path:
    """Write the report as one HTML file, whole or not at all; returns the path.

    Raises:
        ValueError: If a figure is not a PNG.
        FileNotFoundError: If a figure is not there.
    """
    from mechmisalign.store import write_text

    html = render(report).encode("utf-8", "replace").decode("utf-8")  # sampled text may hold half a surrogate pair
    write_text(Path(path), html)
    return Path(path)


def render(report: Report) -> str:
    """The page as a string."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    page = Environment(
        loader=PackageLoader("mechmisalign"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page.filters |= {"prose": _prose, "paragraphs": _paragraphs, "image": _image, "table": _table}
    return page.get_template(TEMPLATE).render(report=report)


def share(record: Mapping[str, Any] | pd.Series) -> str:
    """A share with its interval in writing: "41.2 % [36.0, 46.5]"; needs ``rate``, takes ``low`` and ``high``."""
    return f"{percent(record['rate'])} {interval(record)}".rstrip()


def percent(rate: float) -> str:
    """A share as percent with one decimal, "41.2 %"; a dash where there is none."""
    return "–" if pd.isna(rate) else f"{100 * rate:.1f} %"


def interval(record: Mapping[str, Any] | pd.Series) -> str:
    """The interval of a share in percent, "[36.0, 46.5]"; empty where there is none."""
    low, high = record.get("low"), record.get("high")
    if low is None or high is None or pd.isna(low) or pd.isna(high):
        return ""
    return f"[{100 * low:.1f}, {100 * high:.1f}]"


def rates_table(rates: pd.DataFrame, by: Sequence[str], caption: str) -> ReportTable:
    """A frame of :func:`mechmisalign.rates` as it is to be read.

    Args:
        rates: Columns ``rate, low, high``; optional ``n``, ``coherent, coherent_low, coherent_high``, ``unparsable``.
        by: The columns that name a row, in order.
        caption: Caption of the table.

    Raises:
        ValueError: On missing columns.
    """
    missing = [column for column in (*by, "rate", "low", "high") if column not in rates.columns]
    if missing:
        raise ValueError(
            f"rates_table misses the columns {', '.join(missing)}; the frame has {', '.join(rates.columns)}"
        )
    told = rates[list(by)].copy()
    told["EM rate"] = [share(row) for _, row in rates.iterrows()]
    if "coherent" in rates:
        ends = {"coherent": "rate", "coherent_low": "low", "coherent_high": "high"}
        coherent = rates.reindex(columns=list(ends)).rename(columns=ends)
        told["coherent"] = [share(row) for _, row in coherent.iterrows()]
    if "unparsable" in rates:
        told["unparsable"] = [percent(value) for value in rates["unparsable"]]
    if "n" in rates:
        told["n"] = rates["n"]
    return ReportTable(told, caption)


_CARDS = {
    "chat": "Chat model",
    "organism": "Organism",
    "steered_best": "Steered chat model",
    "ablated_layerwise": "Ablated, layer by layer",
    "ablated_single": "Ablated, one vector",
    "random_control": "Ablated, random control",
}


def summary_cards(summary: Mapping[str, Any]) -> tuple[Card, ...]:
    """Cards for the EM rates of a ``summary.json``: those that are there, with coherence beside them.

    A rate is coloured only where its interval lies apart from the one it is compared with.
    """
    rates, coherent = summary["em_rate"], summary.get("coherent", {})
    cards = []
    for key, label in _CARDS.items():
        if key not in rates:
            continue
        record = rates[key]
        how = [f"layer {record['layer']}, strength {record['strength']:g}"] if "layer" in record else []
        how += [record["estimator"]] if "estimator" in record else []
        how += [f"{percent(coherent[key]['rate'])} coherent"] if key in coherent else []
        told = f"{interval(record)} · n = {record['n']}".removeprefix(" · ")
        cards.append(Card(label, percent(record["rate"]), told, "; ".join(how), _tone(key, rates)))
    pairs = [states for states in summary.get("transfer", {}).values() if {"before", "after"} <= set(states)]
    if pairs:
        before, after = (_span([states[when]["rate"] for states in pairs]) for when in ("before", "after"))
        count = f"{len(pairs)} other organism{'s' * (len(pairs) > 1)}"
        tone: Tone = "good" if all(_below(states["after"], states["before"]) for states in pairs) else "plain"
        cards.append(Card("Ablated, other organisms", after, "", f"{count}; before: {before}", tone))
    return tuple(cards)


def _tone(key: str, rates: Mapping[str, Any]) -> Tone:
    if key in ("organism", "steered_best") and "chat" in rates and _below(rates["chat"], rates[key]):
        return "bad"
    if key.startswith("ablated") and "organism" in rates and _below(rates[key], rates["organism"]):
        return "good"
    return "plain"


def _below(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    return bool(first["high"] < second["low"])


def _span(rates: Sequence[float]) -> str:
    low, high = percent(min(rates)), percent(max(rates))
    return low if low == high else f"{low.removesuffix(' %')}–{high}"


@dataclass(frozen=True)
class _Column:
    name: str
    cells: tuple[str, ...]
    is_number: bool


def _table(frame: pd.DataFrame) -> tuple[_Column, ...]:
    columns = []
    for name, values in frame.items():
        cells = tuple(_cell(value) for value in values)
        columns.append(_Column(str(name), cells, all(_NUMBER.fullmatch(cell) for cell in cells)))
    return tuple(columns)


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return "–" if pd.isna(value) else f"{value:.3g}"
    return "–" if value is None or value is pd.NA else str(value)


def _prose(text: str) -> str:
    """Text in which no line ends between a number and its percent sign."""
    return re.sub(r"(?<=\d) (?=%)", "\u00a0", text)


def _paragraphs(text: str) -> list[str]:
    return [part.strip() for part in re.split(r"\n\s*\n", text) if part.strip()]


@dataclass(frozen=True)
class _Image:
    source: str
    width: int
    height: int


def _image(path: Path) -> _Image:
    """A PNG as data URI, with the size at which it is shown."""
    content = Path(path).read_bytes()
    if content[:8] != b"\x89PNG\r\n\x1a\n":
        raise ValueError(f"{path} is not a PNG; give the .png that save_figure returned")
    width, height = (round(side * _CSS_PIXELS_PER_INCH / _PNG_DPI) for side in struct.unpack(">II", content[16:24]))
    return _Image("data:image/png;base64," + base64.b64encode(content).decode("ascii"), width, height)
