"""What every transport owes its caller, tried on each of them."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator

import pytest
import torch
from expert_hosts import HIDDEN, ask, assert_answers, collect, make_shipment, soon
from transport_rigs import GrpcRig, LocalRig, Rig, VirtualRig

from experts.errors import DeadlinePassed, HostFailed, HostLost, NotHosted
from experts.ffn import ExpertWeights
from experts.placement import ExpertKey

FIRST, SECOND, THIRD, BROKEN = (1, 0), (1, 1), (3, 0), (5, 5)
KEYS: dict[str, list[ExpertKey]] = {"a": [FIRST, SECOND], "b": [SECOND, THIRD]}
RigMaker = Callable[..., Rig]


@pytest.fixture(params=[LocalRig, GrpcRig, VirtualRig], ids=["local", "grpc", "virtual"])
def make_rig(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[RigMaker]:
    rigs: list[Rig] = []

    def make(dtype: torch.dtype = torch.float32) -> Rig:
        rig: Rig = request.param(KEYS, dtype)
        rigs.append(rig)
        if isinstance(rig, VirtualRig):
            monkeypatch.setattr("expert_hosts.time", rig.time)
            monkeypatch.setattr(sys.modules[__name__], "time", rig.time)
        rig.begin()
        return rig

    yield make
    for rig in rigs:
        rig.end()


@pytest.fixture
def rig(make_rig: RigMaker) -> Rig:
    return make_rig()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_row_order_shape_and_dtype_are_kept(make_rig: RigMaker, dtype: torch.dtype) -> None:
    rig = make_rig(dtype)
    shipment = make_shipment({SECOND: 3, FIRST: 1}, dtype)
    assert_answers(shipment, ask(rig.transport, "a", shipment, soon()))


def test_a_shipment_of_no_rows_has_an_answer_of_no_rows(rig: Rig) -> None:
    result = ask(rig.transport, "a", make_shipment({}), soon())
    assert isinstance(result, torch.Tensor) and result.shape == (0, HIDDEN)


def test_each_ticket_gets_its_own_result_once(rig: Rig) -> None:
    shipments = {}
    for number in range(40):
        host = "ab"[number % 2]
        key = KEYS[host][number % 3 == 0]
        shipment = make_shipment({key: 1 + number % 7}, seed=number)
        shipments[rig.transport.send(host, shipment, soon())] = shipment
    assert len(shipments) == 40
    for ticket, result in collect(rig.transport, shipments).items():
        assert_answers(shipments[ticket], result)
    assert rig.transport.poll(time.monotonic() + 0.05) == []


def test_poll_is_empty_only_once_its_time_is_over(rig: Rig) -> None:
    rig.stall("a")
    rig.transport.send("a", make_shipment({FIRST: 1}), soon())
    assert rig.transport.poll(0.0) == []
    until = time.monotonic() + 0.1
    assert rig.transport.poll(until) == []
    assert time.monotonic() >= until


def test_repeating_a_shipment_repeats_the_answer(rig: Rig) -> None:
    shipment = make_shipment({SECOND: 5})
    tickets = [rig.transport.send(host, shipment, soon()) for host in ("a", "b", "a")]
    first, *others = collect(rig.transport, tickets).values()
    assert_answers(shipment, first)
    assert isinstance(first, torch.Tensor)
    for other in others:
        assert isinstance(other, torch.Tensor) and torch.equal(first, other)


def test_missing_experts_are_named_and_nothing_is_computed(rig: Rig) -> None:
    result = ask(rig.transport, "a", make_shipment({FIRST: 1, THIRD: 2, (7, 7): 1}), soon())
    assert isinstance(result, NotHosted)
    assert (result.host, result.missing) == ("a", {THIRD, (7, 7)})
    assert rig.hosts["a"].rows_total == 0


def test_an_evicted_expert_is_missing_and_a_loaded_one_is_not(rig: Rig) -> None:
    rig.hosts["a"].evict(FIRST)
    rig.hosts["a"].load(THIRD)
    assert isinstance(ask(rig.transport, "a", make_shipment({FIRST: 1}), soon()), NotHosted)
    shipment = make_shipment({THIRD: 2})
    assert_answers(shipment, ask(rig.transport, "a", shipment, soon()))


def test_a_failed_computation_is_an_error_without_details(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def explode(weights: ExpertWeights, x_TH: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("secret path /weights")

    with monkeypatch.context() as patched:
        patched.setattr("experts.arithmetic.expert_ffn", explode)
        result = ask(rig.transport, "a", make_shipment({FIRST: 1}), soon())
    assert isinstance(result, HostFailed)
    assert "secret" not in str(result) and "secret" in caplog.text
    shipment = make_shipment({FIRST: 1})
    assert_answers(shipment, ask(rig.transport, "a", shipment, soon()))


def test_an_unknown_host_is_lost(rig: Rig) -> None:
    result = ask(rig.transport, "nobody", make_shipment({FIRST: 1}), soon())
    assert isinstance(result, HostLost) and result.host == "nobody"


def test_a_stalled_host_costs_only_its_own_deadline(rig: Rig) -> None:
    rig.stall("a")
    stalled_shipment = make_shipment({FIRST: 1})
    stalled = rig.transport.send("a", stalled_shipment, soon())
    shipment = make_shipment({THIRD: 4})
    assert_answers(shipment, ask(rig.transport, "b", shipment, soon()))
    deadline = time.monotonic() + 0.1
    result = ask(rig.transport, "a", make_shipment({FIRST: 1}), deadline)
    assert time.monotonic() >= deadline
    assert isinstance(result, DeadlinePassed) and result.host == "a"
    assert rig.transport.linked() == {"a", "b"}
    rig.resume("a")
    assert_answers(stalled_shipment, collect(rig.transport, [stalled])[stalled])


def test_deadlines_pass_in_their_own_order(rig: Rig) -> None:
    rig.stall("a")
    now = time.monotonic()
    later, sooner, past = (
        rig.transport.send("a", make_shipment({FIRST: 1}), now + wait_s) for wait_s in (0.2, 0.1, -1.0)
    )
    order = []
    while len(order) < 3:
        for ticket, result in rig.transport.poll(soon()):
            assert isinstance(result, DeadlinePassed)
            order.append(ticket)
    assert order == [past, sooner, later]


def test_a_late_answer_is_dropped_and_tells_that_the_host_lives(rig: Rig) -> None:
    rig.stall("a")
    result = ask(rig.transport, "a", make_shipment({FIRST: 1}), time.monotonic() + 0.05)
    assert isinstance(result, DeadlinePassed)
    assert rig.transport.revived() == frozenset()
    rig.resume("a")
    give_up = soon()
    revived: frozenset[str] = frozenset()
    while not revived:
        assert time.monotonic() < give_up
        revived = rig.transport.revived()
    assert revived == {"a"}
    assert rig.transport.poll(time.monotonic() + 0.05) == []
    assert rig.transport.revived() == frozenset()
    shipment = make_shipment({FIRST: 1})
    assert_answers(shipment, ask(rig.transport, "a", shipment, soon()))
    assert rig.transport.revived() == frozenset()


def test_the_end_of_a_link_ends_the_silence_of_its_host(rig: Rig) -> None:
    """Between two looks a link may end and form anew: nothing else would tell that the host is well."""
    rig.stall("a")
    assert isinstance(ask(rig.transport, "a", make_shipment({FIRST: 1}), time.monotonic() + 0.05), DeadlinePassed)
    assert rig.transport.revived() == frozenset()
    rig.kill("a")
    rig.wait_linked("b")
    rig.restart("a")
    rig.wait_linked("a", "b")
    assert rig.transport.revived() == {"a"}
    assert rig.transport.revived() == frozenset()


def test_the_end_of_a_link_fails_what_is_on_it_at_once(rig: Rig) -> None:
    rig.stall("a")
    deadline = soon()
    tickets = [rig.transport.send("a", make_shipment({FIRST: 1}), deadline) for _ in range(3)]
    changes = rig.changes
    rig.kill("a")
    for result in collect(rig.transport, tickets).values():
        assert isinstance(result, HostLost) and result.host == "a"
    assert time.monotonic() < deadline
    rig.wait_linked("b")
    assert rig.changes > changes
    assert isinstance(ask(rig.transport, "a", make_shipment({FIRST: 1}), soon()), HostLost)
    shipment = make_shipment({SECOND: 2})
    assert_answers(shipment, ask(rig.transport, "b", shipment, soon()))


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_restarted_host_is_linked_again(rig: Rig, elsewhere: bool) -> None:
    for _ in range(2):
        rig.kill("a")
        rig.wait_linked("b")
        changes = rig.changes
        rig.restart("a", elsewhere=elsewhere)
        if elsewhere:
            rig.transport.connect(rig.infos)
        rig.wait_linked("a", "b")
        assert rig.changes > changes
        shipment = make_shipment({FIRST: 2})
        assert_answers(shipment, ask(rig.transport, "a", shipment, soon()))


def test_connect_drops_links_that_are_wanted_no_more(rig: Rig) -> None:
    rig.stall("a")
    ticket = rig.transport.send("a", make_shipment({FIRST: 1}), soon())
    only_b = {"b": rig.infos["b"]}
    rig.transport.connect(only_b)
    assert rig.transport.linked() == {"b"}
    assert isinstance(collect(rig.transport, [ticket])[ticket], HostLost)
    rig.resume("a")
    shipment = make_shipment({SECOND: 2})
    assert_answers(shipment, ask(rig.transport, "b", shipment, soon()))
    rig.transport.connect(rig.infos)
    rig.wait_linked("a", "b")
    assert_answers(shipment, ask(rig.transport, "a", shipment, soon()))


def test_connecting_to_the_same_hosts_leaves_their_links_alone(rig: Rig) -> None:
    rig.stall("a")
    shipment = make_shipment({FIRST: 1})
    ticket = rig.transport.send("a", shipment, soon())
    changes = rig.changes
    rig.transport.connect(dict(rig.infos))
    assert (rig.transport.linked(), rig.changes) == ({"a", "b"}, changes)
    rig.resume("a")
    assert_answers(shipment, collect(rig.transport, [ticket])[ticket])


def test_a_closed_transport_has_no_links(rig: Rig) -> None:
    rig.transport.close()
    assert rig.transport.linked() == frozenset()
    rig.transport.close()
