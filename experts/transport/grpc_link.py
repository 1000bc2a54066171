"""One link of the gRPC transport: the thread that connects to a host, links up, and connects again after an end.

Answers are taken apart and passed on where gRPC hands them over, in a thread of its own, before the link's thread
hears of them: one thread less to wait for.
A link knows that its stream lives or has ended, and nothing of deadlines passing: that is its transport's part.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import grpc
import torch

from experts.errors import BadFrame, DeadlinePassed, HostLost, TransportError
from experts.link_terms import LinkTerms
from experts.placement import HostInfo
from experts.tls import ROWS_RULE, Identity, is_loopback
from experts.transport.base import Shipment, Ticket
from experts.transport.grpc_options import METHOD, SERVICE, client_options
from experts.transport.grpc_security import explain, open_channel
from experts.wire.codec import (
    decode_error,
    decode_host_hello,
    decode_mismatch,
    decode_result,
    encode_hello,
    encode_shipment,
    message_bound,
)
from experts.wire.frames import Frame, Kind, split

log = logging.getLogger(__name__)

Outcome = torch.Tensor | TransportError


@dataclass(frozen=True, kw_only=True)
class Reconnect:
    """Seconds to wait after an attempt: `first_s` doubling up to `longest_s`; `refused_s` after a refused hello."""

    first_s: float = 0.05
    longest_s: float = 1.0
    refused_s: float = 5.0


class Arrival(NamedTuple):
    """What became of a ticket, as its link learnt it; HostLost when its stream ended."""

    ticket: Ticket
    host: str
    outcome: Outcome


@dataclass(frozen=True, kw_only=True)
class LinkSetup:
    """What all links of a transport have in common."""

    router_name: str
    terms: LinkTerms
    on_change: Callable[[], None]
    arrived: queue.SimpleQueue[Arrival]
    max_message_bytes: int
    max_in_flight: int
    reconnect: Reconnect
    tls: Identity | None
    insecure: bool


class _Outgoing(NamedTuple):
    ticket: Ticket
    shipment: Shipment
    deadline: float


_Outbox = queue.SimpleQueue[_Outgoing | None]
"""Shipments on their way to the stream; None ends it. Bounded by `max_in_flight`."""


_PASSED_ON = "an answer that was passed on"

STALE_S = 2.0
"""A connection that was asked something and brought nothing for so long is made anew: damage on the way can leave one
that neither works nor ends. A host that only computes answers the hello of a new one at once."""
HELLO_S = 3.0
"""The same for a connection that has not begun."""


class _Refused(Exception):
    """The two ends do not fit: another checkpoint, another host than was meant, another protocol."""


class Link:
    """The wish to reach one life of one host: a thread that connects, reads and connects again."""

    def __init__(self, info: HostInfo, setup: LinkSetup) -> None:
        self._info = info
        self._setup = setup
        self._host = info.name
        self._thread = threading.Thread(target=self._run, name=f"link-{info.name}", daemon=True)
        self._closed = threading.Event()
        self._lock = threading.Lock()
        # Guarded by the lock. The outbox is there exactly while the link is up.
        self._outbox: _Outbox | None = None
        self._in_flight: dict[Ticket, int] = {}
        self._call: grpc.Call | None = None
        self._message_limit = 0
        self._incarnation = info.incarnation
        self._asked_at = self._heard_at = 0.0
        self._last_trouble = ""

    @property
    def is_up(self) -> bool:
        return self._outbox is not None

    def leads_to(self, info: HostInfo) -> bool:
        """Whether this link is the one to hold to the host of `info`: it was meant for that life of the host, or has
        met it already, before the cluster view told of it."""
        lives = (self._info.incarnation, self._incarnation)
        return self._info.address == info.address and info.incarnation in lives

    def start(self) -> None:
        self._thread.start()

    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def close(self) -> None:
        """End the link now; its thread ends soon."""
        with self._lock:
            self._closed.set()
            call = self._call
        self._end("no link is wanted any more")
        if call is not None:
            call.cancel()

    def renew_if_stale(self, now: float) -> None:
        """Make the connection anew if nothing has come of it for `STALE_S` though something was asked."""
        with self._lock:
            waits = self._outbox is not None and bool(self._in_flight)
            is_stale = waits and now - max(self._asked_at, self._heard_at) >= STALE_S
            call = self._call if is_stale else None
        if call is not None:
            self._report(f"nothing came for {STALE_S:g} s: connecting anew")
            call.cancel()

    def join(self) -> None:
        if self._thread is not threading.current_thread():
            self._thread.join()

    def send(self, ticket: Ticket, shipment: Shipment, deadline: float) -> TransportError | None:
        """Queue `shipment`; the error, when that is not possible."""
        num_bytes = message_bound(shipment)
        with self._lock:
            if self._outbox is None:
                return HostLost(self._host, "not linked")
            if num_bytes > self._message_limit:
                return BadFrame(self._host, f"a message of {num_bytes} bytes, {self._message_limit} are allowed")
            if len(self._in_flight) >= self._setup.max_in_flight:
                return DeadlinePassed(self._host, f"{len(self._in_flight)} shipments are unanswered already")
            if not self._in_flight:
                self._asked_at = time.monotonic()
            self._in_flight[ticket] = shipment.rows_TH.shape[0]
            self._outbox.put(_Outgoing(ticket, shipment, deadline))
        return None

    def _run(self) -> None:
        reconnect = self._setup.reconnect
        pause_s = reconnect.first_s
        while not self._closed.is_set():
            try:
                was_up = self._converse()
                pause_s = reconnect.first_s if was_up else min(2 * pause_s, reconnect.longest_s)
            except _Refused as refusal:
                self._report(f"the two ends do not fit: {refusal}")
                pause_s = reconnect.refused_s
            self._closed.wait(pause_s)

    def _converse(self) -> bool:
        """One stream from hello to end. Whether the link was up. Raises _Refused."""
        setup, address = self._setup, self._info.address
        if not (setup.tls or setup.insecure or is_loopback(address.rpartition(":")[0])):
            raise _Refused(f"its address {ROWS_RULE}")
        outbox: _Outbox = queue.SimpleQueue()
        channel = open_channel(address, client_options(setup.max_message_bytes), setup.tls)
        hello_timer = threading.Timer(HELLO_S, self._miss_hello)
        hello_timer.daemon = True
        try:
            exchange = channel.stream_stream(f"/{SERVICE}/{METHOD}", None, self._hear)
            call = exchange(self._requests(outbox))
            if not self._begin(call):
                return False
            hello_timer.start()
            for heard in call:
                if isinstance(heard, BadFrame):
                    raise heard
                if isinstance(heard, Frame):
                    self._bring_up(heard, outbox)
            self._report("the host ended the stream")
        except BadFrame as error:
            self._report(error.problem)
        except grpc.RpcError as error:
            self._report(explain(str(error.details()), setup.tls))
        finally:
            hello_timer.cancel()
            was_up = self._end("its stream ended")
            outbox.put(None)
            channel.close()
        return was_up

    def _miss_hello(self) -> None:
        """Until it says hello, a host is as good as down."""
        with self._lock:
            call = self._call if self._outbox is None else None
        if call is not None:
            self._report(f"no hello for {HELLO_S:g} s")
            call.cancel()

    def _requests(self, outbox: _Outbox) -> Iterator[bytes]:
        """What the stream sends; runs in a thread of gRPC's, which alone waits when the host takes nothing."""
        yield encode_hello(self._setup.terms, self._setup.router_name)
        while (out := outbox.get()) is not None:
            yield encode_shipment(out.ticket, out.shipment, out.deadline - time.monotonic())

    def _begin(self, call: grpc.Call) -> bool:
        """Let `close` cancel `call`; False when it came first."""
        with self._lock:
            is_wanted = not self._closed.is_set()
            if is_wanted:
                self._call = call
        if not is_wanted:
            # Not under the lock: gRPC holds one of its own when it calls `_hear`.
            call.cancel()
        return is_wanted

    def _bring_up(self, frame: Frame, outbox: _Outbox) -> None:
        """Check the host's first message and link up. Raises _Refused and BadFrame."""
        if frame.header.kind == Kind.ERROR:
            raise _Refused(decode_mismatch(frame, self._host))
        hello = decode_host_hello(frame, self._host)
        if hello.host_name != self._host:
            raise _Refused(f"host {hello.host_name!r} answers at {self._info.address}")
        with self._lock:
            if self._closed.is_set():
                return
            self._message_limit = min(self._setup.max_message_bytes, hello.max_message_bytes)
            self._incarnation = hello.incarnation
            self._outbox = outbox
        self._last_trouble = ""
        self._notify()

    def _hear(self, message: bytes) -> Frame | BadFrame | str:
        """Pass an answer on; what else the host says goes to the link's thread. Called by gRPC, with each message."""
        try:
            frame = split(message, self._host)
            self._heard_at = time.monotonic()
            if not self.is_up:
                return frame
            if frame.header.kind not in (Kind.RESULT, Kind.ERROR):
                raise BadFrame(self._host, "an answer is expected after the hello")
            self._take(frame)
        except BadFrame as error:
            return error
        return _PASSED_ON

    def _take(self, frame: Frame) -> None:
        """Pass an answer on, if this life of the host was asked for it and has not answered yet."""
        header = frame.header
        with self._lock:
            is_of_this_life = header.incarnation == self._incarnation
            num_rows = self._in_flight.pop(header.seq, None) if is_of_this_life else None
        if num_rows is None:
            told = decode_error(frame, self._host).problem if header.kind == Kind.ERROR else "a result"
            self._report(f"an answer to nothing that was asked: {told}")
            return
        outcome = self._outcome_of(frame, num_rows)
        self._setup.arrived.put(Arrival(header.seq, self._host, outcome))

    def _outcome_of(self, frame: Frame, num_rows: int) -> Outcome:
        if frame.header.kind == Kind.ERROR:
            return decode_error(frame, self._host)
        try:
            return decode_result(frame, num_rows, self._setup.terms, self._host)
        except BadFrame as error:
            return error

    def _end(self, reason: str) -> bool:
        """Take the link down, if it is up, and fail what is in flight. Whether it was up."""
        with self._lock:
            was_up = self._outbox is not None
            self._outbox = None
            lost, self._in_flight = self._in_flight, {}
        for ticket in lost:
            self._setup.arrived.put(Arrival(ticket, self._host, HostLost(self._host, reason)))
        if was_up:
            self._notify()
        return was_up

    def _notify(self) -> None:
        try:
            self._setup.on_change()
        except Exception:
            # A listener's trouble must not end the link.
            log.exception("on_change failed")

    def _report(self, trouble: str) -> None:
        """Log `trouble`, once while it lasts."""
        if trouble != self._last_trouble and not self._closed.is_set():
            log.warning("link to host %s at %s: %s", self._host, self._info.address, trouble)
        self._last_trouble = trouble
