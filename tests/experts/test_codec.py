"""Messages and back: what goes in comes out bit for bit, and whatever else comes in is a BadFrame."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from expert_hosts import HIDDEN, make_shipment, make_terms
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st

from experts.errors import BadFrame, DeadlinePassed, HostFailed, NotHosted, TransportError
from experts.link_terms import LinkTerms
from experts.transport.base import Segment, Shipment
from experts.wire.codec import (
    MAX_ROWS,
    MAX_SEGMENTS,
    decode_error,
    decode_result,
    decode_shipment,
    encode_error,
    encode_hello,
    encode_result,
    encode_shipment,
    message_bound,
    mismatch,
    read_request,
    read_response,
)
from experts.wire.expert_pb2 import (
    DTYPE_BFLOAT16,
    DTYPE_UNSPECIFIED,
    Error,
    ExchangeRequest,
    ExchangeResponse,
)
from experts.wire.expert_pb2 import Shipment as ShipmentMessage

SETTINGS = settings(max_examples=150, deadline=None)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TERMS = make_terms()
NUMBERS = st.one_of(st.integers(0, 40), st.integers(0, 2**32 - 1))


@st.composite
def shipments(draw: st.DrawFn) -> Shipment:
    hidden = draw(st.integers(1, 9))
    dtype = draw(st.sampled_from(DTYPES))
    segments = draw(st.lists(st.builds(Segment, layer=NUMBERS, expert=NUMBERS, num_rows=st.integers(0, 5)), max_size=6))
    num_rows = sum(segment.num_rows for segment in segments)
    # Any bits, so also infinities and NaNs.
    size = num_rows * hidden * dtype.itemsize
    data = bytearray(draw(st.binary(min_size=size, max_size=size)))
    flat = torch.frombuffer(data, dtype=dtype) if size else torch.empty(0, dtype=dtype)
    return Shipment(segments=tuple(segments), rows_TH=flat.view(num_rows, hidden), epoch=draw(NUMBERS))


def bits(x: torch.Tensor) -> bytes:
    return x.contiguous().view(torch.uint8).numpy().tobytes()


def message_of(shipment: Shipment, remaining_s: float = 1.0) -> tuple[ShipmentMessage, memoryview]:
    request, rows = read_request(encode_shipment(1, shipment, remaining_s), "router")
    return request.shipment, rows


@SETTINGS
@given(shipments(), st.integers(1, 2**64 - 1))
def test_a_shipment_survives_the_wire(shipment: Shipment, seq: int) -> None:
    terms = make_terms(shipment.rows_TH.dtype, hidden=shipment.rows_TH.shape[1])
    frame = encode_shipment(seq, shipment, 1.5)
    assert len(frame) <= message_bound(shipment)
    request, rows = read_request(frame, "router")
    message = request.shipment
    assert (message.seq, message.deadline_ms) == (seq, 1500)
    decoded = decode_shipment(message, rows, terms, "router")
    assert (decoded.segments, decoded.epoch) == (shipment.segments, shipment.epoch)
    assert (decoded.rows_TH.dtype, decoded.rows_TH.shape) == (shipment.rows_TH.dtype, shipment.rows_TH.shape)
    assert bits(decoded.rows_TH) == bits(shipment.rows_TH)


@SETTINGS
@given(shipments(), st.integers(1, 2**64 - 1))
def test_a_result_survives_the_wire(shipment: Shipment, seq: int) -> None:
    rows_TH = shipment.rows_TH
    terms = make_terms(rows_TH.dtype, hidden=rows_TH.shape[1])
    response, rows = read_response(encode_result(seq, rows_TH), "host")
    assert response.result.seq == seq
    assert bits(decode_result(response.result, rows, rows_TH.shape[0], terms, "host")) == bits(rows_TH)


@SETTINGS
@given(shipments())
def test_frames_are_what_the_proto_says(shipment: Shipment) -> None:
    terms = make_terms(shipment.rows_TH.dtype, hidden=shipment.rows_TH.shape[1])
    frame = encode_shipment(5, shipment, 1.5)
    stock = ExchangeRequest.FromString(frame)
    assert stock.rows == bits(shipment.rows_TH)
    assert (stock.shipment.seq, len(stock.shipment.segments)) == (5, len(shipment.segments))
    # Another implementation may order the fields differently and pads nothing.
    stock.ClearField("padding")
    rows_only = ExchangeRequest(rows=stock.rows)
    stock.ClearField("rows")
    head = stock.SerializeToString()
    for other in (rows_only.SerializeToString() + head, head + rows_only.SerializeToString()):
        request, rows = read_request(other, "router")
        decoded = decode_shipment(request.shipment, rows, terms, "router")
        assert (decoded.segments, bits(decoded.rows_TH)) == (shipment.segments, bits(shipment.rows_TH))


@pytest.mark.parametrize("num_rows", [1, 3, 300, 20_000])
def test_rows_lie_aligned_in_the_frame_and_are_not_copied(num_rows: int) -> None:
    frame = encode_shipment(1, make_shipment({(0, 0): num_rows}), 1.0)
    request, rows = read_request(frame, "router")
    decoded = decode_shipment(request.shipment, rows, TERMS, "router")
    lies_at = torch.frombuffer(frame, dtype=torch.uint8).data_ptr()
    offset = decoded.rows_TH.data_ptr() - lies_at
    assert 0 < offset < len(frame) and offset % 16 == 0


def test_rows_that_are_not_contiguous_are_sent_in_order() -> None:
    whole = torch.arange(4.0 * 2 * HIDDEN).view(4, 2 * HIDDEN)
    rows = whole[::2, ::2]
    shipment = Shipment(segments=(Segment(layer=0, expert=0, num_rows=2),), rows_TH=rows)
    decoded = decode_shipment(*message_of(shipment), TERMS, "router")
    assert torch.equal(decoded.rows_TH, rows)


@pytest.mark.parametrize(
    ("remaining_s", "deadline_ms"),
    [(0.0001, 1), (0.0, 0), (-3.0, 0), (2.0, 2000), (1e12, 2**32 - 1), (math.inf, 2**32 - 1)],
)
def test_the_time_left_is_rounded_up_and_bounded(remaining_s: float, deadline_ms: int) -> None:
    message, rows = message_of(make_shipment({(0, 0): 2}), remaining_s)
    assert message.deadline_ms == deadline_ms
    assert bool(rows) == (remaining_s > 0)


def test_a_hello_fits_only_its_own_terms() -> None:
    hello = ExchangeRequest.FromString(encode_hello(TERMS, "router")).hello
    assert hello.router_name == "router"
    assert mismatch(hello, TERMS) == ""
    assert mismatch(hello, make_terms(digest="other")) == "checkpoint digest is weights-1, not other"
    assert mismatch(hello, make_terms(torch.bfloat16)) == "dtype is torch.float32, not torch.bfloat16"
    assert mismatch(hello, make_terms(hidden=9)) == f"hidden size is {HIDDEN}, not 9"
    hello.protocol_version += 1
    hello.dtype = DTYPE_UNSPECIFIED
    assert "protocol version" in mismatch(hello, TERMS) and "dtype is None" in mismatch(hello, TERMS)


@pytest.mark.parametrize(
    "error",
    [
        NotHosted("host", [(1, 2), (3, 4)]),
        HostFailed("host", "the computation failed"),
        BadFrame("host", "odd bytes"),
        DeadlinePassed("host", "too late"),
    ],
)
def test_errors_survive_the_wire(error: TransportError) -> None:
    message = ExchangeResponse.FromString(encode_error(7, error)).error
    assert message.seq == 7
    decoded = decode_error(message, "host")
    assert type(decoded) is type(error)
    assert str(decoded) == str(error)
    if isinstance(error, NotHosted) and isinstance(decoded, NotHosted):
        assert decoded.missing == error.missing


@pytest.mark.parametrize("kind", [Error.KIND_UNSPECIFIED, Error.KIND_MISMATCH, 77])
def test_an_error_of_no_use_is_a_bad_frame(kind: Any) -> None:
    assert isinstance(decode_error(Error(kind=kind, message="x" * 9999), "host"), BadFrame)
    assert len(str(decode_error(Error(kind=kind, message="x" * 9999), "host"))) < 300


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"dtype": DTYPE_BFLOAT16}, "rows of dtype torch.bfloat16 on a link of torch.float32"),
        ({"dtype": DTYPE_UNSPECIFIED}, "rows of dtype 0"),
        ({"dtype": 99}, "rows of dtype 99"),
        ({"hidden_size": HIDDEN + 1}, f"rows of {HIDDEN + 1} numbers"),
        ({"hidden_size": 0}, "rows of 0 numbers"),
        ({"num_rows": 2}, "segments of 3 rows in a shipment of 2"),
        ({"num_rows": 2**32 - 1}, "segments of 3 rows in a shipment of 4294967295"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(changes: dict[str, Any], told: str) -> None:
    message, rows = message_of(make_shipment({(0, 0): 1, (0, 1): 2}))
    for name, value in changes.items():
        setattr(message, name, value)
    with pytest.raises(BadFrame, match=told):
        decode_shipment(message, rows, TERMS, "router")


@pytest.mark.parametrize("num_bytes", [0, 3 * HIDDEN * 4 - 4, 3 * HIDDEN * 4 + 1])
def test_too_few_or_too_many_bytes_are_refused(num_bytes: int) -> None:
    message, _ = message_of(make_shipment({(0, 0): 3}))
    with pytest.raises(BadFrame, match=f"{num_bytes} bytes for 3 rows of {HIDDEN} × torch.float32"):
        decode_shipment(message, memoryview(bytes(num_bytes)), TERMS, "router")


def test_counts_are_bounded_before_anything_is_made() -> None:
    message, rows = message_of(make_shipment({(0, 0): 1}))
    message.segments[0].num_rows = message.num_rows = MAX_ROWS + 1
    with pytest.raises(BadFrame, match=f"where {MAX_ROWS} are allowed"):
        decode_shipment(message, rows, TERMS, "router")
    for _ in range(MAX_SEGMENTS):
        message.segments.add()
    with pytest.raises(BadFrame, match=f"where {MAX_SEGMENTS} are allowed"):
        decode_shipment(message, rows, TERMS, "router")


def test_an_answer_of_another_length_is_refused() -> None:
    response, rows = read_response(encode_result(1, torch.zeros(3, HIDDEN)), "host")
    with pytest.raises(BadFrame, match="3 rows in answer to 4"):
        decode_result(response.result, rows, 4, TERMS, "host")


def decode_anything(data: bytes, terms: LinkTerms = TERMS) -> None:
    """As both ends do it: read, then decode; only BadFrame may come of it."""
    try:
        request, rows = read_request(data, "router")
        mismatch(request.hello, terms)
        decoded = decode_shipment(request.shipment, rows, terms, "router")
        assert decoded.rows_TH.nbytes == len(rows)
    except BadFrame:
        pass
    try:
        response, rows = read_response(data, "host")
        assert isinstance(decode_error(response.error, "host"), TransportError)
        decode_result(response.result, rows, 2, terms, "host")
    except BadFrame:
        pass


def read_by_stock(data: bytes) -> tuple[ExchangeRequest, bytes] | None:
    try:
        message = ExchangeRequest.FromString(data)
    except DecodeError:
        return None
    rows = message.rows
    message.ClearField("rows")
    return message, rows


def read_by_us(data: bytes) -> tuple[ExchangeRequest, bytes] | None:
    try:
        message, rows = read_request(data, "router")
    except BadFrame:
        return None
    message.ClearField("rows")
    return message, bytes(rows)


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        b"\x7a\x03abc",
        b"\x7a\x02abc",
        b"\x7a\x83\x80\x80\x80\x80\x00abc",
        # A number where a length would stand, whose "end" is a false border.
        b"\x08\x02\x7a\x03\x7a\x01A",
        # A tag of two bytes.
        b"\xaa\x01\x7a\x02\x7a\x01",
        b"\x7a\x01a\x7a\x01b",
        b"\x12\x00\x72\x01\x00\x72\x00\x7a\x01b",
    ],
)
def test_odd_layouts_are_read_as_the_message_library_reads_them(frame: bytes) -> None:
    assert read_by_us(frame) == read_by_stock(frame)


@SETTINGS
@given(st.binary(max_size=200))
def test_random_bytes_are_refused_and_nothing_else(data: bytes) -> None:
    decode_anything(data)


@SETTINGS
@given(shipments(), st.data())
def test_mutated_frames_are_decoded_or_refused(shipment: Shipment, data: st.DataObject) -> None:
    if data.draw(st.booleans()):
        frame = bytearray(encode_shipment(3, shipment, 1.0))
    else:
        frame = bytearray(encode_result(3, shipment.rows_TH))
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(frame) - 1))
        cut = data.draw(st.integers(0, 3))
        frame[place : place + cut] = data.draw(st.binary(max_size=3))
        if not frame:
            break
    assert read_by_us(bytes(frame)) == read_by_stock(bytes(frame))
    decode_anything(bytes(frame), make_terms(shipment.rows_TH.dtype, hidden=shipment.rows_TH.shape[1]))
