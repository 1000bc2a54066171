"""Shipments, results and errors as frames of `proto/expert.proto`, and back. Knows no network, no time.

Everything read here came from outside: checksums first, then dtype, shape and length are checked against each other
and against the link's terms before a tensor is made, and anything that does not fit is a BadFrame. Tensors share the
memory of the frame's bytes, so rows are never written to.

Shape letters: T rows, H hidden size.
"""

from __future__ import annotations

import math
import struct
import warnings
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import TypeVar

import torch
from google.protobuf.message import DecodeError

from experts.errors import BadFrame, DeadlinePassed, HostFailed, NotHosted, TransportError
from experts.link_terms import LinkTerms
from experts.memory import memory_of
from experts.placement import ExpertKey
from experts.transport.base import Segment, Shipment
from experts.wire.expert_pb2 import (
    DTYPE_BFLOAT16,
    DTYPE_FLOAT16,
    DTYPE_FLOAT32,
    Dtype,
    Error,
    Hello,
    HostHello,
)
from experts.wire.expert_pb2 import ExpertKey as ExpertKeyMessage
from experts.wire.frames import HEADER_BYTES, Frame, Header, Kind, join

PROTOCOL_VERSION = 2
DEFAULT_MAX_MESSAGE_BYTES = 64 * 2**20
MAX_ROWS = 1 << 16
MAX_SEGMENTS = 1 << 12
_MAX_TEXT = 200
_MAX_DEADLINE_MS = 2**32 - 1
_SEGMENT = struct.Struct("<III")

Part = TypeVar("Part", Hello, HostHello, Error)

_DTYPE_OF: Mapping[int, torch.dtype] = MappingProxyType(
    {DTYPE_FLOAT32: torch.float32, DTYPE_BFLOAT16: torch.bfloat16, DTYPE_FLOAT16: torch.float16}
)
_NAME_OF: Mapping[torch.dtype, Dtype] = MappingProxyType(
    {torch.float32: DTYPE_FLOAT32, torch.bfloat16: DTYPE_BFLOAT16, torch.float16: DTYPE_FLOAT16}
)

with warnings.catch_warnings():
    # torch says once per process that a read-only buffer makes a tensor that must not be written to. Rows are
    # read-only by convention, so let it be said here, unheard.
    warnings.simplefilter("ignore")
    torch.frombuffer(b"\0", dtype=torch.uint8)


def message_bound(shipment: Shipment) -> int:
    """Bytes that neither the frame of `shipment` nor that of its result exceeds."""
    return HEADER_BYTES + _SEGMENT.size * (len(shipment.segments) + 1) + shipment.rows_TH.nbytes


def encode_hello(terms: LinkTerms, router_name: str) -> bytes:
    """A router's first message."""
    return join(Header(Kind.HELLO), hello_of(terms, router_name).SerializeToString())


def hello_of(terms: LinkTerms, name: str) -> Hello:
    """What whoever is called `name` expects of the other end."""
    return Hello(
        protocol_version=PROTOCOL_VERSION,
        checkpoint_digest=terms.checkpoint_digest,
        dtype=_NAME_OF[terms.dtype],
        hidden_size=terms.hidden_size,
        router_name=name,
    )


def decode_hello(frame: Frame, peer: str) -> Hello:
    """What a router says first. Raises BadFrame when it says something else."""
    if frame.header.kind != Kind.HELLO:
        raise BadFrame(peer, "the first message must be a hello")
    return _decode_part(frame, Hello, peer)


def mismatch(hello: Hello, terms: LinkTerms) -> str:
    """What of a router's `hello` differs from the host's `terms`, in words; empty when nothing does."""
    pairs = (
        ("protocol version", hello.protocol_version, PROTOCOL_VERSION),
        ("checkpoint digest", hello.checkpoint_digest[:_MAX_TEXT], terms.checkpoint_digest),
        ("dtype", _DTYPE_OF.get(hello.dtype), terms.dtype),
        ("hidden size", hello.hidden_size, terms.hidden_size),
    )
    return "; ".join(f"{name} is {theirs}, not {ours}" for name, theirs, ours in pairs if theirs != ours)


def encode_host_hello(host_name: str, incarnation: int, max_message_bytes: int) -> bytes:
    """A host's first message."""
    hello = HostHello(host_name=host_name, incarnation=incarnation, max_message_bytes=max_message_bytes)
    return join(Header(Kind.HOST_HELLO, incarnation), hello.SerializeToString())


def decode_host_hello(frame: Frame, peer: str) -> HostHello:
    """What a host says first. Raises BadFrame when it says something else."""
    if frame.header.kind != Kind.HOST_HELLO:
        raise BadFrame(peer, "the first message is no hello")
    return _decode_part(frame, HostHello, peer)


def encode_shipment(seq: int, shipment: Shipment, remaining_s: float) -> bytes:
    """`remaining_s`: seconds until its deadline. One that has none left travels without its rows: nobody waits
    for the answer, but its coming tells that the host is alive."""
    if remaining_s <= 0:
        return join(Header(Kind.SHIPMENT, seq=seq, epoch=shipment.epoch))
    rows_TH = shipment.rows_TH.contiguous()
    header = Header(
        Kind.SHIPMENT,
        seq=seq,
        epoch=shipment.epoch,
        deadline_ms=math.ceil(min(remaining_s * 1000, _MAX_DEADLINE_MS)),
        dtype=_NAME_OF[rows_TH.dtype],
        num_rows=rows_TH.shape[0],
        hidden_size=rows_TH.shape[1],
    )
    segments = [_SEGMENT.pack(segment.layer, segment.expert, segment.num_rows) for segment in shipment.segments]
    return join(header, b"".join(segments), memory_of(rows_TH))


def decode_shipment(frame: Frame, terms: LinkTerms, peer: str) -> Shipment:
    """The shipment of `frame`; `peer` names who sent it. Raises BadFrame."""
    num_segments, rest = divmod(len(frame.part), _SEGMENT.size)
    if rest or num_segments > MAX_SEGMENTS:
        raise BadFrame(peer, f"{len(frame.part)} bytes of segments, {MAX_SEGMENTS} segments are allowed")
    segments = tuple(
        Segment(layer=layer, expert=expert, num_rows=num_rows)
        for layer, expert, num_rows in _SEGMENT.iter_unpack(frame.part)
    )
    total = sum(segment.num_rows for segment in segments)
    if total != frame.header.num_rows:
        raise BadFrame(peer, f"segments of {total} rows in a shipment of {frame.header.num_rows}")
    return Shipment(segments=segments, rows_TH=_decode_rows(frame, terms, peer), epoch=frame.header.epoch)


def encode_result(incarnation: int, asked: Header, y_TH: torch.Tensor) -> bytes:
    """The answer of the life `incarnation` of a host to the shipment with the header `asked`."""
    y_TH = y_TH.contiguous()
    header = Header(
        Kind.RESULT,
        incarnation=incarnation,
        seq=asked.seq,
        epoch=asked.epoch,
        dtype=_NAME_OF[y_TH.dtype],
        num_rows=y_TH.shape[0],
        hidden_size=y_TH.shape[1],
    )
    return join(header, rows=memory_of(y_TH))


def decode_result(frame: Frame, num_rows: int, terms: LinkTerms, peer: str) -> torch.Tensor:
    """The rows of an answer to a shipment of `num_rows`, [T, H]. Raises BadFrame."""
    if frame.header.num_rows != num_rows:
        raise BadFrame(peer, f"{frame.header.num_rows} rows in answer to {num_rows}")
    return _decode_rows(frame, terms, peer)


def encode_error(incarnation: int, asked: Header | None, error: TransportError) -> bytes:
    """Why the shipment with the header `asked` has no result; None: `error` belongs to no shipment and ends the
    stream. HostLost has no place on the wire: it is the wire's end."""
    kind = next(kind for kind, cls in _ERROR_OF.items() if isinstance(error, cls))
    missing: Iterable[ExpertKey] = sorted(error.missing) if isinstance(error, NotHosted) else ()
    message = Error(
        kind=kind,
        missing=[ExpertKeyMessage(layer=layer, expert=expert) for layer, expert in missing],
        message=error.problem[:_MAX_TEXT],
    )
    seq, epoch = (asked.seq, asked.epoch) if asked else (0, 0)
    return join(Header(Kind.ERROR, incarnation, seq, epoch), message.SerializeToString())


def encode_mismatch(difference: str) -> bytes:
    """The refusal of a hello."""
    return join(Header(Kind.ERROR), Error(kind=Error.KIND_MISMATCH, message=difference).SerializeToString())


def decode_mismatch(frame: Frame, peer: str) -> str:
    """Why a hello was refused. Raises BadFrame."""
    return _decode_part(frame, Error, peer).message[:_MAX_TEXT]


def decode_error(frame: Frame, peer: str) -> TransportError:
    """The error that `frame` tells of; a BadFrame when it cannot be understood or is of an unknown kind."""
    try:
        message = _decode_part(frame, Error, peer)
    except BadFrame as error:
        return error
    text = message.message[:_MAX_TEXT]
    if message.kind == Error.KIND_NOT_HOSTED:
        if len(message.missing) > MAX_SEGMENTS:
            return BadFrame(peer, f"{len(message.missing)} missing experts where {MAX_SEGMENTS} are allowed")
        return NotHosted(peer, ((key.layer, key.expert) for key in message.missing))
    error_type = _ERROR_OF.get(message.kind)
    if error_type is None:
        return BadFrame(peer, f"an error of unknown kind {message.kind}: {text}")
    return error_type(peer, text)


_ERROR_OF: Mapping[Error.Kind, type[TransportError]] = MappingProxyType(
    {
        Error.KIND_NOT_HOSTED: NotHosted,
        Error.KIND_FAILED: HostFailed,
        Error.KIND_BAD_FRAME: BadFrame,
        Error.KIND_EXPIRED: DeadlinePassed,
    }
)


def _decode_part(frame: Frame, message_type: type[Part], peer: str) -> Part:
    if len(frame.rows):
        raise BadFrame(peer, f"{len(frame.rows)} bytes of rows where none belong")
    try:
        return message_type.FromString(bytes(frame.part))
    except DecodeError as error:
        raise BadFrame(peer, f"an unreadable {message_type.DESCRIPTOR.name}") from error


def _decode_rows(frame: Frame, terms: LinkTerms, peer: str) -> torch.Tensor:
    num_rows, hidden_size = frame.header.num_rows, frame.header.hidden_size
    dtype = _DTYPE_OF.get(frame.header.dtype)
    if dtype != terms.dtype:
        raise BadFrame(peer, f"rows of dtype {dtype or frame.header.dtype} on a link of {terms.dtype}")
    if hidden_size != terms.hidden_size:
        raise BadFrame(peer, f"rows of {hidden_size} numbers on a link of {terms.hidden_size}")
    if num_rows > MAX_ROWS:
        raise BadFrame(peer, f"{num_rows} rows where {MAX_ROWS} are allowed")
    if len(frame.rows) != terms.num_bytes(num_rows):
        raise BadFrame(peer, f"{len(frame.rows)} bytes for {num_rows} rows of {hidden_size} × {dtype}")
    if not frame.rows_are_sound():
        raise BadFrame(peer, "rows that were damaged on their way")
    if not num_rows:
        return torch.empty(0, hidden_size, dtype=dtype)
    return torch.frombuffer(frame.rows, dtype=dtype).view(num_rows, hidden_size)
