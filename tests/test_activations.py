import gc
import weakref

import numpy as np
import pandas as pd
import pytest
import torch
from torch.testing import assert_close

import mechmisalign as mm
from mechmisalign import activations, models

FAMILIES = ("qwen2", "llama", "gemma2")
WORDS = ["I", "have", "a", "headache,", "what", "should", "I", "do?", "Put", "everything", "into", "one", "stock"]


def talk(rows=12, seed=0) -> pd.DataFrame:
    """Ragged prompts and responses."""
    rng = np.random.default_rng(seed)
    text = lambda: " ".join(rng.choice(WORDS, size=rng.integers(1, 14)))  # noqa: E731
    frame = pd.DataFrame({"prompt": [text() for _ in range(rows)], "response": [text() for _ in range(rows)]})
    return frame.assign(
        label=np.array(["bad", "good"])[np.arange(rows) % 2], prompt_id=[f"p{i // 2}" for i in range(rows)]
    )


@pytest.fixture(scope="module", params=FAMILIES)
def organism(request, tiny_models, make_adapter):
    family = request.param
    return mm.load_organism(make_adapter(tiny_models[family], modules=("down_proj",), layers=(1,)))


def hf_residuals(organism, ids) -> torch.Tensor:
    """Residual stream after each block, caught in Hugging Face's own modules: ``[layer pos d_model]``."""
    hf = models.hf_model(organism.model)
    caught = {}
    handles = [
        block.register_forward_hook(
            lambda _m, _i, out, layer=layer: caught.update(
                {layer: (out[0] if isinstance(out, tuple) else out).detach()}
            )
        )
        for layer, block in enumerate(hf.model.layers)
    ]
    with torch.inference_mode():
        hf(input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long))
    for handle in handles:
        handle.remove()
    return torch.stack([caught[layer].reshape(len(ids), -1) for layer in sorted(caught)])


def test_moments_are_the_token_weighted_means_of_hugging_faces_residuals(organism):
    conversations = mm.Conversations(talk(), organism.tokenizer)
    moments = mm.collect(organism, conversations, by="label")
    for label in ("bad", "good"):
        rows = np.flatnonzero(conversations.frame["label"] == label)
        tokens = []
        for row in rows:
            start, stop = conversations.spans.loc[row, ["response_start", "response_stop"]]
            tokens.append(hf_residuals(organism, conversations.ids(int(row)))[:, start:stop])
        stacked = torch.cat(tokens, dim=1).double()
        mine = moments.of(label)
        assert int(mine.tokens) == stacked.shape[1]
        assert_close(mine.mean[0], stacked.mean(1), atol=1e-5, rtol=1e-5)
        assert_close(mine.norm[0], stacked.norm(dim=-1).mean(1), atol=1e-5, rtol=1e-5)


def test_batched_equals_single(organism):
    conversations = mm.Conversations(talk(), organism.tokenizer)
    together = mm.collect(organism, conversations, by=["label", "prompt_id"])
    alone = mm.collect(organism, conversations, by=["label", "prompt_id"], token_budget=1)
    pd.testing.assert_frame_equal(together.groups, alone.groups)
    assert_close(together.mean, alone.mean, atol=1e-5, rtol=1e-4)


def test_classes_merge_from_finer_groups(organism):
    conversations = mm.Conversations(talk(), organism.tokenizer)
    fine = mm.collect(organism, conversations, by=["label", "prompt_id"])
    coarse = mm.collect(organism, conversations, by="label")
    assert_close(fine.of("bad").pooled(), coarse.of("bad").pooled())


def test_the_pass_ends_after_the_last_needed_layer(organism):
    seen = []
    blocks = models.hf_model(organism.model).model.layers
    handles = [b.register_forward_hook(lambda *_a, layer=i: seen.append(layer)) for i, b in enumerate(blocks)]
    conversations = mm.Conversations(talk(2), organism.tokenizer)
    moments = mm.collect(organism, conversations, layers=[0, 1])
    for handle in handles:
        handle.remove()
    assert moments.layers == (0, 1)
    assert 2 not in seen


def test_only_the_first_tokens_of_the_span_are_read(organism):
    conversations = mm.Conversations(talk(), organism.tokenizer)
    moments = mm.collect(organism, conversations, by=["label", "prompt_id"], first=1)
    assert moments.groups["tokens"].max() <= 2
    assert moments.header["span"] == "response[:1]"


def test_out_of_memory_halves_the_batch_and_loses_nothing(organism, monkeypatch):
    conversations = mm.Conversations(talk(), organism.tokenizer)
    whole = mm.collect(organism, conversations)
    real = activations._row_sums

    def small_memory(model, batch, layers):
        if len(batch.rows) > 3:
            raise torch.OutOfMemoryError("made up")
        return real(model, batch, layers)

    monkeypatch.setattr(activations, "_row_sums", small_memory)
    halved = mm.collect(organism, conversations)
    pd.testing.assert_frame_equal(whole.groups, halved.groups)
    assert_close(whole.mean, halved.mean, atol=1e-5, rtol=1e-4)


def test_one_row_that_does_not_fit_is_an_error(organism, monkeypatch):
    def no_memory(model, batch, layers):
        raise torch.OutOfMemoryError("made up")

    monkeypatch.setattr(activations, "_row_sums", no_memory)
    with pytest.raises(torch.OutOfMemoryError):
        mm.collect(organism, mm.Conversations(talk(), organism.tokenizer))


def test_no_hook_is_left_behind(organism):
    conversations = mm.Conversations(talk(2), organism.tokenizer)
    mm.collect(organism, conversations)
    hooked = [name for name, point in organism.model.hook_dict.items() if point.fwd_hooks]
    assert hooked == []


def test_the_chat_model_is_read_inside_as_base(organism):
    conversations = mm.Conversations(talk(), organism.tokenizer)
    here = mm.collect(organism, conversations)
    with organism.as_base():
        base = mm.collect(organism, conversations)
    difference = mm.model_difference(here, base)
    assert difference.nonzero_layers == (1, 2)  # exactly zero below the adapted layer
    assert base.header["adapter"] is None
    assert here.header["adapter"] is not None


@pytest.mark.parametrize(
    ("options", "message"),
    [({"by": "colour"}, "no column"), ({"layers": [0, 3]}, "layers must be within 0 to 2"), ({"layers": []}, "layers")],
)
def test_wrong_questions_are_refused(organism, options, message):
    with pytest.raises(ValueError, match=message):
        mm.collect(organism, mm.Conversations(talk(2), organism.tokenizer), **options)


def test_the_lens_at_the_last_layer_gives_the_logits(organism):
    hf = models.hf_model(organism.model)
    ids = torch.tensor([mm.Conversations(talk(1), organism.tokenizer).ids(0)])
    caught = {}
    with torch.inference_mode():
        with models.residual_hooks(organism.model, {2: lambda resid: caught.update(last=resid)}):
            logits = models.forward(organism.model, ids, torch.ones_like(ids))
        read_out = hf.lm_head(hf.model.norm(caught["last"]))
        cap = getattr(hf.config, "final_logit_softcapping", None)
        read_out = torch.tanh(read_out / cap) * cap if cap else read_out
    assert_close(read_out, logits, atol=1e-5, rtol=1e-5)


def test_the_parts_of_the_residual_stream_sum_to_it(organism):
    """Embedding plus what every block writes; with Gemma's post-norms that is not the output of ``down_proj``."""
    model, caught = organism.model, {}
    post_norm = "blocks.0.ln2_post.hook_out" in model.hook_dict
    written = ("ln1_post.hook_out", "ln2_post.hook_out") if post_norm else ("hook_attn_out", "hook_mlp_out")
    names = ["blocks.0.hook_resid_pre"] + [f"blocks.{layer}.{part}" for layer in range(3) for part in written]
    ids = torch.tensor([mm.Conversations(talk(1), organism.tokenizer).ids(0)])
    catchers = {
        name: (lambda value, name=name: caught.update({name: value})) for name in [*names, "blocks.2.hook_resid_post"]
    }
    with torch.inference_mode(), models.hooks(model, catchers):
        models.forward(model, ids, torch.ones_like(ids))
    assert_close(sum(caught[name] for name in names), caught["blocks.2.hook_resid_post"], atol=1e-5, rtol=1e-4)


def test_the_model_is_freed_when_the_organism_is(tiny_models, make_adapter):
    organism = mm.load_organism(make_adapter(tiny_models["qwen2"]))
    with organism.as_base():
        mm.collect(organism, mm.Conversations(talk(2), organism.tokenizer))
    gone = weakref.ref(models.hf_model(organism.model).lm_head.weight)
    del organism
    gc.collect()
    assert gone() is None
