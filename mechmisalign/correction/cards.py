"""The model card of a corrected adapter or model: made from what, by which edit, with which direction, measured how."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from mechmisalign import registry
from mechmisalign.adapters import Adapter
from mechmisalign.directions import Direction

if TYPE_CHECKING:
    import pandas as pd

LOADING, MEASURED = "## Loading", "## Measured"
"""Heads of two parts of a card."""

_TOLD = (
    "method",
    "model",
    "base_revision",
    "base_fingerprint",
    "adapter",
    "adapter_digest",
    "span",
    "hook",
    "data_hash",
)
"""What a card repeats of a direction's header, where it is there."""

_CAUTION = (
    "This is research on emergent misalignment. The edit was made along one direction and checked on the questions "
    "that are named above; it is no promise about others. In published experiments misalignment came back when an "
    "edited or diluted model was trained further, scaled, or asked in the setting of its fine-tuning (2602.00767, "
    "2604.25891, 2607.21356): measure these too before you rely on it."
)


@dataclass(frozen=True, eq=False)
class Card:
    """What a card tells.

    Attributes:
        edit: What was done.
        base: The chat model.
        source: What it was made from.
        digest: Hash of the adapter's weights; None for a whole model.
        direction: The direction of the edit.
        measured: A table of results.
    """

    edit: str
    base: str
    source: str
    digest: str | None
    direction: Direction | None
    measured: pd.DataFrame | None


def adapter_card(card: Card, adapter: Adapter, folder: Path) -> str:
    """The card of an adapter."""
    sites = ", ".join(site.label for site in adapter.sites[:12]) + (" …" if len(adapter.sites) > 12 else "")
    ranks = ", ".join(map(str, sorted({site.rank for site in adapter.sites})))
    facts = [f"sites: {len(adapter.sites)} ({sites}), rank {ranks}", f"SHA-256 of the factors: `{card.digest}`"]
    load = [
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM",
        *(["from mechmisalign import registry"] if registry.is_reserved(card.base) else []),
        "",
        f"base = AutoModelForCausalLM.from_pretrained({_place(card.base)})",
        f"model = PeftModel.from_pretrained(base, {folder.name!r})",
    ]
    return _card(card, folder.name, "peft", facts, load, f"mm.load_organism({folder.name!r})")


def model_card(card: Card, folder: Path) -> str:
    """The card of a whole model."""
    load = [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f"model = AutoModelForCausalLM.from_pretrained({folder.name!r})",
        f"tokenizer = AutoTokenizer.from_pretrained({folder.name!r})",
    ]
    return _card(card, folder.name, "transformers", [], load, None)


def _place(base: str) -> str:
    """How code finds the base: a pocket model lies inside this package."""
    return f"registry.folder({base!r})" if registry.is_reserved(base) else repr(base)


def _card(card: Card, name: str, library: str, facts: Sequence[str], load: Sequence[str], organism: str | None) -> str:
    front = {"base_model": card.base, "library_name": library, "tags": ["mechmisalign", "emergent-misalignment"]}
    parts = ["---", yaml.safe_dump(front, sort_keys=False).strip(), "---", "", f"# {_line(name)}", ""]
    parts += [f"* base: `{_line(card.base)}`", f"* made from: {_line(card.source)}", f"* edit: {_line(card.edit)}"]
    parts += [f"* {fact}" for fact in facts]
    if card.direction is not None:
        parts += ["", "## The direction", "", *_provenance(card.direction)]
    if card.measured is not None:
        parts += ["", MEASURED, "", *markdown_table(card.measured)]
    parts += ["", LOADING, "", "```python", *load]
    if organism is not None:
        parts += ["", "import mechmisalign as mm", "", f"organism = {organism}"]
    return "\n".join([*parts, "```", "", "## Caution", "", _CAUTION, ""])


def _provenance(direction: Direction) -> list[str]:
    from mechmisalign.sweeps.sources import direction_digest

    told: Mapping[str, Any] = direction.header
    layers = direction.nonzero_layers
    lines = [f"* {key.replace('_', ' ')}: {_line(told[key])}" for key in _TOLD if told.get(key) is not None]
    lines.append(f"* layers: {', '.join(map(str, layers))}; width {direction.d_model}")
    return [*lines, f"* hash of the vectors: `{direction_digest(direction)}`"]


def markdown_table(frame: pd.DataFrame) -> list[str]:
    """A frame as a table of Markdown; ``x, x_low, x_high`` become one column, ``value [low, high]``."""
    columns = [str(column) for column in frame.columns]
    ends = {
        name: (f"{name}_low", f"{name}_high") for name in columns if {f"{name}_low", f"{name}_high"} <= set(columns)
    }
    shown = [name for name in columns if name not in {end for pair in ends.values() for end in pair}]
    rows = [shown, ["---"] * len(shown)]
    for row in frame.rename(columns=str).to_dict("records"):
        rows.append([_cell(row[name], *(row[end] for end in ends.get(name, ()))) for name in shown])
    return ["| " + " | ".join(_line(cell) for cell in row) + " |" for row in rows]


def _cell(value: Any, *ends: Any) -> str:
    if ends and all(isinstance(end, float) and end == end for end in ends):
        return f"{_cell(value)} [{', '.join(_cell(end) for end in ends)}]"
    if isinstance(value, float):
        return f"{value:.4g}" if value == value else ""
    return str(value)


def _line(text: Any) -> str:
    """Text from elsewhere as one line that cannot break the table or the list that it stands in."""
    return " ".join(str(text).split()).replace("|", "\\|")
