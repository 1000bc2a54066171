"""One port of several processes: nobody's connection waits for a process that is stopped.

The system gives each new connection to one of the sockets that listen on the port, whether its process accepts or not.
So these processes hand each other their listening sockets, over unix sockets in a folder of their user's: what waits in
another one's queue for too long is taken by whoever sees it, and what is left there at that one's end is taken at once.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import select
import socket
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

log = logging.getLogger(__name__)

LOOK_S = 0.1
PATIENCE_S = 0.25
"""Longer than an event loop that works is away from its socket."""
SUFFIX = ".listener"


@dataclass(kw_only=True, eq=False)
class _Neighbour:
    """Another process on the port: the line to it, its listening socket once it has come, and since when (loop time)
    connections wait there."""

    line: socket.socket
    listener: socket.socket | None = None
    waiting_since: float | None = None


class SharedPort:
    """Shares `listener` with all others that are given the same `meeting`, a path that all their own ones begin with.

    Each connection that is taken from another's queue is handed to `on_connection`, which owns it from then on. Belongs
    to the event loop that runs when it is made.
    """

    def __init__(self, listener: socket.socket, meeting: Path, on_connection: Callable[[socket.socket], None]) -> None:
        self._listener = listener
        self._on_connection = on_connection
        self._loop = asyncio.get_running_loop()
        self._neighbours: set[_Neighbour] = set()
        self._path = meeting.with_name(f"{meeting.name}-{secrets.token_hex(4)}{SUFFIX}")
        self._door = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._door.setblocking(False)
        try:
            # It is found once it listens: who finds one that refuses takes it for dead.
            unfinished = self._path.with_suffix(".new")
            self._door.bind(str(unfinished))
            self._door.listen()
            unfinished.rename(self._path)
        except OSError as error:
            # A folder that cannot be written to, or a path too long for a socket.
            log.warning("the port is not shared at %s: %s", self._path, error)
        else:
            self._loop.add_reader(self._door, self._open)
            self._visit(meeting)
        self._timer = self._loop.call_later(LOOK_S, self._look)

    @property
    def num_known(self) -> int:
        """Of how many others the listening sockets are here."""
        return sum(neighbour.listener is not None for neighbour in self._neighbours)

    def close(self) -> None:
        """Leave. Once nobody here listens any more: others then take what is left in the queue."""
        self._timer.cancel()
        self._loop.remove_reader(self._door)
        self._door.close()
        self._path.unlink(missing_ok=True)
        for neighbour in list(self._neighbours):
            self._forget(neighbour)

    def _visit(self, meeting: Path) -> None:
        """Meet all who are there; whoever comes later visits us."""
        for path in meeting.parent.iterdir():
            if path == self._path or path.suffix != SUFFIX or not path.name.startswith(f"{meeting.name}-"):
                continue
            line = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            line.setblocking(False)
            try:
                line.connect(str(path))
            except OSError as error:
                line.close()
                if isinstance(error, ConnectionRefusedError):
                    path.unlink(missing_ok=True)
            else:
                self._meet(line)

    def _open(self) -> None:
        with suppress(OSError):
            line, _ = self._door.accept()
            line.setblocking(False)
            self._meet(line)

    def _meet(self, line: socket.socket) -> None:
        neighbour = _Neighbour(line=line)
        self._neighbours.add(neighbour)
        self._loop.add_reader(line, self._hear, neighbour)
        with suppress(OSError):
            socket.send_fds(line, [b"\0"], [self._listener.fileno()])

    def _hear(self, neighbour: _Neighbour) -> None:
        """Its listening socket came, or its end."""
        try:
            said, fds, _, _ = socket.recv_fds(neighbour.line, 1, 1)
        except BlockingIOError:
            return
        except OSError:
            said, fds = b"", []
        for fd in fds:
            os.set_inheritable(fd, False)
            neighbour.listener = socket.socket(fileno=fd)
        if not said:
            self._take(neighbour)
            self._forget(neighbour)

    def _forget(self, neighbour: _Neighbour) -> None:
        self._neighbours.discard(neighbour)
        self._loop.remove_reader(neighbour.line)
        neighbour.line.close()
        if neighbour.listener is not None:
            neighbour.listener.close()

    def _look(self) -> None:
        self._timer = self._loop.call_later(LOOK_S, self._look)
        now = self._loop.time()
        for neighbour in self._neighbours:
            if neighbour.listener is None or not _is_waited_at(neighbour.listener):
                neighbour.waiting_since = None
            elif neighbour.waiting_since is None:
                neighbour.waiting_since = now
            elif now - neighbour.waiting_since >= PATIENCE_S:
                self._take(neighbour)

    def _take(self, neighbour: _Neighbour) -> None:
        """Accept all that wait there."""
        with suppress(OSError):
            while neighbour.listener is not None:
                connection, _ = neighbour.listener.accept()
                connection.setblocking(False)
                self._on_connection(connection)


def _is_waited_at(listener: socket.socket) -> bool:
    poll = select.poll()
    poll.register(listener, select.POLLIN)
    return bool(poll.poll(0))
