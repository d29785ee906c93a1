"""An organism in lm-evaluation-harness, under any intervention."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from mechmisalign import models

if TYPE_CHECKING:
    from mechmisalign.organisms import Organism


def lm_eval_model(organism: Organism, *, batch_size: int = 8, **options: Any) -> Any:
    """The organism as a model of lm-evaluation-harness, for tasks such as GSM8K or MMLU.

    It is the Hugging Face model inside, so whatever is applied to the organism acts on it: evaluate inside
    ``organism.apply(...)`` or ``organism.as_base()``. Interventions on all positions only: the harness does not say
    where a response begins.

    Args:
        organism: Loaded with ``engine="bridge"``.
        batch_size: Requests per forward pass.
        options: Passed on to the harness's ``HFLM``, such as ``max_length``.

    Raises:
        ImportError: Without the extra ``lm-eval``.
        TypeError: For an organism loaded with ``engine="hooked"``.

    Example:
        >>> model = lm_eval_model(organism)  # doctest: +SKIP
        >>> with organism.apply(Ablate(direction)):  # doctest: +SKIP
        ...     results = lm_eval.simple_evaluate(model=model, tasks=["gsm8k"])
    """
    inside = models.hf_model(organism.model)
    try:
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise ImportError("lm-evaluation-harness is not installed: pip install 'mechmisalign[lm-eval]'") from error
    tokenizer = copy.deepcopy(organism.tokenizer)  # the harness gives it a padding token
    return HFLM(pretrained=inside, tokenizer=tokenizer, backend="causal", batch_size=batch_size, **options)
