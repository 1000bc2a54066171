"""What only the gRPC transport has: hellos, frames from strangers, bounded queues, ports, threads that end."""

from __future__ import annotations

import pickle
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import grpc
import pytest
import torch
from expert_hosts import (
    HIDDEN,
    PATIENCE_S,
    GatedHost,
    ask,
    assert_answers,
    collect,
    make_host,
    make_shipment,
    make_terms,
    soon,
    wait_until,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from experts.errors import BadFrame, DeadlinePassed, HostLost, InvalidInput, NotHosted, TransportError
from experts.link_terms import LinkTerms
from experts.placement import HostInfo
from experts.transport.base import Shipment
from experts.transport.grpc_client import GrpcTransport
from experts.transport.grpc_link import Reconnect
from experts.transport.grpc_server import ExpertHostServer, serve_expert_host
from experts.wire.codec import (
    decode_error,
    decode_host_hello,
    encode_error,
    encode_hello,
    encode_host_hello,
    encode_result,
    encode_shipment,
)
from experts.wire.frames import Frame, Header, Kind, join, split

FIRST = (1, 0)
LOCALHOST = "127.0.0.1"
FAST = Reconnect(first_s=0.01, longest_s=0.05, refused_s=0.05)
SLOW = Reconnect(first_s=3600.0, longest_s=3600.0)
NEVER_AGAIN = Reconnect(first_s=0.01, longest_s=0.05, refused_s=3600.0)
EXCHANGE = "/herd.expert.v1.ExpertHostService/Exchange"


@pytest.fixture
def host() -> GatedHost:
    return make_host("a", [FIRST])


@pytest.fixture
def serve(host: GatedHost) -> Iterator[Callable[..., ExpertHostServer]]:
    servers: list[ExpertHostServer] = []

    def start(**options: Any) -> ExpertHostServer:
        defaults = {"host": host, "terms": make_terms(), "incarnation": 1, "bind": LOCALHOST, "max_streams": 4}
        servers.append(serve_expert_host(**{**defaults, **options}))
        return servers[-1]

    yield start
    host.gate.set()
    for server in servers:
        server.stop(grace=0)


@pytest.fixture
def link() -> Iterator[Callable[..., GrpcTransport]]:
    transports: list[GrpcTransport] = []

    def start(address: str, terms: LinkTerms | None = None, **options: Any) -> GrpcTransport:
        options = {"router_name": "router", "terms": terms or make_terms(), "reconnect": FAST, **options}
        transports.append(GrpcTransport(**options))
        transports[-1].connect({"a": HostInfo(name="a", incarnation=1, address=address)})
        return transports[-1]

    yield start
    for transport in transports:
        transport.close()


Serve = Callable[..., ExpertHostServer]
LinkTo = Callable[..., GrpcTransport]


def wait_linked(transport: GrpcTransport) -> None:
    wait_until(lambda: transport.linked() == {"a"}, "the link")


def assert_serves(transport: GrpcTransport) -> None:
    shipment = make_shipment({FIRST: 2})
    assert_answers(shipment, ask(transport, "a", shipment, soon()))


# Hellos


@pytest.mark.parametrize(
    ("terms", "told"),
    [
        (make_terms(digest="other"), "checkpoint digest is other, not weights-1"),
        (make_terms(torch.bfloat16), "dtype is torch.bfloat16, not torch.float32"),
        (make_terms(hidden=16), "hidden size is 16, not 8"),
    ],
)
def test_a_router_of_another_model_is_refused_and_says_why(
    serve: Serve, link: LinkTo, caplog: pytest.LogCaptureFixture, terms: LinkTerms, told: str
) -> None:
    server = serve()
    stranger = link(server.address, terms, reconnect=NEVER_AGAIN)
    wait_until(lambda: "the two ends do not fit: " + told in caplog.text, "the refusal in the router's log")
    assert stranger.linked() == frozenset()
    assert isinstance(ask(stranger, "a", make_shipment({FIRST: 1}), soon()), HostLost)
    friend = link(server.address)
    wait_linked(friend)
    assert_serves(friend)
    # One attempt, one refusal: a router that does not fit must not knock all the time.
    assert caplog.text.count("refused router 'router'") == 1


def test_a_host_of_another_name_is_not_linked(serve: Serve, link: LinkTo, caplog: pytest.LogCaptureFixture) -> None:
    transport = link(serve().address)
    transport.connect({"b": HostInfo(name="b", incarnation=1, address=serve().address)})
    wait_until(lambda: "host 'a' answers at" in caplog.text, "the refusal in the router's log")
    assert transport.linked() == frozenset()


def test_a_refused_router_is_linked_once_it_fits(serve: Serve, link: LinkTo, caplog: pytest.LogCaptureFixture) -> None:
    server = serve(terms=make_terms(digest="old"))
    transport = link(server.address)
    wait_until(lambda: "do not fit" in caplog.text, "the refusal")
    server.stop(grace=0)
    serve(ports=range(server.port, server.port + 1))
    wait_linked(transport)
    assert_serves(transport)


# Frames from strangers: a bare channel that sends what it likes


class Stranger:
    """A stream of raw bytes to a host."""

    def __init__(self, address: str) -> None:
        self._channel = grpc.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)])
        self._messages: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        exchange = self._channel.stream_stream(EXCHANGE)
        self._answers = exchange(iter(self._messages.get, None), timeout=PATIENCE_S)

    def send(self, *messages: bytes) -> None:
        for message in messages:
            self._messages.put(message)

    def answer(self) -> Frame | None:
        """The next answer; None at the end of the stream, which must come by itself."""
        try:
            message = next(self._answers, None)
        except grpc.RpcError as error:
            assert error.code() is not grpc.StatusCode.DEADLINE_EXCEEDED
            return None
        return None if message is None else split(message, "host")

    def error(self) -> tuple[int, TransportError]:
        """The number and the error of the next answer."""
        frame = self.answer()
        assert frame is not None and frame.header.kind == Kind.ERROR
        return frame.header.seq, decode_error(frame, "host")

    def greet(self) -> None:
        self.send(HELLO)
        frame = self.answer()
        assert frame is not None and decode_host_hello(frame, "host").host_name == "a"

    def close(self) -> None:
        self._messages.put(None)
        self._channel.close()


@pytest.fixture
def stranger(serve: Serve) -> Iterator[Callable[[], Stranger]]:
    address = serve(max_streams=16).address
    strangers: list[Stranger] = []

    def start() -> Stranger:
        strangers.append(Stranger(address))
        return strangers[-1]

    yield start
    for one in strangers:
        one.close()


HELLO = encode_hello(make_terms(), "stranger")


def shipment_of(seq: int, remaining_s: float = 10.0) -> bytes:
    return encode_shipment(seq, make_shipment({FIRST: 2}), remaining_s)


def lying_shipment(seq: int, rows: bytes | None = None, **changes: int) -> bytes:
    """A shipment whose checksums are right and whose words are not."""
    frame = split(shipment_of(seq), "test")
    return join(frame.header._replace(**changes), bytes(frame.part), frame.rows if rows is None else rows)


def damage(message: bytes, place: int, bit: int = 0) -> bytes:
    damaged = bytearray(message)
    damaged[place] ^= 1 << bit
    return bytes(damaged)


def test_the_first_message_must_be_a_hello(stranger: Callable[[], Stranger]) -> None:
    for first in (shipment_of(1), join(Header(Kind.HOST_HELLO))):
        one = stranger()
        one.send(first)
        seq, error = one.error()
        assert seq == 0 and isinstance(error, BadFrame) and "must be a hello" in error.problem
        assert one.answer() is None


@pytest.mark.parametrize(
    "second", [HELLO, shipment_of(0), join(Header(Kind.RESULT, seq=1))], ids=["hello", "0", "result"]
)
def test_what_is_no_shipment_ends_the_stream(stranger: Callable[[], Stranger], second: bytes) -> None:
    one = stranger()
    one.greet()
    one.send(second)
    seq, error = one.error()
    assert seq == 0 and isinstance(error, BadFrame)
    assert one.answer() is None


def test_a_bad_shipment_is_answered_by_its_number_and_the_stream_goes_on(
    host: GatedHost, stranger: Callable[[], Stranger]
) -> None:
    one = stranger()
    one.greet()
    one.send(
        lying_shipment(7, rows=b"short"),
        lying_shipment(8, num_rows=2**32 - 1),
        damage(shipment_of(9), -1),
        shipment_of(10)[:-4],
        shipment_of(11),
    )
    for expected in (7, 8, 9, 10):
        seq, error = one.error()
        assert seq == expected and isinstance(error, BadFrame)
    answer = one.answer()
    assert answer is not None and (answer.header.seq, answer.header.num_rows) == (11, 2)
    assert host.num_computed == 1


def test_a_shipment_that_comes_too_late_is_not_computed(host: GatedHost, stranger: Callable[[], Stranger]) -> None:
    one = stranger()
    one.greet()
    one.send(shipment_of(7, remaining_s=0.0), lying_shipment(8, deadline_ms=0))
    for expected in (7, 8):
        seq, error = one.error()
        assert seq == expected and isinstance(error, DeadlinePassed)
    assert host.num_computed == 0


def test_answers_bear_the_life_of_the_host_and_what_they_answer(serve: Serve) -> None:
    one = Stranger(serve(incarnation=2**63 + 5).address)
    epoch_of = {1: 3, 2: 2**64 - 1, 3: 0}
    one.send(HELLO)
    first = one.answer()
    assert first is not None and first.header.incarnation == 2**63 + 5
    for seq, epoch in epoch_of.items():
        keys = {FIRST: 1} if seq < 3 else {(9, 9): 1}
        one.send(encode_shipment(seq, replace(make_shipment(keys), epoch=epoch), 1.0))
        answer = one.answer()
        assert answer is not None
        header = answer.header
        assert (header.incarnation, header.seq, header.epoch) == (2**63 + 5, seq, epoch)
    assert answer is not None and isinstance(decode_error(answer, "host"), NotHosted)
    one.close()


def test_unreadable_frames_end_their_stream_only(host: GatedHost, stranger: Callable[[], Stranger]) -> None:
    sound = shipment_of(1)
    frames = [b"\xff" * 40, pickle.dumps({"rows": [1, 2, 3]}), b"\x12\x05abc", bytes(1000), sound[:70]]
    # The head of a shipment of one segment: header, segment, zeros.
    damaged = st.builds(damage, st.just(sound), st.integers(0, 79), st.integers(0, 7))

    @settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(st.one_of(st.sampled_from(frames), st.binary(min_size=1, max_size=60), damaged))
    def send(frame: bytes) -> None:
        one = stranger()
        one.greet()
        one.send(frame)
        seq, error = one.error()
        assert seq == 0 and isinstance(error, BadFrame)
        assert one.answer() is None
        one.close()

    send()
    assert host.num_computed == 0
    friend = stranger()
    friend.greet()
    friend.send(shipment_of(1))
    answer = friend.answer()
    assert answer is not None and answer.header.num_rows == 2


# Hosts that break the protocol: a scripted one


@pytest.fixture
def scripted() -> Iterator[Callable[..., str]]:
    servers = []

    def start(*answers: Callable[[Header], bytes], incarnation: int = 1) -> str:
        """A host that answers its n-th shipment with what the n-th function makes of its header."""

        def exchange(messages: Iterator[bytes], _context: object) -> Iterator[bytes]:
            next(messages)
            yield encode_host_hello("a", incarnation, 1 << 20)
            for message, answer in zip(messages, answers, strict=False):
                yield answer(split(message, "router").header)

        handler = grpc.stream_stream_rpc_method_handler(exchange)
        server = grpc.server(ThreadPoolExecutor(2), options=[("grpc.so_reuseport", 0)])
        service = grpc.method_handlers_generic_handler("herd.expert.v1.ExpertHostService", {"Exchange": handler})
        server.add_generic_rpc_handlers((service,))
        port = server.add_insecure_port(f"{LOCALHOST}:0")
        server.start()
        servers.append(server)
        return f"{LOCALHOST}:{port}"

    yield start
    for server in servers:
        server.stop(None).wait()


def ones(asked: Header, incarnation: int = 1) -> bytes:
    return encode_result(incarnation, asked, torch.ones(2, HIDDEN))


def test_an_answer_of_the_wrong_shape_is_a_bad_frame(scripted: Callable[..., str], link: LinkTo) -> None:
    transport = link(
        scripted(
            lambda asked: encode_result(1, asked, torch.zeros(3, HIDDEN)),
            lambda asked: encode_result(1, asked, torch.zeros(2, HIDDEN + 1)),
            lambda asked: encode_result(1, asked, torch.zeros(2, HIDDEN, dtype=torch.float16)),
            lambda asked: join(Header(Kind.ERROR, 1, asked.seq)),
            ones,
        )
    )
    wait_linked(transport)
    for _ in range(4):
        assert isinstance(ask(transport, "a", make_shipment({FIRST: 2}), soon()), BadFrame)
    assert_ones(ask(transport, "a", make_shipment({FIRST: 2}), soon()))


def assert_ones(result: torch.Tensor | TransportError) -> None:
    assert isinstance(result, torch.Tensor) and torch.equal(result, torch.ones(2, HIDDEN))


@pytest.mark.parametrize("bit", range(8))
def test_damaged_rows_of_an_answer_are_a_bad_frame(scripted: Callable[..., str], link: LinkTo, bit: int) -> None:
    transport = link(scripted(lambda asked: damage(ones(asked), -1 - bit, bit), lambda asked: ones(asked)[:-1], ones))
    wait_linked(transport)
    for _ in range(2):
        assert isinstance(ask(transport, "a", make_shipment({FIRST: 2}), soon()), BadFrame)
    assert_ones(ask(transport, "a", make_shipment({FIRST: 2}), soon()))


@pytest.mark.parametrize("place", [0, 4, 5, 6, 8, 16, 24, 32, 36, 40, 44, 48, 52, 56, 63])
def test_a_damaged_head_of_an_answer_ends_the_stream_and_another_follows(
    scripted: Callable[..., str], link: LinkTo, place: int
) -> None:
    transport = link(scripted(lambda asked: damage(ones(asked), place) if asked.seq == 1 else ones(asked)))
    wait_linked(transport)
    assert isinstance(ask(transport, "a", make_shipment({FIRST: 2}), soon()), HostLost)
    wait_linked(transport)
    assert_ones(ask(transport, "a", make_shipment({FIRST: 2}), soon()))


@pytest.mark.parametrize(
    "foreign",
    [
        lambda asked: ones(asked._replace(seq=asked.seq + 1000)),
        lambda asked: ones(asked, incarnation=0),
        lambda asked: encode_error(2, asked, NotHosted("a", [FIRST])),
        lambda asked: encode_error(1, None, BadFrame("a", "odd bytes")),
    ],
    ids=["another seq", "an older life", "a newer life", "no shipment"],
)
def test_an_answer_that_nobody_asked_for_is_dropped(
    scripted: Callable[..., str], link: LinkTo, caplog: pytest.LogCaptureFixture, foreign: Callable[[Header], bytes]
) -> None:
    transport = link(scripted(foreign, ones))
    wait_linked(transport)
    unanswered = transport.send("a", make_shipment({FIRST: 2}), time.monotonic() + 0.2)
    answered = transport.send("a", make_shipment({FIRST: 2}), soon())
    results = collect(transport, [unanswered, answered])
    assert isinstance(results[unanswered], DeadlinePassed)
    assert_ones(results[answered])
    assert "an answer to nothing that was asked" in caplog.text


def test_the_second_of_two_answers_is_dropped(
    scripted: Callable[..., str], link: LinkTo, caplog: pytest.LogCaptureFixture
) -> None:
    asked_first: list[Header] = []

    def again(asked: Header) -> bytes:
        return encode_result(1, asked_first[0], torch.zeros(2, HIDDEN))

    transport = link(scripted(lambda asked: asked_first.append(asked) or ones(asked), again, ones))
    wait_linked(transport)
    assert_ones(ask(transport, "a", make_shipment({FIRST: 2}), soon()))
    unanswered = transport.send("a", make_shipment({FIRST: 2}), time.monotonic() + 0.2)
    answered = transport.send("a", make_shipment({FIRST: 2}), soon())
    results = collect(transport, [unanswered, answered])
    assert isinstance(results[unanswered], DeadlinePassed)
    assert_ones(results[answered])
    assert "an answer to nothing that was asked: a result" in caplog.text


def test_a_life_that_the_view_tells_of_later_keeps_its_link(scripted: Callable[..., str], link: LinkTo) -> None:
    address = scripted(ones, lambda asked: ones(asked, 2), lambda asked: ones(asked, 2), incarnation=2)
    transport = link(address)
    wait_linked(transport)
    # The view told of life 1; life 2 has taken its place, and says so in its answers.
    lost = transport.send("a", make_shipment({FIRST: 2}), time.monotonic() + 0.2)
    assert isinstance(collect(transport, [lost])[lost], DeadlinePassed)
    under_way = transport.send("a", make_shipment({FIRST: 2}), soon())
    transport.connect({"a": HostInfo(name="a", incarnation=2, address=address)})
    assert_ones(collect(transport, [under_way])[under_way])
    assert_ones(ask(transport, "a", make_shipment({FIRST: 2}), soon()))


@pytest.mark.parametrize("nonsense", [encode_host_hello("a", 1, 1 << 20), b"", b"\xff" * 9], ids=["hello", "", "ff"])
def test_a_host_that_talks_nonsense_loses_its_link(scripted: Callable[..., str], link: LinkTo, nonsense: bytes) -> None:
    transport = link(scripted(lambda asked: nonsense), reconnect=SLOW)
    wait_linked(transport)
    assert isinstance(ask(transport, "a", make_shipment({FIRST: 2}), soon()), HostLost)
    assert transport.linked() == frozenset()


# Bounds


def test_more_than_a_link_carries_fails_at_once(host: GatedHost, serve: Serve, link: LinkTo) -> None:
    transport = link(serve().address, max_in_flight=2)
    wait_linked(transport)
    host.gate.clear()
    shipment = make_shipment({FIRST: 1})
    carried = [transport.send("a", shipment, soon()) for _ in range(2)]
    assert isinstance(ask(transport, "a", shipment, soon()), DeadlinePassed)
    assert transport.revived() == frozenset()
    host.gate.set()
    for result in collect(transport, carried).values():
        assert_answers(shipment, result)
    assert transport.revived() == {"a"}
    assert_serves(transport)


def test_a_host_that_takes_nothing_does_not_block_its_sender(host: GatedHost, serve: Serve, link: LinkTo) -> None:
    hidden = 4096
    server = serve(terms=make_terms(hidden=hidden))
    transport = link(server.address, make_terms(hidden=hidden))
    wait_linked(transport)
    host.gate.clear()
    # 64 MiB: more than sockets and flow control hold.
    shipment = make_shipment({(9, 9): 128}, hidden=hidden)
    tickets = [transport.send("a", shipment, soon()) for _ in range(32)]
    assert transport.poll(time.monotonic() + 0.05) == []
    assert host.num_computed == 0
    host.gate.set()
    assert len(collect(transport, tickets)) == 32
    assert host.num_computed == 32


@pytest.mark.parametrize(("router_bytes", "host_bytes"), [(4096, 1 << 20), (1 << 20, 4096)])
def test_a_message_over_either_limit_is_not_sent(
    serve: Serve, link: LinkTo, router_bytes: int, host_bytes: int
) -> None:
    transport = link(serve(max_message_bytes=host_bytes).address, max_message_bytes=router_bytes)
    wait_linked(transport)
    result = ask(transport, "a", make_shipment({FIRST: 128}), soon())
    assert isinstance(result, BadFrame) and "4096 are allowed" in str(result)
    assert transport.linked() == {"a"}
    shipment = make_shipment({FIRST: 100})
    assert_answers(shipment, ask(transport, "a", shipment, soon()))


def test_messages_over_the_default_of_grpc_pass_both_ways(serve: Serve, link: LinkTo) -> None:
    class Mirror(GatedHost):
        def compute(self, shipment: Shipment) -> torch.Tensor:
            return shipment.rows_TH

    terms = make_terms(hidden=1024)
    transport = link(serve(host=Mirror("a"), terms=terms).address, terms)
    wait_linked(transport)
    shipment = make_shipment({FIRST: 2000}, hidden=1024)
    assert shipment.rows_TH.nbytes > 4 << 20
    result = ask(transport, "a", shipment, soon())
    assert isinstance(result, torch.Tensor) and torch.equal(result, shipment.rows_TH)


def test_streams_beyond_the_bound_wait_for_a_place(serve: Serve, link: LinkTo) -> None:
    server = serve(max_streams=2)
    first, second = link(server.address), link(server.address)
    wait_linked(first)
    wait_linked(second)
    third = link(server.address)
    assert_serves(first)
    assert third.linked() == frozenset()
    assert server.num_links == 2
    first.close()
    wait_linked(third)
    assert_serves(third)
    assert_serves(second)


# Ports, stopping, threads


def test_a_taken_port_is_an_error_and_a_range_is_searched(serve: Serve) -> None:
    with socket.socket() as taken:
        taken.bind((LOCALHOST, 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(InvalidInput, match=f"must be free at address {LOCALHOST}.*'{port}-{port}'"):
            serve(ports=range(port, port + 1))
        server = serve(ports=range(port, port + 20))
    assert port < server.port < port + 20
    assert server.address == f"{LOCALHOST}:{server.port}"
    with pytest.raises(InvalidInput):
        serve(ports=range(server.port, server.port + 1))


def test_stopping_lets_the_current_answer_out(host: GatedHost, serve: Serve, link: LinkTo) -> None:
    server = serve()
    transport = link(server.address)
    wait_linked(transport)
    host.gate.clear()
    shipment = make_shipment({FIRST: 1})
    ticket = transport.send("a", shipment, soon())
    wait_until(lambda: server.is_busy, "the computation")
    assert server.queue_depth == 1
    stopping = threading.Thread(target=server.stop, args=(PATIENCE_S,))
    stopping.start()
    stopping.join(0.1)
    assert stopping.is_alive()
    host.gate.set()
    assert_answers(shipment, collect(transport, [ticket])[ticket])
    stopping.join(PATIENCE_S)
    assert not stopping.is_alive()
    wait_until(lambda: not transport.linked(), "the end of the link")


def test_stopping_does_not_wait_longer_than_its_grace(host: GatedHost, serve: Serve, link: LinkTo) -> None:
    server = serve()
    transport = link(server.address)
    wait_linked(transport)
    host.gate.clear()
    ticket = transport.send("a", make_shipment({FIRST: 1}), soon())
    wait_until(lambda: server.is_busy, "the computation")
    server.stop(grace=0.01)
    assert isinstance(collect(transport, [ticket])[ticket], HostLost)


def test_a_failing_listener_does_not_end_the_link(serve: Serve, link: LinkTo) -> None:
    def explode() -> None:
        raise RuntimeError("the event loop is closed")

    server = serve()
    transport = link(server.address, on_change=explode)
    wait_linked(transport)
    assert_serves(transport)
    server.stop(grace=0)
    wait_until(lambda: not transport.linked(), "the end of the link")
    serve(ports=range(server.port, server.port + 1))
    wait_linked(transport)
    assert_serves(transport)


def test_closing_leaves_no_threads(serve: Serve, link: LinkTo) -> None:
    before = set(threading.enumerate())
    server = serve()
    unreachable = link(f"{LOCALHOST}:1")
    transports = [link(server.address) for _ in range(3)]
    for transport in transports:
        wait_linked(transport)
        assert_serves(transport)
    for transport in [*transports, unreachable]:
        transport.close()
    links = [thread.name for thread in set(threading.enumerate()) - before if thread.name.startswith("link-")]
    assert links == []
    server.stop(grace=0)
    wait_until(lambda: set(threading.enumerate()) <= before, "the end of all threads")
