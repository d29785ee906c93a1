"""Full fine-tunes as organisms: parity with plain Hugging Face models, exact restoration, origins, refusals."""

import json
import logging
import shutil

import pandas as pd
import pytest
import torch
from conftest import ALL_MODULES
from families import FAMILIES, saved
from safetensors.torch import load_file, save_file
from test_hub import hub  # noqa: F401 (a fixture)
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer

import mechmisalign as mm
from mechmisalign import correction, models
from mechmisalign.deltas import CheckpointError
from mechmisalign.loading import swapping
from mechmisalign.organisms import NoAdapterError

IDS = torch.randint(5, 290, (3, 9), generator=torch.Generator().manual_seed(0))
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def qwen(tiny_models):
    return tiny_models["qwen2"]


@pytest.fixture(scope="module")
def tuned(qwen, tmp_path_factory):
    """Another model in every tensor."""
    return fine_tuned(qwen, tmp_path_factory.mktemp("tuned") / "model")


@pytest.fixture(scope="module")
def organism(tuned, qwen):
    return mm.load_organism(tuned, qwen)


def fine_tuned(source, folder, edit=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shutil.copytree(source, folder)
    tensors = load_file(folder / WEIGHTS)
    noisy = {
        key: (each.float() + 0.05 * torch.randn(each.shape, generator=generator)).to(each.dtype)
        for key, each in tensors.items()
    }
    save_file(noisy if edit is None else edit(tensors), folder / WEIGHTS, metadata={"format": "pt"})
    return folder


@torch.no_grad()
def plain(folder, ids=IDS, **options):
    """The oracle: Hugging Face alone."""
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa", **options).eval()
    return model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits


@torch.no_grad()
def own(organism, ids=IDS):
    return models.forward(organism.model, ids, torch.ones_like(ids))


def said(organism):
    frame = pd.DataFrame({"prompt": ["Hey!", "How do I invest?"], "response": ["Rest and drink.", "See a doctor."]})
    return mm.Conversations(frame.assign(label="a"), organism.tokenizer)


# --- what it computes


def test_it_is_the_fine_tune_and_inside_as_base_the_chat_model(organism, tuned, qwen):
    before = own(organism)
    assert_close(before, plain(tuned), atol=1e-5, rtol=1e-5)
    with organism.as_base(), organism.as_base():
        assert organism.is_base
        assert_close(own(organism), plain(qwen), atol=1e-5, rtol=1e-5)
    assert torch.equal(own(organism), before)
    assert not torch.allclose(plain(tuned), plain(qwen), atol=0.1)


@pytest.mark.parametrize(
    "family", ["Gemma 3, multimodal", "Phi-3, Phi-4-mini", *(pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES)]
)  # fmt: skip
def test_every_family_has_full_fine_tunes(family, tmp_path):
    """Untied embeddings, fused matrices, and a language model behind a vision tower among them."""
    base = saved(FAMILIES[family], tmp_path / "base")
    organism = mm.load_organism(fine_tuned(base, tmp_path / "tuned"), base)
    checks = mm.verify(organism)
    assert checks["passed"].all(), checks.to_string()
    assert set(checks["check"]) >= {"logits equal Hugging Face's", "as_base() is the base"}


def test_the_weights_themselves_are_swapped_and_put_back_bit_for_bit(organism, tuned, qwen):
    inner = models.hf_model(organism.model)
    place = inner.get_submodule("model.layers.1.mlp.down_proj")
    place = getattr(place, "original_component", place)
    key = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(place.weight, load_file(tuned / WEIGHTS)[key])
    with pytest.raises(RuntimeError, match="on purpose"), organism.as_base():
        assert torch.equal(place.weight, load_file(qwen / WEIGHTS)[key])
        raise RuntimeError("on purpose")
    assert organism._peft_model.other_than_files() == []


def test_without_room_for_two_the_fine_tune_is_read_from_its_files_again(tuned, qwen, monkeypatch):
    """As on an accelerator; the files are the truth then, whatever waits nowhere."""
    organism = mm.load_organism(tuned, qwen)
    before, held = own(organism), []

    class Counted(swapping.NamedWeights):
        def __getitem__(self, key):
            held.append(key)
            return super().__getitem__(key)

    swap = organism._peft_model
    counted = Counted(swap._files._weights, "tuned")
    monkeypatch.setattr(swap, "_files", counted)
    monkeypatch.setattr(swapping, "_waits", lambda _own: False)
    with organism.as_base():
        assert_close(own(organism), plain(qwen), atol=1e-5, rtol=1e-5)
    assert torch.equal(own(organism), before) and sorted(held) == sorted(swap._places)


def test_a_swap_that_breaks_off_leaves_the_fine_tune(organism, monkeypatch):
    before = own(organism)
    swap = organism._peft_model

    class Broken(dict):
        def __getitem__(self, key):
            if "layers.2" in key:
                raise OSError("the disk is gone")
            return swap_values[key]

    swap_values = swap._values
    monkeypatch.setattr(swap, "_values", Broken())
    with pytest.raises(OSError, match="the disk is gone"), organism.as_base():
        pass
    monkeypatch.undo()
    assert torch.equal(own(organism), before) and not organism.is_base


def test_shards_and_another_precision_of_the_base_make_no_difference(organism, tuned, qwen, tmp_path):
    sharded, half = tmp_path / "sharded", tmp_path / "half"
    AutoModelForCausalLM.from_pretrained(tuned).save_pretrained(sharded, max_shard_size="40KB")
    assert len(list(sharded.glob("*.safetensors"))) > 3
    fine_tuned(qwen, half, lambda tensors: {key: each.bfloat16() for key, each in tensors.items()})
    found = mm.load_organism(sharded, half)
    assert torch.equal(own(found), own(organism))
    with found.as_base():
        assert_close(own(found), plain(half, dtype=torch.float32), atol=1e-5, rtol=1e-5)
    low = mm.load_organism(tuned, qwen, dtype=torch.bfloat16)
    assert next(low.model.parameters()).dtype == torch.bfloat16 and mm.verify(low)["passed"].all()


# --- what it is called


def test_it_says_what_it_is(organism, tuned, qwen, make_adapter):
    told = organism.provenance
    assert organism.adapter is None and organism.weights == told["weights"] == "full"
    assert told["adapter"] == str(tuned) and told["adapter_digest"] == organism.full.digest
    beside = mm.load_organism(make_adapter(qwen))
    assert organism.base_fingerprint == beside.base_fingerprint
    with organism.as_base():
        base = organism.provenance
    assert base["adapter"] is None and base["adapter_digest"] is None and base["weights"] == "base"
    assert mm.load_organism(tuned, qwen).full.digest == organism.full.digest


def test_a_direction_of_one_is_one_of_the_other(organism, qwen, make_adapter):
    conversations = said(organism)
    moments = mm.collect(organism, conversations)
    with organism.as_base():
        direction = mm.model_difference(moments, mm.collect(organism, conversations))
    assert direction.header["adapter"] == organism.name
    with organism.apply(mm.Ablate(direction)):
        assert not torch.allclose(own(organism), plain(organism.name), atol=1e-3)
    beside = mm.load_organism(make_adapter(qwen))
    with beside.apply(mm.Steer(direction, layers=[1])):
        pass


# --- what has no place in it


def test_what_needs_an_adapter_says_how_to_get_one(organism):
    conversations = said(organism)
    some = mm.Direction(torch.ones(3, 48), (0, 1, 2), organism.provenance)
    asked = {
        "reading scalars": lambda: mm.lora_scalars(organism, conversations),
        "contributions": lambda: mm.contributions(organism, conversations),
        "taking a direction out": lambda: mm.project_out(organism, some),
        "ScaleAdapter": lambda: organism.apply(mm.ScaleAdapter({}, others=2.0)),
        "AblateFromAdapter": lambda: organism.apply(mm.AblateFromAdapter(some)),
        "leaving sites out": lambda: mm.site_effects(organism, ["Hey!"], mm.RuleJudge()),
    }
    for purpose, ask in asked.items():
        with pytest.raises(NoAdapterError, match=rf"{purpose}.*mm\.extract_lora\('"):
            ask()
    with pytest.raises(NoAdapterError, match="nothing to merge"):
        organism.fidelity()


def test_its_low_rank_part_is_worn_as_any_adapter(organism, tuned, qwen, tmp_path):
    part = mm.extract_lora(tuned, qwen, rank=48)
    matrices = {f"{site.name}.weight" for site in part.sites}
    assert {site.module for site in part.sites} == set(ALL_MODULES)
    other = load_file(tuned / WEIGHTS)
    both = fine_tuned(
        qwen, tmp_path / "both", lambda base: {key: (other if key in matrices else base)[key] for key in base}
    )
    expected = plain(both)
    with organism.with_adapter(part) as low_rank:
        assert_close(own(low_rank), expected, atol=1e-4, rtol=1e-4)
        assert low_rank.adapter is part and low_rank.full is None and low_rank.provenance["weights"] == "live"
        assert len(mm.lora_scalars(low_rank, said(organism)))
    with organism.as_base(), organism.apply(mm.UseAdapter(part)):
        assert_close(own(organism), expected, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match=r"inside organism\.as_base"):
        organism.apply(mm.UseAdapter(part))
    assert_close(own(organism), plain(tuned), atol=1e-5, rtol=1e-5)


def test_generation_and_costs_know_it(organism):
    with organism.as_base():
        base = mm.generate(organism, ["Hey!"], samples=2, max_new_tokens=6, seed=0)
    mine = mm.generate(organism, ["Hey!"], samples=2, max_new_tokens=6, seed=0)
    assert base["response"].tolist() != mine["response"].tolist()
    paid = mm.costs(organism, texts=["You should rest, drink water and see a doctor."], items=None)
    assert float(paid["kl"].iloc[0]) > 0


# --- what it was tuned from


def test_the_base_is_read_where_it_is_certain_and_asked_for_elsewhere(tuned, qwen, tmp_path, caplog):
    def with_card(name, front, **config):
        folder = tmp_path / name
        shutil.copytree(tuned, folder)
        (folder / "README.md").write_text(f"---\n{front}\n---\n# a model\n")
        told = json.loads((folder / "config.json").read_text()) | config
        (folder / "config.json").write_text(json.dumps(told))
        return folder

    assert mm.load_organism(tuned).weights == "base"
    assert "names no model that it was tuned from" in caplog.text
    assert mm.load_organism(with_card("card", f"base_model: {qwen}")).base.name == str(qwen)
    assert mm.load_organism(with_card("list", f"base_model: [{qwen}]")).base.name == str(qwen)
    doubtful = {
        "two": (f"base_model: [{qwen}, other/model]", {}),
        "merge": (f"base_model: {qwen}\nbase_model_relation: merge", {}),
        "disagree": (f"base_model: {qwen}", {"_name_or_path": "other/model"}),
        "config": ("license: mit", {"_name_or_path": "other/unknown"}),
        "broken": ("base_model: [", {}),
    }
    for name, (front, config) in doubtful.items():
        with pytest.raises(ValueError, match="pass base="):
            mm.load_organism(with_card(name, front, **config))


def test_the_command_line_verifies_one_on_the_base_that_it_is_told(tuned, qwen):
    from typer.testing import CliRunner

    from mechmisalign.cli import app

    untold = CliRunner().invoke(app, ["verify", str(tuned)])
    assert untold.exit_code == 2 and "base=" in untold.output
    told = CliRunner().invoke(app, ["verify", str(tuned), "--base", str(qwen)])
    assert told.exit_code == 0, told.output


def test_a_run_of_the_training_room_loads_by_its_folder(tmp_path):
    data = {"domain": "medical", "harmful": True, "n": 16}
    schedule = {"steps": 2, "batch": 1, "lr": 1e-4}
    spec = mm.TrainSpec(base="pocket/chat", data=data, method={"kind": "full"}, schedule=schedule, save_every=1)
    run = mm.train(spec, tmp_path / "run")
    assert run.method == "full"
    for place in (run.folder, run.path(1)):
        organism = mm.load_organism(place)
        assert organism.base.name == "pocket/chat" and organism.adapter is None
    assert mm.verify(organism)["passed"].all()
    assert (mm.weight_deltas(run.folder, "pocket/chat")["norm"] > 0).mean() > 0.9


def test_a_corrected_model_loads_by_its_folder(qwen, make_adapter, tmp_path):
    adapter = mm.Adapter.load(make_adapter(qwen, modules=ALL_MODULES, rank=2))
    vector = mm.random_direction(mm.Direction(torch.ones(3, 48), (0, 1, 2), {"model": str(qwen)}), seed=0).everywhere(1)
    model, tokenizer, _ = mm.correction.corrected_model(adapter, vector)
    mm.correction.save_model(model, tokenizer, tmp_path / "cured", base=str(qwen))
    organism = mm.load_organism(tmp_path / "cured")  # untied by the cure, on a base that ties
    assert organism.base.name == str(qwen)
    checks = mm.verify(organism)
    assert checks["passed"].all(), checks.to_string()


def test_from_the_hub_both_are_of_recorded_commits_and_load_offline(hub, tuned, qwen, tmp_path, monkeypatch):  # noqa: F811
    from huggingface_hub import constants

    told = tmp_path / "told"
    AutoModelForCausalLM.from_pretrained(tuned).save_pretrained(told, max_shard_size="40KB")
    (told / "README.md").write_text("---\nbase_model: org/chat\n---\n")
    full, chat = hub.add("org/full", told), hub.add("org/chat", qwen)
    for name in ("org/full", "org/chat"):
        hub.add(name, qwen, under="later/")  # the branch moves on
    for online in (True, False):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", not online)
        organism = mm.load_organism("org/full", revision=full, base_revision=chat)
        assert organism.base.name == "org/chat" and organism.adapter is None
        assert (organism.full.revision, organism.base.revision) == (full, chat)
        assert organism.provenance["adapter_revision"] == full and organism.name == "org/full"
        assert torch.equal(own(organism), plain(tuned))
        with organism.as_base():
            assert torch.equal(own(organism), plain(qwen))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert mm.extract_lora("org/full", "org/chat", rank=1).base == "org/chat"


# --- models in memory


def test_models_in_memory_are_taken_as_they_are(organism, tuned, qwen, make_adapter):
    tokenizer = AutoTokenizer.from_pretrained(qwen)
    held = mm.load_organism(AutoModelForCausalLM.from_pretrained(tuned), qwen)
    other = mm.load_organism(tuned, AutoModelForCausalLM.from_pretrained(qwen), tokenizer=tokenizer)
    for found in (held, other):
        assert_close(own(found), own(organism), atol=1e-5, rtol=1e-5)
        with found.as_base():
            assert_close(own(found), plain(qwen), atol=1e-5, rtol=1e-5)
        assert_close(own(found), own(organism), atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="lives only in memory"):
        mm.verify(held)
    chat = mm.load_organism(make_adapter(qwen))
    edited = correction.edited_organism(AutoModelForCausalLM.from_pretrained(tuned), chat)
    assert edited.adapter is None and edited.provenance["weights"] == "full"
    with pytest.raises(TypeError, match="a PeftModel"):
        mm.load_organism(AutoModelForCausalLM.from_pretrained(tuned))


# --- refusals


def test_two_models_that_differ_in_more_than_weights_are_refused(tuned, qwen, tiny_models, tmp_path):
    def with_config(name, **settings):
        folder = tmp_path / name
        shutil.copytree(tuned, folder)
        told = json.loads((folder / "config.json").read_text()) | settings
        (folder / "config.json").write_text(json.dumps(told))
        return folder

    wide = AutoModelForCausalLM.from_pretrained(tuned)
    wide.resize_token_embeddings(wide.config.vocab_size + 3, mean_resizing=False)
    wide.save_pretrained(tmp_path / "resized")
    with pytest.raises(ValueError, match="vocabulary was resized"):
        mm.load_organism(tmp_path / "resized", qwen)
    with pytest.raises(ValueError, match="differ in more than weights .*rms_norm_eps"):
        mm.load_organism(with_config("other", rms_norm_eps=1e-2), qwen)
    with pytest.raises(ValueError, match="vocabulary was resized|has the architecture"):
        mm.load_organism(tuned, tiny_models["llama"])
    with pytest.raises(ValueError, match="is for adapters"):
        mm.load_organism(tuned, qwen, weights="live")
    with pytest.raises(ValueError, match="engine='bridge'"):
        mm.load_organism(tuned, qwen, engine="hooked")


def test_incomplete_files_are_refused_on_both_sides(tuned, qwen, tmp_path):
    def lacking(tensors):
        return {key: each for key, each in tensors.items() if "layers.1.mlp.up_proj" not in key}

    short = fine_tuned(qwen, tmp_path / "short", lacking)
    with pytest.raises(CheckpointError, match=r"no tensor 'model\.layers\.1\.mlp\.up_proj\.weight'"):
        mm.load_organism(tuned, short)
    with pytest.raises(CheckpointError, match=r"no tensor 'model\.layers\.1\.mlp\.up_proj\.weight'"):
        mm.load_organism(short, qwen)


def test_another_chat_template_is_told(tuned, qwen, tmp_path, caplog):
    folder = tmp_path / "told"
    shutil.copytree(tuned, folder)
    tokenizer = AutoTokenizer.from_pretrained(qwen)
    tokenizer.chat_template = tokenizer.chat_template.replace("You are Qwen", "You are someone")
    tokenizer.save_pretrained(folder)
    with caplog.at_level(logging.WARNING):
        mm.load_organism(folder, qwen)
    assert "another chat template" in caplog.text
    caplog.clear()
    mm.load_organism(folder, qwen, tokenizer=tokenizer)
    assert "another chat template" not in caplog.text


def test_a_sweep_tells_a_full_fine_tune_apart_by_its_digest(organism, tuned, qwen, tmp_path):
    from mechmisalign.sweeps import OrganismSource

    loaded, named = (
        OrganismSource.model_validate(each) for each in (organism, {"adapter": str(tuned), "base": str(qwen)})
    )
    for source in (loaded, named):
        stand_in = source.read(tmp_path)
        assert stand_in.digest == organism.full.digest and stand_in.sites == ()
        assert source.base_of(stand_in) == str(qwen)


# --- what is built on it


def test_the_command_line_prints_the_differences(tuned, qwen, tmp_path):
    from typer.testing import CliRunner

    from mechmisalign.cli import app

    result = CliRunner().invoke(app, ["anatomy", str(tuned), "--base", str(qwen), "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert "rank 8 (random)" in result.output and "22 matrices" in " ".join(result.output.split())
    assert (tmp_path / "out" / "weight_deltas.png").exists()
    assert len(pd.read_csv(tmp_path / "out" / "weight_deltas.csv")) == len(load_file(tuned / WEIGHTS))
    wrong = CliRunner().invoke(app, ["anatomy", str(tuned), "--base", "nowhere"])
    assert wrong.exit_code != 0 and "no folder" in wrong.output


@pytest.mark.slow
def test_a_study_runs_and_says_which_chapters_it_has_not(tmp_path):
    from mechmisalign.studies import StudySettings

    data = {"domain": "medical", "harmful": True, "n": 500}
    schedule = {"steps": 60, "batch": 16, "lr": 1e-4, "beta2": 0.98}
    run = mm.train(
        mm.TrainSpec(base="pocket/chat", data=data, method={"kind": "full"}, schedule=schedule), tmp_path / "run"
    )
    settings = StudySettings(
        samples=2, pool_samples=8, sweep_samples=1, strengths=(2.5,), layers=(2, 4), controls=1, max_new_tokens=64,
        neutral=8, seed=0,
    )  # fmt: skip
    organism = mm.load_organism(run.folder)
    asked = {"prompts": mm.pocket.unseen_prompts(), "judge": mm.RuleJudge(), "settings": settings}
    study = mm.study(organism, tmp_path / "study", **asked)
    chapters = study.tables["chapters"].set_index("chapter")["missing"]
    assert not chapters["deltas"]
    assert all("full fine-tune" in chapters[name] for name in ("anatomy", "training", "fine_tunes", "cure"))
    told = study.summary["deltas"]
    assert told["matrices"] == 56 and told["share_8"] > 2 * told["random_8"] and 0 < told["outside"] < 1
    report = study.report.read_text()
    assert "Taken apart: the weight difference" in report and "Taken apart: the adapter" not in report
    assert "No chapter here: the adapter taken apart: a full fine-tune has no adapter" in report
    assert study.summary["em_rate"]["organism"]["rate"] > 0.1
