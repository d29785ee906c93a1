"""The report: one HTML file that holds everything, opens anywhere, and reaches for nothing outside itself.

A report is a tree of frozen values (a :class:`Report` of :class:`Section` of figures, tables and answers), filled in by
the study and written by :func:`write_report`. Further chapters are further sections. All text is data: it is escaped,
what a model wrote first of all. The page's policy forbids connections and scripts; a page with an
:class:`AnswerBrowser` allows one script, the package's own, by its hash.
"""

from .answers import AnswerBrowser, answer_browser
from .cards import BROKEN_BELOW, is_broken, summary_cards
from .rendering import TEMPLATE, render, write_report
from .tables import interval, percent, rates_table, share
from .values import Answer, Card, Exchange, Report, ReportFigure, ReportTable, Section, Tone

__all__ = [
    "BROKEN_BELOW",
    "TEMPLATE",
    "Answer",
    "AnswerBrowser",
    "Card",
    "Exchange",
    "Report",
    "ReportFigure",
    "ReportTable",
    "Section",
    "Tone",
    "answer_browser",
    "interval",
    "is_broken",
    "percent",
    "rates_table",
    "render",
    "share",
    "summary_cards",
    "write_report",
]
