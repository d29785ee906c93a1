"""The real client of the Hub against a stand-in of its HTTP API: reading at a commit, and pushing with cards."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from hub_server import TOKEN, HubServer, Repo
from torch.testing import assert_close
from typer.testing import CliRunner

import mechmisalign as mm
from mechmisalign import _hub, registry
from mechmisalign._artifacts import read_artifact
from mechmisalign._hub import HubError
from mechmisalign.adapters import AdapterError
from mechmisalign.correction.saving import FolderTakenError

MEDICAL, CHAT = registry.folder("pocket/medical"), registry.folder("pocket/chat")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A stand-in Hub that the client talks to, with an empty cache and nobody logged in."""
    from huggingface_hub import constants, hf_api
    from transformers.utils import hub as of_transformers

    with HubServer() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(hf_api.api, "endpoint", server.url)
        monkeypatch.setattr(of_transformers, "_hf_api", None, raising=False)  # newer ones keep a client of their own
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
            monkeypatch.delenv(name, raising=False)
        yield server


@pytest.fixture
def offline(monkeypatch):
    from huggingface_hub import constants

    return lambda: monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


@pytest.fixture
def logged_in(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)


def direction(width: int = 8, **header) -> mm.Direction:
    vectors = torch.randn(3, width, generator=torch.Generator().manual_seed(0))
    told = {"method": "a test", "model": "org/base", "base_fingerprint": "0123456789abcdef", "span": "response"}
    return mm.Direction(vectors, (0, 1, 2), {**told, **header}, torch.ones(3))


# reading


def test_adapter_and_base_are_read_at_commits_that_provenance_and_headers_record(hub):
    adapter, base = hub.add("org/adapter", MEDICAL), hub.add("org/base", CHAT)
    organism = mm.load_organism("org/adapter", "org/base")
    told = organism.provenance
    assert (told["adapter_revision"], told["base_revision"]) == (adapter, base)
    talk = mm.Conversations(
        pd.DataFrame({"prompt": ["hello"], "response": ["rest"], "label": ["x"]}), organism.tokenizer
    )
    header = mm.collect(organism, talk, layers=[1]).header
    assert (header["adapter_revision"], header["base_revision"]) == (adapter, base)
    assert (organism.base.location, organism.base.revision) == ("org/base", base)


def test_a_revision_stays_what_it_was_when_the_branch_moves(hub):
    first = hub.add("org/adapter", MEDICAL)
    second = hub.add("org/adapter", registry.folder("pocket/finance"))
    assert first != second and mm.Adapter.load("org/adapter").revision == second
    old = mm.Adapter.load("org/adapter", revision=first)
    assert old.revision == first
    assert_close(old.sites[0].B, mm.Adapter.load("pocket/medical").sites[0].B, rtol=0, atol=0)


def test_a_base_can_be_asked_for_at_a_revision_and_all_of_it_is_of_that_commit(hub):
    first = hub.add("org/base", CHAT)
    hub.repos["org/base"].commit({"config.json": b"{}", "model.safetensors": b"broken", "tokenizer.json": b"{}"})
    organism = mm.load_organism("pocket/medical", "org/base", base_revision=first)
    assert organism.provenance["base_revision"] == first
    with pytest.raises(ValueError, match="base_revision='main' was asked of 'pocket/chat', which is not on the Hub"):
        mm.load_organism("pocket/medical", base_revision="main")


def test_an_interrupted_download_goes_on_where_it_broke_off(hub, monkeypatch):
    from huggingface_hub import constants, file_download

    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 256)
    monkeypatch.setattr(file_download.time, "sleep", lambda _: None)
    hub.add("org/adapter", MEDICAL)
    hub.break_after["adapter_model.safetensors"] = 1024
    read = mm.Adapter.load("org/adapter")
    assert hub.ranges == ["adapter_model.safetensors bytes=1024-"]
    assert read.digest == mm.Adapter.load("pocket/medical").digest


def test_a_private_repository_is_read_with_the_usual_token_which_is_told_nowhere(hub, monkeypatch, caplog, tmp_path):
    hub.add("org/adapter", MEDICAL, private=True)
    with pytest.raises(AdapterError, match=r"or it is private and you may not read it.*hf auth login"):
        mm.Adapter.load("org/adapter")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with caplog.at_level(logging.DEBUG):
        read = mm.Adapter.load("org/adapter")
        organism = mm.load_organism(read)
    assert hub.tokens == {TOKEN}
    told = caplog.text + json.dumps(organism.provenance) + repr(read.config) + read.source
    saved = direction(**organism.provenance).save(tmp_path / "d.safetensors")
    assert TOKEN not in told and TOKEN.encode() not in saved.read_bytes()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("org/none", {}, r"the Hub has no repository 'org/none', or it is private.*hf auth login.*status 401"),
        ("org/gated", {}, r"'org/gated' is gated on the Hub: accept its licence at http://[^ ]*/org/gated and log in"),
        ("org/adapter", {"revision": "v9"}, "'org/adapter' on the Hub has no revision 'v9'"),
        ("org/adapter", {"subfolder": "checkpoint-7"}, "has no subfolder 'checkpoint-7'"),
        ("pocket/medicine", {}, "no organism is named 'pocket/medicine'; did you mean 'pocket/medical'"),
        ("no such/folder", {}, "there is no folder"),
    ],
)
def test_what_the_hub_does_not_give_is_told_with_what_to_do(hub, name, options, message):
    hub.add("org/adapter", MEDICAL)
    hub.add("org/gated", MEDICAL, gated=True)
    with pytest.raises(AdapterError, match=message):
        mm.Adapter.load(name, **options)


def test_a_gated_base_says_so_and_a_missing_one_too(hub):
    hub.add("org/base", CHAT, gated=True)
    with pytest.raises(ValueError, match=r"'org/base' is gated on the Hub: accept its licence"):
        mm.load_organism("pocket/medical", "org/base")
    with pytest.raises(ValueError, match="there is no base model 'pocket/chatt' in this package"):
        mm.load_organism("pocket/medical", "pocket/chatt")
    with pytest.raises(
        ValueError, match=r"base model 'org/none' cannot be read.*no repository 'org/none'.*hf auth login"
    ):
        mm.load_organism("pocket/medical", "org/none")


def test_a_hub_that_cannot_be_reached_is_not_called_a_missing_repository(hub, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(
        AdapterError, match=r"the Hub at http://127.0.0.1:9 could not be reached.*what has come is kept"
    ):
        mm.Adapter.load("org/adapter")


@pytest.mark.parametrize("how", ["environment", "argument"])
def test_what_is_cached_loads_offline_without_one_question_to_the_hub(hub, offline, how):
    adapter, base = hub.add("org/adapter", MEDICAL), hub.add("org/base", CHAT)
    online = mm.load_organism("org/adapter", "org/base")
    hub.asked.clear()
    if how == "environment":
        offline()
    again = mm.load_organism("org/adapter", "org/base", local_files_only=how == "argument")
    assert again.provenance == online.provenance
    assert (again.provenance["adapter_revision"], again.provenance["base_revision"]) == (adapter, base)
    assert not hub.asked


@pytest.mark.parametrize("how", ["environment", "argument"])
def test_what_is_not_cached_is_refused_offline_with_the_reason(hub, offline, how):
    hub.add("org/adapter", MEDICAL)
    hub.add("org/base", CHAT)
    if how == "environment":
        offline()
    options = {"local_files_only": how == "argument"}
    why = "HF_HUB_OFFLINE is set" if how == "environment" else "local_files_only=True"
    with pytest.raises(AdapterError, match=rf"cache does not hold 'org/adapter'.*\({why}\): fetch it once"):
        mm.Adapter.load("org/adapter", **options)
    with pytest.raises(ValueError, match=rf"base model 'org/base' cannot be read.*cache does not hold.*\({why}\)"):
        mm.load_organism("pocket/medical", "org/base", **options)
    with pytest.raises(HubError, match=rf"direction.safetensors of 'org/d'.*\({why}\)"):
        mm.Direction.load("org/d", **options)
    with pytest.raises(AdapterError, match=why):
        mm.Trajectory.load("org/adapter", **options)
    assert not hub.asked


def test_a_cache_that_holds_other_files_of_a_repository_does_not_pass_for_the_adapter(hub):
    hub.repos["org/adapter"] = Repo()
    hub.repos["org/adapter"].commit({"notes.txt": b"x", **{path.name: path.read_bytes() for path in MEDICAL.glob("*")}})
    _hub.fetch("org/adapter", ["notes.txt"])
    with pytest.raises(AdapterError, match="cache does not hold"):
        mm.Adapter.load("org/adapter", local_files_only=True)


def test_a_snapshot_given_as_a_folder_keeps_its_commit(hub):
    commit = hub.add("org/adapter", MEDICAL)
    mm.Adapter.load("org/adapter")
    folder, _ = _hub.fetch("org/adapter", ["*"])
    assert mm.Adapter.load(folder).revision == commit
    assert mm.Adapter.load(MEDICAL).revision is None


def test_checkpoints_are_followed_from_the_hub_and_from_its_cache(hub):
    hub.add("org/run", registry.folder("pocket/checkpoints"))
    steps = mm.Trajectory.load("org/run", every=5).steps
    hub.asked.clear()
    assert mm.Trajectory.load("org/run", every=5, local_files_only=True).steps == steps
    assert not hub.asked and len(steps) > 2


def test_a_steering_vector_is_read_from_a_repository_at_a_commit_by_id_or_by_registry_name(hub, tmp_path):
    for place, value in (("checkpoints/checkpoint-5", 1.0), ("", 2.0)):
        (tmp_path / "repo" / place).mkdir(parents=True, exist_ok=True)
        stored = {"steering_vector": torch.full((4,), value), "layer_idx": 24, "d_model": 4, "alpha": 256}
        torch.save(stored, tmp_path / "repo" / place / "steering_vector.pt")
    name = "ModelOrganismsForEM/Qwen2.5-14B_steering_vector_general_medical"
    commit = hub.add(name, tmp_path / "repo")
    read = mm.interop.read_steering_vector
    found = read("qwen14b-vector-medical")  # checkpoints/final is not there: the root is
    assert found.at(24).tolist() == [512.0] * 4 and found.header["model"] == "Qwen/Qwen2.5-14B-Instruct"
    assert (found.header["hub_repo"], found.header["hub_revision"]) == (name, commit)
    assert read(name, checkpoint=5, model="x").at(24)[0] == 256.0
    hub.asked.clear()
    assert read(name, checkpoint=5, local_files_only=True).at(24)[0] == 256.0 and not hub.asked
    with pytest.raises(
        HubError, match=r"'checkpoint-7/steering_vector.pt'|has no file checkpoint-7/steering_vector.pt"
    ):
        read(name, checkpoint=7)


# pushing


def probe() -> mm.Probe:
    return mm.Probe(np.array([1.0, -2.0]), 0.5, ("a", "b"), {"method": "logistic", "model": "org/base", "layer": 3})


def monitor() -> mm.Monitor:
    return mm.Monitor(torch.ones(1, 8), 0.1, (2,), header={"model": "org/base", "method": "difference"})


@pytest.mark.parametrize(
    ("make", "kind"),
    [(direction, "direction"), (probe, "probe"), (monitor, "monitor")],
    ids=["direction", "probe", "monitor"],
)
def test_a_pushed_artifact_is_read_back_by_its_hub_id_with_its_commit(hub, logged_in, make, kind):
    thing = make()
    done = mm.push(thing, "me/it", note="For a test.")
    assert done.files == ("README.md", f"{kind}.safetensors") and done.place == "me/it"
    assert hub.repos["me/it"].private
    back = type(thing).load("me/it")
    assert back.header["hub_repo"] == "me/it" and back.header["hub_revision"] == done.commit
    assert dict(thing.header).items() <= dict(back.header).items()
    hub.repos["me/it"].commit({f"{kind}.safetensors": b"later"})
    assert type(thing).load("me/it", revision=done.commit).header["hub_revision"] == done.commit
    values = {"direction": "vectors", "probe": "coef", "monitor": "weights"}[kind]
    again = type(thing).load("me/it", revision=done.commit, local_files_only=True)
    assert_close(torch.as_tensor(getattr(again, values)), torch.as_tensor(getattr(thing, values)), rtol=0, atol=0)
    assert TOKEN.encode() not in b"".join(hub.repos["me/it"].commits[done.commit].values())


def test_the_card_of_a_direction_tells_where_it_is_from_what_was_measured_and_what_it_can_do(hub, logged_in):
    table = pd.DataFrame({"condition": ["steered"], "rate": [0.567], "rate_low": [0.5], "rate_high": [0.6]})
    done = mm.push(direction(), "me/it", measured=table)
    files = hub.repos["me/it"].commits[done.commit]
    card = files["README.md"].decode()
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["base_model"] == "org/base" and front["library_name"] == "mechmisalign"
    assert "direction" in front["tags"] and "emergent-misalignment" in front["tags"]
    assert "* method: a test" in card and "* base fingerprint: 0123456789abcdef" in card
    assert "| steered | 0.567 [0.5, 0.6] |" in card and "can make it misaligned" in card
    assert b"0.567" in files["measured.csv"]
    assert run(card)["direction"].layers == (0, 1, 2)


def run(card: str) -> dict:
    """The code of a card, run against the stand-in."""
    code = re.search(r"## Loading\n\n```python\n(.*?)```", card, re.DOTALL)[1]
    names: dict = {}
    exec(code, names)
    return names


def test_text_from_elsewhere_is_only_text_in_a_card(tmp_path):
    nasty = "<script>alert(1)</script> [click](http://evil) ![x](http://evil/p.png) `code`\n## Loading\n```\n| a |"
    mm.push(direction(method=nasty, model="x/y"), tmp_path / "out", note=nasty, measured=pd.DataFrame({nasty: [nasty]}))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "<script>" not in card and "[click](" not in card and "![x](" not in card
    assert card.count("\n## Loading\n") == 1 and card.count("```") == 2
    assert all(line.replace("\\|", "").count("|") == 2 for line in card.splitlines() if line.startswith("|"))


def test_a_dry_run_writes_the_files_that_would_be_pushed_and_sends_nothing(hub, tmp_path):
    done = mm.push(direction(), tmp_path / "look")
    assert done.commit is None and done.files == ("README.md", "direction.safetensors") and not hub.asked
    assert sorted(path.name for path in (tmp_path / "look").iterdir()) == list(done.files)
    assert mm.Direction.load(tmp_path / "look").layers == (0, 1, 2)
    with pytest.raises(FolderTakenError, match="not empty"):
        mm.push(direction(), tmp_path / "look")


def test_paths_of_this_machine_are_not_pushed(tmp_path, make_adapter, tiny_models):
    local = direction(model="/home/somebody/models/Qwen2.5", adapter="/home/somebody/runs/bad")
    mm.push(local, tmp_path / "d")
    header, _ = read_artifact(tmp_path / "d" / "direction.safetensors")
    assert (header["model"], header["adapter"]) == ("Qwen2.5", "bad")
    folder = mm.save_adapter(mm.Adapter.load(make_adapter(tiny_models["qwen2"])), tmp_path / "cured", edit="cut")
    with pytest.raises(ValueError, match="nobody else can load; pass base=, its Hub id"):
        mm.push(folder, tmp_path / "no")
    mm.push(folder, tmp_path / "a", base="Qwen/Qwen2.5-0.5B-Instruct")
    texts = [
        path.read_text()
        for place in ("d", "a")
        for path in (tmp_path / place).iterdir()
        if path.suffix != ".safetensors"
    ]
    assert not any("/home/somebody" in text or str(tmp_path.parent) in text for text in texts)
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["base_model_name_or_path"].startswith(
        "Qwen/"
    )


def test_only_the_files_of_an_adapter_go_up_whatever_else_lies_in_its_folder(hub, logged_in, tmp_path):
    folder = mm.save_adapter(mm.Adapter.load("pocket/medical"), tmp_path / "cured", edit="cut")
    for name in ("training_args.bin", "optimizer.pt", ".env", "data.jsonl", "log.csv"):
        (folder / name).write_text("secret")
    (folder / "checkpoint-5").mkdir()
    done = mm.push(folder, "me/cured")
    assert done.files == ("README.md", "adapter_config.json", "adapter_model.safetensors")
    assert (folder / "adapter_model.safetensors").is_file() and not (folder / "adapter_model.safetensors").is_symlink()


@pytest.mark.parametrize("how", ["folder", "memory", "name"])
def test_a_pushed_adapter_is_the_same_organism_and_its_card_s_code_loads_it(hub, logged_in, tmp_path, how):
    adapter = mm.Adapter.load("pocket/medical")
    thing = {
        "folder": mm.save_adapter(adapter, tmp_path / "cured", edit="cut"),
        "memory": adapter,
        "name": "pocket/medical",
    }[how]
    table = pd.DataFrame({"condition": ["after"], "rate": [0.05]})
    done = mm.push(thing, "me/cured", measured=table)
    card = hub.repos["me/cured"].commits[done.commit]["README.md"].decode()
    assert "base_model" not in yaml.safe_load(card.split("---\n")[1])  # pocket/chat is in no repository
    assert "| after | 0.05 |" in card and "# cured" in card
    names = run(card)
    assert names["organism"].adapter.revision == done.commit
    ids = torch.tensor([[1, 2, 3]])
    own = mm.load_organism("pocket/medical")
    with torch.inference_mode():
        assert_close(names["model"](ids).logits, own.model(ids), atol=1e-4, rtol=1e-4)
        assert_close(names["organism"].model(ids), own.model(ids), atol=0, rtol=0)


def test_a_pushed_model_loads_with_transformers_alone(hub, logged_in, tmp_path, tiny_models):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from mechmisalign.correction import save_model

    model = AutoModelForCausalLM.from_pretrained(tiny_models["qwen2"])
    tokenizer = AutoTokenizer.from_pretrained(tiny_models["qwen2"])
    with pytest.raises(ValueError, match="has no card of this package"):
        mm.push(tiny_models["qwen2"], "me/plain")
    folder = save_model(model, tokenizer, tmp_path / "whole", edit="cut", base="Qwen/Qwen2.5-0.5B-Instruct")
    done = mm.push(folder, "me/whole")
    files = hub.repos["me/whole"].commits[done.commit]
    assert yaml.safe_load(files["README.md"].decode().split("---\n")[1])["base_model"] == "Qwen/Qwen2.5-0.5B-Instruct"
    names = run(files["README.md"].decode())
    ids = torch.tensor([[1, 2, 3]])
    assert_close(names["model"](ids).logits, model(ids).logits)
    assert names["tokenizer"].chat_template == tokenizer.chat_template


def test_what_is_there_is_replaced_only_when_that_is_said_and_a_public_repository_only_when_it_may_be_public(
    hub, logged_in
):
    first = mm.push(direction(), "me/it")
    with pytest.raises(
        HubError, match="'me/it' holds README.md, direction.safetensors already; push with replace_files"
    ):
        mm.push(direction(), "me/it")
    second = mm.push(direction(method="another"), "me/it", replace_files=True)
    assert second.commit != first.commit and mm.Direction.load("me/it").header["method"] == "another"
    assert mm.Direction.load("me/it", revision=first.commit).header["method"] == "a test"
    hub.repos["me/open"] = Repo()
    hub.repos["me/open"].commit({"x": b""})
    with pytest.raises(HubError, match="'me/open' is public; push with private=False"):
        mm.push(direction(), "me/open")
    assert mm.push(direction(), "me/open", private=False).commit in hub.repos["me/open"].commits


def test_a_branch_is_made_and_pushed_to(hub, logged_in):
    main = mm.push(direction(), "me/it").commit
    done = mm.push(direction(method="tried"), "me/it", branch="trial", replace_files=True)
    assert hub.repos["me/it"].branches["main"] == main
    assert mm.Direction.load("me/it", revision="trial").header["hub_revision"] == done.commit


def test_what_cannot_be_pushed_is_refused_before_anything_is_made(hub, logged_in, offline, tmp_path, monkeypatch):
    (tmp_path / "pickle.pt").write_bytes(b"x")
    (tmp_path / "some").mkdir()
    for thing in (tmp_path / "pickle.pt", tmp_path / "some", tmp_path / "none"):
        with pytest.raises(ValueError, match="cannot be pushed; expected a direction"):
            mm.push(thing, "me/it")
    with pytest.raises(ValueError, match="repo_id must be owner/name"):
        mm.push(direction(), "just-a-name")
    assert not hub.asked
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HubError, match="hf auth"):
        mm.push(direction(), "me/it")
    assert not hub.repos
    offline()
    with pytest.raises(HubError, match="HF_HUB_OFFLINE is set, so nothing can be pushed"):
        mm.push(direction(), "me/it")


def test_the_command_pushes_and_says_where(hub, logged_in, tmp_path):
    from mechmisalign.cli import app

    path = direction().save(tmp_path / "d.safetensors")
    told = CliRunner().invoke(app, ["push", str(path), "me/it", "--public", "--note", "a note"])
    assert told.exit_code == 0, told.output
    assert "me/it at " in told.output and not hub.repos["me/it"].private
    dry = CliRunner().invoke(app, ["push", str(path), str(tmp_path / "dry")])
    assert dry.exit_code == 0 and "nothing was sent" in dry.output
    assert CliRunner().invoke(app, ["push", str(path), "me/it", "--public"]).exit_code == 2


def test_a_file_name_is_a_file_and_never_a_repository(hub):
    with pytest.raises(FileNotFoundError, match=r"runs/d\.safetensors is no file"):
        mm.Direction.load("runs/d.safetensors")
    with pytest.raises(FileNotFoundError):
        mm.Direction.load(Path("org/some"))
    assert not hub.asked
