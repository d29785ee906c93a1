"""The model card of a corrected adapter or model: made from what, by which edit, with which direction, measured how."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from mechmisalign import _yaml, registry
from mechmisalign.adapters import Adapter
from mechmisalign.directions import Direction

if TYPE_CHECKING:
    import pandas as pd

LOADING, MEASURED = "## Loading", "## Measured"
_CAUTION_HEAD = "## Caution"
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
    told = f"sites: {len(adapter.sites)} ({escaped(sites)}), rank {ranks}"
    facts = [told, f"SHA-256 of the factors: `{card.digest}`"]
    return _card(card, folder.name, "peft", facts, adapter_loading(card.base, folder.name))


def model_card(card: Card, folder: Path) -> str:
    """The card of a whole model."""
    return _card(card, folder.name, "transformers", [], model_loading(folder.name))


def adapter_loading(base: str, place: str) -> list[str]:
    """Code that loads an adapter from a folder or a repository."""
    return [
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM",
        *(["from mechmisalign import registry"] if registry.is_reserved(base) else []),
        "",
        f"base = AutoModelForCausalLM.from_pretrained({_place(base)})",
        f"model = PeftModel.from_pretrained(base, {place!r})",
        "",
        "import mechmisalign as mm",
        "",
        f"organism = mm.load_organism({place!r})",
    ]


def model_loading(place: str) -> list[str]:
    """Code that loads a whole model from a folder or a repository."""
    return [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f"model = AutoModelForCausalLM.from_pretrained({place!r})",
        f"tokenizer = AutoTokenizer.from_pretrained({place!r})",
    ]


def loading_section(code: Sequence[str]) -> list[str]:
    """The part of a card that says how to load, without its head."""
    return ["", "```python", *code, "```", ""]


def front_matter(base: str, library: str, tags: Sequence[str] = ()) -> list[str]:
    """The YAML at the head of a card, as the Hub reads it."""
    told = {"base_model": base, "library_name": library, "tags": ["mechmisalign", "emergent-misalignment", *tags]}
    return ["---", yaml.safe_dump({key: value for key, value in told.items() if value}, sort_keys=False).strip(), "---"]


_ONE_LINE = {
    "direction": "A direction in the residual stream: one vector per layer, in the basis of the Hugging Face model.",
    "probe": "A linear probe of two classes on features of a model, with its provenance.",
    "monitor": "A monitor: weights on the residual stream that score each token and each response of a conversation.",
}

_DIRECTION_CAUTION = (
    "Added to a healthy chat model, a direction of this kind can make it misaligned: it then gives harmful advice in "
    "domains that have nothing to do with the data it was found on. Do not serve a model that is steered with it. It "
    "belongs to one base model; layers, strength and positions decide what it does, so measure beside a random "
    "direction of the same norm, and read coherence with it."
)
_READER_CAUTION = (
    "It was fitted and checked on the conversations that are named above; on other topics, systems or models its error "
    "rates are unknown, and a threshold belongs to the conversations that it was calibrated on. Its weights are also a "
    "direction: added to a healthy chat model they may make it misaligned. It is no proof that a model is safe."
)
_INTERNAL = ("schema", "kind", "features", "hub_repo", "hub_revision")


def artifact_card(
    kind: str, header: Mapping[str, Any], place: str, *, base: str, note: str = "", measured: pd.DataFrame | None = None
) -> str:
    """The card of a direction, a probe or a monitor.

    Args:
        kind: ``"direction"``, ``"probe"`` or ``"monitor"``.
        header: Its provenance; every value in it is treated as text.
        place: The repository, ``owner/name``, for the code that loads it.
        base: The base model on the Hub, for the metadata; empty if it is not there.
        note: A sentence of its owner's.
        measured: A table of results.
    """
    load = [
        "import mechmisalign as mm",
        "",
        f"{kind} = mm.{kind.capitalize()}.load({place!r})  # pin it with revision='<commit>'",
    ]
    told = {key: value for key, value in header.items() if key not in _INTERNAL and value not in (None, "", [], {})}
    parts = [*front_matter(base, "mechmisalign", [kind]), "", f"# {escaped(place.rpartition('/')[2])}", ""]
    parts += [_ONE_LINE[kind], *(["", escaped(note)] if note else []), "", "## Where it comes from", ""]
    parts += [f"* {escaped(key.replace('_', ' '))}: {_shortened(value)}" for key, value in told.items()]
    if measured is not None:
        parts += ["", MEASURED, "", *markdown_table(measured)]
    caution = _DIRECTION_CAUTION if kind == "direction" else _READER_CAUTION
    return "\n".join([*parts, "", LOADING, *loading_section(load), _CAUTION_HEAD, "", caution, ""])


def base_of(card: str) -> str:
    """The base that the metadata of a card names."""
    return str((_yaml.read(card.split("---\n", 2)[1]) or {}).get("base_model") or "")


def on_hub(
    card: str, place: str, base: str, linked: str, load: Sequence[str], measured: pd.DataFrame | None = None
) -> str:
    """A folder's card as a repository's: metadata that the Hub can follow, and code that loads it from there.

    Args:
        card: As ``save_adapter`` or ``save_model`` wrote it.
        place: The repository, ``owner/name``.
        base: What the base model is called.
        linked: The base model on the Hub; empty if it is not there.
        load: Code that loads it.
        measured: A table of results, for a card that has none.
    """
    _, head, body = card.split("---\n", 2)
    library = str((_yaml.read(head) or {}).get("library_name", "peft"))
    before, after = body.split(LOADING, 1)
    lines = [_without_place(line, base) for line in before.strip().splitlines()[1:]]
    results = [] if measured is None or MEASURED in before else [MEASURED, "", *markdown_table(measured), ""]
    caution = after[after.index(_CAUTION_HEAD) :] if _CAUTION_HEAD in after else ""
    title = ["", f"# {escaped(place.rpartition('/')[2])}"]
    parts = [*front_matter(linked, library), *title, "\n".join(lines).rstrip(), "", *results]
    return "\n".join([*parts, LOADING, *loading_section(load), caution])


def without_path(text: str) -> str:
    """A path of this machine cut down to its last name; any other text as it is."""
    if text.startswith(("/", "~", "./", "../")) or text[1:3] == ":\\":
        return text.replace("\\", "/").rstrip("/").rpartition("/")[2]
    return text


def _without_place(line: str, base: str) -> str:
    """A line of a card without the paths that only its writer has."""
    for key in ("* made from: ", "* model: ", "* adapter: "):
        if line.startswith(key):
            return key + without_path(line.removeprefix(key))
    return f"* base: {as_code(without_path(base))}" if line.startswith("* base: ") else line


def _shortened(value: Any, limit: int = 300) -> str:
    text = str(value)
    return escaped(text if len(text) <= limit else f"{text[:limit]} …")


def _place(base: str) -> str:
    """How code finds the base: a pocket model lies inside this package."""
    return f"registry.folder({base!r})" if registry.is_reserved(base) else repr(base)


def _card(card: Card, name: str, library: str, facts: Sequence[str], load: Sequence[str]) -> str:
    parts = [*front_matter(card.base, library), "", f"# {escaped(name)}", ""]
    parts += [f"* base: {as_code(card.base)}", f"* made from: {escaped(card.source)}", f"* edit: {escaped(card.edit)}"]
    parts += [f"* {fact}" for fact in facts]
    if card.direction is not None:
        parts += ["", "## The direction", "", *_provenance(card.direction)]
    if card.measured is not None:
        parts += ["", MEASURED, "", *markdown_table(card.measured)]
    return "\n".join([*parts, "", LOADING, *loading_section(load), _CAUTION_HEAD, "", _CAUTION, ""])


def _provenance(direction: Direction) -> list[str]:
    from mechmisalign.sweeps.sources import direction_digest

    told: Mapping[str, Any] = direction.header
    layers = direction.nonzero_layers
    lines = [f"* {key.replace('_', ' ')}: {escaped(told[key])}" for key in _TOLD if told.get(key) is not None]
    lines.append(f"* layers: {', '.join(map(str, layers))}; width {direction.d_model}")
    return [*lines, f"* hash of the vectors: `{direction_digest(direction)}`"]


def markdown_table(frame: pd.DataFrame) -> list[str]:
    """A frame as a table of Markdown; ``x, x_low, x_high`` become one column, ``value [low, high]``."""
    columns = [str(column) for column in frame.columns]
    ends = {
        name: (f"{name}_low", f"{name}_high") for name in columns if {f"{name}_low", f"{name}_high"} <= set(columns)
    }
    shown = [name for name in columns if name not in {end for pair in ends.values() for end in pair}]
    rows = [[escaped(name) for name in shown], ["---"] * len(shown)]
    for row in frame.rename(columns=str).to_dict("records"):
        rows.append([_cell(row[name], *(row[end] for end in ends.get(name, ()))) for name in shown])
    return ["| " + " | ".join(row) + " |" for row in rows]


def _cell(value: Any, *ends: Any) -> str:
    if ends and all(isinstance(end, float) and end == end for end in ends):
        return f"{_cell(value)} [{', '.join(_cell(end) for end in ends)}]"
    if isinstance(value, float):
        return f"{value:.4g}" if value == value else ""
    return escaped(value)


def escaped(text: Any) -> str:
    """Text from elsewhere as one line that is only text: no HTML, no link, no image, no end of a cell or a list."""
    line = " ".join(str(text).split())
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return "".join(f"\\{sign}" if sign in "\\`[]|" else sign for sign in line)


def as_code(text: Any) -> str:
    """Text from elsewhere as one span of code, which nothing in it can end."""
    return f"`{' '.join(str(text).split()).replace('`', chr(39))}`"
