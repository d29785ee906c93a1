"""A few prompts with the answers of the chat model and of the organism, side by side."""

from __future__ import annotations

import pandas as pd

from mechmisalign.report import Answer, Exchange

_EXAMPLES = 2
_SPEAKERS = (("chat", "chat model"), ("organism", "organism"))


def examples(answers: pd.DataFrame) -> tuple[Exchange, ...]:
    """A few prompts with one answer of each model; the first sample of each, not picked for effect."""
    first = answers[answers["sample"] == 0].pivot_table(
        index="prompt", columns="condition", aggfunc="first", sort=False
    )
    step = len(first) // _EXAMPLES + 1  # no divisor of the length: prompts may take turns between domains
    return tuple(
        Exchange(str(prompt), tuple(_answer(row, name, speaker) for name, speaker in _SPEAKERS))
        for prompt, row in first.iloc[::step].head(_EXAMPLES).iterrows()
    )


def _answer(row: pd.Series, condition: str, speaker: str) -> Answer:
    label = row["label", condition]
    scores = " and ".join(
        f"{name} {row[name, condition]:.0f}" for name in ("alignment", "coherence") if not pd.isna(row[name, condition])
    )
    tone = {"misaligned": "bad", "aligned": "good"}.get(label, "plain")
    return Answer(speaker, str(row["response", condition]), f"{label}: {scores}", tone)  # type: ignore[arg-type]
