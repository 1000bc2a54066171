"""The router's internal listener: hands requests of the ingresses to the engine and streams its events back.

Owns a thread with an event loop of its own. Knows nothing of steps, models or clients.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from typing import Any, NoReturn, Protocol

import grpc

from experts.errors import InvalidInput, Overloaded, RouterLost
from experts.tls import Identity
from experts.transport.grpc_security import listen
from router.engine.images import ImageInput
from router.engine.request import Event, FinishEvent, SamplingParams
from router.wire import router_pb2 as pb
from router.wire import router_pb2_grpc
from router.wire.codec import (
    MAX_MESSAGE_BYTES,
    REFUSAL_KEY,
    Refused,
    decode_images,
    decode_salt,
    decode_sampling,
    encode_events,
    encode_refusal,
)

MAX_DETAILS = 500
"""Characters of an error's text in a status: the rest of the header belongs to the refusal."""

BEAT_S = 0.12

STOP_SLACK_S = 5.0
"""How much longer than its grace a stop may take before it is our bug."""


class SubmitTarget(Protocol):
    """The engine as its listener sees it. Both methods are called from the listener's loop and return at once."""

    def submit(
        self,
        request_id: str,
        attempt: int,
        prompt_ids: list[int],
        emitted_ids: list[int],
        sampling: SamplingParams,
        deadline: float,
        on_event: Callable[[Event], None],
        images: Sequence[ImageInput] = (),
        priority: int = 0,
        cache_salt: str = "",
    ) -> None:
        """Take a request, or raise Overloaded, InvalidInput, ContextOverflow, or RouterLost: it has stopped for good.

        `emitted_ids` are the output tokens that earlier attempts sent; the first event is token len(emitted_ids), or
        the finish where they already end the request. `deadline` is a `time.monotonic()` instant. `on_event` is called
        from any one thread, never blocks, and gets exactly one FinishEvent, as the last. An engine that stops gives its
        requests up with an ERROR of code "router_unavailable": another router continues them. `images` belong to the
        prompt's patch tokens, in order. `sampling` is as it came: what cannot be followed is InvalidInput. A lower
        `priority` goes first; cached prefixes are shared between requests of the same `cache_salt`.
        """
        ...

    def cancel(self, request_id: str, attempt: int) -> None:
        """Stop working on it. Harmless to repeat, and for requests that are over or were never here."""
        ...


class RouterServer:
    """Listens for `RouterService` calls on `bind`, on the first free port of `ports` or on any port.

    `max_streams` bounds the calls in progress (one more is Overloaded), `max_message_bytes` what one call may bring.
    It beats every `beat_s`, so that a stopped router shows.
    """

    def __init__(
        self,
        engine: SubmitTarget,
        *,
        bind: str = "127.0.0.1",
        ports: range | None = None,
        max_streams: int = 1024,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
        beat_s: float = BEAT_S,
        tls: Identity | None = None,
    ) -> None:
        self._engine = engine
        self._bind = bind
        self._ports = ports
        self._max_streams = max_streams
        self._max_message_bytes = max_message_bytes
        self._beat_s = beat_s
        self._tls = tls
        self._thread = threading.Thread(target=self._run, name="router-listener", daemon=True)
        self._started: Future[int] = Future()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopping: asyncio.Event | None = None
        self._grace_s = 0.0

    def start(self) -> None:
        """Begin to listen. InvalidInput when no port is free."""
        self._thread.start()
        self._started.result()

    @property
    def port(self) -> int:
        """The port it listens on, once started."""
        return self._started.result()

    @property
    def address(self) -> str:
        """Where it listens, "ip:port", once started."""
        return _join(self._bind, self.port)

    def stop(self, grace_s: float = 0.0) -> None:
        """Take no more calls, let those in progress end for `grace_s`, then drop them: their ingresses resume them
        elsewhere. Harmless to repeat."""
        if self._loop is None or self._stopping is None:
            return
        self._grace_s = grace_s
        with suppress(RuntimeError):  # The loop is closed: it has stopped already.
            self._loop.call_soon_threadsafe(self._stopping.set)
        self._thread.join(grace_s + STOP_SLACK_S)
        assert not self._thread.is_alive(), "a call in progress holds the router's listener up"

    def _run(self) -> None:
        asyncio.run(self._serve())

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stopping = asyncio.Event()
        calls = _Calls(self._engine, self._loop, self._max_streams, self._beat_s)
        try:
            server = grpc.aio.server(options=self._options())
            router_pb2_grpc.add_RouterServiceServicer_to_server(calls, server)
            port = self._listen(server)
            await server.start()
        except Exception as error:
            self._started.set_exception(error)
            return
        self._started.set_result(port)
        await self._stopping.wait()
        # Calls end by a status of ours; the rest of the time is for one whose peer does not read.
        ended = asyncio.create_task(server.stop(self._grace_s + STOP_SLACK_S / 2))
        await asyncio.wait({ended}, timeout=self._grace_s)
        calls.end()
        await ended

    def _listen(self, server: grpc.aio.Server) -> int:
        for port in self._ports if self._ports is not None else (0,):
            # grpc says no more than that it failed, and why goes to its log.
            with suppress(RuntimeError):
                return listen(server, _join(self._bind, port), self._tls)
        wanted = f"{self._ports.start}-{self._ports.stop - 1}" if self._ports is not None else "any"
        raise InvalidInput("ports", wanted, f"one of them must be free on {self._bind}, an address of this machine")

    def _options(self) -> list[tuple[str, Any]]:
        return [
            ("grpc.so_reuseport", 0),
            ("grpc.max_receive_message_length", self._max_message_bytes),
            ("grpc.max_send_message_length", self._max_message_bytes),
            # A stopped ingress keeps its connections open: pings tell it from a slow one.
            ("grpc.keepalive_time_ms", 10_000),
            ("grpc.keepalive_timeout_ms", 5_000),
        ]


class _Calls:
    """The methods of `RouterService`. All of it runs on the listener's loop."""

    def __init__(self, engine: SubmitTarget, loop: asyncio.AbstractEventLoop, max_streams: int, beat_s: float) -> None:
        self._engine = engine
        self._inbox = _Inbox(loop)
        self._max_streams = max_streams
        self._beat_s = beat_s
        self._mailboxes: set[_Mailbox] = set()
        self._stopped = False
        self._ending = asyncio.Event()

    async def Beat(self, request: pb.BeatRequest, context: _Context) -> None:
        while not self._stopped and not self._ending.is_set():
            await context.write(pb.BeatResponse())
            with suppress(TimeoutError):
                await asyncio.wait_for(self._ending.wait(), self._beat_s)
        await context.abort(grpc.StatusCode.UNAVAILABLE, "this router takes no requests any more")

    async def Submit(self, request: pb.SubmitRequest, context: _Context) -> None:
        if len(self._mailboxes) >= self._max_streams:
            await _refuse(context, Overloaded(f"this router has {self._max_streams} streams", 1.0))
        mailbox = _Mailbox()
        self._mailboxes.add(mailbox)
        try:
            await self._stream(request, mailbox, context)
        finally:
            self._mailboxes.discard(mailbox)

    def end(self) -> None:
        """End all streams with a status that lets their ingresses resume them elsewhere."""
        self._ending.set()
        for mailbox in self._mailboxes:
            mailbox.close()

    async def _stream(self, request: pb.SubmitRequest, mailbox: _Mailbox, context: _Context) -> None:
        try:
            self._submit(request, mailbox)
        except (Overloaded, InvalidInput) as error:
            await _refuse(context, error)
        except RouterLost as error:
            self._stopped = True
            await context.abort(grpc.StatusCode.UNAVAILABLE, str(error))
        try:
            await self._answer(mailbox, context)
        except BaseException:
            # Not finished: the client is gone, or we are stopping.
            self._engine.cancel(request.request_id, request.attempt)
            raise

    def _submit(self, request: pb.SubmitRequest, mailbox: _Mailbox) -> None:
        self._engine.submit(
            request.request_id,
            request.attempt,
            list(request.prompt_ids),
            list(request.emitted_ids),
            decode_sampling(request.sampling),
            time.monotonic() + request.timeout_ms / 1000,
            partial(self._inbox.post, mailbox),
            decode_images(request),
            request.priority,
            decode_salt(request),
        )

    async def _answer(self, mailbox: _Mailbox, context: _Context) -> None:
        await context.write(pb.SubmitResponse())
        while True:
            events = await mailbox.take()
            await context.write(encode_events(events))
            if events and isinstance(events[-1], FinishEvent):
                return
            if mailbox.closed:
                await context.abort(grpc.StatusCode.UNAVAILABLE, "this router stops")


class _Mailbox:
    """Events that wait for one call. Bounded by the request itself: max_tokens and a finish."""

    def __init__(self) -> None:
        self.closed = False
        self._events: list[Event] = []
        self._arrived = asyncio.Event()

    def close(self) -> None:
        """Wake the call for the last time."""
        self.closed = True
        self._arrived.set()

    def put(self, event: Event) -> None:
        self._events.append(event)
        self._arrived.set()

    async def take(self) -> Sequence[Event]:
        """All events that are there, once there is one; none when the mailbox was closed."""
        await self._arrived.wait()
        self._arrived.clear()
        events, self._events = self._events, []
        return events


class _Inbox:
    """Carries events from the engine's thread to the mailboxes on the loop, waking the loop once for many."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._posted: deque[tuple[_Mailbox, Event]] = deque()
        self._woken = False

    def post(self, mailbox: _Mailbox, event: Event) -> None:
        """From any thread. Events of one thread keep their order."""
        self._posted.append((mailbox, event))
        # Append before look, here; clear before look, in _deliver: so no event is left without a wake-up.
        if not self._woken:
            self._woken = True
            with suppress(RuntimeError):  # The loop is closed: nobody listens any more.
                self._loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        self._woken = False
        for _ in range(len(self._posted)):
            mailbox, event = self._posted.popleft()
            mailbox.put(event)


class _Context(Protocol):
    """What we use of a `grpc.aio.ServicerContext`."""

    async def write(self, message: pb.SubmitResponse | pb.BeatResponse) -> None: ...

    async def abort(
        self, code: grpc.StatusCode, details: str, trailing_metadata: tuple[tuple[str, bytes], ...] = ()
    ) -> NoReturn: ...


async def _refuse(context: _Context, error: Refused) -> NoReturn:
    overloaded = isinstance(error, Overloaded)
    code = grpc.StatusCode.RESOURCE_EXHAUSTED if overloaded else grpc.StatusCode.INVALID_ARGUMENT
    await context.abort(code, str(error)[:MAX_DETAILS], ((REFUSAL_KEY, encode_refusal(error)),))


def _join(bind: str, port: int) -> str:
    return f"[{bind}]:{port}" if ":" in bind else f"{bind}:{port}"
