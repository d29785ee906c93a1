"""A real OpenAI-compatible server on loopback that judges, misbehaves on demand, and counts what it was asked.

It reads rubric and answer out of the prompts that the package sends, so it knows the control answers and can be given
grades for the others. Faults are chosen per call, by number.
"""

from __future__ import annotations

import asyncio
import json
import math
import re
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from mechmisalign.judging.controls import CONTROLS
from mechmisalign.judging.rubrics import RUBRICS

KEY = "sk-loopback-0123456789abcdef-secret"

_BLOCK = re.compile(r"----- BEGIN (QUESTION|ANSWER) (\w{16}) -----\n(.*?)\n----- END \1 \2 -----", re.DOTALL)
_SUBJECTS = {name: re.search(r"Rate how .*", RUBRICS[name].instructions)[0] for name in RUBRICS}

Grade = float | str | dict[str, float]
"""A number, a word, or the probabilities of the first token."""
Style = Literal["logprobs", "digits", "text"]
"""Whole numbers are tokens; numbers are split into digits; no log-probabilities at all."""


@dataclass
class Call:
    rubric: str
    answer: str
    body: dict[str, Any]
    fault: str | None
    control: str | None


@dataclass
class JudgeServer:
    """``with JudgeServer() as server: LLMJudge("openai/gpt-4o", base_url=server.url, api_key=KEY)``."""

    grade: Callable[[str, str], Grade] = lambda _rubric, _answer: 50.0
    style: Style = "logprobs"
    latency: float = 0.0
    fault: Callable[[int, str], str | None] = lambda _number, _answer: None
    controls: Callable[[str, str], Grade] | None = None
    retry_after: str = "0.01"
    calls: list[Call] = field(default_factory=list)
    most_at_once: int = 0

    def __enter__(self) -> JudgeServer:
        self._loop, self._at_once, ready = asyncio.new_event_loop(), 0, threading.Event()

        async def start() -> None:
            server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
            self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
            ready.set()

        def run() -> None:
            starting = self._loop.create_task(start())
            self._loop.run_forever()
            left = [task for task in asyncio.all_tasks(self._loop) if task is not starting]
            for task in left:
                task.cancel()
            for task in left:
                self._loop.run_until_complete(asyncio.wait([task]))
            self._loop.close()

        self._thread = threading.Thread(target=run, daemon=True)
        self._thread.start()
        assert ready.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    @property
    def answered(self) -> Counter[tuple[str, str]]:
        """How often each (rubric, answer) that is no control was answered."""
        return Counter((call.rubric, call.answer) for call in self.calls if call.control is None and call.fault is None)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin1")
                length = int(re.search(r"(?i)content-length: (\d+)", head)[1])
                body = json.loads(await reader.readexactly(length))
                self._at_once += 1
                self.most_at_once = max(self.most_at_once, self._at_once)
                try:
                    if not await self._reply(head, body, writer):
                        break
                finally:
                    self._at_once -= 1
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    async def _reply(self, head: str, body: dict[str, Any], writer: asyncio.StreamWriter) -> bool:
        assert head.startswith("POST /v1/chat/completions"), head
        prompt = body["messages"][-1]["content"]
        blocks = {name: text for name, _, text in _BLOCK.findall(prompt)}
        answer = blocks.get("ANSWER", "")
        rubric = next((name for name, subject in _SUBJECTS.items() if subject in prompt), "own")
        control = next((c.name for c in CONTROLS if c.answer == answer), None)
        fault = self.fault(len(self.calls), answer)
        if "authorization: bearer " + KEY not in head.lower().replace(KEY.lower(), KEY):
            fault = "auth"
        self.calls.append(Call(rubric, answer, body, fault, control))
        await asyncio.sleep(self.latency)
        if fault == "drop":
            writer.transport.abort()
            return False
        if fault == "half":
            writer.write(b'HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 500\r\n\r\n{"id": "x')
            await writer.drain()
            return False
        status, headers, payload = self._payload(fault, body, rubric, answer, control)
        lines = [f"HTTP/1.1 {status} x", f"content-length: {len(payload)}", *(f"{k}: {v}" for k, v in headers.items())]
        writer.write("\r\n".join(lines).encode() + b"\r\n\r\n" + payload)
        await writer.drain()
        return True

    def _payload(
        self, fault: str | None, body: dict[str, Any], rubric: str, answer: str, control: str | None
    ) -> tuple[int, dict[str, str], bytes]:
        kind = {"content-type": "application/json"}
        if fault == "garbage":
            return 200, {"content-type": "text/html"}, b"<html><script>alert(1)</script> 502 \xff\xfe"
        if fault == "broken json":
            return 200, kind, b'{"choices": [{"message":'
        if fault == "empty json":
            return 200, kind, b"{}"
        if fault == "429":
            return 429, kind | {"retry-after": self.retry_after}, _error("slow down", "rate_limit_exceeded")
        if fault == "auth":
            return 401, kind, _error(f"Incorrect API key provided: {KEY}.", "invalid_api_key")
        if fault is not None:
            return int(fault), kind, _error(f"refused with {fault}; your key is {KEY}", "some_code")
        grade = self._grade(rubric, answer, control)
        return 200, kind, json.dumps(completion(body, grade, self.style)).encode()

    def _grade(self, rubric: str, answer: str, control: str | None) -> Grade:
        if control is None:
            return self.grade(rubric, answer)
        return (self.controls or good_on_controls)(rubric, control)


def good_on_controls(rubric: str, control: str) -> Grade:
    """What a working judge says of the controls."""
    expected = next(c for c in CONTROLS if c.name == control).expected[rubric]
    if expected.statuses:
        return expected.statuses[0].upper()
    return 95.0 if expected.low > 50 else 5.0


def completion(body: dict[str, Any], grade: Grade, style: Style) -> dict[str, Any]:
    """The reply as such a server words it, cut to ``max_tokens``."""
    if isinstance(grade, dict):
        tokens, top = [max(grade, key=grade.get)], grade
    else:
        text = f"{grade:.0f}" if isinstance(grade, float) else grade
        tokens = [text] if text.isdigit() and style != "digits" else re.findall(r"[A-Z]{3}|.", text, re.DOTALL)
        top = {tokens[0]: 0.9, "I": 0.1}
        if isinstance(grade, float) and style != "digits":
            top = {text: 0.7, str(max(0, int(grade) - 5)): 0.2, "I": 0.1}
    limit = body.get("max_tokens", 10_000)
    choice: dict[str, Any] = {
        "index": 0,
        "finish_reason": "length" if len(tokens) > limit or limit == 1 else "stop",
        "message": {"role": "assistant", "content": "".join(tokens[:limit])},
    }
    if style != "text" and body.get("logprobs"):
        pairs = [{"token": token, "logprob": math.log(p), "bytes": None} for token, p in top.items()]
        choice["logprobs"] = {"content": [{**pairs[0], "top_logprobs": pairs}]}
    usage = {"prompt_tokens": 100, "completion_tokens": 1, "total_tokens": 101}
    return {
        "id": "x", "object": "chat.completion", "created": 0, "model": body["model"], "choices": [choice], "usage": usage
    }  # fmt: skip


def _error(message: str, code: str) -> bytes:
    return json.dumps({"error": {"message": message, "type": code, "code": code}}).encode()
