"""Shipments, results and errors as frames of `proto/expert.proto`, and back. Knows no network, no time.

Everything read here came from outside: dtype, shape and length are checked against each other and against the
link's terms before a tensor is made, and anything that does not fit is a BadFrame. Tensors share the memory of
the message's bytes, so rows are never written to.

Shape letters: T rows, H hidden size.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping
from types import MappingProxyType

import torch

from experts.errors import BadFrame, DeadlinePassed, HostFailed, NotHosted, TransportError
from experts.link_terms import LinkTerms
from experts.placement import ExpertKey
from experts.transport.base import Segment, Shipment
from experts.wire.expert_pb2 import (
    DTYPE_BFLOAT16,
    DTYPE_FLOAT16,
    DTYPE_FLOAT32,
    Dtype,
    Error,
    ExchangeRequest,
    ExchangeResponse,
    Hello,
    HostHello,
    Result,
)
from experts.wire.expert_pb2 import Segment as SegmentMessage
from experts.wire.expert_pb2 import Shipment as ShipmentMessage
from experts.wire.frames import join, split

PROTOCOL_VERSION = 1
DEFAULT_MAX_MESSAGE_BYTES = 64 * 2**20
MAX_ROWS = 1 << 16
MAX_SEGMENTS = 1 << 12
_MAX_TEXT = 200
_MAX_DEADLINE_MS = 2**32 - 1

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
    """Bytes that the message of `shipment` does not exceed."""
    return shipment.rows_TH.nbytes + 32 * len(shipment.segments) + 256


def encode_hello(terms: LinkTerms, router_name: str) -> bytes:
    """A router's first message."""
    hello = Hello(
        protocol_version=PROTOCOL_VERSION,
        checkpoint_digest=terms.checkpoint_digest,
        dtype=_NAME_OF[terms.dtype],
        hidden_size=terms.hidden_size,
        router_name=router_name,
    )
    return ExchangeRequest(hello=hello).SerializeToString()


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
    return ExchangeResponse(hello=hello).SerializeToString()


def encode_shipment(seq: int, shipment: Shipment, remaining_s: float) -> bytes:
    """`remaining_s`: seconds until its deadline. One that has none left travels without its rows: nobody waits
    for the answer, but its coming tells that the host is alive."""
    if remaining_s <= 0:
        return ExchangeRequest(shipment=ShipmentMessage(seq=seq)).SerializeToString()
    rows_TH = shipment.rows_TH
    message = ShipmentMessage(
        seq=seq,
        epoch=shipment.epoch,
        deadline_ms=math.ceil(min(remaining_s * 1000, _MAX_DEADLINE_MS)),
        dtype=_NAME_OF[rows_TH.dtype],
        num_rows=rows_TH.shape[0],
        hidden_size=rows_TH.shape[1],
        segments=[
            SegmentMessage(layer=segment.layer, expert=segment.expert, num_rows=segment.num_rows)
            for segment in shipment.segments
        ],
    )
    return join(ExchangeRequest(shipment=message), rows_TH)


def read_request(frame: bytes, peer: str) -> tuple[ExchangeRequest, memoryview]:
    """What a router sent, and its rows. Raises BadFrame."""
    return split(frame, ExchangeRequest, peer)


def decode_shipment(message: ShipmentMessage, rows: memoryview, terms: LinkTerms, peer: str) -> Shipment:
    """The shipment of `message` and its `rows`; `peer` names who sent it. Raises BadFrame."""
    if len(message.segments) > MAX_SEGMENTS:
        raise BadFrame(peer, f"{len(message.segments)} segments where {MAX_SEGMENTS} are allowed")
    segments = tuple(
        Segment(layer=segment.layer, expert=segment.expert, num_rows=segment.num_rows) for segment in message.segments
    )
    total = sum(segment.num_rows for segment in segments)
    if total != message.num_rows:
        raise BadFrame(peer, f"segments of {total} rows in a shipment of {message.num_rows}")
    return Shipment(segments=segments, rows_TH=_decode_rows(message, rows, terms, peer), epoch=message.epoch)


def encode_result(seq: int, y_TH: torch.Tensor) -> bytes:
    """The answer to shipment `seq`."""
    message = Result(
        seq=seq,
        dtype=_NAME_OF[y_TH.dtype],
        num_rows=y_TH.shape[0],
        hidden_size=y_TH.shape[1],
    )
    return join(ExchangeResponse(result=message), y_TH)


def read_response(frame: bytes, peer: str) -> tuple[ExchangeResponse, memoryview]:
    """What a host sent, and its rows. Raises BadFrame."""
    return split(frame, ExchangeResponse, peer)


def decode_result(message: Result, rows: memoryview, num_rows: int, terms: LinkTerms, peer: str) -> torch.Tensor:
    """The `rows` of an answer to a shipment of `num_rows`, [T, H]. Raises BadFrame."""
    if message.num_rows != num_rows:
        raise BadFrame(peer, f"{message.num_rows} rows in answer to {num_rows}")
    return _decode_rows(message, rows, terms, peer)


def encode_error(seq: int, error: TransportError) -> bytes:
    """Why shipment `seq` has no result. HostLost has no place on the wire: it is the wire's end."""
    kind = next(kind for kind, cls in _ERROR_OF.items() if isinstance(error, cls))
    missing: Iterable[ExpertKey] = sorted(error.missing) if isinstance(error, NotHosted) else ()
    message = Error(
        seq=seq,
        kind=kind,
        missing=[SegmentMessage(layer=layer, expert=expert) for layer, expert in missing],
        message=error.problem[:_MAX_TEXT],
    )
    return ExchangeResponse(error=message).SerializeToString()


def encode_mismatch(difference: str) -> bytes:
    """The refusal of a hello."""
    return ExchangeResponse(error=Error(kind=Error.KIND_MISMATCH, message=difference)).SerializeToString()


def decode_error(message: Error, peer: str) -> TransportError:
    """The error that `message` tells of; one of an unknown kind is a BadFrame."""
    text = message.message[:_MAX_TEXT]
    if message.kind == Error.KIND_NOT_HOSTED:
        if len(message.missing) > MAX_SEGMENTS:
            return BadFrame(peer, f"{len(message.missing)} missing experts where {MAX_SEGMENTS} are allowed")
        return NotHosted(peer, ((segment.layer, segment.expert) for segment in message.missing))
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


def _decode_rows(message: ShipmentMessage | Result, rows: memoryview, terms: LinkTerms, peer: str) -> torch.Tensor:
    num_rows, hidden_size = message.num_rows, message.hidden_size
    dtype = _DTYPE_OF.get(message.dtype)
    if dtype != terms.dtype:
        raise BadFrame(peer, f"rows of dtype {dtype or message.dtype} on a link of {terms.dtype}")
    if hidden_size != terms.hidden_size:
        raise BadFrame(peer, f"rows of {hidden_size} numbers on a link of {terms.hidden_size}")
    if num_rows > MAX_ROWS:
        raise BadFrame(peer, f"{num_rows} rows where {MAX_ROWS} are allowed")
    if len(rows) != terms.num_bytes(num_rows):
        raise BadFrame(peer, f"{len(rows)} bytes for {num_rows} rows of {hidden_size} × {dtype}")
    if not rows:
        return torch.empty(0, hidden_size, dtype=dtype)
    x_TH = torch.frombuffer(rows, dtype=dtype).view(num_rows, hidden_size)
    # Only frames of other implementations come unaligned.
    return x_TH.clone() if x_TH.data_ptr() % dtype.itemsize else x_TH
