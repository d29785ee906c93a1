"""From values to one page."""

from __future__ import annotations

import base64
import hashlib
import re
import struct
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from .answers import AnswerBrowser
from .payload import embedded, preview
from .tables import columns
from .values import Report

if TYPE_CHECKING:
    from markupsafe import Markup

TEMPLATE = "report.html.jinja"
SCRIPT = "answers.js"
_PNG_DPI = 200
_CSS_PIXELS_PER_INCH = 132  # figures at about 1.4 times their size in print


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
    page.filters |= {"prose": _prose, "paragraphs": _paragraphs, "image": _image, "table": columns}
    page.filters |= {"embedded": _embedded, "preview": preview}
    script = _script() if any(section.browsers for section in report.sections) else None
    return page.get_template(TEMPLATE).render(report=report, script=script)


@dataclass(frozen=True)
class _Script:
    """The one script that a page may run, and the hash by which its policy knows it."""

    source: Markup
    sha256: str


def _script() -> _Script:
    from markupsafe import Markup

    source = (resources.files("mechmisalign") / "templates" / SCRIPT).read_text(encoding="utf-8")
    digest = hashlib.sha256(source.encode("utf-8")).digest()
    return _Script(Markup(source), base64.b64encode(digest).decode("ascii"))


def _embedded(browser: AnswerBrowser) -> Markup:
    from markupsafe import Markup

    return Markup(embedded(browser))  # holds no <, > or &


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
