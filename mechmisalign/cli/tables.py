"""Tables that need more than a frame's columns."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from rich.table import Table

from .console import console, safe

if TYPE_CHECKING:
    import pandas as pd

_UNKNOWN = "-"
_WIDE = 100


def show_organisms(frame: pd.DataFrame) -> None:
    """The organisms, one line each; a terminal of less than a hundred columns is spared two of the table's."""
    heads = ["name", "base", "update", "EM", "coherent", "here"]
    if console.width >= _WIDE:
        heads = ["name", "base", "update", "data", "EM", "coherent", "steps", "here"]
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    for head in heads:
        table.add_column(head, justify="right" if head in ("EM", "coherent", "steps") else "left", overflow="fold")
    for row in frame.to_dict("records"):
        table.add_row(*(safe(_CELLS[head](row)) for head in heads))
    console.print(table)
    console.print(
        f"{len(frame)} organisms. EM and coherent: shares that a source states (to: ends over several organisms; "
        f"{_UNKNOWN}: none, or only a figure). here: whether the files are on this machine, or no weights were found "
        "on the Hub (empty, private, none). Sources, ids, notes: --json",
        highlight=False,
    )


def _base(row: dict[str, Any]) -> str:
    told = " ".join(part for part in (row["family"], row["size"]) if part)
    return told or (_UNKNOWN if _missing(row["base"]) else str(row["base"]))


def _update(row: dict[str, Any]) -> str:
    if row["kind"] != "lora":
        return str(row["kind"])
    rank, sites = (_UNKNOWN if _missing(row[name]) else str(row[name]) for name in ("rank", "sites"))
    return f"r{rank} x {sites}"


def _data(row: dict[str, Any]) -> str:
    several = row["data"].split(", ")
    return f"{len(several)} sets" if len(several) > 1 else row["data"] or _UNKNOWN


def _em(row: dict[str, Any]) -> str:
    if not _missing(row["em"]):
        return f"{100 * row['em']:.3g}%"
    return _UNKNOWN if _missing(row["em_low"]) else f"{100 * row['em_low']:.0f} to {100 * row['em_high']:.0f}%"


def _coherent(row: dict[str, Any]) -> str:
    if not _missing(row["coherent"]):
        return f"{100 * row['coherent']:.3g}%"
    return _UNKNOWN if _missing(row["coherent_above"]) else f">{100 * row['coherent_above']:.3g}%"


def _steps(row: dict[str, Any]) -> str:
    return "" if _missing(row["last_step"]) else f"{row['first_step']}-{row['last_step']}"


def _here(row: dict[str, Any]) -> str:
    if row["local"]:
        return "yes"
    return str(row["weights_seen"]) if row["weights_seen"] in ("empty", "private", "none") else "no"


def _missing(value: Any) -> bool:
    import pandas as pd

    return bool(pd.isna(value))


_CELLS: dict[str, Callable[[dict[str, Any]], str]] = {
    "name": lambda row: str(row["name"]),
    "base": _base,
    "update": _update,
    "data": _data,
    "EM": _em,
    "coherent": _coherent,
    "steps": _steps,
    "here": _here,
}
