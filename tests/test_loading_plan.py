"""Plans of loads: what they say is what a load then takes, and nothing is fetched or read for them."""

import json
import shutil

import pytest
import torch
from conftest import ALL_MODULES
from hub_server import HubServer
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import mechmisalign as mm
from mechmisalign.cli import app
from mechmisalign.loading import bases, planning
from mechmisalign.loading import plan as plans
from mechmisalign.loading.headers import read_header, stored_dtype, stored_tensors
from mechmisalign.loading.plan import DISK, DoesNotFitError, LoadingPlan, tell, told_bytes

GIB = 2**30


@pytest.fixture(scope="module")
def base(tiny_models):
    return tiny_models["llama"]


@pytest.fixture(scope="module")
def adapter(base, make_adapter):
    return make_adapter(base, modules=ALL_MODULES, rank=2)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A stand-in of the Hub that the real client asks, and an empty cache."""
    from huggingface_hub import constants, hf_api
    from transformers.utils import hub as of_transformers

    with HubServer() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(hf_api.api, "endpoint", server.url)
        monkeypatch.setattr(of_transformers, "_hf_api", None, raising=False)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield server


@pytest.fixture
def on_the_hub(hub, base, adapter, tmp_path):
    """``me/chat`` and ``me/tuned``, which names it as its base."""
    hub.add("me/chat", base)
    copied = tmp_path / "tuned"
    shutil.copytree(adapter, copied)
    config = json.loads((copied / "adapter_config.json").read_text())
    (copied / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "me/chat"}))
    hub.add("me/tuned", copied)
    return hub


def held(organism):
    """Bytes of the weights that a loaded organism holds, without the adapter's."""
    inner = organism.model.original_model
    return sum(each.numel() * each.element_size() for name, each in inner.named_parameters() if "lora_" not in name)


@pytest.mark.parametrize("weights", ["merged", "live"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_the_weights_of_a_plan_are_those_that_a_load_holds(adapter, weights, dtype):
    planned = mm.loading_plan(adapter, weights=weights, dtype=dtype)
    organism = mm.load_organism(adapter, weights=weights, dtype=dtype)
    kind = "float32" if dtype is None else "bfloat16"
    assert planned.weights == {kind: held(organism)}
    assert planned.adapter == 4 * sum(site.A.numel() + site.B.numel() for site in organism.adapter.sites)
    assert (planned.download, planned.fits, planned.advice) == (0, True, ())
    assert held(organism) + planned.adapter <= planned.peak["host"] <= 1.5 * held(organism) + 4 * planned.adapter


def test_a_plan_by_places_adds_up_to_one_without(adapter):
    split = {"model.embed_tokens": 0, "model.layers.0": 1, "model.layers": "cpu", "": "disk"}
    planned = mm.loading_plan(adapter, weights="live", device_map=split)
    alone = mm.loading_plan(adapter, weights="live", device="cpu")
    assert set(planned.peak) == {"cuda:0", "cuda:1", "host", "files"}
    assert sum(planned.peak.values()) == sum(alone.peak.values())
    organism = mm.load_organism(adapter)
    embedding = organism.model.original_model.get_input_embeddings().weight
    assert planned.peak["cuda:0"] == 4 * embedding.numel()
    assert "free memory not known" in str(planned)  # of GPUs that are not here


def test_an_automatic_map_is_planned_as_accelerate_makes_it(adapter):
    planned = mm.loading_plan(adapter, weights="live", device_map="auto")
    expected = {"host"} if not torch.cuda.is_available() else {"cuda:0"}
    assert {place for place, size in planned.peak.items() if size > planned.adapter} == expected


def test_the_precision_of_the_tensors_counts_and_not_what_the_config_says(base, adapter, tmp_path):
    lying = tmp_path / "lying"
    shutil.copytree(base, lying)
    tensors = load_file(base / "model.safetensors")
    save_file({name: each.bfloat16() for name, each in tensors.items()}, lying / "model.safetensors", {"format": "pt"})
    config = json.loads((lying / "config.json").read_text())
    (lying / "config.json").write_text(json.dumps(config | {"dtype": "float32"}))
    planned = mm.loading_plan(adapter, lying)
    organism = mm.load_organism(adapter, lying)
    assert next(organism.model.parameters()).dtype == torch.bfloat16
    assert planned.weights == {"bfloat16": held(organism)}
    assert next(mm.load_organism(adapter, lying, dtype=torch.float32).model.parameters()).dtype == torch.float32


def test_headers_are_what_the_files_hold(base):
    header, tensors = read_header(base / "model.safetensors"), load_file(base / "model.safetensors")
    assert {name: (each.dtype, each.shape, each.bytes) for name, each in header.items()} == {
        name: (each.dtype, tuple(each.shape), each.numel() * each.element_size()) for name, each in tensors.items()
    }
    assert stored_dtype(header) == torch.float32
    assert stored_dtype(None) is None


def test_a_file_that_is_no_safetensors_is_refused(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(ValueError, match="does not begin as a safetensors file does"):
        read_header(tmp_path / "model.safetensors")


def test_a_plan_of_the_hub_tells_what_is_to_be_fetched_and_fetches_no_weights(on_the_hub, base, adapter):
    sizes = [folder.stat().st_size for folder in (base / "model.safetensors", adapter / "adapter_model.safetensors")]
    planned = mm.loading_plan("me/tuned")
    assert planned.download == sum(sizes)
    assert (planned.adapter, planned.base) == (sizes[1], "me/chat")
    fetched = [path for path in on_the_hub.asked if path.startswith("GET") and "adapter_model" in path]
    assert not fetched
    assert stored_tensors(bases.Base("me/chat", "me/chat")) == read_header(base / "model.safetensors")
    organism = mm.load_organism("me/tuned")
    assert planned.weights == {"float32": held(organism)}
    assert mm.loading_plan("me/tuned").download == 0


def test_offline_a_plan_says_that_it_cannot_know(on_the_hub, base, monkeypatch):
    from huggingface_hub import constants, hf_hub_download

    for name in ("config.json", "adapter_config.json", "adapter_model.safetensors"):
        hf_hub_download("me/chat" if name == "config.json" else "me/tuned", name)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    planned = mm.loading_plan("me/tuned")
    assert planned.download is None
    assert "not known (the network may not be asked" in str(planned)
    assert planned.weights == {"float32": sum(each.bytes for each in read_header(base / "model.safetensors").values())}


def test_a_whole_model_is_planned_too(base):
    planned = mm.loading_plan(base)
    assert planned.weights == {"float32": sum(each.bytes for each in read_header(base / "model.safetensors").values())}


def test_a_quantised_checkpoint_takes_what_its_tensors_do(base, adapter, tmp_path):
    quantised = tmp_path / "quantised"
    shutil.copytree(base, quantised)
    config = json.loads((quantised / "config.json").read_text())
    own = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (quantised / "config.json").write_text(json.dumps(config | {"quantization_config": own}))
    planned = mm.loading_plan(adapter, quantised, weights="live")
    stored = sum(each.bytes for each in read_header(quantised / "model.safetensors").values())
    assert planned.weights["quantised"] == pytest.approx(stored, rel=1e-3)


def example(**changes):
    plan = {
        "organism": "o", "base": "b", "weights": {"float32": 28 * GIB}, "adapter": 5, "download": 0,
        "peak": {"host": 5, "cuda:0": 29 * GIB}, "free": {"host": 100 * GIB, "cuda:0": 24 * GIB},
    }  # fmt: skip
    return LoadingPlan(**(plan | changes))


def test_what_a_gpu_has_no_room_for_is_refused_with_what_to_do(adapter, monkeypatch):
    monkeypatch.setattr(planning, "_free", lambda places: dict.fromkeys(places, 1000))
    monkeypatch.setattr(planning, "TOLD_FROM", 0)
    with pytest.raises(DoesNotFitError, match=r"(?s)does not fit.*bfloat16.*device_map='auto'.*4 bit"):
        mm.load_organism(adapter, device="cuda:0")


def test_what_the_host_has_no_room_for_is_warned_of(caplog):
    short = example(peak={"host": 29 * GIB}, free={"host": 8 * GIB})
    tell(short)
    assert "may not fit" in caplog.text
    assert short.short == {"host": 21 * GIB}


def test_a_load_that_is_big_is_told_of_once_and_a_small_one_is_not(adapter, monkeypatch, capsys):
    mm.load_organism(adapter)
    assert "  weights   " not in capsys.readouterr().err
    monkeypatch.setattr(planning, "TOLD_FROM", 0)
    mm.load_organism(adapter)
    printed = capsys.readouterr()
    assert printed.err.count("  weights   ") == 1
    assert printed.out == ""


def test_bytes_are_told_for_people():
    assert [told_bytes(size) for size in (0, 999, 1024, 28 * GIB, 2000 * GIB)] == [
        "0 B", "999 B", "1.0 KiB", "28.0 GiB", "2.0 TiB"
    ]  # fmt: skip


def test_the_disk_of_downloads_counts_as_a_place(on_the_hub, monkeypatch):
    monkeypatch.setattr(planning, "_free", lambda places: {place: 1000 if place == DISK else GIB for place in places})
    planned = mm.loading_plan("me/tuned")
    assert set(planned.short) == {DISK}
    assert "make room for" in planned.advice[0]


def test_the_command_prints_the_plan_and_its_exit_code_says_whether_it_fits(adapter, monkeypatch):
    runner = CliRunner()
    done = runner.invoke(app, ["plan", str(adapter), "--dtype", "bfloat16"])
    assert done.exit_code == 0
    assert "in bfloat16" in done.stdout
    monkeypatch.setattr(planning, "_free", lambda places: dict.fromkeys(places, 10))
    done = runner.invoke(app, ["plan", str(adapter)])
    assert (done.exit_code, "does not fit" in done.stdout) == (1, True)
    done = runner.invoke(app, ["plan", "pocket/nobody"])
    assert done.exit_code == 2


def test_places_that_contradict_each_other_are_refused(adapter):
    for asked, why in (
        ({"device": "cpu", "device_map": "auto"}, "give one of them"),
        ({"device_map": "somehow"}, "device_map must be one of"),
    ):
        with pytest.raises(ValueError, match=why):
            mm.load_organism(adapter, **asked)
        with pytest.raises(ValueError, match=why):
            mm.loading_plan(adapter, **asked)
    assert plans.TOLD_FROM > GIB
