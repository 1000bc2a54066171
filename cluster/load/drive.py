"""Keeps a load on a server, closed or open loop, and collects what becomes of each request."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

from cluster.load.arrivals import arrival_times
from cluster.load.client import Failed, Outcome
from cluster.load.settings import LoadSettings

Send = Callable[[bytes], Awaitable[Outcome]]


@dataclass(kw_only=True, eq=False)
class Collected:
    """What was measured. `late_s`: how much later than planned each request of an open loop was sent.

    `unfinished` requests were under way, and `unsent` not begun, when somebody asked for the end.
    """

    outcomes: list[Outcome] = field(default_factory=list)
    late_s: list[float] = field(default_factory=list)
    duration_s: float = 0.0
    unfinished: int = 0
    unsent: int = 0

    @property
    def was_interrupted(self) -> bool:
        return self.unfinished + self.unsent > 0


async def drive(
    settings: LoadSettings, bodies: Sequence[bytes], send: Send, on_progress: Callable[[int], None], stop: asyncio.Event
) -> Collected:
    """Send all `bodies` as `settings` say, until all have an outcome or `stop` is set."""
    load = _Load(bodies, send, on_progress)
    began = time.perf_counter()
    loop = _closed(load, settings.concurrency) if settings.request_rate is None else _open(load, settings)
    work = asyncio.create_task(loop)
    asked_to_stop = asyncio.create_task(stop.wait())
    await asyncio.wait({work, asked_to_stop}, return_when=asyncio.FIRST_COMPLETED)
    load.collected.duration_s = time.perf_counter() - began
    load.collected.unfinished = load.in_flight
    load.collected.unsent = len(bodies) - load.in_flight - len(load.collected.outcomes)
    asked_to_stop.cancel()
    work.cancel()
    with suppress(asyncio.CancelledError):
        await work
    return load.collected


@contextmanager
def interruptible() -> Iterator[asyncio.Event]:
    """An event that Ctrl-C and SIGTERM set, instead of what they do otherwise. Within a running loop's main thread."""
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    try:
        yield stop
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)


class _Load:
    def __init__(self, bodies: Sequence[bytes], send: Send, on_progress: Callable[[int], None]) -> None:
        self.bodies = bodies
        self.collected = Collected()
        self.in_flight = 0
        self._send = send
        self._on_progress = on_progress

    async def run(self, body: bytes) -> None:
        self.in_flight += 1
        outcome = await self._send(body)
        self.in_flight -= 1
        self.add(outcome)

    def add(self, outcome: Outcome) -> None:
        self.collected.outcomes.append(outcome)
        self._on_progress(len(self.collected.outcomes))


async def _closed(load: _Load, concurrency: int) -> None:
    """As soon as one is over the next begins."""
    waiting = iter(load.bodies)

    async def one_after_another() -> None:
        for body in waiting:
            await load.run(body)

    async with asyncio.TaskGroup() as group:
        for _ in range(min(concurrency, len(load.bodies))):
            group.create_task(one_after_another())


async def _open(load: _Load, settings: LoadSettings) -> None:
    """Requests come when they come, whatever became of those before."""
    assert settings.request_rate is not None
    times = arrival_times(len(load.bodies), settings.request_rate, settings.burstiness, settings.seed)
    began = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for body, due in zip(load.bodies, times, strict=True):
            wait_s = began + due - time.perf_counter()
            if wait_s > 0:
                await asyncio.sleep(wait_s)
            load.collected.late_s.append(max(time.perf_counter() - began - due, 0.0))
            if load.in_flight >= settings.max_in_flight:
                rule = f"{settings.max_in_flight} requests were under way, as many as --max-in-flight allows"
                load.add(Failed(kind="not_sent", message=rule))
                continue
            group.create_task(load.run(body))
            # Lets the task begin: it counts itself as in flight, and its bytes go out before the next one's.
            await asyncio.sleep(0)
