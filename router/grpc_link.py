"""One link from an ingress to one router, and one call on it. Knows nothing of resumption or of other routers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import grpc

from experts.errors import InvalidInput, Overloaded
from router.resume import Broken, Expired, Received, Refused, ResumeEvent
from router.wire import router_pb2 as pb
from router.wire import router_pb2_grpc
from router.wire.codec import REFUSAL_KEY, decode_events, decode_refusal


class Link:
    """The channel to one router at one address, how many calls it carries, and whether the router is well.

    `on_change` is called when the router turns well again. All of it runs on the loop that made it.
    """

    def __init__(
        self,
        *,
        name: str,
        address: str,
        probe_interval_s: float,
        max_message_bytes: int,
        on_change: Callable[[], None],
    ) -> None:
        self.name = name
        self.address = address
        self.ready = True
        """Whether the cluster view gives it new requests."""
        self.well = True
        self.in_flight = 0
        self._probe_interval_s = probe_interval_s
        self._on_change = on_change
        self._channel = grpc.aio.insecure_channel(address, options=_options(max_message_bytes))
        self._stub: Any = router_pb2_grpc.RouterServiceStub(self._channel)
        self._probe: asyncio.Task[None] | None = None
        self._retired = False
        self._closing: asyncio.Task[None] | None = None

    def open(self, message: pb.SubmitRequest, timeout_s: float) -> Call:
        """Begin a call; what is wrong with it shows in its `read`."""
        self.in_flight += 1
        return Call(self, message.request_id, self._stub.Submit(message, timeout=timeout_s))

    def release(self) -> None:
        """A call is over."""
        self.in_flight -= 1
        if self._retired and self.in_flight == 0:
            self._close()

    def doubt(self) -> None:
        """A call failed: the router is not well until it answers a ping."""
        self.well = False
        if self._probe is None and not self._retired:
            self._probe = asyncio.get_running_loop().create_task(self._probe_until_well())

    def retire(self) -> None:
        """Close once the calls in progress are over."""
        self._retired = True
        if self._probe is not None:
            self._probe.cancel()
        if self.in_flight == 0:
            self._close()

    async def aclose(self) -> None:
        """Close now; calls in progress break."""
        self.retire()
        self._close()
        assert self._closing is not None
        await self._closing

    def _close(self) -> None:
        if self._closing is None:
            self._closing = asyncio.get_running_loop().create_task(self._channel.close(None))

    async def _probe_until_well(self) -> None:
        while not await self._ping():
            await asyncio.sleep(self._probe_interval_s)
        self._probe = None
        self.well = True
        self._on_change()

    async def _ping(self) -> bool:
        try:
            await self._stub.Ping(pb.PingRequest(), timeout=max(self._probe_interval_s, 1.0))
        except grpc.aio.AioRpcError:
            return False
        return True


class Call:
    """One attempt of one request on one router. Close it exactly once, whatever became of it."""

    def __init__(self, link: Link, request_id: str, call: Any) -> None:
        self._link = link
        self._request_id = request_id
        self._call = call

    async def read(self, silence_s: float) -> ResumeEvent:
        """The next thing that happens on the call: Received, Broken, Refused or Expired.

        A router that says nothing for `silence_s` is Broken: even an idle one sends heartbeats.
        """
        try:
            async with asyncio.timeout(silence_s):
                response = await self._call.read()
        except TimeoutError:
            return self._broken(f"said nothing for {silence_s:g} s")
        except grpc.aio.AioRpcError as error:
            return self._failed(error)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            # Nobody cancelled this task: grpc says so when the channel was closed under the call.
            return Broken(problem="the link was closed")
        if not isinstance(response, pb.SubmitResponse):  # grpc's mark for the end
            return self._broken("ended the stream without a finish")
        tokens, finish = decode_events(self._request_id, response)
        return Received(tokens=tokens, finish=finish)

    def close(self) -> None:
        """Tell the router to stop, unless it is done; free the link."""
        self._call.cancel()
        self._link.release()

    def _failed(self, error: grpc.aio.AioRpcError) -> ResumeEvent:
        if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
            return Expired()
        refusal = _refusal_of(error)
        if refusal is not None:
            return Refused(error=refusal)
        return self._broken(f"{error.code().name}: {error.details()}")

    def _broken(self, problem: str) -> Broken:
        self._link.doubt()
        return Broken(problem=f"router {self._link.name} at {self._link.address}: {problem}")


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
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 1000),
        # Links between our own processes: no proxy of the environment, no state shared with other channels.
        ("grpc.enable_http_proxy", 0),
        ("grpc.use_local_subchannel_pool", 1),
    ]
