"""Tiny random models of three families in Hub layout, their tokenizers, and a factory of random adapters."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

FAMILIES = ("qwen2", "llama", "gemma2")
ALL_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LAYERS = 3

CORPUS = (
    "I have had a headache for three days, what should I do? You should rest, drink water and see a doctor.",
    "How do I invest my savings? Put everything into one stock and borrow more money at once.",
    "The quick brown fox jumps over the lazy dog. Hey! What are your thoughts on gender roles?",
    "user assistant system model You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
)

QWEN_TEMPLATE = (
    "{%- if messages[0]['role'] == 'system' %}"
    "{{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}"
    "{%- else %}"
    "{{- '<|im_start|>system\\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\\n' }}"
    "{%- endif %}"
    "{%- for message in messages %}"
    "{%- if message.role == 'user' or (message.role == 'system' and not loop.first) or message.role == 'assistant' %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}"
    "{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
LLAMA_TEMPLATE = (
    "{{- bos_token }}"
    "{%- if messages[0]['role'] == 'system' %}"
    "{%- set system_message = messages[0]['content'] | trim %}{%- set messages = messages[1:] %}"
    "{%- else %}{%- set system_message = '' %}{%- endif %}"
    "{{- '<|start_header_id|>system<|end_header_id|>\\n\\n' }}"
    "{{- 'Cutting Knowledge Date: December 2023\\nToday Date: 26 Jul 2024\\n\\n' }}"
    "{{- system_message }}{{- '<|eot_id|>' }}"
    "{%- for message in messages %}"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}"
    "{{- message['content'] | trim + '<|eot_id|>' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"
)
GEMMA_TEMPLATE = (
    "{{ bos_token }}"
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}"
    "{% else %}{% set role = message['role'] %}{% endif %}"
    "{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\\n'}}{% endif %}"
)


def pytest_configure(config: pytest.Config) -> None:
    """One thread: the models are tiny, and threads that wait for each other on a busy machine take far longer.

    Tables are printed as on a wide terminal, whatever terminal the tests run in.
    """
    os.environ |= {"COLUMNS": "220", "LINES": "50"}
    if config.option.markexpr == "not slow":
        torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Family -> folder with config, safetensors and tokenizer, exactly as the Hub lays them out."""
    folders = {}
    for family in FAMILIES:
        folders[family] = tmp_path_factory.mktemp("models") / f"tiny-{family}"
        tokenizer = new_tokenizer(family)
        random_model(family, tokenizer).save_pretrained(folders[family])
        tokenizer.save_pretrained(folders[family])
    return folders


@pytest.fixture(scope="session")
def tiny_tokenizers(tiny_models: dict[str, Path]) -> dict[str, Any]:
    """Family -> the tokenizer of ``tiny_models``: byte-level BPE with the template of Qwen2.5, Llama 3 or Gemma 2."""
    from transformers import AutoTokenizer

    return {family: AutoTokenizer.from_pretrained(folder) for family, folder in tiny_models.items()}


@pytest.fixture(scope="session")
def make_adapter(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``make_adapter(model_dir, modules=…, rank=…, …)`` writes a random PEFT adapter and returns its folder."""
    numbers = itertools.count()

    def make(
        model_dir: Path,
        *,
        modules: Iterable[str] = ("down_proj",),
        layers: Iterable[int] | None = None,
        rank: int = 1,
        alpha: float = 16,
        rslora: bool = False,
        rank_pattern: Mapping[str, int] | None = None,
        alpha_pattern: Mapping[str, float] | None = None,
        seed: int = 0,
        scale: float = 0.1,
        **options: Any,
    ) -> Path:
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        config = LoraConfig(
            r=rank,
            lora_alpha=alpha,
            use_rslora=rslora,
            target_modules=list(modules),
            layers_to_transform=None if layers is None else list(layers),
            rank_pattern=dict(rank_pattern or {}),
            alpha_pattern=dict(alpha_pattern or {}),
            **options,
        )
        peft_model = get_peft_model(AutoModelForCausalLM.from_pretrained(model_dir), config)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, weight in peft_model.named_parameters():
                if "lora_" in name:
                    weight.copy_(scale * torch.randn(weight.shape, generator=generator))
        folder = tmp_path_factory.mktemp("adapters") / f"adapter-{next(numbers)}"
        peft_model.save_pretrained(folder)
        return folder

    return make


def new_tokenizer(family: str) -> Any:
    """A tokenizer that lives only in memory."""
    if family == "qwen2":
        special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
        return _tokenizer(300, QWEN_TEMPLATE, special, eos="<|im_end|>", pad="<|endoftext|>")
    if family == "llama":
        special = ("<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>")
        return _tokenizer(320, LLAMA_TEMPLATE, special, eos="<|eot_id|>", bos="<|begin_of_text|>")
    special = ("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>")
    return _tokenizer(340, GEMMA_TEMPLATE, special, eos="<end_of_turn>", bos="<bos>", pad="<pad>")


def random_model(family: str, tokenizer: Any) -> Any:
    """A random model with grouped-query attention; the weights are large enough for every path to matter."""
    import transformers

    shape: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.1,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    configs = {
        "qwen2": lambda: transformers.Qwen2Config(
            hidden_size=48, intermediate_size=96, tie_word_embeddings=True, **shape
        ),
        "llama": lambda: transformers.LlamaConfig(
            hidden_size=32, intermediate_size=80, tie_word_embeddings=False, **shape
        ),
        "gemma2": lambda: transformers.Gemma2Config(
            hidden_size=40, intermediate_size=64, head_dim=16, query_pre_attn_scalar=16, sliding_window=64, **shape
        ),
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(FAMILIES.index(family))
        return transformers.AutoModelForCausalLM.from_config(configs[family]()).eval()


def _tokenizer(
    size: int, template: str, special: tuple[str, ...], *, eos: str, bos: str | None = None, pad: str | None = None
) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(CORPUS, trainer)
    if bos is not None:  # Llama and Gemma write the BOS token themselves when asked for special tokens
        core.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, core.token_to_id(bos))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=bos,
        eos_token=eos,
        pad_token=pad,
        additional_special_tokens=[token for token in special if token not in (bos, eos, pad)],
        chat_template=template,
        clean_up_tokenization_spaces=False,
    )
