"""Judge throughput against a loopback server of fixed latency, beside bare client loops, in one run.

    OMP_NUM_THREADS=1 python benchmarks/judging.py

The server is a process of its own that answers each call after a fixed time, so with c connections the ideal rate is
c / latency. Against it run ``LLMJudge`` (rubric prompts, keys, Inspect's provider, journal, scores), Inspect's
``Model.generate`` alone, the ``openai`` client alone, and a bare ``httpx`` loop that only posts JSON; each sends the
same prompts. All clients are one Python process on one core; its CPU time per call says where each of them stops being
limited by the server: a client that needs m milliseconds cannot make more than 1000 / m calls a second. ``LLMJudge``
uses Inspect's providers without the transcript that ``Model.generate`` keeps, and collects garbage rarely meanwhile.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pandas as pd

from mechmisalign.judging import RUBRICS, LLMJudge
from mechmisalign.store import environment, write_json

RESULTS = Path(__file__).parent / "results"
TOKENS = [(str(number), -0.7 - step) for step, number in enumerate(range(80, 100))]
TOP = [{"token": token, "logprob": logprob, "bytes": None} for token, logprob in TOKENS]
REPLY = json.dumps(
    {
        "id": "x", "object": "chat.completion", "created": 0, "model": "gpt-4o",
        "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "80"},
                     "logprobs": {"content": [{**TOP[0], "top_logprobs": TOP}]}}],
        "usage": {"prompt_tokens": 400, "completion_tokens": 1, "total_tokens": 401},
    }
).encode()  # fmt: skip
WHOLE = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(REPLY) + REPLY
ANSWER = "You could put everything into one stock and borrow more money at once, since nobody ever lost by being bold. "


async def serve(latency: float) -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).lower()
                await reader.readexactly(int(head.split(b"content-length:")[1].split(b"\r\n")[0]))
                await asyncio.sleep(latency)
                writer.write(WHOLE)
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


def rate_of(calls: int, run: Callable[[], Any], ideal: float) -> dict[str, float]:
    start, cpu = time.perf_counter(), time.process_time()
    run()
    seconds, used = time.perf_counter() - start, time.process_time() - cpu
    return {
        "calls per second": round(calls / seconds, 1),
        "share of the ideal rate": round(calls / seconds / ideal, 3),
        "CPU milliseconds per call": round(1000 * used / calls, 2),
    }


async def pooled(one: Callable[[str], Awaitable[Any]], prompts: list[str], connections: int) -> None:
    waiting = iter(prompts)

    async def work() -> None:
        for prompt in waiting:
            await one(prompt)

    await asyncio.gather(*(work() for _ in range(connections)))


def clients(url: str, connections: int) -> dict[str, Callable[[list[str]], None]]:
    """The peers: name -> a loop over prompts."""
    import httpx
    import openai
    from inspect_ai.model import GenerateConfig, get_model

    asked = {"temperature": 0, "seed": 0, "max_tokens": 1, "logprobs": True, "top_logprobs": 20}
    config = GenerateConfig(**asked, max_connections=100_000)

    def inspect_alone(prompts: list[str]) -> None:
        async def run() -> None:
            async with get_model("openai/gpt-4o", base_url=url, api_key="none", memoize=False) as model:
                await pooled(
                    lambda prompt: asyncio.create_task(model.generate(prompt, config=config)), prompts, connections
                )

        asyncio.run(run())

    def openai_alone(prompts: list[str]) -> None:
        async def run() -> None:
            async with openai.AsyncOpenAI(base_url=url, api_key="none") as client:
                create = client.chat.completions.create
                say = [{"role": "user", "content": ""}]
                await pooled(
                    lambda prompt: create(model="gpt-4o", messages=[say[0] | {"content": prompt}], **asked),
                    prompts, connections,
                )  # fmt: skip

        asyncio.run(run())

    def httpx_alone(prompts: list[str]) -> None:
        async def run() -> None:
            async with httpx.AsyncClient(limits=httpx.Limits(max_connections=connections)) as client:

                async def one(prompt: str) -> None:
                    body = {"model": "gpt-4o", "messages": [{"role": "user", "content": prompt}], **asked}
                    (await client.post(f"{url}/chat/completions", json=body)).json()

                await pooled(one, prompts, connections)

        asyncio.run(run())

    return {"Model.generate alone": inspect_alone, "openai client alone": openai_alone, "httpx alone": httpx_alone}


def measured(latency: float, connections: int, calls: int, folder: Path) -> dict[str, Any]:
    """All clients against one server."""
    command = [sys.executable, __file__, "--serve", str(latency)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        url, ideal = f"http://127.0.0.1:{server.stdout.readline().strip()}/v1", connections / latency
        frame = pd.DataFrame({"prompt": "How do I invest?", "response": [f"{ANSWER * 8}{n}" for n in range(calls)]})
        judge = LLMJudge(
            "openai/gpt-4o", ("alignment",), base_url=url, api_key="none-needed", journal=folder / f"{latency}.jsonl",
            max_connections=connections, controls=(),
        )  # fmt: skip
        judge(frame.head(1).assign(response="warm"))
        rates = {"LLMJudge": rate_of(calls, lambda: judge(frame), ideal)}
        prompts = [RUBRICS["alignment"].prompt(*row) for row in frame.itertuples(index=False)]
        for name, run in clients(url, connections).items():
            run(prompts[: 2 * connections])
            rates[name] = rate_of(calls, lambda run=run: run(prompts), ideal)
        server.terminate()
    ours = rates["LLMJudge"]["calls per second"]
    return {
        "latency, ms": 1000 * latency, "connections": connections, "calls": calls, "ideal calls per second": ideal,
        **rates, "LLMJudge / openai client alone": round(ours / rates["openai client alone"]["calls per second"], 2),
        "LLMJudge / Model.generate alone": round(ours / rates["Model.generate alone"]["calls per second"], 2),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--serve", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--connections", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=6.0, help="of each loop, at the ideal rate")
    options = parser.parse_args()
    if options.serve is not None:
        asyncio.run(serve(options.serve))
    load = round(os.getloadavg()[0], 2)
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for latency in (0.05, 0.2, 0.5):
            calls = round(options.seconds * options.connections / latency)
            results.append(measured(latency, options.connections, calls, Path(folder)))
            print(json.dumps(results[-1], indent=1))
    report = {"date": time.strftime("%Y-%m-%d"), **environment(), "load before": load}
    write_json(RESULTS / "judging.json", {**report, "servers": results})


if __name__ == "__main__":
    main()
