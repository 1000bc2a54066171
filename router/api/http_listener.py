"""The socket of an HTTP server: an ASGI app served by uvicorn on a thread and an event loop of its own.

Several processes of one user may listen on one port; the system spreads connections over those that live, so that when
one dies the next connection is answered by another. Those that know each other (`router/api/shared_port.py`) also
answer for one that is stopped.
"""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from experts.errors import InvalidInput
from router.api.shared_port import SharedPort

MAX_HEAD_BYTES = 64 * 1024
HEAD_TIMEOUT_S = 30.0
IDLE_TIMEOUT_S = 75.0
"""Longer than clients keep a connection that they do not use, so that it is them who close it."""
BACKLOG = 1024
START_S = 10.0
CLOSE_S = 5.0


class HttpListener:
    """Serves `app` on `host`:`port` from `start` on. At `stop` requests in progress get `grace_s` to finish; then
    `on_end` runs, on the loop that the app ran on.

    At most `max_connections` are open at a time; further ones are answered with 503. Listeners with the same `meeting`,
    a path, take connections from each other that would wait.
    """

    def __init__(
        self,
        app: Callable[..., Awaitable[None]],
        *,
        host: str,
        port: int,
        max_connections: int,
        grace_s: float,
        on_end: Callable[[], Awaitable[None]],
        meeting: Path | None = None,
    ) -> None:
        self._host = host
        self._port = port
        self._grace_s = grace_s
        self._on_end = on_end
        self._server = _Server(
            uvicorn.Config(
                app,
                http=_BoundedProtocol,
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                limit_concurrency=max_connections,
                timeout_keep_alive=int(IDLE_TIMEOUT_S),
                timeout_graceful_shutdown=int(grace_s),
            ),
            meeting,
        )
        self._thread = threading.Thread(target=self._run, name="http", daemon=True)

    def start(self) -> None:
        """Listen. Raises InvalidInput when the address is not ours or the port is taken by another program."""
        self._socket = listening_socket(self._host, self._port)
        self._thread.start()
        self._server.answering.wait(START_S)

    @property
    def alive(self) -> bool:
        """Whether anybody is answered."""
        return self._thread.is_alive()

    def stop(self) -> None:
        """Take no new connections, wait for the requests in progress, end. Harmless when repeated."""
        self._server.should_exit = True
        if self._thread.is_alive():
            self._thread.join(self._grace_s + CLOSE_S)

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=self._server.config.get_loop_factory()) as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        try:
            await self._server.serve(sockets=[self._socket])
        finally:
            await self._on_end()


class _Server(uvicorn.Server):
    """Tells another thread when it answers, and shares its port with others who meet at `meeting`."""

    def __init__(self, config: uvicorn.Config, meeting: Path | None) -> None:
        super().__init__(config)
        self.answering = threading.Event()
        self._meeting = meeting
        self._shared: SharedPort | None = None
        self._arriving: set[asyncio.Task[object]] = set()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self._meeting is not None and sockets:
            self._shared = SharedPort(sockets[0], self._meeting, self._welcome)
        self.answering.set()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for server in self.servers:
            server.close()
        for listener in sockets or []:
            listener.close()
        if self._shared is not None:
            self._shared.close()
        await super().shutdown(sockets)

    def _welcome(self, connection: socket.socket) -> None:
        """Answer on a connection that another listener on the port did not accept."""
        loop = asyncio.get_running_loop()
        task = loop.create_task(loop.connect_accepted_socket(self._protocol, connection))
        self._arriving.add(task)
        task.add_done_callback(self._arriving.discard)

    def _protocol(self) -> HttpToolsProtocol:
        return _BoundedProtocol(config=self.config, server_state=self.server_state, app_state=self.lifespan.state)


class _BoundedProtocol(HttpToolsProtocol):
    """A connection whose heads of requests are bounded in bytes and time: the parser itself would take any."""

    _head_bytes: int | None = None
    """Bytes of the head that is arriving; None between heads."""
    _head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_is_over()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._head_bytes is not None:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES:
                self.transport.abort()

    def on_message_begin(self) -> None:
        self._await_head()
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._head_is_over()
        super().on_headers_complete()

    def _await_head(self) -> None:
        self._head_is_over()
        self._head_bytes = 0
        self._head_timer = self.loop.call_later(HEAD_TIMEOUT_S, self.transport.abort)

    def _head_is_over(self) -> None:
        self._head_bytes = None
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None


def listening_socket(host: str, port: int, *, shared: bool = True) -> socket.socket:
    """A socket that listens on `host`:`port`; `shared`: beside others of this user that share it, too.

    Raises InvalidInput.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except (socket.gaierror, UnicodeError):
        raise InvalidInput("host", host, "must be an address of this machine") from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shared:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise InvalidInput("port", port, f"must be free to listen on {host}: {error.strerror}") from None
    return listener
