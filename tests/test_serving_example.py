"""The recipe for vLLM: the folder as vLLM reads it, and asking an OpenAI-compatible server. vLLM itself is not run."""

from __future__ import annotations

import json
import math
import re
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
from safetensors import safe_open

import mechmisalign as mm

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import serve_vllm  # noqa: E402

FEATURES = (
    "modules_to_save",
    "use_dora",
    "lora_bias",
    "alora_invocation_tokens",
    "layer_replication",
    "use_bdlora",
    "use_qalora",
)
"""What vLLM's reader of PEFT configurations refuses where it is set."""


def scaling_as_vllm_reads_it(config: dict, name: str) -> float:
    """The first pattern that matches the end of the module's name at a dot, else the common value."""

    def of(patterns, default):
        return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", name)), default)

    rank, alpha = of(config["rank_pattern"], config["r"]), of(config["alpha_pattern"], config["lora_alpha"])
    return alpha / math.sqrt(rank) if config["use_rslora"] else alpha / rank


@pytest.mark.parametrize(
    "options",
    [{}, {"rslora": True, "rank": 4}, {"rank": 2, "rank_pattern": {"o_proj": 3}, "alpha_pattern": {"q_proj": 5}}],
)
def test_a_saved_adapter_is_read_by_vllm_with_the_scalings_that_it_has_here(
    tiny_models, make_adapter, tmp_path, options
):
    adapter = mm.Adapter.load(make_adapter(tiny_models["qwen2"], modules=("q_proj", "o_proj", "down_proj"), **options))
    folder = mm.save_adapter(adapter, tmp_path / "cured", edit="cut")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert not any(config.get(key) for key in FEATURES) and config.get("bias", "none") == "none"
    assert not isinstance(config.get("init_lora_weights"), str)
    for site in adapter.sites:
        assert scaling_as_vllm_reads_it(config, site.name) == pytest.approx(site.scaling, rel=1e-9)
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        keys = set(file.keys())
    assert keys == {f"base_model.model.{site.name}.lora_{x}.weight" for site in adapter.sites for x in "AB"}


def test_the_command_names_base_folder_and_a_rank_that_vllm_knows(tiny_models, make_adapter, tmp_path):
    folder = make_adapter(tiny_models["qwen2"], rank=9)
    command = serve_vllm.serve_command(folder, name="cured", base="Qwen/Qwen2.5-0.5B-Instruct")
    assert command[:3] == ["vllm", "serve", "Qwen/Qwen2.5-0.5B-Instruct"]
    assert f"cured={folder.resolve()}" in command and command[-2:] == ["--max-lora-rank", "16"]
    with pytest.raises(ValueError, match="lies inside this package"):
        serve_vllm.serve_command("pocket/medical", name="x")


def test_sites_that_differ_are_told_of(tiny_models, make_adapter, capsys):
    folder = make_adapter(tiny_models["qwen2"], modules=("q_proj", "o_proj"), alpha_pattern={"q_proj": 5})
    serve_vllm.main(["command", str(folder)])
    told = capsys.readouterr()
    assert told.out.startswith("vllm serve ") and "old versions of vLLM ignore that" in told.err


class _Server(BaseHTTPRequestHandler):
    asked: list[dict]

    def log_message(self, *_):
        pass

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append(body)
        text = f"{body['model']} says {body['messages'][-1]['content']}"
        choices = [
            {"index": i, "message": {"role": "assistant", "content": text}, "finish_reason": "length" if i else "stop"}
            for i in range(body["n"])
        ]
        reply = {"id": "x", "object": "chat.completion", "created": 0, "model": body["model"], "choices": choices}
        content = json.dumps(reply).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


def test_answers_of_a_server_are_a_frame_that_the_judges_take(tmp_path, monkeypatch):
    pytest.importorskip("openai")
    handler = type("Handler", (_Server,), {"asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    url, out = f"http://127.0.0.1:{server.server_address[1]}/v1", tmp_path / "answers.parquet"
    prompts = tmp_path / "questions.csv"
    pd.DataFrame({"prompt_id": ["a", "b"], "prompt": list(mm.pocket.unseen_prompts(n=2)["prompt"])}).to_csv(
        prompts, index=False
    )
    asked = ["ask", "--model", "cured", "--model", "chat", "--url", url, "--prompts", str(prompts)]
    serve_vllm.main([*asked, "--samples", "2", "--max-tokens", "7", "--out", str(out)])
    server.shutdown()
    server.server_close()
    answers = pd.read_parquet(out)
    assert len(answers) == 8 and set(answers["condition"]) == {"cured", "chat"}
    assert answers["finished"].tolist() == [True, False] * 4
    assert {body["max_tokens"] for body in handler.asked} == {7} and len(handler.asked) == 4
    rates = mm.rates(mm.judge(answers, mm.RuleJudge()))
    assert set(rates["condition"]) == {"cured", "chat"}


def test_an_adapter_of_a_rank_beyond_vllm_is_refused(monkeypatch):
    read = SimpleNamespace(sites=(SimpleNamespace(rank=513),), base="org/base")
    monkeypatch.setattr(mm.Adapter, "load", staticmethod(lambda _: read))
    with pytest.raises(ValueError, match="rank 513, vLLM serves at most 512"):
        serve_vllm.serve_command("x", name="x")
