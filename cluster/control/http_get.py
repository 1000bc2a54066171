"""One GET, bounded in time and size, whatever the other end does. Asks no proxy and follows nothing."""

from __future__ import annotations

import contextlib
import http.client
import socket
import threading
import time
from collections.abc import Iterator
from urllib.parse import urlsplit

from cluster.control.reading import Held

CHUNK_BYTES = 1 << 16


def get(url: str, timeout_s: float, max_bytes: int) -> bytes | Held:
    """The body of the answer at `url`; Held when there is none with status 200 within `timeout_s` and `max_bytes`."""
    parts = urlsplit(url)
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    end = time.monotonic() + timeout_s
    try:
        connection = kind(parts.hostname or "", parts.port, timeout=timeout_s)
        with contextlib.closing(connection):
            connection.connect()
            with _cut_off(connection.sock, end - time.monotonic()):
                connection.request("GET", f"{parts.path or '/'}?{parts.query}" if parts.query else parts.path or "/")
                return _body(connection.getresponse(), parts.netloc, end, max_bytes)
    except (OSError, http.client.HTTPException, ValueError) as error:
        if time.monotonic() >= end:
            return Held(reason=f"{parts.netloc} did not answer within {timeout_s:g} s")
        return Held(reason=f"{parts.netloc} cannot be asked: {error or type(error).__name__}")


def _body(response: http.client.HTTPResponse, server: str, end: float, max_bytes: int) -> bytes | Held:
    chunks, size = [], 0
    while time.monotonic() < end and (chunk := response.read(CHUNK_BYTES)):
        chunks.append(chunk)
        size += len(chunk)
        if size > max_bytes:
            return Held(reason=f"{server} answers with more than {max_bytes} bytes")
    if time.monotonic() >= end:
        # What was cut off may look like an end.
        return Held(reason=f"{server} did not answer in time")
    body = b"".join(chunks)
    if response.status != http.client.OK:
        return Held(reason=f"{server} answers with {response.status}: {body[:200].decode(errors='replace')}")
    if response.length:
        return Held(reason=f"{server} did not answer to the end")
    return body


@contextlib.contextmanager
def _cut_off(connected: socket.socket, left_s: float) -> Iterator[None]:
    """Ends a connection that is alive and too slow: a socket's own timeout begins anew with every byte.

    It is the socket that is ended, since HTTPConnection forgets it while an answer of unknown length is still read.
    """

    def cut() -> None:
        with contextlib.suppress(OSError):
            connected.shutdown(socket.SHUT_RDWR)

    timer = threading.Timer(left_s, cut)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
