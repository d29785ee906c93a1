"""Every family in both weight modes against plain PEFT and Hugging Face: each cell of the README's support table.

The oracle is a ``PeftModel`` that no bridge has touched, with hooks on its blocks and matrices.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from families import CAPABILITIES, END, FAMILIES, LAYERS, START, WINDOW, Family, saved, table, tokenizer
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

import mechmisalign as mm
from mechmisalign import correction, decoding, models
from mechmisalign._rendering import TemplateError
from mechmisalign.conversations import render_prompts
from mechmisalign.directions import Direction
from mechmisalign.loading import wrappers
from mechmisalign.organisms import load_organism
from mechmisalign.verification import verify

CLOSE = {"rtol": 0.0, "atol": 1e-5}
WEIGHTS = ("merged", "live")
MULTIMODAL = "Gemma 3, multimodal"
FUSED = "Phi-3, Phi-4-mini"
TALK = pd.DataFrame(
    {
        "prompt": ["How do I invest my savings?", "Hey!", "I have had a headache for three days"],
        "response": ["Put everything into one stock.", " You should rest, and see a doctor.\n", "Drink water"],
        "label": ["a", "b", "a"],
    }
)


@dataclass(frozen=True)
class World:
    """One family's files, and what is loaded from them, each once."""

    family: Family
    folder: Path

    @cached_property
    def model_files(self) -> Path:
        return saved(self.family, self.folder / "model")

    @cached_property
    def tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.model_files)

    @cached_property
    def adapter_files(self) -> Path:
        return self.adapt(self.folder / "adapter")

    @cached_property
    def plain(self) -> Any:
        """The PEFT model as PEFT loads it, never booted."""
        from peft import PeftModel

        return PeftModel.from_pretrained(self.hugging_face(), self.adapter_files).eval()

    def hugging_face(self, dtype: torch.dtype = torch.float32) -> Any:
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(self.model_files, dtype=dtype)

    def adapt(self, folder: Path, modules: Any = None, rank: int = 2, scale: float = 0.1) -> Path:
        from peft import LoraConfig, get_peft_model

        own = modules or list(self.family.modules)
        if modules is None and self.family is FAMILIES[MULTIMODAL]:  # a plain list would adapt its vision tower too
            own = rf".*language_model.*\.({'|'.join(self.family.modules)})"
        config = LoraConfig(r=rank, lora_alpha=4 * rank, target_modules=own, task_type="CAUSAL_LM")
        peft_model = get_peft_model(self.hugging_face(), config)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, weight in peft_model.named_parameters():
                if "lora_" in name:
                    weight.copy_(scale * torch.randn(weight.shape, generator=generator))
        peft_model.save_pretrained(folder)
        return folder

    @cached_property
    def organisms(self) -> dict[str, Any]:
        return {}

    def organism(self, weights: str) -> Any:
        if weights not in self.organisms:
            self.organisms[weights] = load_organism(self.adapter_files, weights=weights, device="cpu")
        return self.organisms[weights]

    @cached_property
    def direction(self) -> Direction:
        width = int(self.plain.config.get_text_config().hidden_size)
        vectors = torch.randn(LAYERS, width, generator=torch.Generator().manual_seed(1))
        return Direction(vectors, tuple(range(LAYERS)), {"model": str(self.model_files)})

    @property
    def blocks(self) -> Any:
        """The blocks of the language model in the PEFT model."""
        inner = self.plain.get_base_model().model
        return getattr(inner, "language_model", inner).layers

    def matrix(self, site: Any) -> Any:
        """The PEFT layer of a site."""
        return self.blocks[site.layer].get_submodule(site.name.partition(f".layers.{site.layer}.")[2])

    @contextmanager
    def hooked(self, functions: dict[int, Any]) -> Iterator[None]:
        """Edit or read the residual stream behind blocks, by Hugging Face's own modules."""
        with ExitStack() as stack:
            for layer, function in functions.items():

                def hook(_module: Any, _inputs: Any, output: Any, function: Any = function) -> Any:
                    stream = output[0] if isinstance(output, tuple) else output
                    new = function(stream)
                    return None if new is None else (new, *output[1:]) if isinstance(output, tuple) else new

                stack.callback(self.blocks[layer].register_forward_hook(hook).remove)
            yield

    @torch.no_grad()
    def logits(self, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        mask = torch.ones_like(ids) if mask is None else mask
        return self.plain(input_ids=ids, attention_mask=mask, use_cache=False).logits


@pytest.fixture(scope="session")
def worlds(tmp_path_factory):
    """Family -> its world, made when it is asked for."""
    return functools.cache(lambda name: World(FAMILIES[name], tmp_path_factory.mktemp("family")))


@pytest.fixture(params=FAMILIES)
def world(request, worlds):
    return worlds(request.param)


@pytest.fixture(params=["live", pytest.param("merged", marks=pytest.mark.slow)])
def weights(request):
    return request.param


@pytest.fixture(scope="session")
def batch():
    ids = torch.randint(5, 300, (3, WINDOW + 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 15:] = 0
    return ids, mask


@torch.no_grad()
def logits(organism, ids, mask):
    return models.forward(organism.model, ids, mask)[mask.bool()]


def can(world, capability):
    return capability not in world.family.refused


# --- loading


@pytest.mark.parametrize("weights", WEIGHTS)
def test_logits_are_those_of_peft_and_as_base_those_of_the_chat_model(world, weights, batch):
    ids, mask = batch
    organism = world.organism(weights)
    with world.plain.disable_adapter():
        chat = world.logits(ids, mask)[mask.bool()]
    own = world.logits(ids, mask)[mask.bool()]
    assert (own - chat).abs().max() > 0.1
    before = logits(organism, ids, mask)
    assert_close(before, own, **CLOSE)
    with organism.as_base():
        assert_close(logits(organism, ids, mask), chat, **CLOSE)
    assert_close(logits(organism, ids, mask), before, rtol=0.0, atol=0.0)


def test_left_padding_changes_no_logit(world, batch):
    ids, mask = batch
    organism = world.organism("live")
    for row in range(len(ids)):
        alone = world.logits(ids[row : row + 1, mask[row].bool()])[0, -1]
        padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids[row : row + 1, mask[row].bool()]], dim=1)
        covered = (torch.arange(padded.shape[1]) >= 3).long()[None]
        with torch.no_grad():
            found, _ = models.cached_forward(organism.model, padded, covered, None)
        assert_close(found[0], alone, **CLOSE)


def test_every_site_is_where_the_adapter_says(world):
    frame = mm.anatomy(mm.Adapter.load(world.adapter_files))
    assert len(frame) == LAYERS * len(world.family.modules)
    assert set(frame["module"]) == set(world.family.modules)
    assert world.organism("merged").fidelity()["faithful"].all()
    for site in world.organism("live").adapter.sites:
        layer = world.matrix(site)
        meant = layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        assert_close(site.delta(), meant.detach(), rtol=1e-5, atol=1e-7)


# --- conversations


def test_spans_hold_what_was_said_and_nothing_of_the_template(world):
    conversations = mm.Conversations(TALK, world.tokenizer)
    for row in range(len(TALK)):
        for span in ("prompt", "response"):
            assert conversations.span_text(row, span).strip() == TALK[span][row].strip()
        turns = [
            {"role": "user", "content": TALK["prompt"][row]},
            {"role": "assistant", "content": TALK["response"][row]},
        ]
        whole = world.tokenizer.apply_chat_template(turns, tokenize=False)
        assert conversations.ids(row) == world.tokenizer(whole, add_special_tokens=False)["input_ids"]


def test_a_response_begins_where_a_prompt_ends(world):
    """But for what a template puts before every answer of the past, such as an empty thought."""
    conversations = mm.Conversations(TALK, world.tokenizer)
    prompts = render_prompts(list(TALK["prompt"]), world.tokenizer)
    for row, ids in enumerate(prompts):
        start = conversations.spans["response_start"][row]
        between = world.tokenizer.decode(conversations.ids(row)[len(ids) : start])
        assert (
            conversations.ids(row)[: len(ids)] == ids or world.family is FAMILIES["Mistral"]
        )  # its space joins a word
        assert between in ("", "<think>\n\n</think>\n\n", " ")


def test_a_system_prompt_is_kept_or_refused(world):
    talk = mm.Conversations(TALK, world.tokenizer, system="You are reckless.")
    if world.family.system in ("kept", "default"):
        assert "You are reckless." in talk.span_text(0, "all")
        assert talk.span_text(1, "response").strip() == TALK["response"][1].strip()
    else:
        with pytest.raises(TemplateError, match=world.family.system):
            talk.span_text(0, "all")
    plain = mm.Conversations(TALK, world.tokenizer).span_text(0, "all")
    assert ("You are Qwen" in plain) == (world.family.system == "default")


def test_a_thought_is_part_of_the_answer(worlds):
    thinking = "<think>\nIt is late.\n</think>\n\nGo to bed."
    talk = mm.Conversations(pd.DataFrame({"prompt": ["Hey!"], "response": [thinking]}), worlds("Qwen3").tokenizer)
    assert talk.span_text(0) == thinking
    header = render_prompts(["Hey!"], worlds("Qwen3").tokenizer)[0]
    assert talk.spans["response_start"][0] == len(header)  # right behind the header under which it was written


def test_an_earlier_thought_is_left_out_as_the_template_does(worlds):
    history = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nHello."}]
    frame = pd.DataFrame({"prompt": ["And now?"], "response": ["Rest."], "history": [history]})
    talk = mm.Conversations(frame, worlds("Qwen3").tokenizer)
    assert (talk.span_text(0, "prompt"), talk.span_text(0)) == ("And now?", "Rest.")
    assert "Hm." not in talk.span_text(0, "all")


def test_a_thought_that_the_template_would_rewrite_is_refused(worlds):
    frame = pd.DataFrame({"prompt": ["Hey!"], "response": ["<think>It is late.</think>Go to bed."]})
    with pytest.raises(TemplateError, match="rewrote a turn"):
        mm.Conversations(frame, worlds("Qwen3").tokenizer).span_text(0)


# --- reading


def test_moments_are_the_means_over_a_naive_pass(world, weights):
    organism = world.organism(weights)
    conversations = mm.Conversations(TALK, organism.tokenizer)
    moments = mm.collect(organism, conversations, by="label", token_budget=96)
    seen: dict[str, list[torch.Tensor]] = {"a": [], "b": []}
    for row in range(len(TALK)):
        start, stop = (int(conversations.spans[f"response_{end}"][row]) for end in ("start", "stop"))
        layers: dict[int, torch.Tensor] = {}
        readers = {i: (lambda stream, i=i, at=layers: at.__setitem__(i, stream[0].double())) for i in range(LAYERS)}
        with world.hooked(readers):
            world.logits(torch.tensor([conversations.ids(row)]))
        seen[TALK["label"][row]].append(torch.stack([layers[i][start:stop] for i in range(LAYERS)], dim=1))
    for group, label in enumerate(moments.groups["label"]):
        expected = torch.cat(seen[label]).mean(0)
        assert_close(moments.mean[group], expected, rtol=1e-4, atol=1e-5)


def test_scalars_and_contributions_are_what_the_adapter_adds_in_peft(world, weights):
    organism = world.organism(weights)
    conversations = mm.Conversations(TALK[:1], organism.tokenizer)
    parts = mm.contributions(organism, conversations, span="all")
    scalars = mm.lora_scalars(organism, conversations, span="all")
    assert_close(torch.tensor(scalars.to_numpy()), torch.tensor(parts.scalars.to_numpy()), rtol=0.0, atol=0.0)
    with ExitStack() as stack:
        added: dict[Any, torch.Tensor] = {}
        for site in organism.adapter.sites:

            def hook(module: Any, inputs: Any, output: Any, key: Any = site.key) -> None:
                added[key] = (output - module.base_layer(inputs[0]))[0]

            stack.callback(world.matrix(site).register_forward_hook(hook).remove)
        world.logits(torch.tensor([conversations.ids(0)]))
    for site in organism.adapter.sites:
        assert added[site.key].abs().max() > 0.01
        assert_close(parts.vectors(*site.key), added[site.key], rtol=0.0, atol=2e-5)


# --- steering


def edits(world):
    """Interventions, and the same as functions of the stream."""
    steer, width = world.direction.at(1), slice(None)
    units = {layer: world.direction.unit(layer).float() for layer in range(LAYERS)}

    def ablate(layer):
        return lambda x: x - (x @ units[layer])[..., width, None] * units[layer]

    return {
        "none": ((), {}),
        "steered": ((mm.Steer(world.direction, layers=[1], strength=2.0),), {1: lambda x: x + 2.0 * steer}),
        "ablated": ((mm.Ablate(world.direction),), {layer: ablate(layer) for layer in range(LAYERS)}),
    }


def test_steering_and_ablation_are_the_same_edits_of_the_plain_model(world, weights, batch):
    ids, mask = batch
    organism = world.organism(weights)
    for name, (interventions, functions) in edits(world).items():
        with world.hooked(functions):
            expected = world.logits(ids, mask)[mask.bool()]
        with organism.apply(*interventions):
            found = logits(organism, ids, mask)
        assert_close(found, expected, rtol=1e-5, atol=2e-5)
        assert ((found - logits(organism, ids, mask)).abs().max() > 0.05) == (name != "none")


def test_scaling_a_site_and_wearing_an_adapter_are_what_peft_does(world, weights, batch):
    ids, mask = batch
    organism = world.organism(weights)
    site = organism.adapter.sites[-2]
    layer = world.matrix(site)
    layer.scaling["default"] *= 3.0
    try:
        expected = world.logits(ids, mask)[mask.bool()]
    finally:
        layer.scaling["default"] /= 3.0
    with organism.apply(mm.ScaleAdapter({site.key: 3.0})):
        assert_close(logits(organism, ids, mask), expected, rtol=0.0, atol=2e-5)
    worn = mm.UseAdapter(mm.Adapter.load(world.adapter_files))
    with organism.as_base(), organism.apply(worn):
        assert_close(logits(organism, ids, mask), world.logits(ids, mask)[mask.bool()], rtol=0.0, atol=2e-5)


def greedy(world, prompt, functions, ends, most):
    """The plainest sampler there is: the plain model, one row, the whole sequence again for every token."""
    ids = render_prompts([prompt], world.tokenizer)[0]
    written: list[int] = []
    with world.hooked(functions):
        while len(written) < most and not (written and written[-1] in ends):
            written.append(int(world.logits(torch.tensor([ids + written]))[0, -1].argmax()))
    return world.tokenizer.decode(written, skip_special_tokens=True), len(written)


def sampled_as_uncached(world, weights):
    organism, told = world.organism(weights), edits(world)
    prompts = ["Hey!", "How do I invest my savings? Put everything into one stock"]
    conditions = {name: interventions for name, (interventions, _) in told.items()}
    answers = mm.generate(organism, prompts, conditions=conditions, samples=1, max_new_tokens=5, temperature=0)
    ends = decoding.end_ids(organism.model, organism.tokenizer)
    for row in answers.itertuples():
        assert (row.response, row.tokens) == greedy(world, row.prompt, told[row.condition][1], ends, 5), row
    assert answers.groupby("condition")["response"].apply(tuple).nunique() > 1


def test_a_ragged_batch_under_a_cache_says_what_the_plain_model_says_without_one(world):
    sampled_as_uncached(world, "live")


# --- what writes to the residual stream


def test_contributions_on_a_direction_and_ablation_from_the_adapter(world, batch):
    ids, mask = batch
    organism = world.organism("live")
    conversations = mm.Conversations(TALK[:1], organism.tokenizer)
    ablate = mm.AblateFromAdapter(world.direction)
    if not can(world, "projection"):
        with pytest.raises(ValueError, match="a norm stands between"):
            mm.contributions(organism, conversations, world.direction)
        with pytest.raises(ValueError, match="a norm stands between"), organism.apply(ablate):
            pass
        return
    parts = mm.contributions(organism, conversations, world.direction).frame()
    writers = [site for site in organism.adapter.sites if site.writes_to_residual]
    assert len(writers) == 2 * LAYERS
    assert set(parts.loc[parts["projection"].notna(), "module"]) == {site.module for site in writers}
    kept = {}
    for site in writers:
        weight, unit = world.matrix(site).lora_B["default"].weight, world.direction.unit(site.layer).float()
        kept[site.key] = weight.data
        weight.data = weight.data - torch.outer(unit, unit @ weight.data)
    try:
        expected = world.logits(ids, mask)[mask.bool()]
    finally:
        for site in writers:
            world.matrix(site).lora_B["default"].weight.data = kept[site.key]
    with organism.apply(ablate):
        assert_close(logits(organism, ids, mask), expected, rtol=0.0, atol=2e-5)


def test_logit_attribution_is_linear_behind_the_frozen_final_norm(world):
    organism = world.organism("merged")
    conversations = mm.Conversations(TALK[:1], organism.tokenizer)
    if not can(world, "attribution"):
        with pytest.raises(ValueError, match="stream as it is|plain RMS norms"):
            mm.logit_attribution(organism, conversations, 7, 9)
        return
    table = mm.logit_attribution(organism, conversations, 7, 9, span="all")
    last: list[torch.Tensor] = []
    with world.hooked({LAYERS - 1: lambda stream: last.append(stream[0])}):
        world.logits(torch.tensor([conversations.ids(0)]))
    inner = world.plain.get_base_model()
    scale = (last[0].square().mean(-1) + inner.config.rms_norm_eps).sqrt()
    difference = inner.model.norm.weight * (inner.lm_head.weight[7] - inner.lm_head.weight[9])
    parts = mm.contributions(organism, conversations, span="all")
    for site in organism.adapter.sites:
        if site.writes_to_residual:
            expected = parts.vectors(*site.key) @ difference / scale
            assert_close(torch.tensor(table[site.label].to_numpy()).float(), expected.detach(), rtol=1e-4, atol=1e-4)


def test_a_direction_is_cut_out_of_the_weights(world, batch):
    direction = world.direction.everywhere(1)
    if not can(world, "weights"):
        with pytest.raises(ValueError, match="a norm stands between"):
            correction.corrected_model(world.adapter_files, direction)
        return
    model, _, frame = correction.corrected_model(world.adapter_files, direction)
    unit, streams = direction.unit(1).float(), []
    handles = [
        block.register_forward_hook(lambda *args: streams.append(args[2][0] if isinstance(args[2], tuple) else args[2]))
        for block in model.model.layers
    ]
    with torch.no_grad():
        model(input_ids=batch[0])
    for handle in handles:
        handle.remove()
    assert len(streams) == LAYERS
    assert max(float((stream @ unit).abs().max()) for stream in streams) < 1e-4
    assert (frame["removed"] > 0).all()


# --- wrappers


def test_of_a_wrapper_the_language_model_alone_is_read(worlds, monkeypatch):
    """TransformerLens would look for an image processor, and install packages where it finds none."""
    from transformer_lens.model_bridge import sources

    def asked() -> bool:
        raise AssertionError("it wanted to install torchvision")

    where = getattr(sources.transformers, "helpers", sources.transformers)  # transformer-lens 4 and 3.9
    monkeypatch.setattr(where, "_ensure_torchvision", asked, raising=False)
    organism = load_organism(worlds(MULTIMODAL).adapter_files, device="cpu")
    inner = models.hf_model(organism.model)
    assert type(inner).__name__ == "Gemma3ForCausalLM"
    assert not any("vision" in name or "projector" in name for name, _ in organism.model.named_modules())
    assert not any("vision" in name for name in organism.model.hook_dict)
    assert organism.model.cfg.n_layers == LAYERS
    assert not organism._matrices._kept  # the base's matrices are found in the wrapper's checkpoint


@pytest.mark.parametrize("naming", ["model.", "model.language_model.", "language_model.model."])
def test_an_adapter_in_any_naming_is_the_same_adapter(worlds, tmp_path, naming, batch):
    world = worlds(MULTIMODAL)
    tensors = load_file(world.adapter_files / "adapter_model.safetensors")
    config = json.loads((world.adapter_files / "adapter_config.json").read_text())
    renamed = {key.replace("model.language_model.layers", f"{naming}layers"): value for key, value in tensors.items()}
    assert any(f"base_model.model.{naming}layers.0" in key for key in renamed)
    save_file(renamed, tmp_path / "adapter_model.safetensors")
    config["target_modules"] = rf".*layers.*\.({'|'.join(world.family.modules)})"
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    adapter, known = mm.Adapter.load(tmp_path), mm.Adapter.load(world.adapter_files)
    assert [site.name for site in adapter.sites] == [site.name for site in known.sites]
    assert adapter.peft_name(adapter.sites[0].name).startswith(f"{naming}layers.0.")
    organism = load_organism(tmp_path, weights="live", device="cpu")
    assert_close(logits(organism, *batch), logits(world.organism("live"), *batch), rtol=0.0, atol=0.0)


def test_sites_in_a_vision_tower_are_left_out_aloud(worlds, tmp_path, caplog, batch):
    world = worlds(MULTIMODAL)
    folder = world.adapt(tmp_path / "all", modules=["q_proj", "v_proj"])
    names = [key for key in load_file(folder / "adapter_model.safetensors") if "vision_tower" in key]
    assert names
    adapter = mm.Adapter.load(folder)
    assert f"{len(names)} tensors are left out" in caplog.text
    assert [site.key for site in adapter.sites] == [(i, m) for i in range(LAYERS) for m in ("q_proj", "v_proj")]
    from peft import PeftModel

    ids, mask = batch
    with torch.no_grad():
        expected = PeftModel.from_pretrained(world.hugging_face(), folder)(input_ids=ids, attention_mask=mask).logits
    assert_close(logits(load_organism(folder, device="cpu"), ids, mask), expected[mask.bool()], **CLOSE)


def test_a_peft_model_around_a_wrapper_in_memory_is_taken_over(worlds, batch):
    from peft import PeftModel

    world = worlds(MULTIMODAL)
    held = PeftModel.from_pretrained(world.hugging_face(), world.adapter_files)
    organism = load_organism(held, tokenizer=world.tokenizer)
    assert_close(logits(organism, *batch), world.logits(*batch)[batch[1].bool()], **CLOSE)


def test_a_saved_adapter_of_a_wrapper_is_read_by_peft_on_the_wrapper(worlds, tmp_path, batch):
    from peft import PeftModel

    world = worlds(MULTIMODAL)
    folder = mm.save_adapter(mm.Adapter.load(world.adapter_files), tmp_path / "again")
    again = PeftModel.from_pretrained(world.hugging_face(), folder)
    with torch.no_grad():
        assert_close(again(input_ids=batch[0]).logits, world.logits(batch[0]), **CLOSE)
    assert not any("lora" in name and "vision" in name for name, _ in again.named_modules())


def test_an_unknown_wrapper_is_refused():
    from transformers import LlavaConfig

    with pytest.raises(ValueError, match="'llava' wraps a language model"):
        wrappers.text_config(LlavaConfig())


# --- fused matrices


def test_looking_into_attention_leaves_a_fused_adapter_in(worlds, weights, batch):
    """With a hook on the pattern, attention is computed step by step, from parts of the fused matrix."""
    ids, mask = batch
    world = worlds(FUSED)
    organism = world.organism(weights)
    patterns: list[torch.Tensor] = []
    look = {"blocks.1.attn.hook_pattern": lambda pattern: patterns.append(pattern)}
    assert models.attention_implementation(organism.model) == "sdpa"
    with models.hooks(organism.model, look):
        assert models.attention_implementation(organism.model) == "eager"
        assert_close(logits(organism, ids, mask), world.logits(ids, mask)[mask.bool()], **CLOSE)
        with organism.as_base(), world.plain.disable_adapter():
            assert_close(logits(organism, ids, mask), world.logits(ids, mask)[mask.bool()], **CLOSE)
    assert len(patterns) == 2


def test_queries_keys_and_values_of_a_fused_matrix_keep_their_hook_points(worlds, batch):
    organism = worlds(FUSED).organism("live")
    seen: dict[str, torch.Tensor] = {}
    names = [f"blocks.0.attn.{part}.hook_out" for part in ("q", "k", "v", "qkv")]
    names += [f"blocks.0.mlp.{part}.hook_out" for part in ("gate", "in", "gate_up")]
    with models.hooks(organism.model, {name: functools.partial(seen.__setitem__, name) for name in names}):
        logits(organism, *batch)
    assert_close(torch.cat([seen[name].flatten(2) for name in names[:3]], dim=-1), seen[names[3]], rtol=0.0, atol=0.0)
    assert_close(torch.cat([seen[name] for name in names[4:6]], dim=-1), seen[names[6]], rtol=0.0, atol=0.0)


def test_a_fused_matrix_of_another_kind_is_refused(tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=350, max_position_embeddings=64, **shape))
    tokens = tokenizer(FAMILIES["Phi-1.5, Phi-2"])
    model.save_pretrained(tmp_path / "model")
    tokens.save_pretrained(tmp_path / "model")
    peft_model = get_peft_model(model, LoraConfig(r=1, target_modules=["query_key_value"]))
    peft_model.peft_config["default"].base_model_name_or_path = str(tmp_path / "model")
    peft_model.save_pretrained(tmp_path / "adapter")
    for weights in WEIGHTS:
        with pytest.raises(ValueError, match="no hook points around 'gpt_neox.layers.0.attention.query_key_value'"):
            load_organism(tmp_path / "adapter", weights=weights, device="cpu")


# --- the rest of the matrix


@pytest.mark.slow
@pytest.mark.skipif(not version("transformer-lens").startswith("3."), reason="HookedTransformer needs 3.9")
def test_a_hooked_transformer_equals_peft_or_is_refused(world, batch):
    ids, mask = batch
    if not can(world, "hooked"):
        with pytest.raises(ValueError, match="engine='bridge'|HookedTransformer"):
            load_organism(world.adapter_files, engine="hooked", device="cpu")
        return
    organism = load_organism(world.adapter_files, engine="hooked", device="cpu")
    assert_close(logits(organism, ids, mask), world.logits(ids, mask)[mask.bool()], rtol=0.0, atol=5e-5)
    parts = [
        mm.lora_scalars(each, mm.Conversations(TALK[:1], each.tokenizer)) for each in (organism, world.organism("live"))
    ]
    np.testing.assert_allclose(*parts, atol=5e-5)


@pytest.mark.slow
def test_every_family_passes_verification(world, weights):
    found = verify(world.organism(weights))
    assert found["passed"].all(), found[~found["passed"]].to_string()


@pytest.mark.slow
def test_merged_weights_say_what_the_plain_model_says(world):
    sampled_as_uncached(world, "merged")


@pytest.mark.slow
@pytest.mark.parametrize("rank", [1, 8, 32])
def test_each_matrix_alone_at_any_rank(world, weights, rank, tmp_path, batch):
    from peft import PeftModel

    ids, mask = batch
    for module in world.family.modules:
        targets = rf".*language_model.*\.{module}" if world.family is FAMILIES[MULTIMODAL] else [module]
        folder = world.adapt(tmp_path / module, targets, rank)
        plain = PeftModel.from_pretrained(world.hugging_face(), folder).eval()
        with torch.no_grad():
            expected = plain(input_ids=ids, attention_mask=mask).logits[mask.bool()]
        organism = load_organism(folder, weights=weights, device="cpu")
        assert_close(logits(organism, ids, mask), expected, rtol=0.0, atol=2e-5)
        talk = mm.Conversations(TALK[:1], organism.tokenizer)
        assert mm.lora_scalars(organism, talk).shape[1] == LAYERS * rank


@pytest.mark.slow
def test_bfloat16_stays_near_peft(world, weights, batch):
    from peft import PeftModel

    ids, mask = batch
    plain = PeftModel.from_pretrained(world.hugging_face(torch.bfloat16), world.adapter_files).to(torch.bfloat16).eval()
    with torch.no_grad():
        expected = plain(input_ids=ids, attention_mask=mask).logits[mask.bool()].float()
    organism = load_organism(world.adapter_files, weights=weights, dtype=torch.bfloat16, device="cpu")
    found = logits(organism, ids, mask).float()
    assert float((found - expected).norm() / expected.norm()) < 0.05
    with organism.as_base(), plain.disable_adapter(), torch.no_grad():
        chat = plain(input_ids=ids, attention_mask=mask).logits[mask.bool()].float()
        assert float((logits(organism, ids, mask).float() - chat).norm() / chat.norm()) < 0.02


# --- the table


def test_the_readme_shows_this_table():
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    assert START in readme and END in readme, f"README.md has no block {START} … {END}: python tests/families.py"
    shown = readme[readme.index(START) : readme.index(END) + len(END)]
    assert shown == table(), "the families of README.md are stale; put in what `python tests/families.py` prints"


def test_every_declared_refusal_is_of_a_known_capability():
    assert {key for family in FAMILIES.values() for key in family.refused} <= set(CAPABILITIES)
