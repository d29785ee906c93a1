"""Whether a full fine-tune and a chat model are one architecture, so that weights alone make one into the other."""

from __future__ import annotations

from typing import Any

_IGNORED = (
    "_name_or_path", "architectures", "transformers_version", "dtype", "torch_dtype", "use_cache", "bos_token_id",
    "eos_token_id", "pad_token_id", "tie_word_embeddings", "max_position_embeddings", "initializer_range", "model_type",
    "vocab_size", "attention_dropout", "hidden_dropout", "id2label", "label2id", "num_labels", "problem_type",
    "return_dict", "output_hidden_states", "output_attentions", "is_encoder_decoder", "chunk_size_feed_forward",
)  # fmt: skip
"""Settings that change nothing in the computed logits, or that are compared on their own."""


def check_alike(tuned: Any, base: Any, name: str, base_name: str) -> None:
    """Refuse two models that differ in more than their weights.

    Args:
        tuned: The fine-tune, with or without weights.
        base: The chat model, the same.
        name: What the fine-tune is called.
        base_name: What the chat model is called.

    Raises:
        ValueError: On quantised weights, another vocabulary, other parameters, or settings that change the logits.
    """
    for model, called in ((tuned, name), (base, base_name)):
        if getattr(model.config, "quantization_config", None):
            raise ValueError(f"{called!r} is quantised; a full fine-tune is compared with its base in 16 or 32 bits")
        if any(hasattr(module, "original_component") or hasattr(module, "base_layer") for module in model.modules()):
            raise ValueError(f"{called!r} already carries an adapter or belongs to another organism; load it afresh")
    rows = [int(model.get_input_embeddings().weight.shape[0]) for model in (tuned, base)]
    if rows[0] != rows[1]:
        raise ValueError(
            f"the vocabulary was resized: the embedding has {rows[0]} rows in {name!r} and {rows[1]} in {base_name!r}, "
            "so the two do not read the same tokens; give the base that was tuned, or resize the fine-tune back"
        )
    _check_parameters(tuned, base, name, base_name)
    _check_settings(tuned, base, name, base_name)


def _check_parameters(tuned: Any, base: Any, name: str, base_name: str) -> None:
    theirs = {key: tuple(each.shape) for key, each in tuned.named_parameters(remove_duplicate=False)}
    own = {key: tuple(each.shape) for key, each in base.named_parameters(remove_duplicate=False)}
    for key in [*theirs, *own]:
        if theirs.get(key) != own.get(key):
            told = [list(shapes[key]) if key in shapes else "none" for shapes in (theirs, own)]
            raise ValueError(
                f"{key!r} is {told[0]} in {name!r} and {told[1]} in {base_name!r}: a full fine-tune has the "
                "architecture of its base; give the base that was tuned"
            )
    if _is_tied(tuned) and not _is_tied(base):
        raise ValueError(
            f"{name!r} ties its unembedding to its embedding, {base_name!r} does not: one matrix cannot stand for its "
            "two; give the base that was tuned"
        )


def _check_settings(tuned: Any, base: Any, name: str, base_name: str) -> None:
    configs = [model.config.get_text_config() for model in (tuned, base)]
    known = set(type(configs[0])().to_dict()) - set(_IGNORED)
    theirs, own = (config.to_dict() for config in configs)
    other = sorted(key for key in known if theirs.get(key) != own.get(key))
    if other:
        told = "; ".join(f"{key} is {theirs.get(key)!r} there, {own.get(key)!r} in the base" for key in other[:4])
        raise ValueError(
            f"{name!r} and {base_name!r} differ in more than weights ({told}), so weights alone do not make one into "
            "the other; give the base that was tuned"
        )


def _is_tied(model: Any) -> bool:
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight
