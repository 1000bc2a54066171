"""Closed and open loops against a server that answers when the test lets it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from cluster.load.client import Answered, Failed, Outcome
from cluster.load.drive import Collected, drive
from cluster.load.settings import LoadSettings

DONE = Answered(sent=0.0, times=(1.0,), ended=1.0, prompt_tokens=1, output_tokens=1)


class Gate:
    """Holds requests until the test lets them go."""

    def __init__(self) -> None:
        self.begun: list[bytes] = []
        self.under_way = 0
        self.most = 0
        self.held: list[asyncio.Future[Outcome]] = []

    async def send(self, body: bytes) -> Outcome:
        self.begun.append(body)
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        future = asyncio.get_running_loop().create_future()
        self.held.append(future)
        try:
            return await future
        finally:
            self.under_way -= 1

    def release(self, outcome: Outcome = DONE) -> None:
        self.held.pop(0).set_result(outcome)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0)


def play(
    count: int, scenario: Callable[[Gate, asyncio.Event], Awaitable[None]], **given: Any
) -> tuple[Collected, list[int]]:
    """Drive `count` requests while `scenario` plays the server; what was collected, and the progress told."""
    settings, progress = LoadSettings(url="http://x", **given), list[int]()

    async def main() -> Collected:
        gate, stop = Gate(), asyncio.Event()
        bodies = [b"%d" % number for number in range(count)]
        async with asyncio.timeout(60):
            driving = asyncio.create_task(drive(settings, bodies, gate.send, progress.append, stop))
            await scenario(gate, stop)
            return await driving

    return asyncio.run(main()), progress


def test_a_closed_loop_keeps_so_many_under_way() -> None:
    async def scenario(gate: Gate, _stop: asyncio.Event) -> None:
        for num_begun in [*range(3, 10), 10, 10, 10]:
            await until(lambda count=num_begun: len(gate.begun) == count)
            gate.release()
        assert gate.most == 3
        assert gate.begun == [b"%d" % number for number in range(10)]

    collected, progress = play(10, scenario, concurrency=3)
    assert collected.outcomes == [DONE] * 10
    assert progress == list(range(1, 11))
    assert not collected.was_interrupted
    assert collected.late_s == []


def test_an_open_loop_does_not_wait_for_answers() -> None:
    async def scenario(gate: Gate, _stop: asyncio.Event) -> None:
        await until(lambda: len(gate.begun) == 20)
        assert gate.under_way == 20
        for _ in range(20):
            gate.release()

    collected, _ = play(20, scenario, request_rate=float("inf"))
    assert collected.outcomes == [DONE] * 20
    assert len(collected.late_s) == 20


def test_what_an_open_loop_may_not_send_is_counted() -> None:
    async def scenario(gate: Gate, _stop: asyncio.Event) -> None:
        await until(lambda: len(gate.begun) == 5)
        for _ in range(5):
            gate.release()

    collected, progress = play(8, scenario, request_rate=float("inf"), max_in_flight=5)
    failed = [outcome for outcome in collected.outcomes if isinstance(outcome, Failed)]
    assert [failure.kind for failure in failed] == ["not_sent"] * 3
    assert "5 requests were under way" in failed[0].message
    assert len(collected.outcomes) == len(progress) == 8


@pytest.mark.parametrize("rate", [None, float("inf"), 1e-3])
def test_stopping_keeps_what_was_measured(rate: float | None) -> None:
    async def scenario(gate: Gate, stop: asyncio.Event) -> None:
        num_first = {None: 2, 1e-3: 1}.get(rate, 6)
        await until(lambda: len(gate.begun) == num_first)
        gate.release()
        await until(lambda: gate.under_way == 0 or len(gate.begun) > num_first or gate.under_way == num_first - 1)
        stop.set()

    collected, _ = play(6, scenario, concurrency=2, request_rate=rate)
    assert collected.was_interrupted
    assert collected.outcomes == [DONE]
    expected = {None: (2, 3), 1e-3: (0, 5)}.get(rate, (5, 0))
    assert (collected.unfinished, collected.unsent) == expected
