"""Experts go from host to host whole and checked, and what changes in memory is found, fenced and loaded anew."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from expert_hosts import EXPERT_SIZE, HIDDEN, Experts, make_expert, make_host, make_shipment, make_terms

from experts.errors import BadFrame, HostLost, NotHosted, TransportError
from experts.ffn import ExpertWeights
from experts.host import ExpertHost
from experts.reports import Peer
from experts.slot import Slot
from experts.transport.grpc_server import ExpertHostServer, serve_expert_host
from experts.transport.grpc_weights import PeerWeights
from experts.wire.frames import Header, Kind, join, split
from experts.wire.weights import PIECE_BYTES, decode_pieces, decode_want, encode_pieces, encode_want

KEY = (1, 0)


@pytest.fixture
def server() -> Iterator[ExpertHostServer]:
    server = serve_expert_host(make_host("a", [KEY]), terms=make_terms(), incarnation=5, bind="127.0.0.1")
    yield server
    server.stop(grace=0.1)


def peers(digest: str = "weights-1", expert_size: int = EXPERT_SIZE) -> PeerWeights:
    return PeerWeights(name="b", terms=make_terms(digest=digest), expert_size=expert_size)


def same(one: ExpertWeights, other: ExpertWeights) -> bool:
    return torch.equal(one.gate_up_FH, other.gate_up_FH) and torch.equal(one.down_HF, other.down_HF)


@pytest.mark.parametrize("bytes_per_s", [0.0, 1e6])
def test_an_expert_comes_as_it_is(server: ExpertHostServer, bytes_per_s: float) -> None:
    got = peers().fetch(Peer(name="a", address=server.address), KEY, bytes_per_s)
    assert same(got, make_expert(KEY))


@pytest.mark.parametrize(
    ("ask", "error", "words"),
    [
        (lambda peer: peers().fetch(peer, (9, 9)), NotHosted, "does not hold"),
        (lambda peer: peers(digest="others").fetch(peer, KEY), BadFrame, "checkpoint digest"),
        (lambda peer: peers(expert_size=EXPERT_SIZE + 1).fetch(peer, KEY), BadFrame, "an expert of"),
        (lambda peer: peers().fetch(replace(peer, address="127.0.0.1:1"), KEY), HostLost, ""),
        (lambda peer: peers().fetch(replace(peer, address="192.0.2.1:1"), KEY), HostLost, "loopback"),
    ],
    ids=["not held", "other checkpoint", "other size", "nobody there", "unguarded address"],
)
def test_what_does_not_fit_is_an_error(
    server: ExpertHostServer, ask: Callable[[Peer], object], error: type[TransportError], words: str
) -> None:
    with pytest.raises(error) as caught:
        ask(Peer(name="a", address=server.address))
    assert words in str(caught.value)


def large(dtype: torch.dtype = torch.bfloat16) -> tuple[ExpertWeights, int, int]:
    """More than a piece of each matrix: hidden size, expert size."""
    hidden, size = 512, 1200
    torch.manual_seed(3)
    weights = ExpertWeights(
        gate_up_FH=torch.randn(2 * size, hidden).to(dtype), down_HF=torch.randn(hidden, size).to(dtype)
    )
    return weights, hidden, size


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_pieces_make_the_whole(dtype: torch.dtype) -> None:
    weights, hidden, size = large(dtype)
    pieces = list(encode_pieces(Slot.of(weights), 7))
    assert len(pieces) > 2 and max(map(len, pieces)) < PIECE_BYTES + 200
    assert same(decode_pieces(pieces, make_terms(dtype, hidden=hidden), size, "a"), weights)


def test_pieces_that_are_not_the_whole_are_refused() -> None:
    weights, hidden, size = large()
    terms = make_terms(torch.bfloat16, hidden=hidden)
    pieces = list(encode_pieces(Slot.of(weights), 7))

    def flipped(place: int) -> bytes:
        broken = bytearray(pieces[0])
        broken[place] ^= 1
        return bytes(broken)

    frame = split(pieces[-1], "a")
    longer = join(frame.header, bytes(frame.part), bytes(frame.rows) + b"12")
    spoiled = [
        [],
        pieces[:-1],
        pieces[1:],
        [pieces[0], *pieces],
        [pieces[1], pieces[0], *pieces[2:]],
        [*pieces, pieces[-1]],
        [flipped(-1), *pieces[1:]],
        [flipped(70), *pieces[1:]],
        [flipped(9), *pieces[1:]],
        [*pieces[:-1], longer],
        [b"", *pieces],
        [join(Header(Kind.PIECE), b"\xff\xff\xff", b"x")],
        [join(Header(Kind.RESULT, 1))],
    ]
    for messages in spoiled:
        with pytest.raises(BadFrame):
            decode_pieces(messages, terms, size, "a")


def test_a_sender_whose_memory_has_changed_is_found_out() -> None:
    weights, hidden, size = large()
    slot = Slot.of(weights)
    weights.down_HF[3, 5] += 1.0
    with pytest.raises(BadFrame, match="not those that the sender loaded"):
        decode_pieces(encode_pieces(slot, 7), make_terms(torch.bfloat16, hidden=hidden), size, "a")


def test_only_a_want_is_answered() -> None:
    terms = make_terms()
    assert decode_want(encode_want(terms, "b", KEY), terms, "b") == (KEY, "")
    assert "hidden size" in decode_want(encode_want(make_terms(hidden=HIDDEN + 1), "b", KEY), terms, "b")[1]
    for message in (
        b"",
        b"x" * 64,
        join(Header(Kind.HELLO)),
        join(Header(Kind.WANT), b"\xff"),
        encode_want(terms, "b", KEY)[:-1],
    ):
        with pytest.raises(BadFrame):
            decode_want(message, terms, "b")


def test_a_turned_bit_fences_the_replica_until_it_is_loaded_anew() -> None:
    host = ExpertHost("a", Experts())
    host.load(KEY)
    host.load((1, 1))
    assert host.scrub(KEY) == make_expert(KEY).num_bytes and host.held() == {KEY, (1, 1)}
    bits = host.slot(KEY).weights.gate_up_FH.view(torch.int32)
    bits[2, 3] ^= 1 << 9
    host.scrub(KEY)
    assert host.held() == {(1, 1)} and host.num_damaged == 1
    with pytest.raises(NotHosted):
        host.compute(make_shipment({KEY: 2}))
    host.load(KEY)
    assert same(host.slot(KEY).weights, make_expert(KEY))
    host.scrub(KEY)
    assert host.held() == {KEY, (1, 1)} and host.num_damaged == 1
    assert host.scrub((9, 9)) == 0
