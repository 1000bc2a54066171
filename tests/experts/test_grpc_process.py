"""Hosts in processes of their own, killed and stopped as the operating system does it."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from expert_hosts import ask, assert_answers, collect, make_shipment, make_terms, soon, wait_until
from host_process import HostProcess

from experts.errors import DeadlinePassed, HostLost
from experts.transport import grpc_link
from experts.transport.grpc_client import GrpcTransport
from experts.transport.grpc_link import Reconnect

FIRST = (1, 0)


@pytest.fixture
def transport() -> Iterator[GrpcTransport]:
    fast = Reconnect(first_s=0.01, longest_s=0.05)
    transport = GrpcTransport(router_name="router", terms=make_terms(), reconnect=fast)
    yield transport
    transport.close()


def wait_linked(transport: GrpcTransport, *names: str) -> None:
    wait_until(lambda: transport.linked() == set(names), f"links to {names}")


def assert_serves(transport: GrpcTransport, name: str) -> None:
    shipment = make_shipment({FIRST: 2})
    assert_answers(shipment, ask(transport, name, shipment, soon()))


def test_a_killed_host_is_lost_at_once_and_linked_again_when_it_returns(transport: GrpcTransport) -> None:
    with HostProcess("a", [FIRST]) as doomed, HostProcess("b", [FIRST]) as other:
        transport.connect({"a": doomed.info, "b": other.info})
        wait_linked(transport, "a", "b")
        assert_serves(transport, "a")
        # Stopped first, so that the shipments are surely unanswered when it dies.
        doomed.stop()
        deadline = soon()
        tickets = [transport.send("a", make_shipment({FIRST: 1}), deadline) for _ in range(3)]
        doomed.kill()
        for result in collect(transport, tickets).values():
            assert isinstance(result, HostLost)
        assert time.monotonic() < deadline
        wait_linked(transport, "b")
        assert_serves(transport, "b")
        with HostProcess("a", [FIRST], incarnation=2, port=doomed.port):
            wait_linked(transport, "a", "b")
            assert_serves(transport, "a")


def test_a_stopped_host_misses_deadlines_and_is_welcome_when_it_goes_on(transport: GrpcTransport) -> None:
    with HostProcess("a", [FIRST]) as stopped, HostProcess("b", [FIRST]) as other:
        transport.connect({"a": stopped.info, "b": other.info})
        wait_linked(transport, "a", "b")
        stopped.stop()
        deadline = time.monotonic() + 0.2
        tickets = [transport.send("a", make_shipment({FIRST: 1}), deadline) for _ in range(3)]
        tickets.append(transport.send("a", make_shipment({FIRST: 1}), 0.0))
        for result in collect(transport, tickets).values():
            assert isinstance(result, DeadlinePassed)
        assert time.monotonic() >= deadline
        assert transport.linked() == {"a", "b"}
        assert transport.revived() == frozenset()
        assert_serves(transport, "b")
        stopped.resume()
        wait_until(lambda: "a" in transport.revived(), "the late answers")
        assert_serves(transport, "a")


def test_a_connection_that_brings_nothing_is_made_anew(
    monkeypatch: pytest.MonkeyPatch, transport: GrpcTransport
) -> None:
    """Damage on the way can leave one that neither works nor ends; a stopped host looks the same."""
    monkeypatch.setattr(grpc_link, "STALE_S", 0.2)
    monkeypatch.setattr(grpc_link, "HELLO_S", 0.2)
    with HostProcess("a", [FIRST]) as stopped:
        transport.connect({"a": stopped.info})
        wait_linked(transport, "a")
        assert_serves(transport, "a")
        stopped.stop()
        waiting = transport.send("a", make_shipment({FIRST: 1}), soon())
        expiring = transport.send("a", make_shipment({FIRST: 1}), time.monotonic() + 0.3)
        results = collect(transport, [waiting, expiring])
        assert isinstance(results[expiring], DeadlinePassed)
        assert isinstance(results[waiting], HostLost), "the connection is gone, and what it owed with it"
        assert transport.linked() == frozenset()
        stopped.resume()
        wait_linked(transport, "a")
        assert_serves(transport, "a")


def test_a_silence_is_counted_from_the_first_question(
    monkeypatch: pytest.MonkeyPatch, transport: GrpcTransport
) -> None:
    monkeypatch.setattr(grpc_link, "STALE_S", 0.2)
    with HostProcess("a", [FIRST]) as host:
        transport.connect({"a": host.info})
        wait_linked(transport, "a")
        assert_serves(transport, "a")
        time.sleep(0.3)
        ticket = transport.send("a", make_shipment({FIRST: 1}), time.monotonic())
        assert isinstance(collect(transport, [ticket])[ticket], DeadlinePassed)
        assert transport.linked() == {"a"}
        assert_serves(transport, "a")
