"""An OpenAI-compatible server that does what a test wrote down: sends these bytes, waits, breaks off."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

HANG, BREAK = "hang", "break"
"""Steps of an answer that are no bytes: say nothing more until the server ends; close without an end.

A number is one, too: wait until so many generations were asked for.
"""

Step = bytes | str | int
Answer = tuple[int, Sequence[Step]]
"""Status, and what is sent step by step."""
Script = Callable[[int, dict[str, Any]], Answer]
"""The answer to the n-th generation, and what it asked."""


def chunk(**fields: object) -> bytes:
    return b"data: " + json.dumps(fields).encode() + b"\n\n"


def streamed(*pieces: str, output_tokens: int | None = None, done: bool = True) -> list[Step]:
    """A stream of `pieces`, each a chunk of a completion."""
    steps: list[Step] = [chunk(choices=[{"index": 0, "text": piece}]) for piece in pieces]
    if output_tokens is not None:
        steps.append(chunk(choices=[], usage={"prompt_tokens": 9, "completion_tokens": output_tokens}))
    return [*steps, b"data: [DONE]\n\n"] if done else steps


class ScriptedServer:
    """Listens on `url`; `asked` are the generations' bodies, `headers` those of the newest."""

    def __init__(self, script: Script, *, has_tokenizer: bool = True) -> None:
        self.asked: list[dict[str, Any]] = []
        self.headers: dict[str, str] = {}
        self.url = ""
        self._script = script
        self._has_tokenizer = has_tokenizer

    async def serve(self, ready: Callable[[], None]) -> None:
        self._stop = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        connections: set[asyncio.Task[None]] = set()

        async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.current_task()
            assert task is not None
            connections.add(task)
            with suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
                await self._connection(reader, writer)
            connections.discard(task)
            writer.close()

        server = await asyncio.start_server(accept, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        ready()
        await self._stop.wait()
        server.close()
        for connection in list(connections):
            connection.cancel()
        await asyncio.gather(*connections, return_exceptions=True)

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        request, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().strip().split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        body = await reader.readexactly(int(headers.get("content-length", "0")))
        path = request.split(" ")[1]
        status, steps = self._answer(path, headers, json.loads(body or b"null"))
        writer.write(b"HTTP/1.1 %d Said\r\nconnection: close\r\ntransfer-encoding: chunked\r\n\r\n" % status)
        for step in steps:
            if isinstance(step, int):
                while len(self.asked) < step:
                    await asyncio.sleep(0.001)
                continue
            if step == HANG:
                await self._stop.wait()
            if isinstance(step, str):
                return
            writer.write(b"%x\r\n%b\r\n" % (len(step), step))
            await writer.drain()
        writer.write(b"0\r\n\r\n")
        await writer.drain()

    def _answer(self, path: str, headers: dict[str, str], body: Any) -> Answer:
        if path == "/v1/models":
            return 200, [json.dumps({"data": [{"id": "scripted"}]}).encode()]
        if path == "/version":
            return 200, [b'{"version": "7.5"}']
        if path == "/tokenize" and self._has_tokenizer:
            return 200, [json.dumps({"tokens": list(range(500, 500 + len(body["prompt"].split())))}).encode()]
        if path not in ("/v1/completions", "/v1/chat/completions"):
            return 404, [b'{"error": {"message": "no such page"}}']
        self.headers = headers
        self.asked.append(body)
        return self._script(len(self.asked) - 1, body)


@contextmanager
def scripted(script: Script, *, has_tokenizer: bool = True) -> Iterator[ScriptedServer]:
    """A running server, in a thread of its own."""
    server, ready = ScriptedServer(script, has_tokenizer=has_tokenizer), threading.Event()
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(ready.set)))
    thread.start()
    try:
        assert ready.wait(60)
        yield server
    finally:
        server.stop()
        thread.join()
