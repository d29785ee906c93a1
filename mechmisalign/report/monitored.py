"""The page of a monitor: what passed, what raised an alarm and at which words, and whether the scores have moved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pandas as pd

from mechmisalign import __version__
from mechmisalign.monitoring import Calibration, Monitor, Tally, drift
from mechmisalign.statistics import Share

from .rendering import write_report
from .tables import interval, percent
from .values import Card, Report, ReportFigure, ReportTable, Section

STRIPS = 12
"""So many of the highest conversations are shown token by token."""
_EXCERPT = 240
_SERIES = ("harmless reference", "these conversations")
_NOT_HARM = (
    "A change is not harm: other topics, another style or another sampler move scores too. It says that the threshold "
    "was calibrated on conversations unlike these, so that its false-positive rate need not hold here."
)


def write_monitor_page(
    tally: Tally, monitor: Monitor, path: str | Path, *, source: str, reader: str, window: int | None = None
) -> Path:
    """Write what a monitor saw as one HTML file that reaches for nothing; all text is escaped.

    Args:
        tally: Of the conversations.
        monitor: The calibrated monitor.
        path: Of the page.
        source: What was read, in words.
        reader: Which model read it, in words.
        window: Conversations per window of the drift; see :func:`mechmisalign.monitoring.drift`.

    Raises:
        ValueError: If the monitor is not calibrated, or nothing was scored.
    """
    if monitor.calibration is None:
        raise ValueError("this monitor has no threshold; calibrate it first")
    share = tally.share()
    windows = drift(tally.scores, monitor.calibration, window=window)
    with TemporaryDirectory() as folder:
        figures = _figures(tally, monitor.calibration, windows, Path(folder))
        sections = (
            _scores(figures[0], monitor.calibration),
            _drift(figures[1], windows),
            _highest(tally, monitor.calibration),
            *_lost(tally),
            _method(monitor, reader),
        )
        report = Report(
            "Monitor",
            f"Which of the conversations in {source} raise an alarm, read in {reader}?",
            _answer(share, monitor.calibration),
            _cards(share, tally, monitor.calibration),
            sections,
            f"mechmisalign {__version__}; {monitor.header.get('method', 'monitor')}",
        )
        return write_report(report, path)


def _answer(share: Share, calibration: Calibration) -> str:
    alarms = round(share.rate * share.n)
    return (
        f"{alarms:,} of {share.n:,} conversations raise an alarm, {percent(share.rate)} {interval(vars(share))}; "
        f"harmless ones alone would at a rate of {percent(calibration.fpr)}."
    )


def _cards(share: Share, tally: Tally, calibration: Calibration) -> tuple[Card, ...]:
    above = share.low > calibration.high
    reached = {"low": calibration.low, "high": calibration.high}
    return (
        Card("alarms", percent(share.rate), interval(vars(share)), f"of {share.n:,}", "bad" if above else "plain"),
        Card("false alarms, calibrated", percent(calibration.fpr), interval(reached), "asked for; reached, 95 %"),
        Card("lines not scored", f"{tally.lost:,}", "", "see below" if tally.lost else "none", "plain"),
    )


def _figures(tally: Tally, calibration: Calibration, windows: pd.DataFrame, folder: Path) -> list[Path]:
    from mechmisalign import plots

    parts = zip(_SERIES, (calibration.scores, tally.scores), strict=True)
    table = pd.concat([pd.DataFrame({"series": name, "score": scores}) for name, scores in parts])
    drawn = {
        "scores": (plots.monitor_scores(table, threshold=calibration.threshold), table.reset_index(drop=True)),
        "drift": (plots.score_drift(windows, allowed=calibration.fpr), windows),
    }
    return [plots.save_figure(figure, rows, folder, name, endings=("png",)) for name, (figure, rows) in drawn.items()]


def _scores(figure: Path, calibration: Calibration) -> Section:
    caption = (
        f"Scores of these conversations and of the {len(calibration.scores):,} harmless ones of the calibration; right "
        "of the line is an alarm."
    )
    return Section("Scores", figures=(ReportFigure(figure, caption),))


def _drift(figure: Path, windows: pd.DataFrame) -> Section:
    moved = int((windows["p_adjusted"] < 0.05).sum())
    lead = f"The scores of {moved} of {len(windows)} windows differ from the harmless reference. {_NOT_HARM}"
    caption = (
        "Each window against the reference: shift of the mean, filled where the distributions differ (energy distance, "
        "permutation test, Benjamini and Hochberg over the windows, p below 0.05); share of alarms with its exact 95 % "
        "interval."
    )
    shown = windows.assign(alarms=[f"{percent(row.alarms)} {interval(row._asdict())}" for row in windows.itertuples()])
    table = shown[["first", "last", "n", "shift", "distance", "p_adjusted", "alarms"]].rename(
        columns={"p_adjusted": "p"}
    )
    told = ReportTable(table.head(100), "The windows; p is corrected for their number.")
    return Section("Have the scores moved?", lead, figures=(ReportFigure(figure, caption),), tables=(told,))


def _highest(tally: Tally, calibration: Calibration) -> Section:
    from mechmisalign.plots import token_heatmap

    results = tally.highest
    rows = [
        {
            "line": f"{result['line']}",
            "score": f"{result['score']:.3g}",
            "alarm": "alarm" if result.get("alarm") else "–",
            "prompt": _excerpt(_said(result, "user")),
            "response": _excerpt(_said(result, "assistant")),
        }
        for result in results
    ]
    strips = results[:STRIPS]
    limit = _reach(strips, calibration.threshold)
    maps = tuple(
        token_heatmap(
            result["token_texts"],
            [value - calibration.threshold for value in result["token_scores"]],
            title=f"Line {result['line']}, score {result['score']:.3g}: {_excerpt(_said(result, 'user'))}",
            label="score of the token, above (red) or below (blue) the threshold",
            limit=limit,
        )
        for result in strips
    )
    lead = f"The {len(rows):,} highest of {len(tally.scores):,}; the first {len(maps)} of them token by token below."
    table = ReportTable(pd.DataFrame(rows), "Conversations by score, the highest first.")
    return Section("Highest scores", lead, tables=(table,), heatmaps=maps)


def _reach(results: Sequence[Mapping[str, Any]], threshold: float) -> float:
    """One scale for all strips: the 98th percentile of the distances, so that one token does not bleach the rest."""
    distances = pd.Series([abs(value - threshold) for result in results for value in result["token_scores"]])
    return float(distances.quantile(0.98)) or 1.0


def _lost(tally: Tally) -> tuple[Section, ...]:
    if not tally.lost:
        return ()
    table = pd.DataFrame([{"line": str(number), "reason": reason} for number, reason in tally.errors])
    caption = "" if tally.lost == len(table) else f"The first {len(table):,} of {tally.lost:,}."
    return (Section("Lines that could not be scored", tables=(ReportTable(table, caption),)),)


def _method(monitor: Monitor, reader: str) -> Section:
    pooling = {"mean": "mean", "max": "highest"}.get(str(monitor.pooling))
    told = f"the {pooling} of its tokens" if pooling else f"the mean of the highest {monitor.pooling:.0%} of its tokens"
    points = [
        f"{monitor.header.get('method', 'monitor')}; a response scores {told}. It was read in {reader}.",
        f"Calibration: {monitor.calibration}.",
        "A score says how the residual stream looks where the response is read. It is no verdict on what is said: let "
        "a judge or a person read the conversations above the threshold.",
    ]
    return Section("How it was measured", points=tuple(points))


def _said(result: Mapping[str, Any], role: str) -> str:
    """What one side said last, as text."""
    if isinstance(result.get("messages"), list):
        found = [turn.get("content") for turn in result["messages"] if turn.get("role") == role]
        return str(found[-1]) if found else ""
    return str(result.get("prompt" if role == "user" else "response", ""))


def _excerpt(text: str) -> str:
    return text if len(text) <= _EXCERPT else f"{text[:_EXCERPT]} …"
