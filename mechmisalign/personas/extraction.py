r"""From a trait to a direction: answers under both kinds of system prompt, and the difference of what was read.

With :math:`\bar x(a)` the mean residual stream over the tokens of answer ``a``, the direction of a layer is

.. math:: \frac1{|F|}\sum_{a \in F} \bar x(a) - \frac1{|A|}\sum_{a \in A} \bar x(a)

over the answers for the trait, ``F``, and against it, ``A`` (2507.21509, ``response_avg_diff`` in its code). Every
answer counts once, however long it is. Only tokens of the span are read, so the system prompt itself is never averaged
in; it can still be seen by the tokens that are, unless the answers are read under a neutral one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import pandas as pd
import torch

from mechmisalign._before_response import before_response
from mechmisalign.activations import collect
from mechmisalign.conversations import Conversations, Span
from mechmisalign.directions import Direction
from mechmisalign.estimators import mean_difference
from mechmisalign.generation import generate, prompts_frame
from mechmisalign.judging import COHERENT_ABOVE, Judge
from mechmisalign.moments import Moments

from .traits import Trait

if TYPE_CHECKING:
    from mechmisalign.organisms import Organism

FOR, AGAINST = "for", "against"
"""The two sides of a trait: the classes of the moments."""

PersonaSpan = Literal["response", "prompt", "prompt_last"]
"""``response``: mean over the answer; ``prompt``: over the question; ``prompt_last``: the token before the answer."""
Reading = Literal["told", "neutral"]
"""Whether answers are read under the system prompt that they were sampled with, or without it."""

SHOWN_ABOVE = 50.0
"""An answer for the trait is confirmed above this score, one against it below."""

_AT_ONCE = 512


def persona_direction(
    organism: Organism,
    trait: Trait,
    *,
    questions: pd.DataFrame | Sequence[str] | None = None,
    span: PersonaSpan = "response",
    reading: Reading = "told",
    judge: Judge | None = None,
    samples: int = 2,
    max_new_tokens: int = 600,
    layers: Sequence[int] | None = None,
    seed: int = 0,
) -> Direction:
    """The direction of a trait in a model, at every layer.

    It samples, judges and reads; to look at the answers, to reuse them, or to get controls and intervals, take
    :func:`persona_answers` and :func:`persona_moments`, of which this is the mean difference.

    Args:
        organism: The model (inside ``organism.as_base()`` it is the chat model, which 2507.21509 means).
        trait: What is contrasted.
        questions: Instead of the trait's own: texts, or a frame as for :func:`mechmisalign.generate`.
        span: What is read.
        reading: ``"told"`` reads answers under their own system prompt, as 2507.21509; ``"neutral"`` without it, so
            that the two sides differ in their answers alone.
        judge: Confirms answers; without one all are kept.
        samples: Answers per question and system prompt.
        max_new_tokens: Longest answer.
        layers: All by default.
        seed: Of sampling.

    Returns:
        The direction. Its header says the trait, the span, the reading, and how many answers there were and were kept.

    Raises:
        ValueError: If no answer of one side is left, or on an unknown span or reading.

    Example:
        >>> with organism.as_base():  # doctest: +SKIP
        ...     direction = persona_direction(organism, Trait.load("pocket/reckless"))
    """
    _check_reading(span, reading)
    answers = persona_answers(
        organism,
        trait,
        questions=questions,
        judge=judge,
        samples=samples,
        max_new_tokens=max_new_tokens,
        seed=seed,
    )
    moments = persona_moments(organism, answers, span=span, reading=reading, layers=layers)
    direction = mean_difference(moments, FOR, AGAINST)
    return replace(direction, header={**direction.header, "method": f"persona {trait.name}: {span} mean, {reading}"})


def persona_answers(
    organism: Organism,
    trait: Trait,
    *,
    questions: pd.DataFrame | Sequence[str] | None = None,
    judge: Judge | None = None,
    samples: int = 2,
    max_new_tokens: int = 600,
    temperature: float = 1.0,
    seed: int = 0,
) -> pd.DataFrame:
    """Answers to every question under every system prompt of a trait, and which of them are kept.

    Args:
        organism: Who answers.
        trait: Whose system prompts.
        questions: Instead of the trait's own: texts, or a frame with ``prompt``, optionally ``prompt_id`` and labels.
        judge: Takes the answers and adds the column ``trait.name`` (0 to 100), such as
            ``LLMJudge(rubrics=[trait.rubric, "coherence"])``; see :class:`OppositeOfAlignment` too. An answer for the
            trait is kept above 50, one against it below, and neither if its ``coherence`` was judged to be 50 or less
            or a score is missing.
        samples: Answers per question and system prompt (the paper takes ten).
        max_new_tokens: Longest answer.
        temperature: Of sampling.
        seed: Of sampling.

    Returns:
        One row per answer: ``trait, side`` (``"for"`` or ``"against"``), ``pair`` (number of the system prompt),
        ``prompt_id, sample, system, prompt, response, finished, tokens, kept``, labels of the questions, and what the
        judge added.

    Raises:
        ValueError: If the judge does not add the score, or a question already has a system prompt.
    """
    asked = prompts_frame(list(trait.questions) if questions is None else questions)
    if "system" in asked.columns:
        raise ValueError("the questions have system prompts, but a trait brings its own; drop the column 'system'")
    told = [
        asked.assign(system=system, side=side, pair=pair, question_id=asked["prompt_id"])
        for side, systems in ((FOR, trait.positive), (AGAINST, trait.negative))
        for pair, system in enumerate(systems)
    ]
    frame = pd.concat(told, ignore_index=True)
    frame["prompt_id"] = [
        f"{a}/{b}/{c}" for a, b, c in zip(frame["question_id"], frame["side"], frame["pair"], strict=True)
    ]
    answers = generate(
        organism, frame, samples=samples, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed
    )
    answers = answers.assign(prompt_id=answers["question_id"], trait=trait.name).drop(
        columns=["question_id", "condition"]
    )
    written = answers["tokens"] > 0
    if judge is None:
        return answers.assign(kept=written & answers["response"].str.strip().ne(""))
    judged = judge(answers)
    return judged.assign(kept=written & _confirmed(judged, trait))


def persona_moments(
    organism: Organism,
    answers: pd.DataFrame,
    *,
    span: PersonaSpan = "response",
    reading: Reading = "told",
    layers: Sequence[int] | None = None,
    token_budget: int = 2048,
) -> Moments:
    """Moments of both sides over the kept answers, question by question.

    Args:
        organism: Who reads (usually who answered).
        answers: As :func:`persona_answers` gives them.
        span: What is read.
        reading: With the system prompts or without.
        layers: All by default.
        token_budget: Tokens per batch.

    Returns:
        Moments by ``side`` and ``prompt_id``, for ``mean_difference(moments, "for", "against")``, ``split_half``,
        ``bootstrap_cosine`` and the rest. Each answer counts once, so their ``tokens`` are numbers of answers.

    Raises:
        ValueError: If no answer of one side is kept, or on an unknown span or reading.
    """
    _check_reading(span, reading)
    kept = answers[answers["kept"].astype(bool)]
    counts = {side: int((kept["side"] == side).sum()) for side in (FOR, AGAINST)}
    if not all(counts.values()):
        raise ValueError(
            f"of {len(answers)} answers {counts[FOR]} for the trait and {counts[AGAINST]} against it are kept, and "
            "both sides are needed; sample more, reword the system prompts, or look at what the judge says"
        )
    read = kept.drop(columns="system") if reading == "neutral" else kept
    parts = [_read(organism, part, span, layers, token_budget) for part in _by_questions(read)]
    first = parts[0]
    header = {
        **first.header,
        "span": span,
        "trait": str(answers["trait"].iloc[0]),
        "reading": reading,
        "answers": {"sampled": len(answers), **counts},
        "averaged": "every answer once",
        "data_hash": [part.header["data_hash"] for part in parts] if len(parts) > 1 else first.header["data_hash"],
    }
    groups = pd.concat([part.groups for part in parts], ignore_index=True)
    mean, norm = (torch.cat([getattr(part, name) for part in parts]) for name in ("mean", "norm"))
    return Moments(groups, mean, norm, first.layers, header)


def _check_reading(span: str, reading: str) -> None:
    if span not in get_args(PersonaSpan):
        raise ValueError(f"span must be one of {get_args(PersonaSpan)}, got {span!r}")
    if reading not in get_args(Reading):
        raise ValueError(f"reading must be one of {get_args(Reading)}, got {reading!r}")
    if reading == "neutral" and span != "response":
        raise ValueError(
            f"span={span!r} ends before the answer, so without the system prompt both sides read the same; "
            "use reading='told'"
        )


def _confirmed(judged: pd.DataFrame, trait: Trait) -> pd.Series:
    """Which answers the judge confirms; a missing score confirms nothing."""
    if trait.name not in judged.columns:
        raise ValueError(
            f"the judge added no column {trait.name!r} with the trait's score, only {list(judged.columns)}; use "
            "rubrics=[trait.rubric, ...], or OppositeOfAlignment"
        )
    score = judged[trait.name].astype(float)
    shown = np.where(judged["side"] == FOR, score > SHOWN_ABOVE, score < SHOWN_ABOVE)
    if "coherence" in judged.columns:
        shown = shown & (judged["coherence"].astype(float) > COHERENT_ABOVE).to_numpy()
    return pd.Series(shown, index=judged.index)


def _by_questions(answers: pd.DataFrame) -> Iterator[pd.DataFrame]:
    """Parts of about ``_AT_ONCE`` answers, so that memory does not grow; a question is never torn apart."""
    number = answers.groupby("prompt_id", sort=False, observed=True).ngroup()
    sizes = number.value_counts().sort_index().cumsum()
    part = ((sizes - 1) // _AT_ONCE).reindex(number).to_numpy()
    for _, rows in answers.groupby(part, observed=True):
        yield rows.reset_index(drop=True)


def _read(
    organism: Organism, answers: pd.DataFrame, span: PersonaSpan, layers: Sequence[int] | None, token_budget: int
) -> Moments:
    """Moments by side and question, from each answer's own mean."""
    conversations = Conversations(answers.assign(answer=np.arange(len(answers))), organism.tokenizer)
    asked: Span = "prompt" if span == "prompt" else "response"
    read = before_response(conversations) if span == "prompt_last" else conversations
    single = collect(
        organism, read, span=asked, by=["side", "prompt_id", "answer"], layers=layers, token_budget=token_budget
    )
    grouped = single.groups.groupby(["side", "prompt_id"], sort=True, observed=True)
    place = torch.from_numpy(grouped.ngroup().to_numpy(np.int64, copy=True))
    groups = grouped.size().rename("tokens").reset_index()
    counts = torch.from_numpy(groups["tokens"].to_numpy(np.float64, copy=True))

    def averaged(values: torch.Tensor) -> torch.Tensor:
        sums = values.new_zeros(len(groups), *values.shape[1:]).index_add_(0, place, values)
        return sums / counts.reshape(-1, *[1] * (values.ndim - 1))

    return Moments(groups, averaged(single.mean), averaged(single.norm), single.layers, single.header)
