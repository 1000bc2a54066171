"""Frames and back: what goes in comes out bit for bit, and whatever else comes in is a BadFrame."""

from __future__ import annotations

import math
import struct
import tracemalloc
from contextlib import suppress
from typing import Any

import pytest
import torch
from expert_hosts import HIDDEN, make_shipment, make_terms
from hypothesis import given, settings
from hypothesis import strategies as st

from experts.errors import BadFrame, DeadlinePassed, HostFailed, NotHosted, TransportError
from experts.link_terms import LinkTerms
from experts.transport.base import Segment, Shipment
from experts.wire.codec import (
    MAX_ROWS,
    MAX_SEGMENTS,
    decode_error,
    decode_hello,
    decode_host_hello,
    decode_mismatch,
    decode_result,
    decode_shipment,
    encode_error,
    encode_hello,
    encode_host_hello,
    encode_mismatch,
    encode_result,
    encode_shipment,
    message_bound,
    mismatch,
)
from experts.wire.expert_pb2 import DTYPE_BFLOAT16, DTYPE_UNSPECIFIED, Error
from experts.wire.frames import Frame, Header, Kind, join, split

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


def frame_of(shipment: Shipment, remaining_s: float = 1.0) -> Frame:
    return split(encode_shipment(1, shipment, remaining_s), "router")


@SETTINGS
@given(shipments(), st.integers(1, 2**64 - 1))
def test_a_shipment_survives_the_wire(shipment: Shipment, seq: int) -> None:
    terms = make_terms(shipment.rows_TH.dtype, hidden=shipment.rows_TH.shape[1])
    message = encode_shipment(seq, shipment, 1.5)
    assert len(message) <= message_bound(shipment)
    frame = split(message, "router")
    assert (frame.header.kind, frame.header.seq, frame.header.deadline_ms) == (Kind.SHIPMENT, seq, 1500)
    decoded = decode_shipment(frame, terms, "router")
    assert (decoded.segments, decoded.epoch) == (shipment.segments, shipment.epoch)
    assert (decoded.rows_TH.dtype, decoded.rows_TH.shape) == (shipment.rows_TH.dtype, shipment.rows_TH.shape)
    assert bits(decoded.rows_TH) == bits(shipment.rows_TH)


@SETTINGS
@given(shipments(), st.integers(1, 2**64 - 1), st.integers(0, 2**64 - 1))
def test_a_result_survives_the_wire_and_bears_what_it_answers(shipment: Shipment, seq: int, incarnation: int) -> None:
    rows_TH = shipment.rows_TH
    terms = make_terms(rows_TH.dtype, hidden=rows_TH.shape[1])
    asked = split(encode_shipment(seq, shipment, 1.0), "router").header
    message = encode_result(incarnation, asked, rows_TH)
    assert len(message) <= message_bound(shipment)
    frame = split(message, "host")
    header = frame.header
    assert (header.kind, header.incarnation, header.seq, header.epoch) == (
        Kind.RESULT,
        incarnation,
        seq,
        shipment.epoch,
    )
    assert bits(decode_result(frame, rows_TH.shape[0], terms, "host")) == bits(rows_TH)


@pytest.mark.parametrize("num_rows", [1, 3, 300, 13_000])
@pytest.mark.parametrize("num_segments", [1, 2, 5])
def test_rows_lie_aligned_in_the_frame_and_are_not_copied(num_rows: int, num_segments: int) -> None:
    message = encode_shipment(1, make_shipment({(0, expert): num_rows for expert in range(num_segments)}), 1.0)
    decoded = decode_shipment(split(message, "router"), TERMS, "router")
    lies_at = torch.frombuffer(message, dtype=torch.uint8).data_ptr()
    offset = decoded.rows_TH.data_ptr() - lies_at
    assert 0 < offset < len(message) and offset % 16 == 0


def test_rows_that_are_not_contiguous_are_sent_in_order() -> None:
    whole = torch.arange(4.0 * 2 * HIDDEN).view(4, 2 * HIDDEN)
    rows = whole[::2, ::2]
    shipment = Shipment(segments=(Segment(layer=0, expert=0, num_rows=2),), rows_TH=rows)
    decoded = decode_shipment(frame_of(shipment), TERMS, "router")
    assert torch.equal(decoded.rows_TH, rows)


@pytest.mark.parametrize(
    ("remaining_s", "deadline_ms"),
    [(0.0001, 1), (0.0, 0), (-3.0, 0), (2.0, 2000), (1e12, 2**32 - 1), (math.inf, 2**32 - 1)],
)
def test_the_time_left_is_rounded_up_and_bounded(remaining_s: float, deadline_ms: int) -> None:
    frame = frame_of(make_shipment({(0, 0): 2}), remaining_s)
    assert frame.header.deadline_ms == deadline_ms
    assert bool(frame.rows) == (remaining_s > 0)


def test_a_hello_fits_only_its_own_terms() -> None:
    hello = decode_hello(split(encode_hello(TERMS, "router"), "router"), "router")
    assert hello.router_name == "router"
    assert mismatch(hello, TERMS) == ""
    assert mismatch(hello, make_terms(digest="other")) == "checkpoint digest is weights-1, not other"
    assert mismatch(hello, make_terms(torch.bfloat16)) == "dtype is torch.float32, not torch.bfloat16"
    assert mismatch(hello, make_terms(hidden=9)) == f"hidden size is {HIDDEN}, not 9"
    hello.protocol_version += 1
    hello.dtype = DTYPE_UNSPECIFIED
    assert "protocol version" in mismatch(hello, TERMS) and "dtype is None" in mismatch(hello, TERMS)


def test_a_host_says_who_it_is() -> None:
    hello = decode_host_hello(split(encode_host_hello("a", 2**64 - 1, 1 << 20), "host"), "host")
    assert (hello.host_name, hello.incarnation, hello.max_message_bytes) == ("a", 2**64 - 1, 1 << 20)


def test_hellos_are_not_taken_for_each_other() -> None:
    ours, theirs = split(encode_hello(TERMS, "router"), "x"), split(encode_host_hello("a", 1, 1 << 20), "x")
    with pytest.raises(BadFrame, match="must be a hello"):
        decode_hello(theirs, "x")
    with pytest.raises(BadFrame, match="is no hello"):
        decode_host_hello(ours, "x")


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
    frame = split(encode_error(3, Header(Kind.SHIPMENT, seq=7, epoch=5), error), "host")
    assert (frame.header.incarnation, frame.header.seq, frame.header.epoch) == (3, 7, 5)
    decoded = decode_error(frame, "host")
    assert type(decoded) is type(error)
    assert str(decoded) == str(error)
    if isinstance(error, NotHosted) and isinstance(decoded, NotHosted):
        assert decoded.missing == error.missing


@pytest.mark.parametrize("kind", [Error.KIND_UNSPECIFIED, Error.KIND_MISMATCH, 77])
def test_an_error_of_no_use_is_a_bad_frame(kind: Any) -> None:
    message = Error(kind=kind, message="x" * 9999).SerializeToString()
    decoded = decode_error(split(join(Header(Kind.ERROR), message), "host"), "host")
    assert isinstance(decoded, BadFrame) and len(str(decoded)) < 300


def test_a_refusal_says_why() -> None:
    assert (
        decode_mismatch(split(encode_mismatch("hidden size is 8, not 9"), "host"), "host") == "hidden size is 8, not 9"
    )


@pytest.mark.parametrize("part", [b"\xff" * 9, b"\x12\x05abc"])
def test_messages_that_cannot_be_read_are_refused(part: bytes) -> None:
    with pytest.raises(BadFrame, match="an unreadable Hello"):
        decode_hello(split(join(Header(Kind.HELLO), part), "router"), "router")
    with pytest.raises(BadFrame, match="an unreadable HostHello"):
        decode_host_hello(split(join(Header(Kind.HOST_HELLO), part), "host"), "host")
    assert "an unreadable Error" in str(decode_error(split(join(Header(Kind.ERROR), part), "host"), "host"))


def test_rows_after_a_hello_are_refused() -> None:
    with pytest.raises(BadFrame, match="3 bytes of rows where none belong"):
        decode_hello(split(join(Header(Kind.HELLO), b"", b"abc"), "router"), "router")


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
    frame = frame_of(make_shipment({(0, 0): 1, (0, 1): 2}))
    with pytest.raises(BadFrame, match=told):
        decode_shipment(frame._replace(header=frame.header._replace(**changes)), TERMS, "router")


@pytest.mark.parametrize("num_bytes", [0, 3 * HIDDEN * 4 - 4, 3 * HIDDEN * 4 + 1])
def test_too_few_or_too_many_bytes_are_refused(num_bytes: int) -> None:
    frame = frame_of(make_shipment({(0, 0): 3}))
    with pytest.raises(BadFrame, match=f"{num_bytes} bytes for 3 rows of {HIDDEN} × torch.float32"):
        decode_shipment(frame._replace(rows=memoryview(bytes(num_bytes))), TERMS, "router")


def test_counts_are_bounded_before_anything_is_made() -> None:
    header = Header(Kind.SHIPMENT, seq=1, deadline_ms=1, dtype=1, num_rows=MAX_ROWS + 1, hidden_size=HIDDEN)
    many_rows = split(join(header, struct.pack("<III", 0, 0, MAX_ROWS + 1)), "router")
    with pytest.raises(BadFrame, match=f"where {MAX_ROWS} are allowed"):
        decode_shipment(many_rows, TERMS, "router")
    many_segments = split(join(header, bytes(12 * (MAX_SEGMENTS + 1))), "router")
    with pytest.raises(BadFrame, match=f"{MAX_SEGMENTS} segments are allowed"):
        decode_shipment(many_segments, TERMS, "router")
    with pytest.raises(BadFrame, match="13 bytes of segments"):
        decode_shipment(split(join(header, bytes(13)), "router"), TERMS, "router")


def test_a_claim_of_many_rows_takes_no_memory() -> None:
    """2³² - 1 rows of 2³² - 1 numbers, and segments that say the same, in a frame of a hundred bytes."""
    most = 2**32 - 1
    header = Header(Kind.SHIPMENT, seq=1, deadline_ms=1, dtype=1, num_rows=most, hidden_size=most)
    frame = split(join(header, struct.pack("<III", 0, 0, most)), "router")
    terms = make_terms(hidden=most)
    tracemalloc.start()
    with pytest.raises(BadFrame):
        decode_shipment(frame, terms, "router")
    with pytest.raises(BadFrame):
        decode_result(frame, most, terms, "host")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20


def test_an_answer_of_another_length_is_refused() -> None:
    frame = split(encode_result(1, Header(Kind.SHIPMENT, seq=1), torch.zeros(3, HIDDEN)), "host")
    with pytest.raises(BadFrame, match="3 rows in answer to 4"):
        decode_result(frame, 4, TERMS, "host")


# Damage


SHIPMENT = encode_shipment(7, make_shipment({(0, 0): 1, (0, 1): 2}), 1.0)
RESULT = encode_result(3, Header(Kind.SHIPMENT, seq=7), torch.arange(3.0 * HIDDEN).view(3, HIDDEN))
ERROR = encode_error(3, Header(Kind.SHIPMENT, seq=7), NotHosted("host", [(0, 1)]))
EXPIRED = encode_shipment(7, make_shipment({(0, 0): 1}), 0.0)
HELLO = encode_hello(TERMS, "router")
HOST_HELLO = encode_host_hello("a", 3, 1 << 20)
FRAMES = {
    "shipment": SHIPMENT,
    "result": RESULT,
    "error": ERROR,
    "expired": EXPIRED,
    "hello": HELLO,
    "host hello": HOST_HELLO,
}


def read_as_its_end_does(message: bytes, terms: LinkTerms = TERMS) -> None:
    """Take a frame apart and decode it as the end that it goes to. Raises BadFrame."""
    frame = split(message, "peer")
    if frame.header.kind == Kind.HELLO:
        decode_hello(frame, "peer")
    elif frame.header.kind == Kind.HOST_HELLO:
        decode_host_hello(frame, "peer")
    elif frame.header.kind == Kind.SHIPMENT and frame.header.deadline_ms:
        assert decode_shipment(frame, terms, "peer").rows_TH.nbytes == len(frame.rows)
    elif frame.header.kind == Kind.RESULT:
        assert decode_result(frame, 3, terms, "peer").nbytes == len(frame.rows)
    elif frame.header.kind == Kind.ERROR:
        error = decode_error(frame, "peer")
        if isinstance(error, BadFrame):
            raise error


@pytest.mark.parametrize("name", FRAMES)
def test_every_flipped_bit_is_found(name: str) -> None:
    message = FRAMES[name]
    read_as_its_end_does(message)
    for place in range(len(message)):
        for bit in range(8):
            damaged = bytearray(message)
            damaged[place] ^= 1 << bit
            with pytest.raises(BadFrame):
                read_as_its_end_does(bytes(damaged))


@pytest.mark.parametrize("name", FRAMES)
def test_every_cut_is_found(name: str) -> None:
    message = FRAMES[name]
    for length in range(len(message)):
        with pytest.raises(BadFrame):
            read_as_its_end_does(message[:length])


@pytest.mark.parametrize("message", [SHIPMENT, RESULT], ids=["shipment", "result"])
def test_damaged_rows_leave_their_number_known(message: bytes) -> None:
    damaged = bytearray(message)
    damaged[-1] ^= 0x80
    frame = split(bytes(damaged), "peer")
    assert frame.header.seq == 7
    with pytest.raises(BadFrame, match="rows that were damaged on their way"):
        read_as_its_end_does(bytes(damaged))


@SETTINGS
@given(st.one_of(st.binary(max_size=200), st.binary(max_size=200).map(lambda data: b"HERD" + data)))
def test_random_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(BadFrame):
        read_as_its_end_does(data)


@SETTINGS
@given(shipments(), st.data())
def test_mutated_frames_are_refused(shipment: Shipment, data: st.DataObject) -> None:
    terms = make_terms(shipment.rows_TH.dtype, hidden=shipment.rows_TH.shape[1])
    as_result = data.draw(st.booleans())
    asked = Header(Kind.SHIPMENT, seq=3)
    message = encode_result(1, asked, shipment.rows_TH) if as_result else encode_shipment(3, shipment, 1.0)
    mutated = bytearray(message)
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(mutated)))
        cut = data.draw(st.integers(0, 3))
        mutated[place : place + cut] = data.draw(st.binary(max_size=3))
    if mutated == message:
        return
    with pytest.raises(BadFrame):
        frame = split(bytes(mutated), "peer")
        if as_result:
            decode_result(frame, shipment.rows_TH.shape[0], terms, "peer")
        else:
            decode_shipment(frame, terms, "peer")


# Frames whose checksums are right and whose words are lies: any header may come with any part and any rows.


@SETTINGS
@given(
    st.builds(
        Header,
        kind=st.integers(0, 255),
        incarnation=st.integers(0, 2**64 - 1),
        seq=st.integers(0, 2**64 - 1),
        epoch=st.integers(0, 2**64 - 1),
        deadline_ms=NUMBERS,
        dtype=st.integers(0, 255) | st.integers(0, 4),
        num_rows=NUMBERS,
        hidden_size=NUMBERS | st.just(HIDDEN),
    ),
    st.binary(max_size=60),
    st.binary(max_size=100),
)
def test_lies_are_decoded_or_refused_by_every_reader(header: Header, part: bytes, rows: bytes) -> None:
    frame = split(join(header, part, rows), "peer")
    assert (frame.header, bytes(frame.part), bytes(frame.rows)) == (header, part, rows)
    with suppress(BadFrame):
        assert decode_shipment(frame, TERMS, "peer").rows_TH.nbytes == len(rows)
    with suppress(BadFrame):
        assert decode_result(frame, header.num_rows, TERMS, "peer").nbytes == len(rows)
    with suppress(BadFrame):
        mismatch(decode_hello(frame, "peer"), TERMS)
    with suppress(BadFrame):
        decode_host_hello(frame, "peer")
    assert isinstance(decode_error(frame, "peer"), TransportError)
