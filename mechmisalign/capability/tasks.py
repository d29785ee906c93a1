"""Harmless questions with one right answer, and the length of answers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from mechmisalign._frames import plain_frame
from mechmisalign.generation import Conditions, generate
from mechmisalign.statistics import clustered_share

from .texts import mean_interval

if TYPE_CHECKING:
    from mechmisalign.organisms import Organism

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def task_costs(
    organism: Organism,
    conditions: Conditions | None,
    items: pd.DataFrame,
    *,
    system: str | None = None,
    max_new_tokens: int = 64,
    seed: int = 0,
    workers: int = 1,
) -> pd.DataFrame:
    """How many questions with one right answer are answered rightly, and how long the answers are.

    Each item is answered once under each condition, with the most likely token at every step, and compared with
    :func:`is_right`.

    Args:
        organism: Who answers (inside ``organism.as_base()``: the chat model).
        conditions: Named sets of interventions; by default one, ``"none"``, without any.
        items: ``prompt``, ``answer``, and what else :func:`mechmisalign.generate` takes (``prompt_id, history`` …).
        system: System prompt of items without one.
        max_new_tokens: Longest answer.
        seed: Of the bootstrap resamples.
        workers: As for :func:`mechmisalign.generate`.

    Returns:
        One row per condition: ``condition, accuracy, accuracy_low, accuracy_high`` (a share), and what
        :func:`response_length` gives, and ``items``.

    Raises:
        ValueError: If there is no column ``answer``, or an answer is empty.
    """
    if "answer" not in items.columns:
        raise ValueError(f"items need the columns 'prompt' and 'answer'; these have {list(items.columns)}")
    answers = generate(
        organism,
        items,
        conditions=conditions,
        samples=1,
        temperature=0,
        max_new_tokens=max_new_tokens,
        system=system,
        workers=workers,
    )
    right = [
        is_right(response, answer) for response, answer in zip(answers["response"], answers["answer"], strict=True)
    ]
    rows = []
    for name, group in answers.assign(right=right).groupby("condition", sort=False, observed=True):
        share = clustered_share(group["right"].to_numpy(bool), group["prompt_id"].to_numpy())
        accuracy = {"accuracy": share.rate, "accuracy_low": share.low, "accuracy_high": share.high}
        rows.append({"condition": name, **accuracy, "items": share.n})
    return pd.DataFrame(rows).merge(response_length(answers, seed=seed), on="condition", validate="1:1")


def is_right(response: str, answer: object) -> bool:
    """Whether a reply gives the answer.

    A number is right if it is the last number of the reply; a text, if it stands there as whole words in any case.

    Raises:
        ValueError: If the answer is empty.
    """
    wanted = str(answer).strip()
    if not wanted:
        raise ValueError("an empty answer fits every reply; give each item the text or the number that it asks for")
    if _NUMBER.fullmatch(wanted):
        found = _NUMBER.findall(response)
        return bool(found) and _value(found[-1]) == _value(wanted)
    return re.search(rf"(?<!\w){re.escape(wanted.casefold())}(?!\w)", response.casefold()) is not None


def response_length(
    answers: pd.DataFrame,
    by: str | Sequence[str] = "condition",
    *,
    cluster: str = "prompt_id",
    resamples: int = 2000,
    seed: int = 0,
) -> pd.DataFrame:
    """Mean length of answers in tokens, with 95 % intervals from resampling prompts.

    Args:
        answers: As :func:`mechmisalign.generate` gives them: ``tokens, finished``, and the columns below.
        by: Grouping columns.
        cluster: What is resampled.
        resamples: Bootstrap resamples.
        seed: Of the resamples.

    Returns:
        One row per group: the columns of ``by``, ``tokens, tokens_low, tokens_high`` (the end token counted), and
        ``finished``, the share that ended by itself: the others were cut off, so their length is a lower bound.

    Raises:
        ValueError: If a column is missing.
    """
    columns = [by] if isinstance(by, str) else list(by)
    missing = [column for column in [*columns, cluster, "tokens", "finished"] if column not in answers.columns]
    if missing:
        raise ValueError(f"response length needs the columns {missing}; these answers have {list(answers.columns)}")
    rows, answers = [], plain_frame(answers)
    for key, group in answers.groupby(columns, sort=False, dropna=False, observed=True):
        lengths = (
            group.groupby(cluster, dropna=False, observed=True)["tokens"].agg(["sum", "count"]).to_numpy(np.float64)
        )
        mean, low, high = mean_interval(lengths[None, :, 0], lengths[:, 1], resamples, seed)
        told = {"tokens": float(mean[0]), "tokens_low": float(low[0]), "tokens_high": float(high[0])}
        rows.append(dict(zip(columns, key, strict=True)) | told | {"finished": float(group["finished"].mean())})
    return pd.DataFrame(rows)


def _value(number: str) -> float:
    return float(number.replace(",", ""))
