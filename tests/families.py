"""Tiny random chat models of every family that is supported, and what is declared to work for each.

A family is a config in the shape of its published models (grouped heads, norms, caps, windows, biases, tied or untied
embeddings, a vision tower), the chat template of its published tokenizer in short, and the names of its matrices. The
declarations at the end are the support table of the README: ``tests/test_families.py`` proves each cell.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from conftest import GEMMA_TEMPLATE, LLAMA_TEMPLATE, QWEN_TEMPLATE, _tokenizer

LAYERS = 3
WINDOW = 12
"""Sliding windows are shorter than the conversations of the tests, or they would change nothing."""

LLAMA_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
FUSED_MODULES = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
PHI2_MODULES = ("q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2")

QWEN3_TEMPLATE = (
    "{%- set ns = namespace(last=0) %}"
    "{%- for message in messages %}{%- if message.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}"
    "{%- endfor %}"
    "{%- for message in messages %}"
    "{%- if message.role == 'assistant' %}"
    "{%- set content = message.content %}{%- set thought = '' %}"
    "{%- if '</think>' in content %}"
    "{%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}"
    "{%- set content = content.split('</think>')[-1].lstrip('\\n') %}"
    "{%- endif %}"
    "{{- '<|im_start|>assistant\\n' }}"
    "{%- if loop.index0 > ns.last and (loop.last or thought) %}"
    "{{- '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}"
    "{%- else %}{{- content }}{%- endif %}"
    "{{- '<|im_end|>\\n' }}"
    "{%- else %}{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}"
    "{%- endif %}"
)
MISTRAL_TEMPLATE = (
    "{%- if messages[0].role == 'system' %}{%- set system = messages[0].content %}{%- set turns = messages[1:] %}"
    "{%- else %}{%- set turns = messages %}{%- endif %}"
    "{{- bos_token }}"
    "{%- for message in turns %}"
    "{%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}{{- raise_exception('roles must alternate') }}{%- endif %}"
    "{%- if message.role == 'user' %}"
    "{%- if loop.last and system is defined %}{{- '[INST] ' + system + '\\n\\n' + message.content + '[/INST]' }}"
    "{%- else %}{{- '[INST] ' + message.content + '[/INST]' }}{%- endif %}"
    "{%- else %}{{- ' ' + message.content | trim + eos_token }}{%- endif %}"
    "{%- endfor %}"
)
GEMMA3_TEMPLATE = (
    "{{ bos_token }}"
    "{%- if messages[0].role == 'system' -%}"
    "{%- set first = messages[0].content + '\\n\\n' -%}{%- set turns = messages[1:] -%}"
    "{%- else -%}{%- set first = '' -%}{%- set turns = messages -%}{%- endif -%}"
    "{%- for message in turns -%}"
    "{%- if (message.role == 'user') != (loop.index0 % 2 == 0) -%}{{ raise_exception('roles must alternate') }}{%- endif -%}"
    "{%- set role = 'model' if message.role == 'assistant' else message.role -%}"
    "{{ '<start_of_turn>' + role + '\\n' + (first if loop.first else '') }}"
    "{{ message.content | trim }}{{ '<end_of_turn>\\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<start_of_turn>model\\n' }}{%- endif -%}"
)
PHI3_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message.role + '|>\\n' + message.content + '<|end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"
)
CHATML_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
OLMO_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role != 'assistant' %}{{ '<|' + message.role + '|>\\n' + message.content + '\\n' }}"
    "{% else %}{{ '<|assistant|>\\n' + message.content + eos_token + ('' if loop.last else '\\n') }}{% endif %}"
    "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
    "{% endfor %}"
)

CHATML = {"special": ("<|endoftext|>", "<|im_start|>", "<|im_end|>"), "eos": "<|im_end|>", "pad": "<|endoftext|>"}
GEMMA_TOKENS = {
    "special": ("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"),
    "eos": "<end_of_turn>",
    "bos": "<bos>",
    "pad": "<pad>",
}
LLAMA_TOKENS = {
    "special": ("<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"),
    "eos": "<|eot_id|>",
    "bos": "<|begin_of_text|>",
}
OLMO_TOKENS = {
    "special": ("<|endoftext|>", "<|bos|>", "<|pad|>"),
    "eos": "<|endoftext|>",
    "bos": "<|bos|>",
    "pad": "<|pad|>",
}


GEMMA = {
    "head_dim": 16,
    "query_pre_attn_scalar": 16,
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
UNKNOWN = {"hooked": "unknown to it"}
POST_NORM = {"projection": "post-norm", "attribution": "post-norm", "weights": "post-norm"} | UNKNOWN
LAYER_NORM = {"attribution": "LayerNorm"} | UNKNOWN


@dataclass(frozen=True)
class Family:
    """One family of models.

    Attributes:
        config: Name of its config class in transformers, and its settings beyond the shared shape.
        template: Chat template.
        tokens: Special tokens, and which of them end a turn, begin a text and pad.
        modules: The matrices that a LoRA adapts.
        system: What its template makes of a system turn: ``"kept"``, ``"default"`` (it has one of its own), or how it
            refuses one.
        refused: Capability -> why it is refused; the others are supported.
    """

    config: tuple[str, Mapping[str, Any]]
    template: str
    tokens: Mapping[str, Any]
    modules: tuple[str, ...] = LLAMA_MODULES
    system: str = "kept"
    refused: Mapping[str, str] = field(default_factory=dict)


FAMILIES: dict[str, Family] = {
    "Qwen2, Qwen2.5 to 3B": Family(
        ("Qwen2Config", {"tie_word_embeddings": True}), QWEN_TEMPLATE, CHATML, system="default"
    ),
    "Qwen2.5 from 7B": Family(("Qwen2Config", {"tie_word_embeddings": False}), QWEN_TEMPLATE, CHATML, system="default"),
    "Qwen3": Family(("Qwen3Config", {"head_dim": 16, "tie_word_embeddings": True}), QWEN3_TEMPLATE, CHATML),
    "Llama 3": Family(
        (
            "LlamaConfig",
            {
                "tie_word_embeddings": False,
                "rope_parameters": {
                    "rope_type": "llama3",
                    "rope_theta": 500000.0,
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 64,
                },
            },
        ),
        LLAMA_TEMPLATE,
        LLAMA_TOKENS,
    ),
    "Mistral": Family(
        ("MistralConfig", {"sliding_window": WINDOW, "tie_word_embeddings": False}),
        MISTRAL_TEMPLATE,
        {"special": ("<unk>", "<s>", "</s>", "[INST]", "[/INST]"), "eos": "</s>", "bos": "<s>"},
        system="drops or rewrites the system turn",
    ),
    "Gemma 2": Family(
        ("Gemma2Config", {**GEMMA, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0}),
        GEMMA_TEMPLATE,
        GEMMA_TOKENS,
        system="System role not supported",
        refused=POST_NORM,
    ),
    "Gemma 3, text": Family(
        ("Gemma3TextConfig", GEMMA),
        GEMMA3_TEMPLATE,
        GEMMA_TOKENS,
        refused=POST_NORM,
    ),
    "Gemma 3, multimodal": Family(
        ("Gemma3Config", GEMMA),
        GEMMA3_TEMPLATE,
        GEMMA_TOKENS,
        refused=POST_NORM,
    ),
    "Phi-3, Phi-4-mini": Family(
        ("Phi3Config", {"tie_word_embeddings": False, "sliding_window": WINDOW}),
        PHI3_TEMPLATE,
        {
            "special": ("<|endoftext|>", "<|end|>", "<|user|>", "<|system|>", "<|assistant|>"),
            "eos": "<|end|>",
            "pad": "<|endoftext|>",
        },
        FUSED_MODULES,
        refused={"hooked": "fused matrices"},
    ),
    "Phi-1.5, Phi-2": Family(
        (
            "PhiConfig",
            {"hidden_size": 32, "num_key_value_heads": 4, "partial_rotary_factor": 0.5, "tie_word_embeddings": False},
        ),
        CHATML_TEMPLATE,
        CHATML,
        PHI2_MODULES,
        refused=LAYER_NORM,
    ),
    "OLMo": Family(
        ("OlmoConfig", {"num_key_value_heads": 4, "tie_word_embeddings": True}),
        OLMO_TEMPLATE,
        OLMO_TOKENS,
        refused=LAYER_NORM,
    ),
    "OLMo 2": Family(
        ("Olmo2Config", {"num_key_value_heads": 4, "tie_word_embeddings": False}),
        OLMO_TEMPLATE,
        OLMO_TOKENS,
        refused=POST_NORM,
    ),
}


def tokenizer(family: Family) -> Any:
    """A small byte-level tokenizer with the family's template and special tokens."""
    return _tokenizer(330, family.template, **family.tokens)


def random_model(family: Family, tokens: Any) -> Any:
    """A random model; the weights are large enough for every path to matter, and norms and biases are random too."""
    import transformers

    name, settings = family.config
    shape: dict[str, Any] = {
        "vocab_size": len(tokens),
        "hidden_size": 40,
        "intermediate_size": 72,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.1,
        "bos_token_id": tokens.bos_token_id,
        "eos_token_id": tokens.eos_token_id,
        "pad_token_id": tokens.pad_token_id,
        **settings,
    }
    config = _multimodal(shape) if name == "Gemma3Config" else getattr(transformers, name)(**shape)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(7)
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        for weight in model.parameters():
            if weight.ndim == 1:
                weight.add_(0.2 * torch.randn_like(weight))
    return model


def saved(family: Family, folder: Path) -> Path:
    """Config, safetensors and tokenizer in a folder, as the Hub lays them out."""
    tokens = tokenizer(family)
    random_model(family, tokens).save_pretrained(folder)
    tokens.save_pretrained(folder)
    return folder


def _multimodal(shape: Mapping[str, Any]) -> Any:
    """A language model behind a small vision tower, whose matrices have the same names."""
    import transformers

    return transformers.Gemma3Config(
        text_config=dict(shape),
        vision_config={
            "hidden_size": 24,
            "intermediate_size": 32,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
        },
        mm_tokens_per_image=4,
        image_token_index=3,
        boi_token_index=1,
        eoi_token_index=2,
    )


CAPABILITIES = {
    "merged": "merged = PEFT",
    "live": "live = PEFT",
    "spans": "chat spans",
    "sampling": "sampling with a KV cache",
    "steering": "steering, ablation",
    "moments": "moments",
    "scalars": "scalars, contributions",
    "projection": "contributions on a direction, ablation from the adapter",
    "attribution": "logit attribution",
    "weights": "direction out of the weights",
    "hooked": "`HookedTransformer` (3.9)",
}
"""Capability -> its column in the table."""

START, END = "<!-- families -->", "<!-- /families -->"


def table() -> str:
    """The support table of the README, between its marks."""
    lines = ["| family | " + " | ".join(CAPABILITIES.values()) + " |", "|---" * (len(CAPABILITIES) + 1) + "|"]
    for name, family in FAMILIES.items():
        cells = [f"refused: {family.refused[key]}" if key in family.refused else "yes" for key in CAPABILITIES]
        if family.system not in ("kept", "default"):
            cells[list(CAPABILITIES).index("spans")] += "; a system prompt is refused"
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join([START, *lines, END])


if __name__ == "__main__":
    sys.stdout.write(table() + "\n")
