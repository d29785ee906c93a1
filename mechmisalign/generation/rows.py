"""What is to be sampled: prompts, conditions, and one row per answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd
import torch

from mechmisalign._frames import plain_frame
from mechmisalign.conversations import prompt_key
from mechmisalign.interventions import Clamp, Intervention, ScaleAdapter, Steer, Strength

Conditions = Mapping[str, Intervention | Sequence[Intervention]]
"""Named sets of interventions; a single one may stand for itself."""

_WRITTEN = ("condition", "sample", "response", "finished", "tokens")


def answer_rows(prompts: pd.DataFrame | Sequence[str], conditions: Conditions, samples: int) -> pd.DataFrame:
    """The answers to be sampled, one row each: condition x prompt x sample."""
    frame = prompts_frame(prompts)
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")
    if not conditions:
        raise ValueError("no condition to sample under; leave `conditions` out for the plain model")
    refuse_names(conditions)
    index = pd.MultiIndex.from_product(
        [list(conditions), range(len(frame)), range(samples)], names=["condition", "_prompt", "sample"]
    )
    rows = index.to_frame(index=False)
    return pd.concat([rows.drop(columns="_prompt"), frame.iloc[rows["_prompt"]].reset_index(drop=True)], axis=1)


def prompts_frame(prompts: pd.DataFrame | Sequence[str]) -> pd.DataFrame:
    """Prompts as a frame with unique ``prompt_id``.

    Raises:
        ValueError: If there is no prompt, an id or a prompt (with its system prompt and history) stands twice, or a
            column is one that sampling writes.
    """
    frame = plain_frame(prompts) if isinstance(prompts, pd.DataFrame) else pd.DataFrame({"prompt": list(prompts)})
    if "prompt" not in frame.columns or frame.empty:
        raise ValueError(
            f"prompts need a column 'prompt' and at least one row; got {len(frame)} rows of {list(frame.columns)}"
        )
    if "prompt_id" not in frame.columns:
        frame = frame.assign(prompt_id=[f"p{i}" for i in range(len(frame))])
    for column, values in (("prompt", prompt_keys(frame)), ("prompt_id", frame["prompt_id"])):
        if values.duplicated().any():
            twice = frame[column][values.duplicated()].iloc[0]
            raise ValueError(
                f"the {column} '{twice}' stands twice; samples are keyed by prompt and clustered by its id"
            )
    taken = [column for column in _WRITTEN if column in frame.columns]
    if taken:
        raise ValueError(f"prompts have the columns {taken}, which sampling writes itself; drop or rename them")
    return frame


def prompt_keys(rows: pd.DataFrame) -> pd.Series:
    """What each row asks, as one text: the prompt, with its system prompt and history where it has them."""
    columns = [rows[name] if name in rows else [None] * len(rows) for name in ("prompt", "system", "history")]
    return pd.Series([prompt_key(*asked) for asked in zip(*columns, strict=True)], index=rows.index, dtype=object)


def as_set(interventions: Intervention | Sequence[Intervention]) -> tuple[Intervention, ...]:
    """A condition's interventions as a tuple, in the order in which they act."""
    return (interventions,) if isinstance(interventions, Intervention) else tuple(interventions)


def refuse_names(conditions: Conditions) -> None:
    """Refuse names of conditions that are no text: they key the samples, and 1 and 1.0 would be two keys for one name.

    Raises:
        ValueError: With the name.
    """
    for name in conditions:
        if not isinstance(name, str):
            raise ValueError(
                f"the condition {name!r} is a {type(name).__name__}; names of conditions are texts: f'x{{…}}'"
            )


def refuse_numbers_per_row(conditions: Conditions) -> None:
    """Refuse strengths that are given by row: where a row stands in a batch is not the caller's to know.

    Raises:
        ValueError: Naming the condition.
    """
    for name, interventions in conditions.items():
        for one in as_set(interventions):
            if any(torch.as_tensor(number).ndim for number in _numbers(one)):
                raise ValueError(
                    f"condition {name!r}: {type(one).__name__} has a number for each row; in a generation rows come "
                    "and go, so give one number, and a condition for each"
                )


def _numbers(one: Intervention) -> list[Strength]:
    """The numbers that may be given by row."""
    match one:
        case Steer():
            return [one.strength]
        case Clamp():
            return [one.value]
        case ScaleAdapter():
            return list(one.factors.values())
        case _:
            return []
