"""A port of several listeners: who is stopped or ends leaves no connection without an answer."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
from serving import free_port

from router.api.http_listener import listening_socket
from router.api.shared_port import SUFFIX, SharedPort

LOOPBACK = "127.0.0.1"
CLIENTS = 32


class Side:
    """A listener that accepts nothing itself, and counts what it takes from others."""

    def __init__(self, port: int, meeting: Path) -> None:
        self.listener = listening_socket(LOOPBACK, port)
        self.listener.setblocking(False)
        self.taken: list[socket.socket] = []
        self.shared = SharedPort(self.listener, meeting, self.taken.append)

    def accept(self) -> list[socket.socket]:
        """All that wait in its own queue."""
        accepted = []
        while True:
            try:
                accepted.append(self.listener.accept()[0])
            except BlockingIOError:
                return accepted

    def end(self) -> None:
        self.listener.close()
        self.shared.close()


async def until(look: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not look():
            await asyncio.sleep(0.01)


def connect(stack: ExitStack, port: int) -> None:
    for _ in range(CLIENTS):
        stack.enter_context(socket.create_connection((LOOPBACK, port), timeout=30))


def know_each_other(*sides: Side) -> bool:
    return all(side.shared.num_known == len(sides) - 1 for side in sides)


def test_what_waits_for_one_that_does_not_accept_is_taken(tmp_path: Path) -> None:
    async def run() -> None:
        port = free_port()
        first, second = Side(port, tmp_path / "a"), Side(port, tmp_path / "a")
        await until(lambda: know_each_other(first, second))
        with ExitStack() as stack:
            connect(stack, port)
            # Neither accepts its own: each takes all of the other's.
            await until(lambda: len(first.taken) + len(second.taken) == CLIENTS)
        assert first.taken and second.taken
        first.end()
        second.end()

    asyncio.run(run())


def test_what_is_left_in_the_queue_at_an_end_is_taken(tmp_path: Path) -> None:
    async def run() -> None:
        port = free_port()
        first, second = Side(port, tmp_path / "a"), Side(port, tmp_path / "a")
        await until(lambda: know_each_other(first, second))
        with ExitStack() as stack:
            connect(stack, port)
            first.end()
            await until(lambda: second.shared.num_known == 0)
            assert len(second.accept()) + len(second.taken) == CLIENTS
            # Nothing goes to the socket of the one that ended any more.
            connect(stack, port)
            assert len(second.accept()) == CLIENTS
        second.end()

    asyncio.run(run())


def test_files_of_the_dead_are_removed_and_own_ones_at_the_end(tmp_path: Path) -> None:
    dead = tmp_path / f"a-dead{SUFFIX}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as gone:
        gone.bind(str(dead))

    async def run() -> None:
        side = Side(free_port(), tmp_path / "a")
        assert not dead.exists() and len(list(tmp_path.iterdir())) == 1
        side.end()

    asyncio.run(run())
    assert not list(tmp_path.iterdir())


def test_whoever_begins_is_not_taken_for_dead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        port = free_port()
        first = Side(port, tmp_path / "a")
        listen = socket.socket.listen

        def beside_another(listener: socket.socket, *backlog: int) -> None:
            """Somebody visits between the name and the listening."""
            if listener.family == socket.AF_UNIX:
                first.shared._visit(tmp_path / "a")
            listen(listener, *backlog)

        monkeypatch.setattr(socket.socket, "listen", beside_another)
        second = Side(port, tmp_path / "a")
        monkeypatch.undo()
        assert len(list(tmp_path.iterdir())) == 2
        third = Side(port, tmp_path / "a")
        await until(lambda: know_each_other(first, second, third))
        for side in (first, second, third):
            side.end()

    asyncio.run(run())


@pytest.mark.parametrize("folder", ["missing", "x" * 120])
def test_without_a_place_to_meet_a_listener_is_alone(folder: str, tmp_path: Path) -> None:
    async def run() -> None:
        side = Side(free_port(), tmp_path / folder / "a")
        assert side.shared.num_known == 0
        side.end()

    asyncio.run(run())


def test_others_on_the_machine_are_left_alone(tmp_path: Path) -> None:
    async def run() -> None:
        one, other = Side(free_port(), tmp_path / "a"), Side(free_port(), tmp_path / "b")
        third = Side(one.listener.getsockname()[1], tmp_path / "a")
        await until(lambda: know_each_other(one, third))
        assert other.shared.num_known == 0
        for side in (one, other, third):
            side.end()

    asyncio.run(run())
