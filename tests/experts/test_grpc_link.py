"""What only the gRPC transport has: hellos, frames from strangers, bounded queues, ports, threads that end."""

from __future__ import annotations

import pickle
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
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

from experts.errors import BadFrame, DeadlinePassed, HostLost, InvalidInput
from experts.link_terms import LinkTerms
from experts.placement import HostInfo
from experts.transport.base import Shipment
from experts.transport.grpc_client import GrpcTransport
from experts.transport.grpc_link import Reconnect
from experts.transport.grpc_server import ExpertHostServer, serve_expert_host
from experts.wire.codec import encode_hello, encode_host_hello, encode_result, encode_shipment
from experts.wire.expert_pb2 import Error, ExchangeRequest, ExchangeResponse
from experts.wire.expert_pb2_grpc import ExpertHostServiceStub

FIRST = (1, 0)
LOCALHOST = "127.0.0.1"
FAST = Reconnect(first_s=0.01, longest_s=0.05, refused_s=0.05)
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
        self._frames: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        exchange = self._channel.stream_stream(EXCHANGE, None, ExchangeResponse.FromString)
        self._answers = exchange(iter(self._frames.get, None), timeout=PATIENCE_S)

    def send(self, *frames: ExchangeRequest | bytes) -> None:
        for frame in frames:
            self._frames.put(frame if isinstance(frame, bytes) else frame.SerializeToString())

    def answer(self) -> ExchangeResponse | None:
        """The next answer; None at the end of the stream, which must come by itself."""
        try:
            answer: ExchangeResponse | None = next(self._answers, None)
        except grpc.RpcError as error:
            assert error.code() is not grpc.StatusCode.DEADLINE_EXCEEDED
            return None
        return answer

    def close(self) -> None:
        self._frames.put(None)
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


def frame_of(seq: int, rows: bytes | None = None, **changes: Any) -> ExchangeRequest:
    request = ExchangeRequest.FromString(encode_shipment(seq, make_shipment({FIRST: 2}), 10.0))
    if rows is not None:
        request.rows = rows
    for name, value in changes.items():
        setattr(request.shipment, name, value)
    return request


def test_the_first_message_must_be_a_hello(stranger: Callable[[], Stranger]) -> None:
    for first in (frame_of(1), ExchangeRequest(), b""):
        one = stranger()
        one.send(first)
        answer = one.answer()
        assert answer is not None and answer.error.kind == Error.KIND_BAD_FRAME
        assert "must be a hello" in answer.error.message
        assert one.answer() is None


def test_a_second_hello_ends_the_stream(stranger: Callable[[], Stranger]) -> None:
    one = stranger()
    one.send(HELLO, HELLO)
    first, second = one.answer(), one.answer()
    assert first is not None and first.hello.host_name == "a"
    assert second is not None and second.error.kind == Error.KIND_BAD_FRAME
    assert one.answer() is None


def test_a_bad_shipment_is_answered_by_its_number_and_the_stream_goes_on(
    host: GatedHost, stranger: Callable[[], Stranger]
) -> None:
    one = stranger()
    one.send(HELLO, frame_of(7, rows=b"short"), frame_of(8, num_rows=2**32 - 1), frame_of(9))
    assert one.answer() is not None
    for seq in (7, 8):
        answer = one.answer()
        assert answer is not None
        assert (answer.error.seq, answer.error.kind) == (seq, Error.KIND_BAD_FRAME)
    answer = one.answer()
    assert answer is not None and (answer.result.seq, answer.result.num_rows) == (9, 2)
    assert host.num_computed == 1


def test_a_shipment_that_comes_too_late_is_not_computed(host: GatedHost, stranger: Callable[[], Stranger]) -> None:
    one = stranger()
    one.send(HELLO, frame_of(7, deadline_ms=0))
    assert one.answer() is not None
    answer = one.answer()
    assert answer is not None and (answer.error.seq, answer.error.kind) == (7, Error.KIND_EXPIRED)
    assert host.num_computed == 0


def test_unreadable_frames_end_their_stream_only(stranger: Callable[[], Stranger]) -> None:
    frames = [b"\xff" * 40, pickle.dumps({"rows": [1, 2, 3]}), b"\x12\x05abc", bytes(1000)]

    @settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(st.one_of(st.sampled_from(frames), st.binary(min_size=1, max_size=60)))
    def send(frame: bytes) -> None:
        one = stranger()
        one.send(HELLO, frame)
        assert one.answer() is not None
        answer = one.answer()
        assert answer is not None and answer.error.kind in (Error.KIND_BAD_FRAME, Error.KIND_EXPIRED)
        one.close()

    send()
    friend = stranger()
    friend.send(HELLO, frame_of(1))
    assert friend.answer() is not None
    answer = friend.answer()
    assert answer is not None and answer.result.num_rows == 2


# Hosts that break the protocol: a scripted one


@pytest.fixture
def scripted() -> Iterator[Callable[..., str]]:
    servers = []

    def start(*answers: Callable[[int], bytes]) -> str:
        """A host that answers its n-th shipment with what the n-th function makes of its number."""

        def exchange(requests: Iterator[ExchangeRequest], _context: object) -> Iterator[bytes]:
            next(requests)
            yield encode_host_hello("a", 1, 1 << 20)
            for request, answer in zip(requests, answers, strict=False):
                yield answer(request.shipment.seq)

        handler = grpc.stream_stream_rpc_method_handler(exchange, ExchangeRequest.FromString)
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


def test_an_answer_of_the_wrong_shape_is_a_bad_frame(scripted: Callable[..., str], link: LinkTo) -> None:
    transport = link(
        scripted(
            lambda seq: encode_result(seq, torch.zeros(3, HIDDEN)),
            lambda seq: encode_result(seq, torch.zeros(2, HIDDEN + 1)),
            lambda seq: encode_result(seq, torch.zeros(2, HIDDEN, dtype=torch.float16)),
            lambda seq: ExchangeResponse(error=Error(seq=seq, kind=Error.KIND_UNSPECIFIED)).SerializeToString(),
            lambda seq: encode_result(seq, torch.ones(2, HIDDEN)),
        )
    )
    wait_linked(transport)
    for _ in range(4):
        assert isinstance(ask(transport, "a", make_shipment({FIRST: 2}), soon()), BadFrame)
    result = ask(transport, "a", make_shipment({FIRST: 2}), soon())
    assert isinstance(result, torch.Tensor) and torch.equal(result, torch.ones(2, HIDDEN))


def test_an_answer_that_nobody_asked_for_is_dropped(scripted: Callable[..., str], link: LinkTo) -> None:
    transport = link(
        scripted(
            lambda seq: encode_result(seq + 1000, torch.zeros(2, HIDDEN)),
            lambda seq: encode_result(seq, torch.ones(2, HIDDEN)),
        )
    )
    wait_linked(transport)
    unanswered = transport.send("a", make_shipment({FIRST: 2}), time.monotonic() + 0.2)
    answered = transport.send("a", make_shipment({FIRST: 2}), soon())
    results = collect(transport, [unanswered, answered])
    assert isinstance(results[unanswered], DeadlinePassed)
    assert isinstance(results[answered], torch.Tensor)


@pytest.mark.parametrize("nonsense", [encode_host_hello("a", 1, 1 << 20), b"", b"\xff" * 9], ids=["hello", "", "ff"])
def test_a_host_that_talks_nonsense_loses_its_link(scripted: Callable[..., str], link: LinkTo, nonsense: bytes) -> None:
    transport = link(scripted(lambda seq: nonsense), reconnect=NEVER_AGAIN)
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


def test_the_stock_stub_is_understood(serve: Serve) -> None:
    with grpc.insecure_channel(serve().address) as channel:
        requests = [ExchangeRequest.FromString(HELLO), frame_of(3)]
        hello, answer = ExpertHostServiceStub(channel).Exchange(iter(requests))
    assert (hello.hello.host_name, answer.result.seq, len(answer.rows)) == ("a", 3, 2 * HIDDEN * 4)


def test_stopping_lets_the_current_answer_out(host: GatedHost, serve: Serve, link: LinkTo) -> None:
    server = serve()
    transport = link(server.address)
    wait_linked(transport)
    host.gate.clear()
    shipment = make_shipment({FIRST: 1})
    ticket = transport.send("a", shipment, soon())
    wait_until(lambda: server.is_busy, "the computation")
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
