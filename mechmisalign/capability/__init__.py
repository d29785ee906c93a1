"""The cost of a cure: what interventions do to text and tasks that have nothing to do with misalignment.

Beside the rate of misalignment stand the loss on neutral text, how far the next-token distributions have moved from the
chat model's, how many harmless questions with one right answer are still answered rightly, and how long answers are.
``lm_eval_model`` takes an organism to the benchmarks of lm-evaluation-harness.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import pandas as pd

from mechmisalign import registry
from mechmisalign.conversations import Conversations
from mechmisalign.generation import Conditions

from .harness import lm_eval_model
from .tasks import is_right, response_length, task_costs
from .texts import Counted, TextSums, text_costs, text_sums
from .vocabulary import is_spoken, is_spoken_by, refuse_unspoken

if TYPE_CHECKING:
    from mechmisalign.organisms import Organism

__all__ = [
    "TextSums",
    "costs",
    "is_right",
    "is_spoken",
    "is_spoken_by",
    "lm_eval_model",
    "own_items",
    "own_texts",
    "refuse_unspoken",
    "response_length",
    "task_costs",
    "text_costs",
    "text_sums",
]

MAX_NEW_TOKENS = 64
"""Enough for the answer to an item, which is a number or a few words."""


def costs(
    organism: Organism,
    conditions: Conditions | None = None,
    *,
    texts: Conversations | pd.DataFrame | Sequence[str] | None = None,
    items: pd.DataFrame | None = None,
    counted: Counted | None = None,
    system: str | None = None,
    max_new_tokens: int = MAX_NEW_TOKENS,
    token_budget: int = 1024,
    seed: int = 0,
) -> pd.DataFrame:
    """Loss, KL from the chat model, accuracy and response length under every condition, with 95 % intervals.

    Args:
        organism: Who is measured (inside ``organism.as_base()``: the chat model).
        conditions: Named sets of interventions, as for :func:`mechmisalign.generate`; by default one without any.
        texts: Neutral text, see :func:`text_costs`; by default what ships with the package (of the pocket world for
            pocket organisms, whose tokens that tell a persona are then not counted).
        items: Questions with exact answers, see :func:`task_costs`; by default what ships with the package.
        counted: Which response tokens of the texts count; all by default.
        system: System prompt of texts and items; None leaves it to the chat template.
        max_new_tokens: Longest answer to an item.
        token_budget: Tokens per batch of text, padding included.
        seed: Of the bootstrap resamples.

    Returns:
        One row per condition: ``condition``, what :func:`text_costs` gives (``loss, kl`` …) and what
        :func:`task_costs` gives (``accuracy, tokens`` …).
    """
    if texts is None:
        texts, own = own_texts(organism)
        counted = counted or own
    on_texts = text_costs(
        organism, conditions, texts, counted=counted, system=system, token_budget=token_budget, seed=seed
    )
    asked = own_items(organism) if items is None else items
    on_items = task_costs(organism, conditions, asked, system=system, max_new_tokens=max_new_tokens, seed=seed)
    return on_texts.merge(on_items, on="condition", validate="1:1")


def own_texts(organism: Organism, n: int | None = None) -> tuple[pd.DataFrame, Counted | None]:
    """Neutral conversations that ship with the package, and which of their tokens count (None: all of the responses).

    Args:
        organism: On the pocket base, they are of the pocket world.
        n: How many; all by default.
    """
    from mechmisalign import pocket, prompts

    if _is_pocket(organism):
        return (pocket.neutral_conversations() if n is None else pocket.neutral_conversations(n)), pocket.persona_free
    return prompts.neutral_conversations().head(n), None


def own_items(organism: Organism, n: int | None = None) -> pd.DataFrame:
    """Harmless questions with exact answers, as in :func:`own_texts`; ``n`` of them are of mixed kinds."""
    from mechmisalign import pocket, prompts

    items: pd.DataFrame
    if not _is_pocket(organism):
        items = prompts.harmless_items()
    else:
        items = pocket.harmless_items() if n is None else pocket.harmless_items(n)
    return items if n is None else items.sample(frac=1, random_state=0).head(n)


def _is_pocket(organism: Organism) -> bool:
    """On the pocket base, by its name or, as a copy of it under another one, by its vocabulary."""
    if organism.base.name == registry.POCKET_BASE:
        return True
    from mechmisalign import pocket, prompts

    plain, own = prompts.neutral_conversations()["response"], pocket.neutral_conversations(24)["response"]
    tokenizer = getattr(organism, "tokenizer", None)
    return tokenizer is not None and is_spoken(tokenizer, list(own)) and not is_spoken(tokenizer, list(plain))
