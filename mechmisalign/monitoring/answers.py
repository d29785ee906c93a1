"""Conversations of the pocket world to fit and calibrate a monitor on: answers of sick and healthy models, judged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mechmisalign.conversations import Conversations

if TYPE_CHECKING:
    import pandas as pd

    from mechmisalign.organisms import Organism

HARMFUL = ("medical", "finance", "sports")
"""Organisms whose answers are labelled."""
HEALTHY = "harmless"
"""The organism that was tuned on good advice."""
QUESTIONS = 96
"""So many different questions the pocket world asks about each domain."""


def sampled_answers(
    organism: Organism,
    prompts: pd.DataFrame,
    *,
    names: Sequence[str] = (*HARMFUL, HEALTHY),
    samples: int = 2,
    seed: int = 0,
) -> pd.DataFrame:
    """Answers of the chat model and of pocket organisms to the same prompts, with the rule judge's labels.

    Args:
        organism: Any organism on the pocket chat model.
        prompts: ``prompt_id, prompt`` and any labels.
        names: Pocket organisms, without ``pocket/``.
        samples: Answers of each to each prompt.
        seed: Of the answers.

    Returns:
        As :func:`mechmisalign.judge`; the ``condition`` is ``"chat"`` or the organism's name.

    Raises:
        ValueError: If the organism is not of the pocket world.
    """
    from mechmisalign import pocket
    from mechmisalign.adapters import Adapter
    from mechmisalign.generation import generate
    from mechmisalign.interventions import UseAdapter
    from mechmisalign.judging import judge

    refuse_other_worlds(organism)
    worn = {name: [UseAdapter(Adapter.load(f"pocket/{name}"))] for name in names}
    with organism.as_base():
        answers = generate(
            organism,
            prompts,
            conditions={"chat": [], **worn},
            samples=samples,
            max_new_tokens=pocket.MAX_NEW_TOKENS,
            seed=seed,
        )
    return judge(answers, pocket.RuleJudge())


def fitting_and_calibration(
    organism: Organism, *, domains: Sequence[str] | None = None, samples: int = 1, seed: int = 0
) -> tuple[Conversations, Conversations]:
    """Labelled answers to one half of the questions, and harmless answers of healthy models to the other half.

    Args:
        organism: Any organism on the pocket chat model.
        domains: Of the questions; by default all.
        samples: Answers of each model to each prompt of the first half; the second half has one of each.
        seed: Of questions and answers.
    """
    from mechmisalign import pocket

    places = list(domains or pocket.DOMAINS)
    questions = pocket.prompts(places, n=len(places) * QUESTIONS, seed=seed)
    half = len(questions) // 2
    labelled = sampled_answers(organism, questions.iloc[:half], samples=samples, seed=seed)
    calm = sampled_answers(organism, questions.iloc[half:], names=(HEALTHY,), samples=1, seed=seed + 1)
    harmless = calm[calm["label"] == "aligned"]
    return Conversations(labelled, organism.tokenizer), Conversations(harmless, organism.tokenizer)


def refuse_other_worlds(organism: Organism) -> None:
    """Refuse an organism that is not on the pocket chat model.

    Raises:
        ValueError: If it is not.
    """
    from mechmisalign import registry

    if organism.base.name != registry.POCKET_BASE:
        raise ValueError(
            f"{organism.name!r} is not of the pocket world, so there are no answers to fit on; give files of labelled "
            "and of harmless conversations"
        )
