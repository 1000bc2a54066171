"""The failover machine among scripted hosts, in virtual time: every sentence of what it promises, as an example."""

from __future__ import annotations

from itertools import pairwise

import pytest
from failover_world import COST, ON_TIME_S, World

from experts.placement import ComputeCost
from router.failover.budget import HedgeBudget
from router.failover.events import Answered, HostState, Reason, Send
from router.failover.health import FENCE_S, FIRST_BACKOFF_S
from router.failover.state import Policy
from router.failover.usual import ENOUGH, WINDOW, Usual

E0, E1, E2, E3 = (0, 0), (0, 1), (0, 2), (0, 3)
FLOOR_S = Policy().floor_s
PAIR = {E0: "ab", E1: "ab"}
"""Two experts on two hosts, a replica on each: every dispatch asks both hosts for one expert."""
BOTH = {E0: 1, E1: 1}


def warm(replicas: dict[tuple[int, int], str] = PAIR, times: int = 2 * WINDOW) -> World:
    """Hosts whose usual answers are known."""
    world = World(replicas)
    world.run(dict.fromkeys(replicas, 1), times)
    world.sent.clear()
    return world


def hosts_of(sends: list[Send]) -> list[str]:
    return [send.host for send in sends]


# ---- where rows go


def test_rows_of_one_host_travel_in_one_shipment_with_one_deadline_for_all() -> None:
    world = World({E0: "a", E1: "b", E2: "a"}, Policy(base_s=1.0, per_row_s=0.5))
    world.dispatch({E0: 2, E1: 1, E2: 3})
    assert [(send.host, [part.key for part in send.parts]) for send in world.sent] == [("a", [E0, E2]), ("b", [E1])]
    assert {send.deadline for send in world.sent} == {100.0 + 1.0 + 0.5 * 6}


def test_an_expert_nobody_serves_is_lost_at_once_and_the_others_go() -> None:
    world = World({E0: "a", E1: "b"})
    world.kill("b")
    layer = world.dispatch({E0: 1, E1: 1})
    assert layer.lost_keys == {E1}
    assert layer.took_s == pytest.approx(ON_TIME_S)


def test_many_rows_of_one_expert_are_cut_and_few_are_not() -> None:
    world = World({E0: "ab"})
    world.dispatch({E0: 4})
    assert len(world.sent) == 1
    world.sent.clear()
    world.dispatch({E0: 1000})
    assert sorted(hosts_of(world.sent)) == ["a", "b"]
    assert sum(part.stop - part.start for send in world.sent for part in send.parts) == 1000


def test_a_host_that_says_it_is_slower_gets_fewer_rows() -> None:
    world = World({E0: "ab"})
    world.view(costs={"a": COST, "b": ComputeCost(per_expert_s=4e-4, per_row_s=4e-5)})
    world.dispatch({E0: 1000})
    rows = {send.host: sum(part.stop - part.start for part in send.parts) for send in world.sent}
    assert rows["a"] > 2 * rows["b"] > 0


def test_a_host_that_proves_slower_gets_fewer_rows() -> None:
    world = World({E0: "ab"})
    world.hosts["b"].latency_s = 3 * ON_TIME_S
    world.run({E0: 1000}, 100)
    rows = {send.host: sum(part.stop - part.start for part in send.parts) for send in world.sent[-2:]}
    assert rows.get("a", 0) > 1.5 * rows.get("b", 0)


def test_what_one_step_begins_under_a_placement_it_ends_under() -> None:
    world = World({E0: "a", E1: "a"})
    world.hosts["b"] = world.hosts["a"].__class__()
    world.view({E0: "b", E1: "b"})
    assert world.dispatch({E0: 1}).lost == {}
    assert hosts_of(world.sent) == ["a"]
    world.begin_step()
    world.dispatch({E1: 1})
    assert hosts_of(world.sent) == ["a", "b"]


def test_rows_that_a_host_does_not_hold_go_to_another_and_what_it_holds_may_stay() -> None:
    world = World({E0: "ab", E1: "a"})
    world.hosts["a"].lacks = frozenset({E0})
    world.hosts["b"].latency_s = None
    world.hosts["b"].is_linked = False
    layer = world.dispatch({E0: 1, E1: 1})
    assert layer.lost_keys == {E0}, "nobody else serves it"
    world.hosts["b"].is_linked = True
    world.hosts["b"].latency_s = ON_TIME_S
    assert not world.dispatch({E0: 1, E1: 1}).lost
    assert world.state.failovers[Reason.NOT_HOSTED] >= 1
    assert world.states()["a"] is HostState.UP, "it answered, and is not to blame"


def test_rows_that_moved_during_a_step_are_found_in_the_newest_placement() -> None:
    world = World({E0: "a"})
    world.hosts["b"] = world.hosts["a"].__class__()
    world.view({E0: "b"})
    world.hosts["a"].lacks = frozenset({E0})
    assert not world.dispatch({E0: 1}).lost
    assert hosts_of(world.sent) == ["a", "b"]


# ---- the link ends


def test_a_dead_hosts_shipments_go_to_another_replica_at_once() -> None:
    world = World(PAIR)
    number = world.begin(BOTH)
    began = world.now
    world.kill("a")
    world.finish(number)
    assert not world.layers[number].lost
    assert world.now - began <= 2 * ON_TIME_S
    assert world.states()["a"] is HostState.DEAD
    assert world.state.failovers == {Reason.LOST: 1}
    assert hosts_of(world.sent).count("b") == 2
    world.sent.clear()
    world.dispatch(BOTH)
    assert hosts_of(world.sent) == ["b"]


def test_two_hosts_that_die_at_once_send_nothing_to_each_other() -> None:
    world = World({E0: "abc", E1: "abc", E2: "abc"})
    number = world.begin({E0: 1, E1: 1, E2: 1})
    assert sorted(hosts_of(world.sent)) == ["a", "b", "c"]
    world.kill("a")
    world.kill("b")
    world.finish(number)
    assert not world.layers[number].lost
    assert set(hosts_of(world.sent)[3:]) == {"c"}


def test_a_dead_only_replica_loses_its_rows_at_once_and_they_are_available_again_when_it_serves() -> None:
    world = World({E0: "a", E1: "b"})
    number = world.begin({E0: 1, E1: 1})
    world.kill("a")
    world.finish(number)
    assert world.layers[number].lost_keys == {E0}
    assert not world.available(E0)
    assert world.available(E1)
    world.restart("a")
    assert world.available(E0)
    assert not world.dispatch({E0: 1, E1: 1}).lost


def test_answers_of_an_earlier_life_are_dropped() -> None:
    world = World(PAIR)
    number = world.begin(BOTH)
    [old] = [send.shipment for send in world.sent if send.host == "a"]
    world.hosts["a"].incarnation += 1
    world.view()
    world.decide(Answered(shipment=old))
    assert world.state.late_answers == 1
    world.finish(number)
    assert not world.layers[number].lost


def test_an_answer_that_comes_twice_counts_once() -> None:
    world = World(PAIR)
    number = world.begin(BOTH)
    world.finish(number)
    for send in world.sent:
        world.decide(Answered(shipment=send.shipment))
    assert world.state.late_answers == 2


def test_a_link_that_flaps_is_tried_less_and_less_often() -> None:
    world = warm()
    pauses = []
    for _ in range(5):
        world.kill("a")
        world.dispatch(BOTH)
        down = world.now
        world.hosts["a"].is_linked = True
        asked = len(world.probed)
        while len(world.probed) == asked:
            world.idle(0.1)
        pauses.append(world.now - down)
    assert pauses == sorted(pauses)
    assert pauses[-1] > 4 * pauses[1]


# ---- an answer is late


def test_what_is_late_is_asked_of_another_replica_and_the_first_answer_counts() -> None:
    world = warm()
    world.hang("a")
    layer = world.dispatch(BOTH)
    assert not layer.lost
    assert layer.took_s == pytest.approx(FLOOR_S + ON_TIME_S, abs=1e-3)
    assert world.states()["a"] is HostState.SUSPECT
    assert world.state.hedges == {"won": 1}
    world.sent.clear()
    assert world.dispatch(BOTH).took_s == pytest.approx(ON_TIME_S)
    assert hosts_of(world.sent) == ["b"], "a suspect gets nothing while there is another"


def test_a_late_answer_that_comes_before_the_hedges_counts_and_the_hedges_is_dropped() -> None:
    world = warm()
    world.hosts["b"].latency_s = 0.015
    world.hosts["a"].latency_s = FLOOR_S + 0.005
    number = world.begin({E0: 1})
    first = world.sent[0].host
    world.hosts[first].latency_s = FLOOR_S + 0.005
    world.finish(number)
    world.idle(0.1)
    assert sum(world.state.hedges.values()) <= 1
    assert set(world.states().values()) == {HostState.UP}


def test_patience_is_three_times_what_is_usual_for_so_much_work() -> None:
    world = World(PAIR)
    for host in world.hosts.values():
        host.latency_s = 0.030
    world.run(BOTH, 2 * WINDOW)
    world.hang("a")
    assert world.dispatch(BOTH).took_s == pytest.approx(0.090 + 0.030, rel=0.05)


def test_more_work_gets_more_patience() -> None:
    world = warm()
    link = world.state.links["a"]
    few, many = COST.of(1, 1), COST.of(8, 20_000)
    assert link.patience_s(link.way_s + few, FLOOR_S) == FLOOR_S
    assert link.patience_s(link.way_s + many, FLOOR_S) > 0.3


def test_at_most_every_tenth_shipment_is_hedged() -> None:
    world = warm({E0: "ab", E1: "bc", E2: "ca"})
    rows = {E0: 1, E1: 1, E2: 1}
    for number in range(300):
        if number % 25 == 0:
            world.hang("abc"[number % 3])
        world.dispatch(rows)
        for name in "abc":
            world.wake(name)
        world.idle(0.05)
    hedges = sum(count for outcome, count in world.state.hedges.items() if outcome != "denied")
    firsts = sum(send.is_first for send in world.sent)
    assert 0 < hedges <= 0.1 * firsts


def test_the_budget_of_hedges_pays_for_all_of_a_shipment_or_for_nothing() -> None:
    budget = HedgeBudget()
    budget.earn(19)
    assert not budget.spend(2)
    assert budget.spend(1)
    assert not budget.spend(1)
    budget.earn(1)
    assert budget.spend(1)


# ---- several are late


def test_a_hung_host_is_fenced_and_its_shipments_are_sent_elsewhere_without_a_budget() -> None:
    world = warm()
    while world.state.budget.spend(1):
        pass
    world.hang("a")
    layer = world.dispatch(BOTH)
    assert world.state.hedges["denied"] == 1
    assert not layer.lost
    assert layer.took_s == pytest.approx(FENCE_S + ON_TIME_S, abs=5e-3)
    assert world.states()["a"] is HostState.FENCED
    assert world.state.failovers[Reason.FENCED] == 1


def test_a_host_that_answers_a_hundred_times_slower_is_routed_around_within_two_seconds() -> None:
    world = warm({E0: "ab", E1: "bc", E2: "cd", E3: "da"})
    rows = {E0: 1, E1: 1, E2: 1, E3: 1}
    began = world.now
    world.hosts["a"].latency_s = 100 * ON_TIME_S
    while world.states()["a"] is not HostState.FENCED:
        assert world.dispatch(rows).took_s < 0.1
        world.sleep(0.002)
    assert world.now - began < 2.0
    took = [layer.took_s for layer in world.run(rows, 300, pause_s=0.01)]
    assert sum(took) / len(took) < 1.2 * ON_TIME_S
    assert world.states()["a"] is HostState.FENCED


def test_a_host_slow_for_ever_never_becomes_usual() -> None:
    world = warm({E0: "ab", E1: "bc", E2: "ca"})
    world.hosts["a"].latency_s = 100 * ON_TIME_S
    rows = {E0: 1, E1: 1, E2: 1}
    for _ in range(20):
        world.run(rows, 40, pause_s=0.05)
    took = [layer.took_s for layer in world.run(rows, 200, pause_s=0.05)]
    assert sum(took) / len(took) < 1.5 * ON_TIME_S


def test_a_fenced_host_is_probed_with_growing_pauses() -> None:
    world = warm()
    world.hosts["a"].latency_s = world.hosts["a"].probe_latency_s = 0.4
    while world.states()["a"] is not HostState.FENCED:
        world.dispatch(BOTH)
    fenced = world.now
    world.idle(30.0)
    at = [probed - fenced for probed, host in world.probed if host == "a"]
    pauses = [after - before for before, after in zip([0.0, *at], at, strict=False)]
    assert pauses[0] == pytest.approx(FIRST_BACKOFF_S, abs=0.06)
    assert pauses == sorted(pauses)
    assert pauses[-1] > 3.5
    assert not world.sends_to("a", since=-1)


def test_a_host_that_answers_again_returns_with_a_growing_share() -> None:
    world = warm()
    world.hang("a")
    world.dispatch(BOTH)
    world.run(BOTH, 100)
    assert world.states()["a"] is HostState.FENCED
    world.wake("a")
    while world.states()["a"] is HostState.FENCED:
        world.idle(0.05)
    assert world.states()["a"] is HostState.RETURNING
    shares = []
    while world.states()["a"] is HostState.RETURNING:
        since = len(world.sent)
        world.run(BOTH, 8)
        shares.append(len(world.sends_to("a", since)))
    assert shares[0] <= 2
    assert shares == sorted(shares)
    assert len(shares) > 2
    assert world.states()["a"] is HostState.UP


def test_a_returning_host_that_is_late_again_is_fenced_at_once_and_for_longer() -> None:
    world = warm()
    world.hang("a")
    world.dispatch(BOTH)
    world.run(BOTH, 100)
    first_s = world.state.links["a"].backoff_s
    world.wake("a")
    while world.states()["a"] is not HostState.RETURNING:
        world.idle(0.05)
    world.hosts["a"].latency_s = 0.2
    while world.states()["a"] is HostState.RETURNING:
        world.dispatch(BOTH)
    assert world.states()["a"] is HostState.FENCED
    assert world.state.links["a"].backoff_s > first_s


# ---- no other replica


def test_a_slow_only_replica_goes_on_being_used() -> None:
    world = warm({E0: "a", E1: "b"})
    world.hosts["a"].latency_s = 1.0
    for layer in world.run({E0: 1, E1: 1}, 20):
        assert not layer.lost
        assert layer.took_s == pytest.approx(1.0)
    world.hosts["a"].latency_s = ON_TIME_S
    world.run({E0: 1, E1: 1}, 50)
    assert world.states()["a"] is HostState.UP


def test_a_hung_only_replica_is_waited_for_once_and_found_again_when_it_answers() -> None:
    policy = Policy(base_s=2.0, per_row_s=0.0)
    world = World({E0: "a", E1: "b"}, policy)
    world.run({E0: 1, E1: 1}, 50)
    world.hang("a")
    layer = world.dispatch({E0: 1, E1: 1})
    assert layer.lost_keys == {E0}
    assert layer.took_s == pytest.approx(2.0)
    assert world.states()["a"] is HostState.SILENT
    assert not world.available(E0)
    assert world.dispatch({E0: 1, E1: 1}).took_s == pytest.approx(ON_TIME_S), "nobody waits for it a second time"
    world.idle(10.0)
    assert not world.available(E0)
    world.wake("a")
    world.idle(0.05)
    assert world.available(E0)
    assert not world.dispatch({E0: 1}).lost


def test_a_silent_host_is_asked_again_and_again_however_long() -> None:
    world = World({E0: "a"}, Policy(base_s=1.0, per_row_s=0.0))
    world.hang("a")
    world.dispatch({E0: 1})
    world.idle(60.0)
    at = [probed for probed, _ in world.probed]
    assert max(after - before for before, after in pairwise(at)) < 1.2
    world.hosts["a"].latency_s = ON_TIME_S
    world.idle(1.3)
    assert world.available(E0)


def test_when_all_replicas_are_fenced_they_are_used_all_the_same() -> None:
    world = warm()
    for host in world.hosts.values():
        host.latency_s = host.probe_latency_s = 0.5
    layers = world.run(BOTH, 10)
    assert not any(layer.lost for layer in layers)
    assert set(world.states().values()) <= {HostState.FENCED, HostState.SUSPECT}


def test_nothing_is_sent_for_requests_that_have_ended() -> None:
    world = World(PAIR)
    world.begin_step(give_up_at=world.now + 0.05)
    world.hang("a")
    world.hang("b")
    layer = world.dispatch(BOTH)
    assert layer.lost_keys == {E0, E1}
    assert layer.took_s == pytest.approx(0.05)


# ---- the router itself is away


def test_a_router_that_was_stopped_blames_nobody() -> None:
    world = warm()
    number = world.begin(BOTH)
    world._coming = [(at + 30.0, tie, event) for at, tie, event in world._coming]
    for send in world.sent:
        host, _, what = world._on_way[send.shipment]
        world._on_way[send.shipment] = (host, world.now + 60.0, what)
    world.look(world.now + FLOOR_S, late_s=29.99)
    assert set(world.states().values()) == {HostState.UP}
    world.finish(number)
    assert set(world.states().values()) == {HostState.UP}
    assert not world.state.failovers
    assert world.state.links["a"].usual.p99 == pytest.approx(ON_TIME_S / (1e-3 + COST.of(1, 1)), rel=0.01)


def test_a_deadline_that_passed_while_the_router_was_stopped_is_nobodys_fault() -> None:
    world = World({E0: "a"}, Policy(base_s=2.0, per_row_s=0.0))
    number = world.begin({E0: 1})
    world._coming.clear()
    world.look(world.now + FLOOR_S, late_s=30.0)
    world.finish(number)
    assert not world.layers[number].lost, "it is asked again"
    assert len(world.sent) == 2
    assert world.states()["a"] is HostState.UP


def test_a_busy_router_that_looks_late_takes_what_has_come_before_it_judges() -> None:
    world = warm()
    for _ in range(50):
        number = world.begin(BOTH)
        world.sleep(0.5)
        world.finish(number)
    assert not world.state.failovers
    assert not world.state.hedges


def test_a_router_that_always_looks_late_still_finds_a_hung_host() -> None:
    world = warm()
    world.hang("a")
    number = world.begin(BOTH)
    for _ in range(20):
        if number in world.state.dispatches:
            world.look(world.now + FLOOR_S, late_s=0.05)
    assert number not in world.state.dispatches
    assert world.states()["a"] is not HostState.UP


# ---- what is usual


def test_usual_is_the_second_largest_of_a_hundred() -> None:
    usual = Usual()
    for number in range(ENOUGH - 1):
        usual.add(1.0)
        assert usual.p99 is None, number
    usual.add(50.0)
    assert usual.p99 == 1.0, "one odd sample changes nothing"
    usual.add(50.0)
    assert usual.p99 == 50.0
    for _ in range(2 * WINDOW):
        usual.add(2.0)
    assert usual.p99 == 2.0
