"""A bare gRPC echo: what the library itself costs for the bytes of a shipment, to measure our transport against."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

import grpc

METHOD = "/herd.echo/Echo"
OPTIONS = [("grpc.max_send_message_length", 64 << 20), ("grpc.max_receive_message_length", 64 << 20)]


def echo_main(pipe: Connection) -> None:
    """A process that sends every message back on its stream, until the other end of the pipe closes."""
    server = grpc.server(ThreadPoolExecutor(2), options=OPTIONS)
    server.add_generic_rpc_handlers((_Echo(),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    pipe.send(f"127.0.0.1:{port}")
    try:
        pipe.recv()
    except EOFError:
        server.stop(None)


@contextmanager
def echo_stream(address: str) -> Iterator[Callable[[bytes], bytes]]:
    """One stream to the echo; the function sends a message and waits for it to come back."""
    outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
    with grpc.insecure_channel(address, options=OPTIONS) as channel:
        call: Any = channel.stream_stream(METHOD, _same, _same)(iter(outbox.get, None))

        def round_trip(message: bytes) -> bytes:
            outbox.put(message)
            answer: bytes = next(call)
            return answer

        yield round_trip
        outbox.put(None)


class _Echo(grpc.GenericRpcHandler):  # type: ignore[type-arg]
    def service(self, details: Any) -> Any:
        return grpc.stream_stream_rpc_method_handler(_answers, _same, _same) if details.method == METHOD else None


def _answers(messages: Iterator[bytes], context: object) -> Iterator[bytes]:
    yield from messages


def _same(message: bytes) -> bytes:
    return message
