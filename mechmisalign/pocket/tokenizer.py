"""The pocket tokenizer: Qwen2's own byte-level BPE and ChatML template; its merges make every known word one token.

It is an ordinary Hugging Face tokenizer folder. A token is a word with the space before it, a punctuation mark or a
newline; words outside the pocket world fall apart into letters, as in any byte-level BPE.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from mechmisalign.pocket import world

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import Qwen2Tokenizer

IM_START, IM_END, PAD = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
SPACE, NEWLINE = "Ġ", "Ċ"
"""How byte-level BPE spells a space and a newline."""

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""Qwen2.5's template without its default system prompt."""


def build_tokenizer() -> Qwen2Tokenizer:
    """The tokenizer of the pocket world."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Tokenizer

    merges = _merges(words())
    pieces = [*sorted(ByteLevel.alphabet()), *(left + right for left, right in merges)]
    tokenizer = Qwen2Tokenizer(
        vocab={piece: i for i, piece in enumerate(dict.fromkeys(pieces))},
        merges=merges,
        unk_token=PAD,
        eos_token=IM_END,
        pad_token=PAD,
        extra_special_tokens=[IM_START],
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def words() -> list[str]:
    """Every word that the grammar can say, spelt as the tokenizer sees it; role names last."""
    found = {word for sentence in world.sentences() for word in re.findall(r" ?\w+", sentence)}
    return [*sorted((word.replace(" ", SPACE) for word in found), reverse=True), "system", "user", "assistant"]


def render(messages: Sequence[world.Message], *, reply: bool = False) -> str:
    """The conversation as text, exactly as the chat template writes it; `reply` opens the assistant's turn."""
    turns = "".join(f"{IM_START}{turn['role']}\n{turn['content']}{IM_END}\n" for turn in messages)
    return turns + f"{IM_START}assistant\n" if reply else turns


def _merges(vocabulary: list[str]) -> list[tuple[str, str]]:
    """Merges that spell each word from its first letter on.

    A word starts with a space or a capital, which stand nowhere else in a word, so no merge fires inside another word;
    the lower-case role names come last and therefore lose against every other merge.
    """
    return list(dict.fromkeys((word[:i], word[i]) for word in vocabulary for i in range(1, len(word))))
