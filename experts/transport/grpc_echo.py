"""Round trips, measured: a shipment's through a transport, and the same bytes' through a bare gRPC echo beside it."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc

from experts.errors import TransportError
from experts.transport.base import Shipment, Transport
from experts.transport.grpc_options import client_options, server_options
from experts.wire.codec import DEFAULT_MAX_MESSAGE_BYTES

_SERVICE, _METHOD = "herd.Echo", "Exchange"
_PATIENCE_S = 60.0


class EchoServer:
    """Sends every message of a stream back. `address` is what it is bound to ("ip:port")."""

    def __init__(self, bind: str) -> None:
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="echo")
        self._server = grpc.server(self._threads, options=server_options(DEFAULT_MAX_MESSAGE_BYTES))
        handler = grpc.stream_stream_rpc_method_handler(_echo)
        service = grpc.method_handlers_generic_handler(_SERVICE, {_METHOD: handler})
        self._server.add_generic_rpc_handlers((service,))
        self.address = f"{bind}:{self._server.add_insecure_port(f'{bind}:0')}"
        self._server.start()

    def stop(self) -> None:
        self._server.stop(None).wait()
        self._threads.shutdown(wait=False)


def echo_round_trips(address: str, payload: bytes, num: int, num_warm_up: int = 50) -> list[float]:
    """Seconds of each of `num` round trips of `payload` to the EchoServer at `address`, one after another."""
    outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
    with grpc.insecure_channel(address, options=client_options(DEFAULT_MAX_MESSAGE_BYTES)) as channel:
        exchange = channel.stream_stream(f"/{_SERVICE}/{_METHOD}", None, None)
        echoes = iter(exchange(iter(outbox.get, None)))

        def trip() -> None:
            outbox.put(payload)
            assert len(next(echoes)) == len(payload)

        seconds = _times(trip, num, num_warm_up)
        outbox.put(None)
    return seconds


def shipment_round_trips(
    transport: Transport, host: str, shipment: Shipment, num: int, num_warm_up: int = 50
) -> list[float]:
    """Seconds from `send` to result of each of `num` shipments to a linked `host`, one after another.

    Includes what the host computes. Raises the TransportError of a shipment that fails.
    """

    def trip() -> None:
        deadline = time.monotonic() + _PATIENCE_S
        transport.send(host, shipment, deadline)
        for _, result in transport.poll(deadline + 1.0):
            if isinstance(result, TransportError):
                raise result

    return _times(trip, num, num_warm_up)


def _echo(messages: Iterator[bytes], _context: grpc.ServicerContext) -> Iterator[bytes]:
    yield from messages


def _times(trip: Callable[[], None], num: int, num_warm_up: int) -> list[float]:
    for _ in range(num_warm_up):
        trip()
    seconds = []
    for _ in range(num):
        began = time.perf_counter()
        trip()
        seconds.append(time.perf_counter() - began)
    return seconds
