"""A real HTTP server in a thread that answers as SGLang and as an OpenAI-compatible endpoint do, or fails on demand.

An answer is a function of the prompt alone, see `response_ids` and `reply`, so that a test can tell whose it is.
`fault` decides what goes wrong: it is called with the request's body and the number of its attempts so far, and returns
None or one of the kinds below; a tuple carries what the kind needs.

    ("status", code, headers, body)   any status, with any body
    "garbage"    no HTTP             "html"       a page, with status 200      "shape"   JSON of another shape
    "empty"      an empty body       "truncated"  half of the JSON             "short"   half of the announced body
    "close"      the connection      "hang"       nothing at all
    "abort", "nan", "nan_logprob", "wrong_ids", "fewer", "none"   answers of SGLang that are none
    ("answer", json)  this instead of the answer
"""

import asyncio
import json
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

Body = dict[str, Any]


@dataclass
class Seen:
    """One request as it came in."""

    at: float  # time.monotonic()
    path: str
    headers: dict[str, str]
    body: Body


def response_ids(prompt_ids: list[int]) -> list[int]:
    return [3 + sum(prompt_ids) % 7, prompt_ids[-1], 1]


def logprob(prompt_ids: list[int], token: int) -> float:
    return -0.5 - 0.01 * token - 0.001 * sum(prompt_ids)


def reply(messages: list[dict[str, str]]) -> str:
    return f"an answer to {messages[-1]['content']}"


@dataclass
class FaultServer:
    """Listens on `url` while it is entered."""

    fault: Callable[[Body, int], Any] = lambda body, attempt: None
    delay_s: float | Callable[[Body], float] = 0.0
    model_path: str = "/models/demo/model"
    server_info: Body = field(default_factory=dict)
    model_info: Body = field(default_factory=dict)
    port: int = 0
    seen: list[Seen] = field(default_factory=list)  # of POST requests
    most: int = 0  # requests in work at a time
    working: int = 0
    well: bool = False  # whether it generates when asked how it is
    cut: int = 0  # requests whose client went away before the answer

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> "FaultServer":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        self.attempts: Counter[str] = Counter()
        self.connections: set[asyncio.Task[None]] = set()
        self.loop = asyncio.new_event_loop()
        self.listener = socket.create_server(("127.0.0.1", self.port), backlog=1024)
        self.listener.setblocking(False)
        self.port = self.listener.getsockname()[1]
        self.loop.add_reader(self.listener, self.accept)
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()

    def stop(self) -> None:
        """Nothing listens any more, and open connections are cut."""
        if self.loop.is_closed():
            return
        asyncio.run_coroutine_threadsafe(self.end(), self.loop).result(10)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(10)
        self.loop.close()

    async def end(self) -> None:
        self.loop.remove_reader(self.listener)
        self.listener.close()
        await asyncio.sleep(0.01)  # what was just accepted begins
        for task in self.connections:
            task.cancel()
        await asyncio.gather(*self.connections, return_exceptions=True)
        await asyncio.sleep(0.01)  # connections end in the loop's next rounds

    def accept(self) -> None:
        """Of our own, because asyncio's servers lose what comes in while they are being closed."""
        try:
            accepted, _ = self.listener.accept()
        except BlockingIOError:
            return
        accepted.setblocking(False)
        task = self.loop.create_task(self.connection(accepted))
        self.connections.add(task)
        task.add_done_callback(self.connections.discard)

    def times(self, path: str = "/generate") -> list[float]:
        return [seen.at for seen in self.seen if seen.path == path]

    async def connection(self, accepted: socket.socket) -> None:
        reader = asyncio.StreamReader()
        protocol = asyncio.StreamReaderProtocol(reader)
        transport, _ = await self.loop.connect_accepted_socket(lambda: protocol, accepted)
        writer = asyncio.StreamWriter(transport, protocol, reader, self.loop)
        try:
            while await self.one(reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            transport.abort()

    async def one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Read and answer one request; whether the connection stays."""
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
        except asyncio.IncompleteReadError:
            return False
        first, *lines = head.split("\r\n")
        method, path, _ = first.split(" ")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines if line)}
        body = json.loads(await reader.readexactly(int(headers.get("content-length", 0))) or b"null")
        if method == "GET":
            found = self.about(path)
            return await self.send(writer, 200 if found is not None else 404, json.dumps(found or {"detail": "no"}))
        self.seen.append(Seen(time.monotonic(), path, headers, body))
        text = json.dumps(body, sort_keys=True)
        fault = self.fault(body, self.attempts[text])
        self.attempts[text] += 1
        self.working += 1
        self.most = max(self.most, self.working)
        try:
            delay = self.delay_s(body) if callable(self.delay_s) else self.delay_s
            return await self.unless_gone(reader, self.answer(writer, path, body, fault, delay))
        finally:
            self.working -= 1

    async def unless_gone(self, reader: asyncio.StreamReader, answer: Any) -> bool:
        """Answer, but notice a client that goes away meanwhile."""
        work = asyncio.ensure_future(answer)
        try:
            while not work.done() and not reader.at_eof():
                await asyncio.wait({work}, timeout=0.02)
            if work.done():
                return bool(work.result())
            self.cut += 1
            return False
        finally:
            work.cancel()
            await asyncio.wait({work})

    def about(self, path: str) -> Body | None:
        """What is told before anything is asked; None for what there is not."""
        if path == "/health" or (path == "/health_generate" and self.well):
            return {}
        if path == "/model_info":
            return {"model_path": self.model_path, "is_generation": True} | self.model_info
        if path == "/server_info":
            return {"version": "0.0.test", "dp_size": 1, "enable_deterministic_inference": False} | self.server_info
        return None

    async def answer(self, writer: asyncio.StreamWriter, path: str, body: Body, fault: Any, delay: float) -> bool:
        kind = fault[0] if isinstance(fault, tuple) else fault
        await asyncio.sleep(delay)
        if kind == "hang":
            await asyncio.sleep(3600)
        if kind == "close":
            return False
        if kind == "garbage":
            writer.write(b"\x00\x01 this is no HTTP\r\n\r\n")
            await writer.drain()
            return False
        if kind == "status":
            _, status, headers, text = fault
            return await self.send(writer, status, text, headers)
        if kind == "html":
            return await self.send(writer, 200, "<html><body>please log in</body></html>")
        if kind == "shape":
            return await self.send(writer, 200, '{"usage": [1, 2], "object": "something.else"}')
        if kind == "empty":
            return await self.send(writer, 200, "")
        found = fault[1] if kind == "answer" else self.generated(body, kind) if "input_ids" in body else chat(body)
        text = json.dumps(found)
        if kind == "truncated":
            return await self.send(writer, 200, text[: len(text) // 2])
        if kind == "short":
            await self.send(writer, 200, text[: len(text) // 2], {"Content-Length": str(len(text))})
            return False
        return await self.send(writer, 200, text)

    def generated(self, body: Body, kind: str | None) -> Body:
        ids = body["input_ids"]
        meta: Body = {"finish_reason": {"type": "stop", "matched": 1}}
        if body["sampling_params"]["max_new_tokens"] == 0:
            start = body["logprob_start_len"]
            meta["finish_reason"] = {"type": "length", "length": 0}
            name, tokens = "input_token_logprobs", ids[start + 1 :]
            entries = [[None, ids[start], None], *([logprob(ids[: start + 1], t), t, None] for t in tokens)]
        else:
            name, tokens = "output_token_logprobs", response_ids(ids)
            entries = [[logprob(ids, token), token, None] for token in tokens]
        if kind == "abort":
            meta["finish_reason"] = {"type": "abort", "message": "no room"}
        elif kind == "nan":
            meta["finish_reason"] = {"type": "stop", "matched": "NaN happened"}
        elif kind == "nan_logprob":
            entries[-1][0] = None  # what SGLang's JSON makes of a NaN
        elif kind == "wrong_ids":
            entries[-1][1] += 1
        elif kind == "fewer":
            entries.pop()
        elif kind == "none":
            tokens, entries = [], []
        return {
            "text": "",
            "output_ids": tokens if name.startswith("output") else [],
            "meta_info": meta | {name: entries},
        }

    async def send(
        self, writer: asyncio.StreamWriter, status: int, body: str, headers: dict[str, str] | None = None
    ) -> bool:
        data = body.encode()
        fields = {"Content-Type": "application/json", "Content-Length": str(len(data))} | (headers or {})
        head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
        writer.write(f"HTTP/1.1 {status} Status\r\n{head}\r\n".encode() + data)
        await writer.drain()
        return True


def chat(body: Body) -> Body:
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": reply(body["messages"])}}
    return {"id": "x", "object": "chat.completion", "choices": [choice], "usage": {"completion_tokens": 7}}
