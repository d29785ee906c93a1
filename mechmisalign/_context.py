"""How many positions a model was made for: beyond them it computes numbers that mean nothing, and says nothing."""

from __future__ import annotations

from typing import Any


def context_length(config: Any) -> int | None:
    """Positions that a Hugging Face (or TransformerLens) config names; None where it names none."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    names = ("max_position_embeddings", "n_ctx")
    found = next((value for name in names if isinstance(value := getattr(text, name, None), int)), None)
    return found if found is None or found > 0 else None


def refuse_beyond(tokens: int, limit: int | None, what: str) -> None:
    """Refuse what does not fit into the model's context.

    Args:
        tokens: How long it is.
        limit: Positions of the model; None for no limit.
        what: What it is called, in the singular.

    Raises:
        ValueError: With both numbers.
    """
    if limit is not None and tokens > limit:
        raise ValueError(
            f"{what} has {tokens:,} tokens, and the model's context is {limit:,}: beyond it nothing that the model "
            "computes can be relied on; shorten it, or leave it out"
        )
