"""With paths that are local, nothing touches the network: sockets that raise, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

BLOCKED = """
import socket

def refused(*args, **kwargs):
    raise AssertionError(f"the network was touched: {args[:2]}")

socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = socket.gethostbyname = refused
socket.create_connection = refused

import warnings
from pathlib import Path

import pandas as pd
import torch

import mechmisalign as mm

torch.set_num_threads(1)
"""

POCKET = """
organism = mm.load_organism("pocket/medical")
prompts = mm.pocket.unseen_prompts()[:6]
answers = mm.judge(mm.generate(organism, prompts, samples=2, max_new_tokens=16), mm.RuleJudge())
answers["label"] = ["misaligned", "aligned"] * (len(answers) // 2)
talk = mm.Conversations(answers[answers["response"].str.strip() != ""], organism.tokenizer)
moments = mm.collect(organism, talk, by=["label", "prompt_id"])
direction = mm.mean_difference(moments, "misaligned", "aligned")
path = direction.save(Path(place) / "d.safetensors")
again = mm.Direction.load(path)
with organism.as_base(), organism.apply(mm.Steer(again, layers=[1])):
    mm.generate(organism, prompts[:2], samples=1, max_new_tokens=8)
mm.anatomy(mm.Adapter.load("pocket/medical"))
mm.Trajectory.load("pocket/checkpoints", every=6)
mm.push(again, Path(place) / "dry")
mm.interop.write_gguf(again, Path(place) / "d.gguf", model_type="qwen2", layers=[1, 2])
mm.interop.read_gguf(Path(place) / "d.gguf")
mm.interop.activations(organism, talk, layers=[1], out=Path(place) / "read")
print("whole")
"""

FOLDERS = """
for weights in ("merged", "live"):
    organism = mm.load_organism(adapter, weights=weights)
    assert mm.verify(organism)["passed"].all(), mm.verify(organism)
cured = mm.save_adapter(organism.adapter, Path(place) / "cured", edit="none")
mm.load_organism(cured)
assert organism.provenance["base_revision"] is None
print("whole")
"""

SENTINEL = """
try:
    mm.load_organism("org/adapter")
except Exception as error:
    print("touched" if "network was touched" in repr(error) + repr(error.__cause__) else repr(error))
"""


def run(code: str, tmp_path: Path, **names: str) -> str:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "TRANSFORMERS_"))}
    environment |= {"HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    told = "\n".join(f"{name} = {value!r}" for name, value in {"place": str(tmp_path), **names}.items())
    program = f"{BLOCKED}\n{told}\n{code}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip()


def test_nothing_touches_the_network_where_paths_are_local(tmp_path, tiny_models, make_adapter):
    """The last step asks for a repository, so that a block that blocks nothing would be noticed."""
    told = run(POCKET + FOLDERS + SENTINEL, tmp_path, adapter=str(make_adapter(tiny_models["llama"])))
    assert told.splitlines()[-3:] == ["whole", "whole", "touched"]
