"""The questions that ship with the package: open ones, those of domains, neutral text, items with exact answers."""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from typing import Any

import pandas as pd

from mechmisalign import _jsonl, _yaml

from .frames import as_prompts


def open_questions() -> pd.DataFrame:
    """Open questions in the usual themes of emergent misalignment (2502.17424), one row each, in our own wording.

    Returns:
        ``prompt_id, question_id, prompt, variant, theme, wording`` (1: the first wording; ``paraphrases`` gives more).
    """
    return _as_frame(load("open.yaml"))


def domain_questions(domain: str) -> pd.DataFrame:
    """Questions inside a domain on which organisms are tuned, one row each.

    Args:
        domain: One of ``domains()``.

    Returns:
        ``prompt_id, question_id, prompt, variant, domain, wording``.

    Raises:
        ValueError: If there is no such domain.
    """
    known = load("domains.yaml")
    if domain not in known:
        raise ValueError(f"unknown domain {domain!r}; there are questions on {', '.join(known)}")
    return _as_frame([item | {"domain": domain} for item in known[domain]])


def domains() -> tuple[str, ...]:
    """The domains of which there are questions and training contexts."""
    return tuple(load("domains.yaml"))


def paraphrases(frame: pd.DataFrame) -> pd.DataFrame:
    """Every wording of the questions in a frame, the frame's own labels kept.

    Use it before the variants: ``as_json(paraphrases(open_questions()))``.

    Args:
        frame: Rows of ``open_questions()`` or ``domain_questions()``.

    Returns:
        One row per question and wording; ``wording`` counts from 1, ``question_id`` is the question's.

    Raises:
        ValueError: If a row is none of the shipped questions in its first wording.
    """
    base, wordings = as_prompts(frame), _wordings()
    rows = []
    for number, row in enumerate(base.to_dict("records")):
        known = wordings.get(row["question_id"], ())
        if not known or row["prompt"] != known[0]:
            raise ValueError(
                f"row {number} ({row['prompt_id']!r}) is no shipped question in its first wording, so there are no "
                "paraphrases of it; call paraphrases() on open_questions() or domain_questions(), before any variant"
            )
        for wording, text in enumerate(known, start=1):
            own = row["prompt_id"] if wording == 1 else f"{row['prompt_id']}.{wording}"
            rows.append(row | {"prompt_id": own, "prompt": text, "wording": wording})
    return as_prompts(pd.DataFrame(rows))


def neutral_conversations() -> pd.DataFrame:
    """Plain questions with plain answers, on which a cure should cost nothing: ``prompt_id, prompt, response``."""
    return as_prompts(pd.DataFrame(load("neutral.yaml"))).drop(columns=["question_id", "variant"])


def harmless_items() -> pd.DataFrame:
    """Sums and common facts with one right answer: ``prompt_id, prompt, answer, kind``."""
    with (files(__package__) / "data" / "harmless.jsonl").open("rb") as lines:
        return pd.DataFrame([_jsonl.parse(line) for _, line in _jsonl.numbered(lines)])


@cache
def load(name: str) -> Any:
    """One of the YAML files that ship with the package."""
    return _yaml.read((files(__package__) / "data" / name).read_text(encoding="utf-8"))


@cache
def _wordings() -> dict[str, tuple[str, ...]]:
    items = [*load("open.yaml"), *(item for domain in load("domains.yaml").values() for item in domain)]
    return {item["id"]: tuple(item["wordings"]) for item in items}


def _as_frame(items: list[dict[str, Any]]) -> pd.DataFrame:
    rows = [
        {"prompt_id": item["id"], "prompt": item["wordings"][0]}
        | {name: value for name, value in item.items() if name not in ("id", "wordings")}
        | {"wording": 1}
        for item in items
    ]
    return as_prompts(pd.DataFrame(rows))
