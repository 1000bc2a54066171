"""The measuring tools measure something: every trip is made and timed, a failed one is an error."""

from __future__ import annotations

import pytest
from expert_hosts import make_host, make_shipment
from transport_rigs import LOCALHOST

from experts.errors import NotHosted
from experts.placement import HostInfo
from experts.transport.grpc_echo import EchoServer, echo_round_trips, shipment_round_trips
from experts.transport.local import LocalTransport


def test_echoes_are_timed() -> None:
    server = EchoServer(LOCALHOST)
    try:
        seconds = echo_round_trips(server.address, b"rows" * 1000, num=5, num_warm_up=1)
    finally:
        server.stop()
    assert len(seconds) == 5 and min(seconds) > 0


def test_shipments_are_timed_and_must_succeed() -> None:
    host = make_host("a", [(1, 0)])
    transport = LocalTransport({"a": host})
    transport.connect({"a": HostInfo(name="a", incarnation=1, address="")})
    seconds = shipment_round_trips(transport, "a", make_shipment({(1, 0): 2}), num=5, num_warm_up=1)
    assert len(seconds) == 5 and min(seconds) > 0
    assert host.num_computed == 6
    with pytest.raises(NotHosted):
        shipment_round_trips(transport, "a", make_shipment({(1, 1): 2}), num=5)
