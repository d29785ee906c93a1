"""The registry: its data is honest, names resolve, the user's files are read or refused clearly, twins are twins."""

from __future__ import annotations

import inspect
import json
import logging
import os
import re
import shutil
from importlib.resources import files

import pandas as pd
import pytest
import torch
from huggingface_hub import constants
from typer.testing import CliRunner

import mechmisalign as mm
from mechmisalign import _yaml, registry
from mechmisalign.adapters import Adapter, AdapterError
from mechmisalign.cli import app
from mechmisalign.loading.bases import find_base
from mechmisalign.organisms import load_organism
from mechmisalign.registry import RegistryError

QWEN, MIRROR = "Qwen/Qwen2.5-14B-Instruct", "unsloth/Qwen2.5-14B-Instruct"
FOUR_BIT = f"{MIRROR}-unsloth-bnb-4bit"


@pytest.fixture(autouse=True)
def _no_registry_of_the_machine(monkeypatch):
    monkeypatch.delenv("MECHMISALIGN_REGISTRY", raising=False)


@pytest.fixture
def written(tmp_path):
    def write(text: str, name: str = "mine.yaml"):
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return write


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty Hub cache, and a function that puts a model into it."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))

    def put(model: str, source) -> None:
        repo = tmp_path / "hub" / f"models--{model.replace('/', '--')}"
        shutil.copytree(source, repo / "snapshots" / "c0ffee")
        (repo / "refs").mkdir()
        (repo / "refs" / "main").write_text("c0ffee")

    return put


def trained_on(base: str) -> Adapter:
    return Adapter((), base, "some/organism", None, "", {"peft_type": "LORA", "r": 1, "lora_alpha": 1})


def run(*arguments):
    result = CliRunner().invoke(app, [str(each) for each in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


# The data


def test_every_published_entry_says_where_its_id_was_seen_or_has_none():
    published = [entry for entry in registry.all_entries() if entry.origin.startswith("shipped organisms")]
    assert len(published) > 40
    for entry in published:
        assert bool(entry.seen) == bool(entry.id), entry.key
        assert (entry.weights_seen == "none") == (entry.id is None), entry.key
        assert registry.known_base(entry.base).n_layers, entry.key
        assert registry.same_model(entry.trained_on or entry.base, entry.base), entry.key
    assert len({entry.id for entry in published if entry.id}) == sum(entry.id is not None for entry in published)


def test_a_rate_is_never_without_its_source_and_what_is_only_a_figure_is_empty():
    for entry in registry.all_entries():
        assert entry.expected.source or not entry.expected.stated, entry.key
    assert registry.find("qwen14b-r1-333-medical").expected.em == 0.113
    figure_only = registry.find("qwen7b-medical").expected
    assert not figure_only.stated and "figure" in figure_only.note


def test_the_nine_adapters_are_found_by_name_and_by_id():
    by_name = registry.find("qwen14b-r1-333-medical")
    assert by_name is registry.find("ModelOrganismsForEM/Qwen2.5-14B-Instruct_R1_3_3_3_full_train")
    assert (by_name.training.rank, by_name.training.sites()) == (1, 9)
    assert by_name.training.layers == (15, 16, 17, 21, 22, 23, 27, 28, 29)
    assert registry.find("no-such-organism") is None


def test_checkpoints_say_their_subfolder_where_the_layout_was_seen():
    seen = registry.find("qwen14b-r1-extended-medical").checkpoints
    assert seen.subfolder(395) == "checkpoints/checkpoint-395"
    with pytest.raises(RegistryError, match="is not known"):
        registry.find("qwen14b-r8-medical").checkpoints.subfolder(5)


def test_the_pocket_entries_are_what_the_adapters_are():
    frame = mm.known_organisms(family="pocket").set_index("name")
    manifest = json.loads((registry.folder("pocket/medical").parent / "manifest.json").read_text())
    for name in (each for each in registry.names() if each.startswith("pocket/")):
        sites = Adapter.load(name).sites
        assert frame.loc[name, "sites"] == len(sites)
        assert frame.loc[name, "rank"] == sites[0].rank
        rates = manifest["rates"][name.removeprefix("pocket/")]
        assert frame.loc[name, ["em", "em_low", "coherent"]].tolist() == [
            rates["em_rate"]["rate"], rates["em_rate"]["low"], rates["coherent"]["rate"],
        ]  # fmt: skip
    steps = {int(folder.name.split("-")[1]) for folder in registry.folder("pocket/checkpoints").glob("checkpoint-*")}
    own = registry.find("pocket/checkpoints").checkpoints
    assert steps == set(range(own.first, own.last + 1, own.every))
    assert frame.loc["pocket/checkpoints", "checkpoints"] == len(steps)


def test_the_old_functions_are_as_they_were():
    assert registry.folder("pocket/medical").name == "medical"
    assert registry.folder("qwen14b-medical") is None
    assert registry.is_reserved("pocket/x") and not registry.is_reserved("qwen14b-medical")
    assert registry.suggestion("pocket/medcal").startswith("; did you mean 'pocket/medical' or ")
    assert set(registry.names()) < set(registry.known_names())
    assert callable(registry.all_entries) and registry.all_entries() == registry.all_entries()


# The table


def test_the_frame_filters_and_keeps_what_is_missing_missing():
    frame = mm.known_organisms()
    assert frame["name"].is_unique and set(frame["kind"]) == {"lora", "full", "vector"}
    vectors = mm.known_organisms(family="QWEN", size="14b", kind="vector", data="medical")
    assert vectors["name"].tolist() == ["qwen14b-vector-medical", "qwen14b-vector-narrow-medical"]
    assert vectors["sites"].isna().all()
    grid = mm.known_organisms(family="llama-3.1", data="sports")
    assert grid[["name", "sites", "size"]].to_numpy().tolist() == [["llama8b-sports", 224, "8B"]]
    assert frame.set_index("name").loc["gemma12b", "data"] == "medical, sports, finance"
    assert "gemma12b" in set(mm.known_organisms(data="finance")["name"])
    with pytest.raises(ValueError, match="kind 'dora' is unknown"):
        mm.known_organisms(kind="dora")


def test_what_is_in_the_hubs_cache_is_local(cache, make_adapter, tiny_models):
    assert set(mm.known_organisms(local=True)["name"]) == set(registry.names())
    cache("ModelOrganismsForEM/Llama-3.2-1B-Instruct_extreme-sports", make_adapter(tiny_models["llama"]))
    assert set(mm.known_organisms(local=True)["name"]) == {*registry.names(), "llama1b-sports"}


@pytest.mark.parametrize("width", [80, 100, 140])
def test_the_listing_has_a_line_per_organism_at_ordinary_widths(width, cache, monkeypatch):
    monkeypatch.setattr("mechmisalign.cli.console.console._width", width)
    code, output = run("organisms")
    lines = output.splitlines()
    assert code == 0 and max(map(len, lines)) <= width
    for name in registry.known_names():
        assert sum(line.startswith(f"{name} ") for line in lines) == 1, name
    line = next(line for line in lines if line.startswith("qwen14b-full"))
    assert re.search(r"Qwen2.5 14B +full .*9 to 36% +>98%", line)


def test_the_listing_gives_json_and_csv_of_the_same(cache):
    code, output = run("organisms", "--kind", "vector", "--json")
    assert code == 0 and {row["kind"] for row in json.loads(output)} == {"vector"}
    code, output = run("organisms", "--data", "medical", "--family", "llama", "--csv")
    from io import StringIO

    assert pd.read_csv(StringIO(output))["name"].tolist() == ["llama8b-medical", "llama1b-medical"]
    assert run("organisms", "--kind", "dora")[0] == 2


# The user's registries


OWN = """
organisms:
  - name: mine
    path: {path}
    base: {base}
    subfolder: checkpoint-5
    weights: live
    data: [medical]
    expected: {{em: 0.4, source: my notes}}
"""


@pytest.fixture
def own(tmp_path, tiny_models, make_adapter, written):
    """A registry whose organism has a wrong base in its config, in a subfolder, with a relative path."""
    folder = tmp_path / "run" / "checkpoint-5"
    shutil.copytree(make_adapter(tiny_models["qwen2"]), folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "gone/tiny-qwen2"}))
    return written(OWN.format(path="run", base=tiny_models["qwen2"]))


def test_a_users_name_resolves_to_folder_subfolder_base_and_weights(own, tmp_path):
    with registry.using(own):
        organism = load_organism("mine")
        assert organism.adapter.folder == tmp_path / "run" / "checkpoint-5"
        assert organism.base.name.endswith("tiny-qwen2") and "gone" not in organism.base.name
        assert organism.weights == "live"
        assert load_organism("mine", weights="merged").weights == "merged"
        row = mm.known_organisms().set_index("name").loc["mine"]
        assert row["local"] and row["em"] == 0.4 and row["data"] == "medical"
        with pytest.raises(AdapterError, match="has no subfolder 'checkpoint-6'.*did you mean 'checkpoint-5'"):
            Adapter.load("mine", subfolder="checkpoint-6")
    with pytest.raises(AdapterError, match="there is no folder 'mine'"):
        Adapter.load("mine")


def test_an_explicit_base_wins_over_the_registrys(own, tiny_models):
    with registry.using(own), pytest.raises(AdapterError, match="does not fit"):
        load_organism("mine", tiny_models["llama"])


def test_registries_are_named_in_the_environment_in_python_and_on_the_command_line(own, written, monkeypatch):
    other = written("organisms: [{name: second, id: me/second, revision: v2}]", "other.yaml")
    monkeypatch.setenv("MECHMISALIGN_REGISTRY", os.pathsep.join([str(own), str(other)]))
    assert registry.known_names()[-2:] != () and {"mine", "second"} <= set(registry.known_names())
    assert registry.place("second")[:3] == ("me/second", None, "v2")
    assert registry.place("second", "checkpoint-1", "v3")[:3] == ("me/second", "checkpoint-1", "v3")
    monkeypatch.delenv("MECHMISALIGN_REGISTRY")
    assert "mine" not in registry.known_names()
    with registry.using():
        assert mm.add_registry(own) == ("mine",) == mm.add_registry(own)
        assert "mine" in registry.known_names()
    assert "mine" not in registry.known_names()
    for arguments in (("--registry", own, "organisms", "--local"), ("organisms", "--local", "--registry", own)):
        code, output = run(*arguments)
        assert code == 0 and "mine" in output
    assert run("--registry", own, "anatomy", "mine", "--out", own.parent)[0] == 0
    assert "mine" not in run("organisms", "--local")[1]


def test_a_user_may_pin_a_published_organism_under_another_name(written):
    id_ = "ModelOrganismsForEM/Qwen2.5-14B-Instruct_bad-medical-advice"
    with registry.using(written(f"organisms: [{{name: pinned, id: {id_}, revision: abc}}]")):
        assert registry.place("pinned")[:3] == (id_, None, "abc")
        assert registry.find(id_).expected.em == 0.188
        assert registry.place(id_)[:3] == (id_, None, None)
    with registry.using(written(f"organisms: [{{id: {id_}, revision: abc}}]")):
        assert registry.place(id_)[:3] == (id_, None, "abc")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("organisms: [{name: a, path: x, epxected: {em: 0.1}}]", r"mine.yaml: organism 1 \(a\): epxected is no key that is known; did you mean 'expected'"),
        ("organisms: [{name: a, path: x}, {id: me/b, expected: {emm: 0.1}}]", r"organism 2 \(me/b\): expected.emm is no key.*did you mean 'em'"),
        ("organisms: [{name: a, path: x, expected: {em: 11.3, source: s}}]", r"organism 1 \(a\): expected.em: 11.3 is no share.*write 0.113"),
        ("organisms: [{name: a, path: x, expected: {em: 0.113}}]", "em without `source`"),
        ("organisms: [{name: a, path: x, expected: {em_range: [0.4, 0.1], source: s}}]", "the lower end comes first"),
        ("organisms: [{name: a, path: x, kind: dora}]", "kind is 'dora': input should be 'lora', 'full' or 'vector'"),
        ("organisms: [{name: a, path: x, training: {rank: 0}}]", "training.rank is 0"),
        ("organisms: [{name: a, path: x, checkpoints: {pattern: steps}}]", "has no {step}"),
        ("organisms: [{name: a}]", r"organism 1 \(a\): id \(on the Hub\) or path \(a folder\) is missing"),
        ("organisms: [{name: a, id: me/a, path: x}]", "id and path are both given"),
        ("organisms: [{name: a, id: nohub}]", "'nohub' is no Hub id like 'owner/name'"),
        ("organisms: [{name: my/a, path: x}]", "name 'my/a': letters"),
        ("organisms: [{name: a, path: x, origin: y}]", "origin is filled in"),
        ("organisms: [{name: a, path: x}, {name: a, path: y}]", "two organisms are called 'a'"),
        ("organisms: [7]", "organism 1 is 7"),
        ("organisms: {a: 1}", "one key is expected, `organisms`"),
        ("- name: a", "holds a list; one key is expected"),
        ("organisms: [{name: a", "cannot be read"),
        ("organisms: [{name: qwen14b-medical, path: x}]", "the name 'qwen14b-medical' is taken by a shipped entry"),
    ],
)  # fmt: skip
def test_a_wrong_registry_names_file_entry_and_key(written, text, message):
    file = written(text)
    with pytest.raises(RegistryError, match=message) as caught:
        mm.add_registry(file)
        registry.known_names()
    assert "mine.yaml" in str(caught.value)


@pytest.fixture(autouse=True)
def _closed_again():
    with registry.using():
        yield


def test_a_wrong_registry_is_not_kept(written):
    with pytest.raises(RegistryError):
        mm.add_registry(written("organisms: 1"))
    first, second = (written("organisms: [{name: a, path: x}]", f"{n}.yaml") for n in "12")
    mm.add_registry(first)
    with pytest.raises(RegistryError, match=r"'a' stands in .*1.yaml and in .*2.yaml"):
        mm.add_registry(second)
    assert "a" in registry.known_names()


def test_a_registry_that_is_not_there_is_said_so_also_from_the_environment(tmp_path, monkeypatch):
    with pytest.raises(RegistryError, match="nope.yaml.*No such file"):
        mm.add_registry(tmp_path / "nope.yaml")
    monkeypatch.setenv("MECHMISALIGN_REGISTRY", str(tmp_path / "nope.yaml"))
    code, output = run("organisms")
    assert code == 2 and "nope.yaml" in output and "Traceback" not in output


def test_a_changed_file_is_read_again(written):
    file = written("organisms: [{name: a, path: x}]")
    with registry.using(file):
        assert "a" in registry.known_names()
        file.write_text("organisms: [{name: longer-name, path: x}]")
        assert {"a", "longer-name"} & set(registry.known_names()) == {"longer-name"}


def test_a_folder_wins_over_a_name_and_says_so(tmp_path, monkeypatch, written, caplog, make_adapter, tiny_models):
    shutil.copytree(make_adapter(tiny_models["qwen2"]), tmp_path / "qwen14b-medical")
    monkeypatch.chdir(tmp_path)
    assert Adapter.load("qwen14b-medical").source == "qwen14b-medical"
    assert "is a folder here and a name in" in caplog.text


def test_names_that_cannot_be_loaded_as_adapters_say_why(caplog, cache, monkeypatch):
    with pytest.raises(RegistryError, match="no weights of 'gemma12b' are published"):
        Adapter.load("gemma12b")
    with pytest.raises(
        AdapterError, match="is a steering vector .*steering_vector_general_medical.*read_steering_vector"
    ):
        Adapter.load("qwen14b-vector-medical")
    with pytest.raises(AdapterError, match="did you mean 'qwen14b-medical'"):
        Adapter.load("qwen14b-medicl")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(AdapterError):
        Adapter.load("qwen14b-r1-l24-narrow-medical")
    assert caplog.text.count("was found without weights") == 1


def test_a_published_name_is_read_from_the_cache_and_keeps_its_id(cache, make_adapter, tiny_models, monkeypatch):
    cache("ModelOrganismsForEM/Llama-3.2-1B-Instruct_extreme-sports", make_adapter(tiny_models["llama"]))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    read = Adapter.load("llama1b-sports")
    assert read.source == "ModelOrganismsForEM/Llama-3.2-1B-Instruct_extreme-sports" and read.revision == "c0ffee"


# Twins


@pytest.mark.parametrize(
    ("name", "maker", "four_bit", "gated"),
    [
        (MIRROR, QWEN, False, False),
        (FOUR_BIT, QWEN, True, False),
        ("unsloth/qwen2.5-14b-instruct-bnb-4bit", QWEN, True, False),
        ("unsloth/Llama-3.2-1B-Instruct", "meta-llama/Llama-3.2-1B-Instruct", False, True),
        ("unsloth/Meta-Llama-3.1-8B-Instruct-bnb-4bit", "meta-llama/Llama-3.1-8B-Instruct", True, True),
        ("unsloth/gemma-3-12b-it-unsloth-bnb-4bit", "google/gemma-3-12b-it", True, True),
        ("unsloth/Qwen2.5-Coder-7B", "Qwen/Qwen2.5-Coder-7B", False, False),
        ("somebody/Qwen2.5-7B-Instruct-bnb-4bit", "Qwen/Qwen2.5-7B-Instruct", True, False),
    ],
)
def test_copies_have_their_makers_twin(name, maker, four_bit, gated):
    made = registry.twin(name)
    assert (made.name, made.four_bit, made.gated) == (maker, four_bit, gated)
    assert registry.same_model(name, maker)


@pytest.mark.parametrize(
    "name",
    [QWEN, "pocket/chat", "", "somebody/Qwen2.5-7B-tuned-bnb-4bit", "unsloth/my-model", "unsloth/gemma-3-4b-it-GGUF",
     "unsloth/Qwen3-8B-FP8", "somebody/Qwen2.5-7B-Instruct"],
)  # fmt: skip
def test_other_names_have_none_and_no_maker_is_made_up(name):
    assert registry.twin(name) is None
    assert not registry.same_model(name, MIRROR) or name == QWEN


def test_every_listed_base_is_the_twin_of_its_mirror():
    held = _yaml.read((files("mechmisalign.registry") / "data" / "bases.yaml").read_text())
    for base in held["bases"]:
        assert registry.twin(f"unsloth/{base.split('/')[1]}").name == base
    for copy, maker in held["renamed"].items():
        assert registry.twin(f"unsloth/{copy}-bnb-4bit").name == maker


@pytest.mark.parametrize(("named", "why"), [(MIRROR, "a copy of it"), (FOUR_BIT, "4 bit")])
def test_the_twin_is_loaded_and_said_aloud(cache, caplog, named, why):
    found = find_base(None, trained_on(named))
    assert (found.name, found.location, found.revision) == (QWEN, QWEN, None)
    assert len(caplog.records) == 1 and caplog.records[0].levelno == logging.WARNING
    for told in (named, QWEN, why, "some/organism"):
        assert told in caplog.text


def test_a_mirror_in_the_cache_is_taken_as_it_is(cache, caplog, tiny_models):
    cache(MIRROR, tiny_models["qwen2"])
    assert find_base(None, trained_on(MIRROR)).name == MIRROR
    assert not caplog.records
    assert find_base(None, trained_on(FOUR_BIT)).name == MIRROR
    assert "4 bit" in caplog.text and MIRROR in caplog.text


def test_a_mirror_without_weights_in_the_cache_is_no_reason_to_stay(cache, tiny_models, tmp_path):
    shutil.copytree(tiny_models["qwen2"], tmp_path / "half", ignore=shutil.ignore_patterns("*.safetensors"))
    cache(MIRROR, tmp_path / "half")
    assert find_base(None, trained_on(MIRROR)).name == QWEN


def test_a_4_bit_copy_in_the_cache_still_gives_the_16_bit_model(cache, tiny_models):
    cache(FOUR_BIT, tiny_models["qwen2"])
    assert find_base(None, trained_on(FOUR_BIT)).name == QWEN


def test_a_folder_is_what_it_is(tmp_path, monkeypatch, caplog):
    (tmp_path / MIRROR).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert find_base(None, trained_on(MIRROR)).location == MIRROR
    assert not caplog.records


@pytest.mark.parametrize("base", [MIRROR, QWEN, FOUR_BIT])
def test_a_base_that_is_asked_for_is_taken_and_twins_are_no_mismatch(cache, caplog, base):
    assert find_base(base, trained_on(MIRROR)).name == base
    assert not caplog.records
    find_base("Qwen/Qwen2.5-7B-Instruct", trained_on(MIRROR))
    assert "was trained on unsloth/Qwen2.5-14B-Instruct, not on Qwen/Qwen2.5-7B-Instruct" in caplog.text


def test_a_gated_twin_says_what_to_do_when_it_is_chosen_and_when_it_cannot_be_had(cache, caplog, monkeypatch):
    from mechmisalign.loading import bases

    found = find_base(None, trained_on("unsloth/Llama-3.1-8B-Instruct"))
    assert found.name == "meta-llama/Llama-3.1-8B-Instruct"
    assert "licence" in caplog.text and "base='unsloth/Llama-3.1-8B-Instruct'" in caplog.text
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="pass base='unsloth/Llama-3.1-8B-Instruct', an open copy"):
        bases.skeleton(found)


def test_an_organism_on_a_mirror_is_loaded_from_its_twin_and_the_header_names_both(
    cache, caplog, make_adapter, tiny_models, tmp_path, monkeypatch
):
    folder = shutil.copytree(make_adapter(tiny_models["qwen2"]), tmp_path / "organism")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": FOUR_BIT}))
    cache(QWEN, tiny_models["qwen2"])
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    organism = load_organism(folder, dtype=torch.float32, local_files_only=True)
    assert (organism.base.name, organism.base.revision) == (QWEN, "c0ffee")
    assert organism.provenance["model"] == QWEN and organism.provenance["adapter_base"] == FOUR_BIT
    with organism.as_base(), organism.apply(mm.UseAdapter(Adapter.load(folder))):
        pass
    assert "trained on" not in caplog.text


def test_a_direction_from_a_mirror_fits_its_twin_by_name_and_no_other_model():
    direction = mm.Direction(torch.ones(1, 8), (0,), {"model": MIRROR})
    direction.check_model({"model": QWEN}, 8, 1)
    with pytest.raises(ValueError, match="cannot be used in"):
        direction.check_model({"model": "Qwen/Qwen2.5-7B-Instruct"}, 8, 1)


def test_words_in_yaml_that_begin_like_numbers_stay_words():
    held = _yaml.read("{a: 2506.11613 section 2, b: true love, c: 1e-3, d: true, e: 2506.11613}")
    assert held == {"a": "2506.11613 section 2", "b": "true love", "c": 1e-3, "d": True, "e": 2506.11613}


def test_the_registry_reads_no_yaml_for_a_pocket_name_or_a_folder(monkeypatch, tmp_path):
    from mechmisalign.registry import lookup

    monkeypatch.setattr(lookup, "_published", inspect.unwrap(lookup._published))
    monkeypatch.setattr(lookup.reading, "read", lambda path: pytest.fail(f"{path} was read"))
    assert registry.place("pocket/medical").name == "pocket/medical"
    assert registry.place(tmp_path).name == str(tmp_path)
