"""Frames: the binary messages that `proto/expert.proto` describes, whose rows are copied once or not at all.

A frame's head has a checksum of its own, so that a shipment whose rows were damaged can still be told by its number.
"""

from __future__ import annotations

import struct
import zlib
from enum import IntEnum
from typing import NamedTuple, cast

from experts.errors import BadFrame
from experts.kernels.crc32 import Bytes, crc32

MAGIC = b"HERD"
HEADER_BYTES = 64
_ALIGNMENT = 16
_FIELDS = struct.Struct("<4sBBHQQQIIIII")
_CHECKSUM = struct.Struct("<IQ")
assert _FIELDS.size + _CHECKSUM.size == HEADER_BYTES


class Kind(IntEnum):
    """What a frame says."""

    HELLO = 1
    HOST_HELLO = 2
    SHIPMENT = 3
    RESULT = 4
    ERROR = 5
    WANT = 6
    PIECE = 7


class Header(NamedTuple):
    """The fields of a frame that fit all kinds; what a kind has no use for is 0. See `proto/expert.proto`."""

    kind: int
    incarnation: int = 0
    seq: int = 0
    epoch: int = 0
    deadline_ms: int = 0
    dtype: int = 0
    num_rows: int = 0
    hidden_size: int = 0


class Frame(NamedTuple):
    """A frame taken apart; `part` and `rows` lie where they lay in its bytes. The head is sound, the rows perhaps not:
    ask `rows_are_sound`."""

    header: Header
    part: memoryview
    rows: memoryview
    rows_checksum: int

    def rows_are_sound(self) -> bool:
        """Whether the rows are those that were sent."""
        whole = cast(bytes, self.rows.obj)  # The message, which ends with the rows.
        return crc32(whole, len(whole) - len(self.rows)) == self.rows_checksum


def join(header: Header, part: bytes = b"", rows: Bytes = b"") -> bytes:
    """The frame of `header`, `part` and `rows`, which begin on a multiple of 16 bytes."""
    kind, incarnation, seq, epoch, deadline_ms, dtype, num_rows, hidden_size = header
    fields = _FIELDS.pack(
        MAGIC, kind, dtype, 0, incarnation, seq, epoch, deadline_ms, num_rows, hidden_size, len(part), crc32(rows)
    )
    padded = part + bytes(-len(part) % _ALIGNMENT)
    return b"".join((fields, _CHECKSUM.pack(_head_checksum(fields, padded), 0), padded, rows))


def split(frame: bytes, peer: str) -> Frame:
    """The frame that `peer` sent, taken apart. Raises BadFrame when it is none, or its head is not as it was sent."""
    if len(frame) < HEADER_BYTES:
        raise BadFrame(peer, f"a frame of {len(frame)} bytes where a header takes {HEADER_BYTES}")
    fields = _FIELDS.unpack_from(frame)
    magic, kind, dtype, nothing, incarnation, seq, epoch, deadline_ms, num_rows, hidden_size, part_bytes, rows = fields
    if magic != MAGIC:
        raise BadFrame(peer, "bytes that are no frame")
    rows_begin = HEADER_BYTES + part_bytes + -part_bytes % _ALIGNMENT
    if rows_begin > len(frame):
        raise BadFrame(peer, f"a part of {part_bytes} bytes in a frame of {len(frame)}")
    view = memoryview(frame)
    checksum, nothing_more = _CHECKSUM.unpack_from(frame, _FIELDS.size)
    if checksum != _head_checksum(view[: _FIELDS.size], view[HEADER_BYTES:rows_begin]) or nothing or nothing_more:
        raise BadFrame(peer, "a frame whose head was damaged on its way")
    header = Header(kind, incarnation, seq, epoch, deadline_ms, dtype, num_rows, hidden_size)
    return Frame(header, view[HEADER_BYTES : HEADER_BYTES + part_bytes], view[rows_begin:], rows)


def _head_checksum(fields: bytes | memoryview, padded_part: bytes | memoryview) -> int:
    return zlib.crc32(padded_part, zlib.crc32(fields))
