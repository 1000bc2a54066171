"""The HTTP socket: shared between processes, bounded for clients, in order at its end."""

from __future__ import annotations

import asyncio
import http.client
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from serving import free_port

from experts.errors import InvalidInput
from router.api import http_listener
from router.api.http_listener import MAX_HEAD_BYTES, HttpListener, listening_socket

LOOPBACK = "127.0.0.1"


class App:
    """Answers with its name; a request for /wait is answered after `go` only."""

    def __init__(self, name: bytes) -> None:
        self.name = name
        self.waiting = threading.Event()
        self.go = threading.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/wait":
            self.waiting.set()
            await asyncio.to_thread(self.go.wait)
        if scope["path"] == "/stop":
            self.waiting.set()
            self.go.wait()
        headers = [(b"content-length", str(len(self.name)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": self.name})


@contextmanager
def listening(
    app: App, port: int, *, max_connections: int = 100, ended: list[str] | None = None, meeting: Path | None = None
) -> Iterator[Any]:
    async def on_end() -> None:
        if ended is not None:
            ended.append("end")

    listener = HttpListener(
        app,
        host=LOOPBACK,
        port=port,
        max_connections=max_connections,
        grace_s=10.0,
        on_end=on_end,
        meeting=meeting,
    )
    listener.start()
    try:
        yield listener
    finally:
        app.go.set()
        listener.stop()
        assert not listener.alive


def get(port: int, path: str = "/") -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(LOOPBACK, port, timeout=30)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def test_two_listeners_share_a_port_and_one_goes_on_alone() -> None:
    port = free_port()
    with listening(App(b"a"), port) as first, listening(App(b"b"), port):
        # The system spreads connections by a hash of their ports: 64 on one side have a chance of 2**-63.
        assert {get(port)[1] for _ in range(64)} == {b"a", b"b"}
        first.stop()
        assert {get(port) for _ in range(16)} == {(200, b"b")}


def test_a_listener_that_is_stopped_keeps_no_connection_for_itself(tmp_path: Path) -> None:
    port, apps = free_port(), (App(b"a"), App(b"b"))
    with listening(apps[0], port, meeting=tmp_path / "m"), listening(apps[1], port, meeting=tmp_path / "m"):
        stopping = threading.Thread(target=get, args=(port, "/stop"))
        stopping.start()
        while not any(app.waiting.is_set() for app in apps):
            time.sleep(0.01)
        stopped = apps[not apps[0].waiting.is_set()]
        well = apps[stopped is apps[0]]
        assert {get(port) for _ in range(16)} == {(200, well.name)}
        stopped.go.set()
        stopping.join(30)
        assert {get(port)[1] for _ in range(64)} == {b"a", b"b"}


def test_a_port_of_another_program_is_refused_and_so_is_a_foreign_address() -> None:
    with listening_socket(LOOPBACK, 0, shared=False) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InvalidInput) as caught:
            listening_socket(LOOPBACK, port)
        assert (caught.value.field, caught.value.value) == ("port", port)
    with pytest.raises(InvalidInput) as caught:
        listening_socket("no such host.invalid", 1)
    assert caught.value.field == "host"


def test_a_shared_port_is_not_free() -> None:
    with listening_socket(LOOPBACK, 0) as one:
        port = one.getsockname()[1]
        with listening_socket(LOOPBACK, port), pytest.raises(InvalidInput):
            listening_socket(LOOPBACK, port, shared=False)


def test_a_request_in_progress_is_finished_before_the_end() -> None:
    app, ended, port = App(b"late"), [], free_port()
    answers: list[tuple[int, bytes]] = []
    with listening(app, port, ended=ended) as listener:
        client = threading.Thread(target=lambda: answers.append(get(port, "/wait")))
        client.start()
        assert app.waiting.wait(30)
        stopping = threading.Thread(target=listener.stop)
        stopping.start()
        app.go.set()
        stopping.join(30)
        client.join(30)
    assert answers == [(200, b"late")]
    assert ended == ["end"]


@pytest.mark.parametrize("head", [b"GET / HTTP/1.1\r\nx: ", b"GET /"])
def test_an_endless_head_is_cut_off(head: bytes) -> None:
    port = free_port()
    with listening(App(b"a"), port), socket.create_connection((LOOPBACK, port), timeout=30) as client:
        sent = 0
        with pytest.raises(OSError):
            client.sendall(head)
            while sent <= 200 * MAX_HEAD_BYTES:
                client.sendall(b"a" * 4096)
                sent += 4096
        assert get(port) == (200, b"a")


@pytest.mark.parametrize("head", [b"", b"GET / HT", b"GET / HTTP/1.1\r\nhost: a\r\n"])
def test_a_head_that_never_ends_is_given_up(head: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_listener, "HEAD_TIMEOUT_S", 0.05)
    port = free_port()
    with listening(App(b"a"), port), socket.create_connection((LOOPBACK, port), timeout=30) as client:
        client.sendall(head)
        with suppress(ConnectionResetError):
            assert client.recv(100) == b""
        assert get(port) == (200, b"a")


def test_a_kept_connection_may_be_idle_longer_than_a_head(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_listener, "HEAD_TIMEOUT_S", 0.05)
    app, port = App(b"a"), free_port()
    with listening(app, port):
        kept = http.client.HTTPConnection(LOOPBACK, port, timeout=30)
        kept.request("GET", "/")
        assert kept.getresponse().read() == b"a"
        # Another connection's time runs out meanwhile.
        with socket.create_connection((LOOPBACK, port), timeout=30) as idle, suppress(ConnectionResetError):
            idle.recv(1)
        kept.request("GET", "/")
        assert kept.getresponse().read() == b"a"
        kept.close()


def test_too_many_connections_are_told_so() -> None:
    app, port = App(b"a"), free_port()
    with listening(app, port, max_connections=3), ExitStack() as stack:
        for _ in range(3):
            stack.enter_context(socket.create_connection((LOOPBACK, port), timeout=30))
        statuses = {get(port)[0]}
        assert statuses == {503}
    assert not app.waiting.is_set()
