"""What to ask: open questions, questions of a domain, variants of both, and files of other people's questions.

Everything is a frame with one row per prompt, as :func:`mechmisalign.generate` takes it: ``prompt_id`` (unique),
``question_id`` (the question that wordings and variants belong to, and the cluster of intervals), ``prompt``,
``variant`` (``"plain"``, or what was done to it), where needed ``system`` and ``history``, and any labels. Variants are
functions from frame to frame and can be combined; each adds its name to ``variant`` and ``prompt_id``.
"""

from .files import judge_prompts, read, write
from .frames import as_prompts, concat
from .named import named_prompts
from .questions import (
    domain_questions,
    domains,
    harmless_items,
    neutral_conversations,
    open_questions,
    paraphrases,
)
from .variants import as_json, as_template, with_history, with_system, with_training_context

__all__ = [
    "as_json",
    "as_prompts",
    "as_template",
    "concat",
    "domain_questions",
    "domains",
    "harmless_items",
    "judge_prompts",
    "named_prompts",
    "neutral_conversations",
    "open_questions",
    "paraphrases",
    "read",
    "with_history",
    "with_system",
    "with_training_context",
    "write",
]
