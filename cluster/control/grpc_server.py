"""The controller's shell: a gRPC listener, a clock and a journal file around the pure core, on one event loop.

Only the loop's thread touches the state. Starting hosts is left to an `Executor`; what fails there becomes a problem
in the status, never an end of the controller.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Generic, Protocol, TypeVar

import grpc

from cluster.control.core import start, step
from cluster.control.grpc_commands import Commands
from cluster.control.journal import JournalFile
from cluster.control.numbers import ControllerNumbers, planner_of, replicas_of
from cluster.control.reading import Held, LoadSource, expected_of
from cluster.control.state import (
    Alarmed,
    AskRoom,
    ControllerState,
    DrainAsked,
    Effect,
    EndHost,
    EnsureHost,
    Event,
    HostGone,
    HostReported,
    Journal,
    Leave,
    LoadRead,
    MemberReported,
    PublishView,
    SendOrder,
    Steering,
    Tick,
    Timing,
    WriteJournal,
)
from cluster.control.status import status_of
from cluster.control.steer import plan_ahead
from experts.errors import InvalidInput
from experts.grpc_control import MAX_MESSAGE_BYTES
from experts.reports import ClusterStatus, ControllerInfo, HostOrder
from experts.tls import Identity
from experts.transport.grpc_options import server_options
from experts.transport.grpc_security import listen
from experts.wire import control_pb2 as pb
from experts.wire.control_pb2_grpc import ControlServiceServicer, add_ControlServiceServicer_to_server
from experts.wire.view import (
    host_report_from_wire,
    member_report_from_wire,
    order_to_wire,
    status_to_wire,
    view_to_wire,
)

TICK_S = 0.25
TURN_S = 1.0
"""Between turns of the control loop; hosts report as often."""
LEAST_PAUSE_S = 0.1
MAX_CUT_MS = 60_000
HEARTBEAT_S = 2.0
START_TIMEOUT_S = 30.0

log = logging.getLogger(__name__)

Message = TypeVar("Message")


class Executor(Protocol):
    """Carries out what the controller wants of the world. Called on threads of a small pool."""

    def ensure_host(self, name: str) -> None:
        """Start the process of host `name` unless there is one."""
        ...

    def end_host(self, name: str) -> None:
        """End the process of host `name` for good, if there is one, begun or not."""
        ...

    def ask_room(self, num_hosts: int) -> None:
        """Have as many machines as so many hosts need, where machines can be added."""
        ...

    def leave(self, hosts: Iterable[str]) -> None:
        """End all hosts, which are named, then this process, for good."""
        ...


@dataclass(frozen=True, kw_only=True)
class Listener:
    """Where to listen, as whom, and what to tell others. `port` 0: the port of the last life, or any free one."""

    bind: str = "127.0.0.1"
    advertise: str = "127.0.0.1"
    port: int = 0
    tls: Identity | None = None


class ControlServer:
    """The controller of one cluster. Its methods may be called from any thread."""

    def __init__(
        self,
        *,
        name: str,
        journal: JournalFile,
        fresh: Journal,
        hosts: tuple[str, ...],
        executor: Executor,
        listener: Listener,
        node: str = "",
        prometheus: str = "",
        timing: Timing | None = None,
        steering: Steering | None = None,
        load: LoadSource | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`fresh` is the journal of a first life; what lies on disk counts only if its digest is the same. `load` is
        where experts' load is read; None: nobody knows it."""
        self._name = name
        self._file = journal
        self._executor = executor
        self._listener = listener
        self._clock = clock
        self._info = ControllerInfo(pid=os.getpid(), node=node, prometheus=prometheus)
        left = journal.read()
        self._journal = left if left is not None and left.digest == fresh.digest else _above(fresh, left)
        self._hosts = hosts
        self._timing = timing
        self._steering = steering
        self._load = load
        self._pool = ThreadPoolExecutor(max_workers=4, thread_name_prefix="control-work")
        self._thread = threading.Thread(target=self._run, name="control", daemon=True)
        self._address: Future[str] = Future()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None
        self._core: _Core | None = None

    def start(self) -> str:
        """Listen; returns the advertised address. Raises InvalidInput when the wanted port is taken."""
        self._thread.start()
        return self._address.result(timeout=START_TIMEOUT_S)

    def stop(self) -> None:
        """End the listener; the journal stays."""
        if self._loop is not None and self._stop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(timeout=5.0)
        self._pool.shutdown(wait=False, cancel_futures=True)

    def status(self) -> ClusterStatus:
        """What `herd status` shows."""
        core, loop = self._core, self._loop
        if core is None or loop is None:
            return ClusterStatus(name=self._name)
        return asyncio.run_coroutine_threadsafe(_call(core.status), loop).result(timeout=START_TIMEOUT_S)

    def host_names(self) -> tuple[str, ...]:
        """Of all hosts that there may be a process of."""
        return self._hosts if self._core is None else self._core.host_names()

    def numbers(self) -> ControllerNumbers:
        """For the metrics page of this process."""
        core, loop = self._core, self._loop
        if core is None or loop is None:
            return ControllerNumbers(status=ClusterStatus(name=self._name))
        return asyncio.run_coroutine_threadsafe(_call(core.numbers), loop).result(timeout=START_TIMEOUT_S)

    def set_metrics_address(self, address: str) -> None:
        """Tell the status where this process's metrics are."""
        self._info = replace(self._info, metrics_address=address)
        if self._core is not None:
            self._core.info = replace(self._core.info, metrics_address=address)

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except BaseException as error:
            if self._address.done():
                raise
            self._address.set_exception(error)

    async def _serve(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        server = grpc.aio.server(options=server_options(MAX_MESSAGE_BYTES))
        port = self._bind(server)
        info = replace(self._info, address=f"{self._listener.advertise}:{port}")
        journal = replace(self._journal, port=port)
        state, effects = start(journal, self._hosts, self._clock(), self._timing, self._steering)
        core = _Core(self._name, state, info, self._file, self._executor, self._pool, self._clock)
        core.carry_out(effects)
        add_ControlServiceServicer_to_server(core, server)
        await server.start()
        self._core = core
        turns = asyncio.create_task(core.turn_for_ever(self._load))
        ticks = asyncio.create_task(core.tick_for_ever())
        self._address.set_result(info.address)
        try:
            await self._stop.wait()
        finally:
            ticks.cancel()
            turns.cancel()
            await server.stop(grace=0.5)

    def _bind(self, server: grpc.aio.Server) -> int:
        """The configured port must be free; that of the last life is only preferred."""
        wanted = self._listener.port
        for port in [wanted] if wanted else [self._journal.port, 0]:
            try:
                return listen(server, f"{self._listener.bind}:{port}", self._listener.tls)
            except RuntimeError:
                log.warning("port %d of %s cannot be bound", port, self._listener.bind)
        raise InvalidInput("control-port", wanted, f"must be free to bind on {self._listener.bind}")


class _Core(ControlServiceServicer):
    """The state, the streams that attend to it, and the carrying out of effects. Lives on the loop."""

    def __init__(
        self,
        name: str,
        state: ControllerState,
        info: ControllerInfo,
        file: JournalFile,
        executor: Executor,
        pool: ThreadPoolExecutor,
        clock: Callable[[], float],
    ) -> None:
        self.info = info
        self._name = name
        self._state = state
        self._file = file
        self._executor = executor
        self._pool = pool
        self._clock = clock
        # Of its own, because starting hosts may keep the others busy for long.
        self._turner = ThreadPoolExecutor(max_workers=1, thread_name_prefix="control-turn")
        self._streams = itertools.count(1)
        self._hosts: dict[int, _Latest[pb.HostOrder]] = {}
        self._members: dict[int, _Latest[pb.ClusterView]] = {}
        self._problems: dict[str, str] = {}
        self._view = pb.ClusterView()
        self._commands = Commands(lambda: self._state, self._feed, clock)

    def status(self) -> ClusterStatus:
        status = status_of(self._state, self._name, self.info)
        return replace(status, problems=(*status.problems, *self._problems.values()))

    def numbers(self) -> ControllerNumbers:
        return ControllerNumbers(
            status=self.status(), replicas=replicas_of(self._state), planner=planner_of(self._state)
        )

    async def tick_for_ever(self) -> None:
        while True:
            self._feed(Tick())
            await asyncio.sleep(TICK_S)

    async def turn_for_ever(self, source: LoadSource | None) -> None:
        """Turns of the control loop. Loads are read and plans made on a thread: this loop goes on meanwhile."""
        while True:
            began = self._clock()
            self._feed(await self._read(source))
            await asyncio.sleep(max(LEAST_PAUSE_S, began + TURN_S - self._clock()))

    async def _read(self, source: LoadSource | None) -> LoadRead:
        if source is None or not self._state.moving.goal:
            return LoadRead(load=None)
        try:
            return await self._read_and_plan(source)
        except Exception as error:
            # Not to know the load is no reason to stop.
            log.exception("no load could be acted upon")
            return LoadRead(load=None, missing=f"no load could be acted upon: {error}")

    async def _read_and_plan(self, source: LoadSource) -> LoadRead:
        loop = asyncio.get_running_loop()
        read = await loop.run_in_executor(self._turner, source.load, expected_of(self._state), self._clock())
        load, missing = (None, read.reason) if isinstance(read, Held) else (read, "")
        question = plan_ahead(self._state, load, self._clock())
        if question is None:
            return LoadRead(load=load, missing=missing)
        ahead = await loop.run_in_executor(self._turner, question.answer, self._clock())
        return LoadRead(load=load, missing=missing, ahead=ahead)

    def carry_out(self, effects: list[Effect]) -> None:
        for effect in effects:
            match effect:
                case WriteJournal(journal=journal):
                    self._write(journal)
                case PublishView(view=view):
                    self._view = view_to_wire(view)
                    for member in self._members.values():
                        member.put(self._view)
                case SendOrder(stream=stream, order=order):
                    if stream in self._hosts:
                        self._hosts[stream].put(order_to_wire(order))
                case EnsureHost(name=name):
                    self._work(f"starting host {name}", self._executor.ensure_host, name)
                case EndHost(name=name):
                    self._work(f"ending host {name}", self._executor.end_host, name)
                case AskRoom(num_hosts=number):
                    self._work("asking for machines", self._executor.ask_room, number)
                case Alarmed(text=text):
                    log.warning("placement: %s", text)
                case Leave(reason=reason):
                    log.warning("leaving: %s", reason)
                    self._leave()

    async def AttendHost(self, requests: AsyncIterator[pb.HostReport], context: Any) -> AsyncIterator[pb.HostOrder]:
        stream, outbox = next(self._streams), _Latest[pb.HostOrder]()
        names: set[str] = set()

        def take(message: pb.HostReport) -> None:
            names.add(message.name)
            self._feed(HostReported(report=host_report_from_wire(message), stream=stream))

        self._hosts[stream] = outbox
        try:
            async for order in _attended(requests, take, outbox, context):
                yield order or pb.HostOrder()
        finally:
            del self._hosts[stream]
            for name in names:
                self._feed(HostGone(name=name, stream=stream))

    async def AttendMember(
        self, requests: AsyncIterator[pb.MemberReport], context: Any
    ) -> AsyncIterator[pb.ClusterView]:
        stream, outbox = next(self._streams), _Latest[pb.ClusterView]()
        outbox.put(self._view)

        def take(message: pb.MemberReport) -> None:
            self._feed(MemberReported(report=member_report_from_wire(message)))

        self._members[stream] = outbox
        try:
            async for view in _attended(requests, take, outbox, context):
                yield view or pb.ClusterView()
        finally:
            del self._members[stream]

    async def Status(self, request: pb.StatusRequest, context: Any) -> pb.StatusResponse:
        return status_to_wire(self.status())

    async def Drain(self, request: pb.DrainRequest, context: Any) -> pb.DrainResponse:
        self._feed(DrainAsked())
        return pb.DrainResponse()

    async def Cut(self, request: pb.CutRequest, context: Any) -> pb.CutResponse:
        host = self._state.hosts.get(request.host)
        outbox = self._hosts.get(host.stream) if host is not None and host.stream is not None else None
        if host is not None and outbox is not None:
            # With its target, because an order that it had not read yet is replaced by this one.
            order = order_to_wire(host.ordered or HostOrder(target=host.target))
            order.cut_ms = min(request.ms, MAX_CUT_MS)
            outbox.put(order)
            return pb.CutResponse()
        await context.abort(grpc.StatusCode.NOT_FOUND, f"no host {request.host!r} is here")
        raise AssertionError("abort does not return")

    async def Plan(self, request: pb.PlanRequest, context: Any) -> pb.PlanResponse:
        return self._commands.plan(request)

    async def Place(self, request: pb.PlaceRequest, context: Any) -> pb.PlaceResponse:
        return self._commands.place(request)

    async def History(self, request: pb.HistoryRequest, context: Any) -> pb.HistoryResponse:
        return self._commands.history()

    async def Rows(self, request: pb.RowsRequest, context: Any) -> pb.RowsResponse:
        return self._commands.rows()

    async def Shutdown(self, request: pb.ShutdownRequest, context: Any) -> pb.ShutdownResponse:
        self._leave()
        return pb.ShutdownResponse()

    def _leave(self) -> None:
        self._work("leaving", self._executor.leave, self.host_names())

    def host_names(self) -> tuple[str, ...]:
        """Of all hosts that there may be a process of."""
        return tuple(self._state.hosts)

    def _feed(self, event: Event) -> None:
        self._state, effects = step(self._state, event, self._clock())
        self.carry_out(effects)

    def _write(self, journal: Journal) -> None:
        try:
            self._file.write(journal)
            self._problems.pop("journal", None)
        except OSError as error:
            # Serving matters more than the journal: without it a next life starts from what members report.
            self._problems["journal"] = f"the journal cannot be written: {error.strerror}"

    def _work(self, what: str, function: Callable[..., None], *args: object) -> None:
        def done(future: Future[None]) -> None:
            error = None if future.cancelled() else future.exception()
            if error is not None:
                log.error("%s failed", what, exc_info=error)
                self._problems[what] = f"{what} failed: {error}"
            else:
                self._problems.pop(what, None)

        self._pool.submit(function, *args).add_done_callback(done)


class _Latest(Generic[Message]):
    """Room for one message that a newer one replaces: only the newest order or view is worth sending."""

    def __init__(self) -> None:
        self._message: Message | None = None
        self._there = asyncio.Event()

    def put(self, message: Message) -> None:
        self._message = message
        self._there.set()

    async def get(self) -> Message:
        await self._there.wait()
        self._there.clear()
        message = self._message
        assert message is not None
        return message


async def _attended(
    requests: AsyncIterator[Any], take: Callable[[Any], None], outbox: _Latest[Message], context: Any
) -> AsyncIterator[Message | None]:
    """Feed what comes in to `take`, and yield what is to go out: None every two seconds without anything else."""
    reader = asyncio.create_task(_read(requests, take))
    getter: asyncio.Task[Message] | None = None
    try:
        while not reader.done():
            getter = getter or asyncio.create_task(outbox.get())
            await asyncio.wait({reader, getter}, timeout=HEARTBEAT_S, return_when=asyncio.FIRST_COMPLETED)
            if getter.done():
                yield getter.result()
                getter = None
            elif not reader.done():
                yield None
        try:
            reader.result()
        except ValueError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
    finally:
        reader.cancel()
        if getter is not None:
            getter.cancel()


async def _read(requests: AsyncIterator[Any], take: Callable[[Any], None]) -> None:
    async for message in requests:
        take(message)


async def _call(function: Callable[[], Message]) -> Message:
    return function()


def _above(fresh: Journal, left: Journal | None) -> Journal:
    """A fresh journal for other settings than those of `left`, whose numbers stay taken."""
    if left is None:
        return fresh
    return replace(fresh, term=left.term, epoch=left.epoch, port=left.port)
