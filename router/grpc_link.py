"""One link from an ingress to one router, and one call on it. Knows nothing of resumption or of other routers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import grpc

from experts.errors import InvalidInput, Overloaded
from experts.tls import Identity
from experts.transport.grpc_options import RECONNECT
from experts.transport.grpc_security import open_aio_channel
from router.patience import Patience
from router.resume import Broken, Expired, Received, Refused, ResumeEvent
from router.wire import router_pb2 as pb
from router.wire import router_pb2_grpc
from router.wire.codec import REFUSAL_KEY, decode_events, decode_refusal

LOOKS_PER_SILENCE = 8
BLIP = 2.0
"""A silence this many times as long as what was allowed was no stop, but a router short of processors."""


class Link:
    """The channel to one router at one address, how many calls it carries, and whether the router is well.

    Routers beat (`RouterService.Beat`) as long as they live. One that was not heard for `silence_s` or whose connection
    broke is not well, and all its calls are broken, until it beats again; it is asked to every `probe_interval_s`.
    `on_change` is called when the router turns well again. All of it runs on the loop that made it.
    """

    def __init__(
        self,
        *,
        name: str,
        address: str,
        silence_s: float,
        probe_interval_s: float,
        max_message_bytes: int,
        on_change: Callable[[], None],
        tls: Identity | None = None,
    ) -> None:
        self.name = name
        self.address = address
        self.ready = True
        """Whether the cluster view gives it new requests."""
        self.well = True
        self._loop = asyncio.get_running_loop()
        self._patience = Patience(silence_s)
        self._probe_interval_s = probe_interval_s
        self._on_change = on_change
        self._channel = open_aio_channel(address, _options(max_message_bytes), tls)
        self._stub: Any = router_pb2_grpc.RouterServiceStub(self._channel)
        self._calls: set[Call] = set()
        self._heard_at = self._loop.time()
        self._tasks = [self._loop.create_task(work()) for work in (self._listen, self._watch)]
        self._retired = False
        self._closing: asyncio.Task[None] | None = None

    @property
    def in_flight(self) -> int:
        """How many calls it carries."""
        return len(self._calls)

    def open(self, message: pb.SubmitRequest, timeout_s: float) -> Call:
        """Begin a call; what is wrong with it shows in its `read`."""
        call = Call(self, message.request_id, self._stub.Submit(message, timeout=timeout_s))
        self._calls.add(call)
        return call

    def release(self, call: Call) -> None:
        """The call is over."""
        self._calls.discard(call)
        if self._retired and not self._calls:
            self._close()

    def hear(self) -> None:
        """The router said something."""
        self._heard_at = self._loop.time()

    def doubt(self) -> None:
        """The router is not well until it beats again."""
        self.well = False

    def retire(self) -> None:
        """Close once the calls in progress are over."""
        self._retired = True
        if not self._calls:
            self._close()

    async def aclose(self) -> None:
        """Close now; calls in progress break."""
        self._retired = True
        self._close()
        assert self._closing is not None
        await self._closing

    def _close(self) -> None:
        if self._closing is None:
            for task in self._tasks:
                task.cancel()
            self._closing = self._loop.create_task(self._channel.close(None))

    async def _listen(self) -> None:
        """Hear beats, and ask for new ones whenever they end."""
        while True:
            with suppress(grpc.aio.AioRpcError):
                async for _ in self._stub.Beat(pb.BeatRequest()):
                    self._beat()
            self.doubt()
            await asyncio.sleep(self._probe_interval_s)

    def _beat(self) -> None:
        silence_s = self._loop.time() - self._heard_at
        self.hear()
        if self.well:
            return
        if silence_s < BLIP * self._patience.seconds(self._heard_at):
            self._patience.false_alarm(self._heard_at)
        self.well = True
        self._on_change()

    async def _watch(self) -> None:
        """Notice silence. What this process did not hear because it was stopped itself is not held against anybody."""
        look_s = self._patience.least_s / LOOKS_PER_SILENCE
        while True:
            looked_at = self._loop.time()
            await asyncio.sleep(look_s)
            now = self._loop.time()
            overslept_s = now - looked_at - look_s
            if overslept_s > look_s:
                self._heard_at += overslept_s
            patience_s = self._patience.seconds(now)
            if self.well and now - self._heard_at >= patience_s:
                self.doubt()
                for call in list(self._calls):
                    call.fall_silent(f"said nothing for {patience_s:g} s")


class Call:
    """One attempt of one request on one router. Close it exactly once, whatever became of it."""

    def __init__(self, link: Link, request_id: str, call: Any) -> None:
        self._link = link
        self._request_id = request_id
        self._call = call
        self._silence = ""

    async def read(self) -> ResumeEvent:
        """The next thing that happens on the call: Received, Broken, Refused or Expired."""
        try:
            response = await self._call.read()
        except grpc.aio.AioRpcError as error:
            return self._failed(error)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            # Nobody cancelled this task: the router fell silent, or the channel closed under the call.
            return self._broken(self._silence or "the link was closed", silent=bool(self._silence))
        if not isinstance(response, pb.SubmitResponse):  # grpc's mark for the end
            return self._broken("ended the stream without a finish")
        self._link.hear()
        tokens, finish = decode_events(self._request_id, response)
        return Received(tokens=tokens, finish=finish)

    def fall_silent(self, silence: str) -> None:
        """Let `read` say that the router does not answer, now."""
        self._silence = silence
        self._call.cancel()

    def close(self) -> None:
        """Tell the router to stop, unless it is done; free the link."""
        self._call.cancel()
        self._link.release(self)

    def _failed(self, error: grpc.aio.AioRpcError) -> ResumeEvent:
        if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
            return Expired()
        refusal = _refusal_of(error)
        if refusal is not None:
            return Refused(error=refusal)
        self._link.doubt()
        return self._broken(f"{error.code().name}: {error.details()}")

    def _broken(self, problem: str, *, silent: bool = False) -> Broken:
        return Broken(problem=f"router {self._link.name} at {self._link.address}: {problem}", silent=silent)


def _refusal_of(error: grpc.aio.AioRpcError) -> Overloaded | InvalidInput | None:
    trailers: Any = error.trailing_metadata()
    for key, value in trailers or ():
        if key == REFUSAL_KEY:
            return decode_refusal(value)
    return None


def _options(max_message_bytes: int) -> list[tuple[str, Any]]:
    return [
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.max_send_message_length", max_message_bytes),
        # A restarted router is found again within a second.
        *RECONNECT,
        # Links between our own processes: no proxy of the environment, no state shared with other channels.
        ("grpc.enable_http_proxy", 0),
        ("grpc.use_local_subchannel_pool", 1),
    ]
