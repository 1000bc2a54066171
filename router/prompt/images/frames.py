"""Messages between the ingress and its decoding processes: one letter, a length, so many bytes. No pickle.

Knows nothing of pictures.
"""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Sequence

_HEAD = struct.Struct(">cQ")


class BadMessage(Exception):
    """The other side is gone, late, or says what it must not."""


class Late(BadMessage):
    """The instant passed until which the other side was waited for."""


def send(link: socket.socket, kind: bytes, parts: Sequence[bytes], until: float | None = None) -> None:
    """Send `parts` as one message. `until` is a `time.monotonic()` instant, None waits. Raises BadMessage and Late."""
    head = _HEAD.pack(kind, sum(map(len, parts)))
    try:
        for part in (head, *parts):
            link.settimeout(_left(until))
            link.sendall(part)
    except OSError as error:
        raise _translated(error) from error


def receive(link: socket.socket, max_bytes: int, until: float | None = None) -> tuple[bytes, bytearray]:
    """The letter and the bytes of the next message. Raises Late, and BadMessage, before memory is taken for too long a
    one."""
    try:
        kind, length = _HEAD.unpack(_read(link, _HEAD.size, until))
        if length > max_bytes:
            raise BadMessage(f"a message of {length} bytes")
        return kind, _read(link, length, until)
    except OSError as error:
        raise _translated(error) from error


def _read(link: socket.socket, num_bytes: int, until: float | None) -> bytearray:
    data = bytearray(num_bytes)
    view = memoryview(data)
    while view:
        link.settimeout(_left(until))
        got = link.recv_into(view)
        if got == 0:
            raise BadMessage("the end")
        view = view[got:]
    return data


def _translated(error: OSError) -> BadMessage:
    kind = Late if isinstance(error, TimeoutError) else BadMessage
    return kind(type(error).__name__)


def _left(until: float | None) -> float | None:
    if until is None:
        return None
    left = until - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left
