"""Frames: messages of `proto/expert.proto` as bytes, whose rows are copied once or not at all.

A frame is what the .proto says, and any implementation of it can read and write one. But the message library would
copy the rows twice more on each side, so here they are appended to the rest of the message and viewed in place.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from google.protobuf.message import DecodeError

from experts.errors import BadFrame
from experts.wire.expert_pb2 import ExchangeRequest, ExchangeResponse

Message = TypeVar("Message", ExchangeRequest, ExchangeResponse)

_LENGTH_DELIMITED = 2
_PADDING_TAG = ExchangeRequest.PADDING_FIELD_NUMBER << 3 | _LENGTH_DELIMITED
_ROWS_TAG = ExchangeRequest.ROWS_FIELD_NUMBER << 3 | _LENGTH_DELIMITED
_ALIGNMENT = 16


def join(message: ExchangeRequest | ExchangeResponse, rows_TH: torch.Tensor) -> bytes:
    """The frame of `message` with `rows_TH` as its rows, which begin on a multiple of 16 bytes."""
    head = message.SerializeToString()
    rows_tag = bytes((_ROWS_TAG,)) + _varint(rows_TH.nbytes)
    num_padding = -(len(head) + 2 + len(rows_tag)) % _ALIGNMENT
    padding = bytes((_PADDING_TAG, num_padding)) + bytes(num_padding)
    # numpy knows no bfloat16, so it sees plain bytes.
    rows = rows_TH.contiguous().view(torch.uint8).numpy().data
    return b"".join((head, padding, rows_tag, rows))


def split(frame: bytes, message_type: type[Message], peer: str) -> tuple[Message, memoryview]:
    """The message of a frame, and its rows. Raises BadFrame when the bytes are no such message."""
    head_end, rows_begin = _borders(frame)
    try:
        message = message_type.FromString(frame[:head_end])
    except DecodeError as error:
        raise BadFrame(peer, "an unreadable message") from error
    return message, memoryview(frame)[rows_begin:] if rows_begin else memoryview(message.rows)


def _borders(frame: bytes) -> tuple[int, int]:
    """Where the head ends and the rows begin in a frame that ends with its rows; of another one all is head, and 0.

    The borders decide only who reads the rows: the message library reads a frame of any layout.
    """
    no_borders = len(frame), 0
    position = 0
    for _ in ("payload", "padding", "rows"):
        if position >= len(frame):
            return no_borders
        tag = frame[position]
        length, begin = _varint_at(frame, position + 1)
        if tag == _ROWS_TAG:
            return (position, begin) if begin + length == len(frame) else no_borders
        if tag >= 0x80 or tag & 7 != _LENGTH_DELIMITED:
            return no_borders
        position = begin + length
    return no_borders


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value >= 0x80:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def _varint_at(frame: bytes, begin: int) -> tuple[int, int]:
    """(value, position after it); a value beyond the frame's end when there is none of at most five bytes."""
    value = 0
    for place, byte in enumerate(frame[begin : begin + 5]):
        value |= (byte & 0x7F) << 7 * place
        if byte < 0x80:
            return value, begin + place + 1
    return len(frame) + 1, len(frame)
