"""The controller adds and drains hosts while they serve; sick ones get nothing; what is short is mended first."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import pytest

from cluster.control.core import start, step
from cluster.control.fleet import Load
from cluster.control.journal import decode, encode
from cluster.control.move_state import Limits
from cluster.control.pack import pack
from cluster.control.plan import PlanState, Policy, plan
from cluster.control.scale import Scaling
from cluster.control.share import with_share
from cluster.control.state import (
    AskRoom,
    ControllerState,
    Effect,
    EndHost,
    EnsureHost,
    Event,
    HostDrainAsked,
    HostReported,
    HostsAsked,
    Journal,
    LoadRead,
    MemberReported,
    MoveAsked,
    PublishView,
    SendOrder,
    Steering,
    TargetAsked,
    Tick,
    Timing,
    WriteJournal,
)
from cluster.control.status import status_of
from cluster.control.steer import fleet_of, started
from cluster.control.trouble import RELAPSE_S, SICK_AFTER_S, Trouble
from cluster.simulate.counted_load import CountedLoad
from experts.errors import InvalidInput
from experts.placement import ClusterView, ExpertKey
from experts.reports import ControllerInfo, HostOrder, HostReport, MemberKind, MemberReport

KEYS = [(layer, expert) for layer in (0, 1) for expert in range(8)]
PATIENT = Policy(settle_s=0.0, cool_down_s=0.0)


@dataclass
class Site:
    """A controller, a router, and hosts that are started when it says so: they load in no time what they are told."""

    replicas: int = 1
    steering: Steering = field(default_factory=lambda: Steering(rebalances=True, policy=PATIENT))
    starts: bool = True
    """Whether a host that is to be started comes."""
    now: float = 100.0
    up: dict[str, int] = field(default_factory=dict)
    """The incarnation of every host that lives."""
    held: dict[str, set[ExpertKey]] = field(default_factory=dict)
    orders: dict[str, HostOrder] = field(default_factory=dict)
    busy: float = 0.5
    """Share of the time that each host computes."""
    wait_s: float | None = 0.0
    seen: dict[str, str] = field(default_factory=dict)
    """The states of hosts as the router sees them, where they are not up."""
    counted: CountedLoad = field(default_factory=CountedLoad)
    effects: list[Effect] = field(default_factory=list)
    views: list[ClusterView] = field(default_factory=list)
    stream: int = 1
    disk: str = ""
    rows: dict[tuple[str, int], dict[ExpertKey, int]] = field(default_factory=dict)
    computed: dict[str, float] = field(default_factory=dict)
    state: ControllerState = field(init=False)

    def __post_init__(self) -> None:
        target = pack(layers=(0, 1), num_experts=8, hosts=("host-0", "host-1"), num_replicas=self.replicas)
        self.begin(Journal(digest="d", target=target))
        self.run(4)

    def begin(self, journal: Journal) -> None:
        self.state, effects = start(journal, ("host-0", "host-1"), self.now, Timing(), self.steering)
        self.do(effects)

    def restart(self) -> None:
        self.stream += 1
        self.begin(decode(json.loads(self.disk)))

    def take(self, event: Event) -> None:
        self.state, effects = step(self.state, event, self.now)
        self.do(effects)

    def do(self, effects: list[Effect]) -> None:
        self.effects += effects
        for effect in effects:
            match effect:
                case WriteJournal(journal=journal):
                    self.disk = json.dumps(encode(journal))
                case PublishView(view=view):
                    self.views.append(view)
                case SendOrder(name=name, order=order):
                    self.orders[name] = order
                case EnsureHost(name=name) if self.starts and name not in self.up:
                    self.up[name] = int(self.now)
                    self.held[name] = set()
                case EndHost(name=name):
                    self.up.pop(name, None)

    def run(self, seconds: float) -> None:
        for _ in range(round(seconds / 0.5)):
            self.now += 0.5
            for name in list(self.up):
                self.obey(name)
            states = {name: self.seen.get(name, "up") for name in self.up}
            router = MemberReport(kind=MemberKind.ROUTER, name="r", hosts=states, longest_wait_s=self.wait_s)
            self.take(MemberReported(report=router))
            self.take(Tick())
            self.take(LoadRead(load=self.counted.load(self.state, self.now)))

    def obey(self, name: str) -> None:
        order = self.orders.get(name)
        if order is not None and order.retire:
            del self.up[name], self.orders[name]
            return
        if order is not None:
            self.held[name] = set(order.target)
        rows = self.rows.setdefault((name, self.up[name]), {})
        for key in self.held[name]:
            if name in self.placed(key):
                # Each expert has a hundred rows a second, on all its hosts together.
                rows[key] = rows.get(key, 0) + 50 // len(self.placed(key))
        self.computed[name] = self.computed.get(name, 0.0) + self.busy / 2
        report = HostReport(
            name=name,
            incarnation=self.up[name],
            address=f"{name}:1",
            held=frozenset(self.held[name]),
            held_bytes=10 * len(self.held[name]),
            order=order.number if order else 0,
            rows=dict(rows),
            num_shipments=sum(rows.values()) // 10,
            compute_s=self.computed[name],
        )
        self.take(HostReported(report=report, stream=self.stream))

    def placed(self, key: ExpertKey) -> tuple[str, ...]:
        return self.views[-1].placement.hosts_of(key) if self.views else ()

    def load_of(self) -> Mapping[str, int]:
        """How many experts each host serves."""
        names = [name for names in self.views[-1].placement.replicas.values() for name in names]
        return {name: names.count(name) for name in sorted(set(names))}

    def problems(self) -> tuple[str, ...]:
        return status_of(self.state, "s", ControllerInfo()).problems


def always_complete(site: Site) -> None:
    whole = next(index for index, view in enumerate(site.views) if len(view.placement.replicas) == len(KEYS))
    for before, after in zip(site.views[whole:], site.views[whole + 1 :], strict=False):
        assert len(after.placement.replicas) == len(KEYS)
        assert after.placement.epoch >= before.placement.epoch


@pytest.mark.parametrize("rebalances", [True, False])
@pytest.mark.parametrize("busy", [0.0, 0.5])
def test_hosts_that_are_added_get_their_share(rebalances: bool, busy: float) -> None:
    site = Site(steering=Steering(rebalances=rebalances, policy=PATIENT), busy=busy)
    site.take(HostsAsked(number=4))
    site.run(15)
    assert site.load_of() == {"host-0": 4, "host-1": 4, "host-2": 4, "host-3": 4}
    assert AskRoom(num_hosts=4) in site.effects
    always_complete(site)


def test_fewer_hosts_are_drained_and_their_names_not_used_again() -> None:
    site = Site()
    site.take(HostsAsked(number=3))
    site.run(12)
    site.take(HostsAsked(number=2))
    site.run(10)
    assert len(site.up) == 2 and site.state.hosts.keys() == site.up.keys()
    gone = {"host-0", "host-1", "host-2"} - site.up.keys()
    site.take(HostsAsked(number=3))
    site.run(12)
    assert not gone & site.up.keys() and "host-3" in site.up
    always_complete(site)


def test_a_host_that_never_comes_is_not_counted_upon_and_can_be_taken_back() -> None:
    site = Site(starts=True)
    site.starts = False
    site.take(HostsAsked(number=3))
    site.run(60)
    assert site.load_of() == {"host-0": 8, "host-1": 8}
    assert site.state.load is not None, "the load of those that are there is known"
    site.take(HostsAsked(number=2))
    site.run(1)
    assert EndHost(name="host-2") in site.effects
    assert list(site.state.hosts) == ["host-0", "host-1"]


def test_a_process_of_a_host_that_was_taken_back_is_ended() -> None:
    site = Site()
    site.starts = False
    site.take(HostsAsked(number=3))
    site.run(1)
    site.take(HostsAsked(number=2))
    late = HostReport(name="host-2", incarnation=7, address="host-2:1")
    site.take(HostReported(report=late, stream=1))
    assert site.orders["host-2"].retire


def test_a_host_that_only_says_why_it_cannot_begin_gets_nothing() -> None:
    site = Site()
    site.starts = False
    site.take(HostsAsked(number=3))
    for _ in range(10):
        report = HostReport(name="host-2", incarnation=7, problem="no such folder")
        site.take(HostReported(report=report, stream=1))
        site.run(1)
    assert site.load_of() == {"host-0": 8, "host-1": 8}
    assert any("no such folder" in problem for problem in site.problems())


@pytest.mark.parametrize("seconds", [0.0, 0.5, 1.0, 2.0, 4.0, 8.0])
def test_a_controller_that_is_killed_knows_its_hosts(seconds: float) -> None:
    site = Site()
    site.take(HostsAsked(number=4))
    site.run(seconds)
    site.restart()
    site.run(20)
    assert site.load_of() == {"host-0": 4, "host-1": 4, "host-2": 4, "host-3": 4}
    site.take(HostsAsked(number=2))
    site.run(seconds)
    site.restart()
    site.run(30)
    assert site.state.hosts.keys() == site.up.keys() == site.load_of().keys()
    assert sum(site.load_of().values()) == len(KEYS) and len(site.up) == 2
    always_complete(site)


@pytest.mark.parametrize("number", [0, 1, 5000])
def test_a_number_of_hosts_that_cannot_be_is_refused(number: int) -> None:
    site = Site(replicas=2, steering=Steering(num_replicas=2, policy=Policy(min_replicas=2)))
    before = site.state
    with pytest.raises(InvalidInput, match="from 2, the replicas"):
        site.take(HostsAsked(number=number))
    assert site.state is before


# By their use


def scaled(**values: float) -> Steering:
    scaling = replace(Scaling(min_hosts=2, max_hosts=4, up_after_s=5.0, down_after_s=20.0), **values)
    return Steering(rebalances=True, policy=PATIENT, scaling=scaling)


def test_busy_hosts_get_more_and_idle_ones_are_drained() -> None:
    site = Site(steering=scaled(), busy=0.95)
    site.run(120)
    assert len(site.load_of()) == 4, "no more than were allowed"
    site.busy = 0.01
    site.run(4)
    assert len(site.up) == 4, "not at once"
    site.run(120)
    assert len(site.up) == len(site.load_of()) == 2, "no fewer than there shall be"
    always_complete(site)


def test_requests_that_wait_for_busy_hosts_bring_more() -> None:
    site = Site(steering=scaled(), busy=0.5, wait_s=5.0)
    site.run(20)
    assert len(site.state.hosts) > 2


def test_without_leave_nobody_adds_hosts() -> None:
    site = Site(busy=0.99, wait_s=100.0)
    site.run(120)
    assert len(site.state.hosts) == 2


def test_what_is_not_known_holds() -> None:
    site = Site(steering=scaled(), busy=0.95, wait_s=None)
    site.run(60)
    assert len(site.state.hosts) == 2, "nobody knows how long requests wait"
    site.busy, site.wait_s = 7.0, 0.0
    site.run(60)
    assert len(site.state.hosts) == 2, "nobody is busy for seven times the time"


def test_while_a_host_comes_no_other_is_asked_for() -> None:
    site = Site(steering=scaled(), busy=0.95)
    site.starts = False
    site.run(90)
    assert site.state.hosts.keys() == {"host-0", "host-1", *site.state.journal.added}
    assert site.state.journal.away == set(site.state.journal.added)
    number = len(site.state.hosts)
    site.run(60)
    assert 2 < len(site.state.hosts) == number


def test_what_a_person_decided_the_load_does_not_undo() -> None:
    site = Site(steering=scaled(), busy=0.01)
    site.take(HostsAsked(number=4))
    site.run(300)
    assert len(site.up) == 4
    site.take(HostDrainAsked(name="host-1"))
    site.run(300)
    assert len(site.up) == 3
    site.run(800)
    assert len(site.up) == 2


# Sick hosts


def test_a_sick_host_keeps_what_it_has_and_gets_nothing() -> None:
    site = Site(replicas=1)
    site.take(HostsAsked(number=3))
    site.run(15)
    here = site.load_of()["host-2"]
    site.seen["host-2"] = "fenced"
    site.run(SICK_AFTER_S + 1.0)
    assert fleet_of(site.state).able == ("host-0", "host-1")
    assert any("host-2" in problem and "routers cannot use it" in problem for problem in site.problems())
    key = next(key for key in KEYS if "host-2" not in site.placed(key))
    with pytest.raises(InvalidInput, match="used by all routers"):
        site.take(MoveAsked(key=key, to="host-2"))
    with pytest.raises(InvalidInput, match="not sick"):
        site.take(TargetAsked(replicas=dict.fromkeys(KEYS, ("host-2",))))
    site.take(HostDrainAsked(name="host-1"))
    site.run(20)
    assert site.load_of() == {"host-0": 16 - here, "host-2": here}
    site.seen.clear()
    site.run(2)
    assert fleet_of(site.state).able == ("host-0", "host-2")


def test_who_was_ill_for_a_moment_or_long_ago_is_not_sick() -> None:
    ill = Trouble().hear(["up", "fenced"], 10.0)
    assert not ill.is_sick(10.0) and not ill.hear(["suspect"], 14.0).is_sick(14.0)
    ill = ill.hear(["returning", "silent"], 10.0 + SICK_AFTER_S)
    assert ill.is_sick(14.0) and ill.hear(["returning"], 15.0).is_sick(15.0)
    assert ill.hear([], 15.0) == ill, "nobody says anything"
    assert not ill.is_sick(13.0 + RELAPSE_S)
    assert ill.hear(["up", "up"], 15.0) == Trouble()


def test_a_new_life_of_a_sick_host_is_tried() -> None:
    site = Site()
    site.seen["host-1"] = "silent"
    site.run(6)
    assert fleet_of(site.state).able == ("host-0",)
    site.up["host-1"] += 1
    del site.seen["host-1"]
    site.run(1)
    assert fleet_of(site.state).able == ("host-0", "host-1")


def test_experts_of_a_host_that_is_gone_do_not_go_to_a_sick_one() -> None:
    site = Site()
    site.take(HostsAsked(number=3))
    site.run(15)
    site.seen["host-2"] = "dead"
    site.run(5)
    here = site.load_of()["host-2"]
    site.starts = False
    del site.up["host-1"]
    site.run(45)
    assert site.load_of().keys() == {"host-0", "host-2"} and site.load_of()["host-2"] == here
    assert len(site.views[-1].placement.replicas) == len(KEYS)


# What is short


def test_all_hosts_mend_at_the_same_time_before_anything_else_moves() -> None:
    limits = Limits(bytes_per_s=1e-3, loads_at_once=1)
    site = Site(replicas=1, steering=Steering(policy=PATIENT, limits=Limits()))
    site.take(HostsAsked(number=4))
    site.run(20)
    site.state = replace(site.state, steering=replace(site.state.steering, limits=limits))
    lost = {key for key in KEYS if site.placed(key) == ("host-3",)}
    assert len(lost) >= 3
    site.starts = False
    del site.up["host-3"]
    for _ in range(200):
        if "host-3" in site.state.journal.away:
            break
        site.run(0.5)
    site.run(1)
    assert all(site.placed(key) and "host-3" not in site.placed(key) for key in lost), "a host each half second"
    assert sum(site.load_of().values()) == len(KEYS) and "host-3" not in site.load_of()


# The share of a new host


def test_a_share_is_taken_from_who_has_most_rows() -> None:
    site = Site()
    site.take(HostsAsked(number=3))
    for _ in range(20):
        if "host-2" in fleet_of(site.state).hosts:
            break
        site.run(0.5)
    rows = {key: 100.0 if key == (0, 0) else 1.0 for key in KEYS}
    before = {key: ("host-0",) if key[1] < 4 else ("host-1",) for key in KEYS}
    after = with_share(before, "host-2", fleet_of(site.state), MappingProxyType(rows))
    moved = [key for key in KEYS if after[key] == ("host-2",)]
    assert {layer for layer, _ in moved} == {0, 1} and len(moved) == 4
    assert all(after[key] in (before[key], ("host-2",)) for key in KEYS)
    assert sum(before[key] == ("host-0",) for key in moved if key[0] == 0) >= 1
    assert with_share(after, "host-2", fleet_of(site.state), rows) == after, "who has something gets no more"


def test_a_load_by_prometheus_may_know_the_queue_itself() -> None:
    site = Site(steering=scaled(), busy=0.95, wait_s=None)
    for _ in range(40):
        load = site.counted.load(site.state, site.now)
        site.take(LoadRead(load=None if load is None else replace(load, queue_s=0.0)))
        site.now += 0.5
        for name in list(site.up):
            site.obey(name)
        site.take(Tick())
    assert len(site.state.hosts) > 2
    assert isinstance(site.state.load, Load)


class ReadFromPages(CountedLoad):
    """Of a host that holds nothing nobody reads how busy it is."""

    def load(self, state: ControllerState, now: float) -> Load | None:
        found = super().load(state, now)
        if found is None:
            return None
        holding = {name for name, host in state.hosts.items() if host.report is not None and host.report.held}
        return replace(found, busy={name: share for name, share in found.busy.items() if name in holding})


def test_a_host_that_holds_nothing_is_idle_and_the_first_to_go() -> None:
    site = Site(steering=replace(scaled(), extra_slots=2), busy=0.05, counted=ReadFromPages())
    target = site.state.moving.goal
    site.take(HostsAsked(number=3))
    site.run(15)
    site.take(TargetAsked(replicas=target))
    site.run(15)
    assert len(site.up) == 3 and site.load_of() == {"host-0": 8, "host-1": 8}
    site.state = replace(site.state, journal=replace(site.state.journal, sized_until=0.0))
    site.run(30)
    assert site.up.keys() == {"host-0", "host-1"}
    always_complete(site)


def test_replicas_beyond_the_room_of_a_host_are_given_back() -> None:
    site = Site()
    target = {key: tuple(dict.fromkeys(("host-0", *site.placed(key)))) for key in KEYS}
    state = replace(site.state, moving=started(target))
    made, _ = plan(None, fleet_of(state), target, PATIENT, PlanState(), site.now)
    assert made.held_by, "whatever the load"
    left = [key for key, names in made.target.items() if "host-0" in names]
    assert len(left) == len(KEYS) // 2 + state.steering.limits.staging
    assert all(made.target.values())
    sick = Trouble(since=site.now - RELAPSE_S, last=site.now)
    state = replace(state, hosts={**state.hosts, "host-0": replace(state.hosts["host-0"], trouble=sick)})
    made, _ = plan(None, fleet_of(state), target, PATIENT, PlanState(), site.now)
    assert not made.is_change, "what a sick host has too may be needed"
