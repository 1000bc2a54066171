"""The gRPC listener of an expert host: checks hellos, answers shipments, gives weights to other hosts. Knows nothing
of placements.

The blocking server is used on purpose: one thread per stream answers sooner than an event loop does, and a host has
few streams (one per router).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc

from experts.errors import BadFrame, DeadlinePassed, HostFailed, InvalidInput, TransportError
from experts.host import ExpertHost
from experts.link_terms import LinkTerms
from experts.tls import ROWS_RULE, Identity, is_loopback
from experts.transport.grpc_options import METHOD, SERVICE, WEIGHTS_METHOD, server_options
from experts.transport.grpc_security import listen
from experts.wire.codec import (
    DEFAULT_MAX_MESSAGE_BYTES,
    decode_hello,
    decode_shipment,
    encode_error,
    encode_host_hello,
    encode_mismatch,
    encode_result,
    mismatch,
)
from experts.wire.frames import Frame, Kind, split
from experts.wire.weights import decode_want, encode_pieces

log = logging.getLogger(__name__)

DEFAULT_MAX_STREAMS = 64
MAX_GIVEN = 2
"""Experts that are given to other hosts at a time; more are refused, and come from disk."""


def serve_expert_host(
    host: ExpertHost,
    *,
    terms: LinkTerms,
    incarnation: int,
    bind: str,
    ports: range | None = None,
    max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES,
    max_streams: int = DEFAULT_MAX_STREAMS,
    tls: Identity | None = None,
    insecure: bool = False,
) -> ExpertHostServer:
    """Listen on address `bind` and answer shipments with `host` until `stop`.

    `ports`: the ports to try, in order; None lets the system choose. Raises InvalidInput when none is free.
    `incarnation` names this life of the process. More than `max_streams` routers at a time are refused. Without `tls`
    only a loopback address is listened on, any with `insecure`.
    """
    if tls is None and not insecure and not is_loopback(bind):
        raise InvalidInput("host-bind", bind, ROWS_RULE)
    return ExpertHostServer(host, terms, incarnation, bind, ports, max_message_bytes, max_streams, tls)


class ExpertHostServer:
    """A running listener. `address` is what it is bound to ("ip:port")."""

    def __init__(
        self,
        host: ExpertHost,
        terms: LinkTerms,
        incarnation: int,
        bind: str,
        ports: range | None,
        max_message_bytes: int,
        max_streams: int,
        tls: Identity | None,
    ) -> None:
        self._threads = ThreadPoolExecutor(max_streams, thread_name_prefix=f"expert-host-{host.name}")
        self._server = grpc.server(
            self._threads,
            options=server_options(max_message_bytes),
            maximum_concurrent_rpcs=max_streams,
        )
        hello = encode_host_hello(host.name, incarnation, max_message_bytes)
        self._exchange = _Exchange(host, terms, incarnation, hello)
        self._server.add_generic_rpc_handlers((_service(self._exchange),))
        self.port = _bind(self._server, bind, ports, tls)
        self.address = _join(bind, self.port)
        self._server.start()

    @property
    def num_links(self) -> int:
        """Routers linked now: streams whose hello was accepted."""
        return self._exchange.links.value

    @property
    def queue_depth(self) -> int:
        """Shipments that wait, are being computed or are being answered now."""
        return self._exchange.busy.value

    @property
    def is_busy(self) -> bool:
        """Whether there is such a shipment."""
        return self.queue_depth > 0

    def cut(self, seconds: float) -> None:
        """For a drill: read and answer nothing for so long, as if a network had lost it all."""
        log.warning("a drill cuts the rows of this host off for %.1f s", seconds)
        self._exchange.cut_until = time.monotonic() + seconds

    def stop(self, grace: float) -> None:
        """Answer what is being computed (for at most `grace` seconds), then end all streams and the listener."""
        self._exchange.drain(grace)
        self._server.stop(None).wait()
        # Not waited for: a computation that outlasts its grace has nobody left to answer.
        self._threads.shutdown(wait=False)


class _Exchange:
    """The service: every stream runs `exchange` in a thread of its own."""

    def __init__(self, host: ExpertHost, terms: LinkTerms, incarnation: int, hello: bytes) -> None:
        self._host = host
        self._terms = terms
        self._incarnation = incarnation
        self._hello = hello
        self._draining = threading.Event()
        self._giving = threading.BoundedSemaphore(MAX_GIVEN)
        self.cut_until = 0.0
        self.busy = _Gauge()
        self.links = _Gauge()

    def exchange(self, frames: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        """One router's stream, from hello to end. What cannot be read ends it, and nothing else."""
        router = context.peer()
        try:
            self._wait_for_network()
            hello = decode_hello(split(next(frames, b""), router), router)
            difference = mismatch(hello, self._terms)
            if difference:
                log.warning("refused router %.80r: %s", hello.router_name, difference)
                yield encode_mismatch(difference)
                return
            with self.links:
                yield self._hello
                yield from self._answers(frames, router)
        except BadFrame as error:
            log.warning("ended the stream of %s: %s", router, error.problem)
            yield encode_error(self._incarnation, None, error)

    def weights(self, message: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
        """The weights of an expert for another host, in pieces, or one error."""
        asker = context.peer()
        self._wait_for_network()
        if not self._giving.acquire(blocking=False):
            yield encode_error(self._incarnation, None, HostFailed(self._host.name, "gives to others already"))
            return
        try:
            key, difference = decode_want(message, self._terms, asker)
            if difference:
                log.warning("refused weights to %s: %s", asker, difference)
                yield encode_mismatch(difference)
                return
            yield from encode_pieces(self._host.slot(key), self._incarnation)
        except TransportError as error:
            log.warning("gave no weights to %s: %s", asker, error.problem)
            yield encode_error(self._incarnation, None, error)
        finally:
            self._giving.release()

    def drain(self, grace: float) -> None:
        """Begin no further shipment; return when the current ones are answered, or after `grace` seconds."""
        self._draining.set()
        self.busy.wait_for_zero(grace)

    def _answers(self, frames: Iterator[bytes], router: str) -> Iterator[bytes]:
        for message in frames:
            self._wait_for_network()
            if self._draining.is_set():
                return
            frame = split(message, router)
            if frame.header.kind != Kind.SHIPMENT or not frame.header.seq:
                raise BadFrame(router, "only shipments may follow the hello")
            # Busy until the answer is on its way: the generator resumes only then.
            with self.busy:
                yield self._answer(frame, router)

    def _wait_for_network(self) -> None:
        left_s = self.cut_until - time.monotonic()
        if left_s > 0:
            self._draining.wait(left_s)

    def _answer(self, frame: Frame, router: str) -> bytes:
        try:
            if not frame.header.deadline_ms:
                raise DeadlinePassed(self._host.name, "the deadline had passed on arrival")
            y_TH = self._host.compute(decode_shipment(frame, self._terms, router))
        except TransportError as error:
            return encode_error(self._incarnation, frame.header, error)
        return encode_result(self._incarnation, frame.header, y_TH)


class _Gauge:
    """How many threads are inside its `with` block now."""

    def __init__(self) -> None:
        self.value = 0
        self._changed = threading.Condition()

    def __enter__(self) -> None:
        self._add(1)

    def __exit__(self, *_: object) -> None:
        self._add(-1)

    def wait_for_zero(self, timeout: float) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self.value == 0, timeout)

    def _add(self, change: int) -> None:
        with self._changed:
            self.value += change
            self._changed.notify_all()


def _service(exchange: _Exchange) -> grpc.GenericRpcHandler[bytes, bytes]:
    """Frames pass gRPC as the bytes that they are: see `experts.wire.frames`."""
    handlers = {
        METHOD: grpc.stream_stream_rpc_method_handler(exchange.exchange),
        WEIGHTS_METHOD: grpc.unary_stream_rpc_method_handler(exchange.weights),
    }
    return grpc.method_handlers_generic_handler(SERVICE, handlers)


def _bind(server: grpc.Server, bind: str, ports: range | None, tls: Identity | None) -> int:
    for port in (0,) if ports is None else ports:
        try:
            bound = listen(server, _join(bind, port), tls)
        except RuntimeError:
            continue
        if bound:
            return bound
    tried = "any" if ports is None else f"{ports.start}-{ports.stop - 1}"
    raise InvalidInput("host ports", tried, f"one of them must be free at address {bind}")


def _join(address: str, port: int) -> str:
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
