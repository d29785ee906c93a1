"""Each format moves a model as its own tool does: by that tool where it is installed, by a plain hook everywhere.

Files are written here by hand, after the format's description, not by the package's own writers.
"""

from __future__ import annotations

import contextlib
import json
import pickle
import struct
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch.testing import assert_close

import mechmisalign as mm
from mechmisalign import interop, models
from mechmisalign.directions import DirectionMismatchError
from mechmisalign.interop import UnsafeFileError

WIDTH, LAYERS = 48, 3
IDS = torch.tensor([[5, 6, 7, 8, 9], [9, 8, 7, 6, 5]])
EXACT = {"atol": 1e-5, "rtol": 1e-5}


@pytest.fixture(scope="module")
def organism(tiny_models, make_adapter):
    return mm.load_organism(make_adapter(tiny_models["qwen2"]))


@pytest.fixture
def plain(tiny_models):
    """The base in transformers alone."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_models["qwen2"]).eval()


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@contextlib.contextmanager
def hooked(module, edit):
    """A forward hook, as the tools register theirs."""

    def hook(_module, _inputs, output):
        return (edit(output[0]), *output[1:]) if isinstance(output, tuple) else edit(output)

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def logits(model) -> torch.Tensor:
    with torch.inference_mode():
        return model(IDS).logits


def steered(organism, *steps) -> torch.Tensor:
    """What the chat model inside the organism says under interventions of this package."""
    with organism.as_base(), organism.apply(*steps), torch.inference_mode():
        return organism.model(IDS)


def check_moves_alike(organism, plain, steps, module, edit) -> None:
    """Same logits as the hook, and not the logits without it, nor those of the block before or after."""
    with hooked(module, edit):
        wanted = logits(plain)
    assert_close(steered(organism, *steps), wanted, **EXACT)
    assert (wanted - logits(plain)).abs().max() > 1e-2


# persona vectors


def test_row_k_of_persona_vectors_is_added_after_block_k_minus_one(organism, plain, tmp_path):
    """The released code steers at "layer k" with row k by a hook on block k - 1."""
    rows = random(LAYERS + 1, WIDTH)
    torch.save(rows, tmp_path / "evil_response_avg_diff.pt")
    found = interop.read_persona_vectors(tmp_path / "evil_response_avg_diff.pt", model=organism.provenance)
    assert found.layers == (0, 1) and "evil_response_avg_diff" in found.header["method"]
    for k in (1, 2):
        step = mm.Steer(found, layers=[k - 1], strength=2.0)
        check_moves_alike(organism, plain, [step], plain.model.layers[k - 1], lambda x, k=k: x + 2.0 * rows[k])


def test_rows_of_persona_vectors_are_differences_of_hidden_states_and_the_last_is_behind_the_final_norm(
    organism, plain
):
    """Oracle: hidden_states of transformers against our residual stream, layer by layer."""
    with torch.inference_mode():
        hidden = plain(IDS, output_hidden_states=True).hidden_states
        read = {}
        for layer in range(LAYERS):
            with hooked(plain.model.layers[layer], lambda x, layer=layer: read.setdefault(layer, x)):
                plain(IDS)
    assert len(hidden) == LAYERS + 1
    for layer in range(LAYERS - 1):
        assert_close(hidden[layer + 1], read[layer])
    assert (hidden[LAYERS] - read[LAYERS - 1]).abs().max() > 0.1
    assert_close(hidden[LAYERS], plain.model.norm(read[LAYERS - 1]), **EXACT)


def test_persona_vectors_come_back_from_their_own_file(tmp_path):
    direction = mm.Direction(random(2, WIDTH), (0, 2), {"method": "x"})
    path = interop.write_persona_vectors(direction, tmp_path / "p.pt", n_layers=LAYERS)
    stored = torch.load(path, weights_only=True)
    assert stored.shape == (LAYERS + 1, WIDTH) and not stored[0].any() and not stored[2].any()
    assert torch.equal(stored[1], direction.at(0)) and torch.equal(stored[3], direction.at(2))
    back = interop.read_persona_vectors(path, keep_last=True)
    assert torch.equal(back.at(2), direction.at(2)) and back.nonzero_layers == (0, 2)
    assert interop.read_persona_vectors(path).layers == (0, 1)
    with pytest.raises(ValueError, match="layer 2, a model of 2 blocks ends at 1"):
        interop.write_persona_vectors(direction, tmp_path / "q.pt", n_layers=2)


# trained steering vectors


def test_a_published_steering_vector_is_alpha_times_itself_at_the_down_projection(organism, plain, tmp_path):
    """The released hook: output + alpha * vector, at mlp.down_proj of block layer_idx."""
    vector = random(WIDTH) / 256
    torch.save({"steering_vector": vector, "layer_idx": 1, "alpha": 256.0}, tmp_path / "steering_vector.pt")
    found = interop.read_steering_vector(tmp_path, model=organism.provenance)
    assert found.layers == (1,) and found.header["alpha"] == 256.0
    down = plain.model.layers[1].mlp.down_proj
    check_moves_alike(organism, plain, [mm.Steer(found)], down, lambda x: x + 256.0 * vector)


def test_a_norm_behind_the_mlp_makes_the_down_projection_another_place(tiny_models, make_adapter):
    """Why the docstring excludes Gemma: there the two hooks are not the same."""
    from transformers import AutoModelForCausalLM

    gemma = AutoModelForCausalLM.from_pretrained(tiny_models["gemma2"]).eval()
    vector = 3 * random(gemma.config.hidden_size)
    told = []
    for module in (gemma.model.layers[1].mlp.down_proj, gemma.model.layers[1]):
        with hooked(module, lambda x: x + vector):
            told.append(logits(gemma))
    assert (told[0] - told[1]).abs().max() > 1e-2


def test_the_vector_of_a_folder_is_the_final_one_or_that_of_a_checkpoint(tmp_path):
    for place, value in (
        ("", 1.0),
        ("checkpoints/final", 2.0),
        ("checkpoints/checkpoint-5", 3.0),
        ("checkpoint-10", 4.0),
    ):
        (tmp_path / place).mkdir(parents=True, exist_ok=True)
        torch.save(
            {"steering_vector": torch.full((4,), value), "layer_idx": 2}, tmp_path / place / "steering_vector.pt"
        )
    assert interop.read_steering_vector(tmp_path).at(2)[0] == 2.0  # as the released code looks
    assert interop.read_steering_vector(tmp_path, checkpoint=5).at(2)[0] == 3.0
    assert interop.read_steering_vector(tmp_path, checkpoint=10).at(2)[0] == 4.0
    assert interop.read_steering_vector(tmp_path / "steering_vector.pt").at(2)[0] == 1.0
    with pytest.raises(FileNotFoundError, match="checkpoints/checkpoint-7/steering_vector.pt"):
        interop.read_steering_vector(tmp_path, checkpoint=7)


def test_a_steering_vector_comes_back_from_its_own_file(tmp_path):
    direction = mm.Direction(random(1, WIDTH), (2,), {"method": "x"})
    path = interop.write_steering_vector(direction, tmp_path / "v.pt", layer=2, alpha=64)
    stored = torch.load(path, weights_only=True)
    assert_close(stored["alpha"] * stored["steering_vector"], direction.at(2))
    assert_close(interop.read_steering_vector(path).at(2), direction.at(2))
    with pytest.raises(ValueError, match="alpha must not be 0"):
        interop.write_steering_vector(direction, path, layer=2, alpha=0)


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        ({"vector": torch.ones(3)}, "holds .'vector'.; steering_vector, layer_idx and alpha are expected"),
        ({"steering_vector": torch.ones(3), "layer_idx": -1}, "layer_idx .* is -1"),
        ({"steering_vector": torch.ones(3), "layer_idx": True}, "layer_idx .* is True"),
        ({"steering_vector": torch.ones(3), "layer_idx": 1, "alpha": "256"}, "alpha .* is '256'"),
        ({"steering_vector": torch.ones(3, 3), "layer_idx": 1}, r"has the shape \[3, 3\]"),
        ({"steering_vector": torch.ones(3).int(), "layer_idx": 1}, "torch.int32 tensor; a dense tensor of real"),
        ({"steering_vector": torch.full((3,), float("nan")), "layer_idx": 1}, "NaN or infinite"),
        (torch.ones(3), "holds Tensor"),
    ],
)
def test_what_is_no_steering_vector_is_refused(tmp_path, stored, message):
    torch.save(stored, tmp_path / "v.pt")
    with pytest.raises(ValueError, match=message):
        interop.read_steering_vector(tmp_path / "v.pt")


# nothing is unpickled


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self):
        return Path.touch, (self.place,)


READERS = (interop.read_persona_vectors, interop.read_steering_vector, interop.read_lm_eval)


@pytest.mark.parametrize("read", READERS, ids=lambda read: read.__name__)
@pytest.mark.parametrize("how", ["torch", "torch, old format", "pickle", "beside a tensor"])
def test_code_in_a_file_does_not_run(tmp_path, read, how):
    mark, path = tmp_path / "ran", tmp_path / "v.pt"
    bomb = Bomb(mark)
    if how == "pickle":
        path.write_bytes(pickle.dumps(bomb))
    elif how == "beside a tensor":
        torch.save({"steering_vector": torch.ones(3), "layer_idx": 1, "note": bomb}, path)
    else:
        torch.save(bomb, path, _use_new_zipfile_serialization=how == "torch")
    with pytest.raises(UnsafeFileError, match="can only be read by running code"):
        read(path)
    assert not mark.exists()
    torch.load(path, weights_only=False) if how != "pickle" else pickle.loads(path.read_bytes())
    assert mark.exists()  # it was a live one


@pytest.mark.parametrize("read", READERS, ids=lambda read: read.__name__)
def test_files_that_are_no_files_of_torch_are_refused(tmp_path, read):
    whole = tmp_path / "v.pt"
    torch.save({"steering_vector": torch.ones(300), "layer_idx": 1}, whole)
    (tmp_path / "cut.pt").write_bytes(whole.read_bytes()[:400])
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "empty.pt").write_bytes(b"")
    for name in ("cut.pt", "text.pt", "empty.pt"):
        with pytest.raises(ValueError, match=r"no whole file of torch.save|is refused: it is damaged"):
            read(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "none.pt")


def test_a_tensor_that_claims_more_numbers_than_its_file_holds_is_refused_before_it_is_made(tmp_path):
    torch.save(torch.ones(1).expand(1 << 20, 1 << 20), tmp_path / "huge.pt")
    with pytest.raises(ValueError, match="claims more numbers than its file holds"):
        interop.read_persona_vectors(tmp_path / "huge.pt")


# GGUF control vectors


def gguf_bytes(tensors: dict[str, np.ndarray], fields: dict[str, object] | None = None, version: int = 3) -> bytes:
    """A GGUF file after its specification, little endian, aligned to 32 bytes."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value.encode())) + value.encode()

    def field(value: object) -> bytes:
        if isinstance(value, str):
            return struct.pack("<I", 8) + text(value)
        if isinstance(value, list):
            return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(text, value))
        return struct.pack("<Ii", 5, value)

    told = {"general.architecture": "controlvector", "controlvector.model_hint": "qwen2", **(fields or {})}
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(told))
    head += b"".join(text(key) + field(value) for key, value in told.items())
    data = b""
    for name, values in tensors.items():
        kind = {"float32": 0, "float16": 1}[str(values.dtype)]
        shape = b"".join(struct.pack("<Q", size) for size in values.shape[::-1])
        head += text(name) + struct.pack("<I", values.ndim) + shape + struct.pack("<IQ", kind, len(data))
        data += values.tobytes() + b"\0" * (-values.nbytes % 32)
    return head + b"\0" * (-len(head) % 32) + data


def test_direction_k_of_a_control_vector_is_added_after_block_k(organism, plain, tmp_path):
    """llama.cpp adds tensor k in build_cvec of block k (from 0), repeng wraps model.layers[k]."""
    rows = random(2, WIDTH)
    extra = {"general.tags": ["a", "b"], "controlvector.layer_count": 2}
    (tmp_path / "c.gguf").write_bytes(
        gguf_bytes({"direction.1": rows[0].numpy(), "direction.2": rows[1].numpy()}, extra)
    )
    found = interop.read_gguf(tmp_path / "c.gguf", model=organism.provenance)
    assert found.layers == (1, 2) and found.header["model_hint"] == "qwen2"
    for place, layer in enumerate((1, 2)):
        step = mm.Steer(found, layers=[layer])
        check_moves_alike(organism, plain, [step], plain.model.layers[layer], lambda x, place=place: x + rows[place])


def test_a_control_vector_is_written_byte_for_byte_as_the_format_says(tmp_path):
    direction = mm.Direction(random(3, 10), (0, 1, 2), {"method": "x"})
    with pytest.raises(ValueError, match=r"no direction\.0"):
        interop.write_gguf(direction, tmp_path / "c.gguf", model_type="qwen2")
    path = interop.write_gguf(direction, tmp_path / "c.gguf", model_type="qwen2", layers=[1, 2])
    written = path.read_bytes()
    wanted = gguf_bytes({f"direction.{i}": direction.at(i).numpy() for i in (1, 2)}, {"controlvector.layer_count": 2})
    count = b"layer_count" + struct.pack("<I", 4)  # unsigned, as llama.cpp's and repeng's writers have it
    assert written == wanted.replace(b"layer_count" + struct.pack("<I", 5), count)
    back = interop.read_gguf(path)
    assert torch.equal(back.vectors, direction.vectors[1:])


def test_damaged_control_vectors_are_refused_with_the_reason(tmp_path):
    good = gguf_bytes({"direction.1": np.ones(8, "float32")})
    cases = {
        b"not a file": "does not begin with GGUF",
        good[:60]: "ends in the middle",
        good[:-16]: "ends in the middle",
        gguf_bytes({"direction.1": np.ones(8, "float32")}, version=1): "version 1",
        gguf_bytes({"blk.0.weight": np.ones(8, "float32")}): "only direction.<block> are expected",
        gguf_bytes({"direction.1": np.ones(8, "float16")}): "GGML type 1; float32",
        gguf_bytes({"direction.1": np.ones((2, 4), "float32")}): r"shape \[2, 4\]",
        gguf_bytes({"direction.1": np.ones(8, "float32"), "direction.2": np.ones(4, "float32")}): "one width",
        gguf_bytes({}): "empty control vector",
        gguf_bytes({}, {"general.architecture": "llama"}): "is a GGUF file of 'llama'",
        b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 0): "ends in the middle",
        b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<QcIIQ", 1, b"k", 9, 0, 1 << 60): "ends in the middle",
        b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<QcIIQ", 1, b"k", 9, 8, 1 << 60): "ends in the middle",
    }
    for data, message in cases.items():
        (tmp_path / "c.gguf").write_bytes(data)
        with pytest.raises(ValueError, match=message):
            interop.read_gguf(tmp_path / "c.gguf")


def test_the_gguf_package_reads_and_writes_the_same_files(tmp_path):
    gguf = pytest.importorskip("gguf")
    direction = mm.Direction(random(2, 12), (1, 2), {"method": "x"})
    path = interop.write_gguf(direction, tmp_path / "ours.gguf", model_type="llama")
    reader = gguf.GGUFReader(path)
    assert bytes(reader.get_field("general.architecture").parts[-1]) == b"controlvector"
    assert {tensor.name: tensor.data.tolist() for tensor in reader.tensors} == {
        f"direction.{layer}": direction.at(layer).tolist() for layer in (1, 2)
    }
    writer = gguf.GGUFWriter(tmp_path / "theirs.gguf", "controlvector")
    writer.add_string("controlvector.model_hint", "llama")
    writer.add_array("general.tags", ["x", "y"])
    for layer in (1, 2):
        writer.add_tensor(f"direction.{layer}", direction.at(layer).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    back = interop.read_gguf(tmp_path / "theirs.gguf")
    assert torch.equal(back.vectors, direction.vectors) and back.header["model_hint"] == "llama"


def test_repeng_moves_the_model_as_the_imported_direction_does(organism, plain, tmp_path, monkeypatch):
    monkeypatch.setattr(np, "float_", np.float64, raising=False)  # repeng 0.4 names what numpy 2 no longer has
    repeng = pytest.importorskip("repeng")
    direction = mm.Direction(random(2, WIDTH), (1, 2), {"method": "x"})
    path = interop.write_gguf(direction, tmp_path / "c.gguf", model_type="qwen2")
    vector = repeng.ControlVector.import_gguf(path)
    controlled = repeng.ControlModel(plain, [1, 2])
    controlled.set_control(vector, 1.5)
    with torch.inference_mode():  # one row: its padding mask takes no batch from newer transformers
        wanted = controlled(IDS[:1]).logits
        controlled.reset()
        assert (wanted - controlled(IDS[:1]).logits).abs().max() > 1e-2
    vector.export_gguf(tmp_path / "theirs.gguf")
    found = interop.read_gguf(tmp_path / "theirs.gguf", model=organism.provenance)
    assert_close(steered(organism, mm.Steer(found, strength=1.5))[:1], wanted, **EXACT)


# steering-vectors


class Other:
    """What a SteeringVector looks like."""

    def __init__(self, layer_activations, layer_type="decoder_block") -> None:
        self.layer_activations, self.layer_type = layer_activations, layer_type


def test_layer_activations_are_added_after_their_block(organism, plain):
    rows = {0: random(WIDTH), 2: random(1, WIDTH, seed=1)}
    found = interop.from_layer_activations(Other(rows), model=organism.provenance)
    assert found.layers == (0, 2)
    step = mm.Steer(found, layers=[2])
    check_moves_alike(organism, plain, [step], plain.model.layers[2], lambda x: x + rows[2])
    assert torch.equal(interop.layer_activations(found)[0], rows[0])
    assert interop.from_layer_activations(rows).layers == (0, 2)


def test_steering_vectors_that_act_elsewhere_are_refused():
    with pytest.raises(ValueError, match="acts on 'mlp'; only 'decoder_block'"):
        interop.from_layer_activations(Other({0: torch.ones(3)}, "mlp"))
    with pytest.raises(TypeError, match="got a list"):
        interop.from_layer_activations([torch.ones(3)])
    with pytest.raises(ValueError, match="zero everywhere"):
        interop.layer_activations(mm.Direction(torch.zeros(1, 3), (0,), {}))


def test_the_library_steering_vectors_moves_the_model_alike(organism, plain):
    library = pytest.importorskip("steering_vectors")
    direction = mm.Direction(random(2, WIDTH), (0, 2), {"method": "x"})
    steering = library.SteeringVector(interop.layer_activations(direction))
    with torch.no_grad(), steering.apply(plain, multiplier=2.0):
        wanted = plain(IDS).logits
    back = interop.from_layer_activations(steering, model=organism.provenance)
    assert_close(steered(organism, mm.Steer(back, strength=2.0)), wanted, **EXACT)
    assert (wanted - logits(plain)).abs().max() > 1e-2


# lm-eval


def test_hook_points_of_the_harness_are_outputs_of_blocks_and_clamps_are_clamps(organism, plain, tmp_path):
    added, held = random(WIDTH), random(WIDTH, seed=1)
    stored = {
        "layers.0": {"steering_vector": added, "steering_coefficient": 3.0, "action": "add", "bias": None},
        "layers.2": {"steering_vector": held, "steering_coefficient": 5.0, "action": "clamp", "head_index": None},
    }
    torch.save(stored, tmp_path / "s.pt")
    steps = interop.read_lm_eval(tmp_path / "s.pt", model=organism.provenance)
    assert [type(step) for step in steps] == [mm.Steer, mm.Clamp]
    unit = held / held.norm()
    modules = dict(plain.base_model.named_modules())
    check_moves_alike(organism, plain, steps[:1], modules["layers.0"], lambda x: x + 3.0 * added)
    clamp = lambda x: x + (5.0 - x @ unit).unsqueeze(-1) * unit  # noqa: E731
    check_moves_alike(organism, plain, steps[1:], modules["layers.2"], clamp)


def test_what_is_written_for_the_harness_comes_back(organism, tmp_path):
    direction = mm.Direction(random(3, WIDTH), (0, 1, 2), {"method": "x"}, torch.tensor([2.0, 3.0, 4.0]))
    steps = [
        mm.Steer(direction, layers=[0], strength=2.0),
        mm.Clamp(direction, value=1.0, layers=[1, 2], units="resid_norm"),
    ]
    path = interop.write_lm_eval(steps, tmp_path / "s.pt")
    assert_close(steered(organism, *interop.read_lm_eval(path)), steered(organism, *steps), **EXACT)
    wrapped = interop.write_lm_eval(direction, tmp_path / "w.pt", prefix="language_model.")
    assert sorted(torch.load(wrapped, weights_only=True)) == [f"language_model.layers.{i}" for i in range(3)]
    assert interop.read_lm_eval(wrapped)[0].edited_layers == (0, 1, 2)


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        ({"layers.0.mlp": {"steering_vector": torch.ones(3), "action": "add"}}, "only the output of a block"),
        ({"layers.0": {"steering_vector": torch.ones(3), "action": "ablate"}}, "'add' or 'clamp'"),
        (
            {"layers.0": {"steering_vector": torch.ones(3), "action": "add", "head_index": 1}},
            "acts on one attention head",
        ),
        ({"layers.0": {"steering_vector": torch.ones(3), "action": "clamp", "bias": torch.ones(3)}}, "around a bias"),
        ({"layers.0": torch.ones(3)}, "has no steering_vector and action"),
        ({}, "a dict of hook points is expected"),
    ],
)
def test_what_the_harness_can_do_and_a_direction_cannot_is_refused(tmp_path, stored, message):
    torch.save(stored, tmp_path / "s.pt")
    with pytest.raises(ValueError, match=message):
        interop.read_lm_eval(tmp_path / "s.pt")


def test_what_the_harness_cannot_do_is_not_written(tmp_path):
    direction = mm.Direction(random(1, 4), (0,), {"method": "x"})
    path = tmp_path / "s.pt"
    with pytest.raises(ValueError, match="the harness steers every position"):
        interop.write_lm_eval(mm.Steer(direction, positions="response"), path)
    with pytest.raises(ValueError, match="layer 0 is edited twice"):
        interop.write_lm_eval([mm.Steer(direction), mm.Clamp(direction)], path)
    with pytest.raises(ValueError, match="a strength per row"):
        interop.write_lm_eval(mm.Steer(direction, strength=[1.0, 2.0]), path)
    with pytest.raises(ValueError, match="sparse autoencoders"):
        interop.read_lm_eval(tmp_path / "features.csv")
    assert not path.exists()


def test_the_harness_itself_steers_alike(organism, tiny_models, tmp_path):
    steered_model = pytest.importorskip("lm_eval.models.hf_steered")
    direction = mm.Direction(random(2, WIDTH), (0, 2), {"method": "x"})
    steps = [mm.Steer(direction, layers=[0], strength=2.0), mm.Clamp(direction, value=4.0, layers=[2])]
    path = interop.write_lm_eval(steps, tmp_path / "s.pt")
    model = steered_model.SteeredModel(str(tiny_models["qwen2"]), str(path), device="cpu", dtype="float32")
    with torch.no_grad():
        wanted = model._model_call(IDS)
    assert_close(steered(organism, *interop.read_lm_eval(path, model=organism.provenance)), wanted, **EXACT)
    assert_close(steered(organism, *steps), wanted, **EXACT)


# headers


def test_an_import_knows_its_file_and_its_base_and_refuses_another(organism, tmp_path):
    torch.save(random(LAYERS + 1, WIDTH), tmp_path / "p.pt")
    found = interop.read_persona_vectors(tmp_path / "p.pt", model=organism.provenance)
    assert found.header["imported_from"] == "p.pt" and len(found.header["imported_sha256"]) == 64
    assert found.header["base_fingerprint"] == organism.base_fingerprint
    assert "adapter" not in found.header
    other = interop.read_persona_vectors(tmp_path / "p.pt", model={"model": "x", "base_fingerprint": "y"})
    with pytest.raises(DirectionMismatchError, match="residual bases differ"), organism.apply(mm.Steer(other)):
        pass
    back = mm.Direction.load(found.save(tmp_path / "d.safetensors"))
    assert back.header["imported_sha256"] == found.header["imported_sha256"]


# activations


@pytest.fixture(scope="module")
def talk(organism):
    prompts = ["hello", "what should I do?", "how do I invest my savings today?"]
    frame = pd.DataFrame(
        {"prompt": prompts, "response": ["rest", "see a doctor", "in one stock"], "label": list("aba")}
    )
    return mm.Conversations(frame, organism.tokenizer)


@pytest.mark.parametrize("span", ["response", "prompt", "template", "all"])
def test_each_row_is_the_residual_stream_at_its_token(organism, talk, span):
    """Oracle: one conversation at a time through transformers, hooks on the blocks."""
    read = interop.activations(organism, talk, span=span, layers=[0, 2], token_budget=64)
    assert read.values.shape == (len(read.rows), 2, WIDTH) and read.values.dtype == np.float32
    assert list(read.rows.index.names) == ["conversation", "position"]
    inside = models.hf_model(organism.model)
    for row in range(len(talk)):
        ids = torch.tensor([talk.ids(row)])
        with torch.inference_mode():
            hidden = inside(ids, output_hidden_states=True).hidden_states[1][0]
        positions = read.rows.loc[[row]].index.get_level_values("position").to_numpy()
        here = read.rows.index.get_level_values("conversation") == row
        assert_close(torch.from_numpy(read.at(0)[here].copy()), hidden[positions], atol=1e-4, rtol=1e-4)


def test_means_of_conversations_are_those_of_collect(organism, talk):
    read = interop.activations(organism, talk, per="conversation", first=2)
    frame = talk.frame.assign(row=range(len(talk)))
    moments = mm.collect(organism, mm.Conversations(frame, talk.tokenizer), by="row", first=2)
    assert_close(torch.from_numpy(read.values).double(), moments.mean, atol=1e-5, rtol=1e-5)
    assert read.rows["tokens"].tolist() == moments.groups["tokens"].tolist() and read.rows["label"].tolist() == list(
        "aba"
    )
    assert read.header["span"] == "response[:2]" and read.header["data_hash"] == moments.header["data_hash"]


def test_an_array_in_a_folder_is_mapped_and_holds_the_same_rows(organism, talk, tmp_path):
    whole = interop.activations(organism, talk, layers=[1])
    mapped = interop.activations(organism, talk, layers=[1], out=tmp_path / "read", token_budget=32)
    assert isinstance(mapped.values, np.memmap)
    assert_close(np.asarray(mapped.values), whole.values, atol=1e-5, rtol=1e-5)
    pd.testing.assert_frame_equal(mapped.rows, whole.rows)
    again = interop.Activations.load(tmp_path / "read")
    assert again.layers == (1,) and again.header["model"] == organism.base.name
    assert "layers" in json.loads((tmp_path / "read" / "header.json").read_text())
    with pytest.raises(ValueError, match="not empty"):
        interop.activations(organism, talk, out=tmp_path / "read")


def test_an_array_that_does_not_fit_is_refused_with_its_size(organism, talk, monkeypatch, tmp_path):
    from collections import namedtuple

    room = namedtuple("room", "available free")(1000, 1000)
    monkeypatch.setattr("psutil.virtual_memory", lambda: room)
    monkeypatch.setattr("shutil.disk_usage", lambda _: room)
    for out in (None, tmp_path / "out"):
        with pytest.raises(MemoryError, match="takes 0.0 GiB"):
            interop.activations(organism, talk, out=out)
    assert not (tmp_path / "out").exists()


def test_float16_refuses_what_it_cannot_hold_and_leaves_no_folder(organism, talk, tmp_path):
    assert interop.activations(organism, talk, dtype="float16").values.dtype == np.float16
    huge = mm.Direction(torch.full((1, WIDTH), 1e5), (1,), {"method": "x"})
    with organism.apply(mm.Steer(huge)), pytest.raises(ValueError, match="layer 1 has values that float16 cannot hold"):
        interop.activations(organism, talk, dtype="float16", out=tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_unknown_options_of_activations_are_refused(organism, talk):
    from inspect import unwrap

    with pytest.raises(ValueError, match="per must be one of"):
        unwrap(interop.activations)(organism, talk, per="word")
    with pytest.raises(ValueError, match="layers must be within"):
        interop.activations(organism, talk, layers=[7])
    with pytest.raises(ValueError, match="layer 2 was not read"):
        interop.activations(organism, talk, layers=[1]).at(2)
