"""The controller's core moves experts while they serve: plans, persons, deaths of hosts and of itself."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import pytest

from cluster.control.core import start, step
from cluster.control.fleet import Load
from cluster.control.journal import decode, encode
from cluster.control.move_state import Limits
from cluster.control.numbers import planner_of
from cluster.control.pack import pack
from cluster.control.plan import Policy
from cluster.control.state import (
    Asked,
    ControllerState,
    Effect,
    Event,
    HostDrainAsked,
    HostReported,
    Journal,
    LoadRead,
    MoveAsked,
    PlanAsked,
    PublishView,
    RollbackAsked,
    SendOrder,
    Steering,
    TargetAsked,
    Tick,
    WriteJournal,
)
from cluster.control.status import status_of
from cluster.control.steer import expert_bytes, plan_ahead
from cluster.simulate.counted_load import CountedLoad
from experts.errors import InvalidInput
from experts.placement import ClusterView, ExpertKey
from experts.reports import ControllerInfo, HostOrder, HostReport

HOSTS = ("h0", "h1", "h2")
KEYS = [(layer, expert) for layer in (0, 1) for expert in range(6)]
NOW = Policy(settle_s=0.0, cool_down_s=30.0)


@dataclass
class Site:
    """A controller and hosts that load in no time what they are told to, and count what they are asked."""

    steering: Steering = field(default_factory=lambda: Steering(rebalances=True, extra_slots=1, policy=NOW))
    now: float = 100.0
    rates: dict[ExpertKey, int] = field(default_factory=dict)
    broken: set[tuple[ExpertKey, str]] = field(default_factory=set)
    dead: set[str] = field(default_factory=set)
    left: set[str] = field(default_factory=set)
    held: dict[str, set[ExpertKey]] = field(default_factory=lambda: {name: set() for name in HOSTS})
    orders: dict[str, HostOrder] = field(default_factory=dict)
    rows: dict[str, dict[ExpertKey, int]] = field(default_factory=lambda: {name: {} for name in HOSTS})
    views: list[ClusterView] = field(default_factory=list)
    stream: int = 1
    disk: str = ""
    before_effect: Callable[[], None] = field(default=lambda: None)
    load: CountedLoad = field(default_factory=CountedLoad)
    state: ControllerState = field(init=False)

    def __post_init__(self) -> None:
        target = pack(layers=(0, 1), num_experts=6, hosts=HOSTS, num_replicas=1)
        self.begin(Journal(digest="d", target=target))
        self.run(3)

    def begin(self, journal: Journal) -> None:
        self.state, effects = start(journal, HOSTS, self.now, None, self.steering)
        self.do(effects)

    def restart(self) -> None:
        """The next life has what is on disk; hosts connect anew."""
        self.stream += 1
        self.begin(decode(json.loads(self.disk)))

    def take(self, event: Event) -> None:
        self.state, effects = step(self.state, event, self.now)
        self.do(effects)

    def do(self, effects: list[Effect]) -> None:
        for effect in effects:
            self.before_effect()
            match effect:
                case WriteJournal(journal=journal):
                    self.disk = json.dumps(encode(journal))
                case PublishView(view=view):
                    self.views.append(view)
                case SendOrder(name=name, order=order):
                    self.orders[name] = order

    def tick(self) -> None:
        self.now += 0.5
        for key, rate in self.rates.items():
            name = self.placed(key)[0]
            self.rows[name][key] = self.rows[name].get(key, 0) + rate // 2
        for name in HOSTS:
            self.obey(name)
        self.take(Tick())

    def run(self, seconds: float) -> None:
        for _ in range(round(seconds / 0.5)):
            self.tick()
            self.take(LoadRead(load=self.load.load(self.state, self.now)))

    def obey(self, name: str) -> None:
        order = self.orders.get(name)
        if name in self.dead or name in self.left:
            return
        if order is not None and order.retire:
            self.left.add(name)
            return
        failed = {key for key in (order.target if order else ()) if (key, name) in self.broken}
        if order is not None:
            self.held[name] = set(order.target) - failed
        report = HostReport(
            name=name,
            incarnation=1,
            address=f"{name}:1",
            held=frozenset(self.held[name]),
            held_bytes=10 * len(self.held[name]),
            order=order.number if order else 0,
            failed=frozenset(failed),
            problem="torn file" if failed else "",
            rows=dict(self.rows[name]),
            num_shipments=sum(self.rows[name].values()) // 10,
        )
        self.take(HostReported(report=report, stream=self.stream))

    def placed(self, key: ExpertKey) -> tuple[str, ...]:
        return self.views[-1].placement.hosts_of(key)

    def placement(self) -> dict[ExpertKey, set[str]]:
        return {key: set(names) for key, names in self.views[-1].placement.replicas.items()}


def always_complete(site: Site) -> None:
    """No view has an expert without a host, since the first that had all; epochs only grow."""
    whole = [view.placement for view in site.views if len(view.placement.replicas) == len(KEYS)]
    since = next(index for index, view in enumerate(site.views) if view.placement == whole[0])
    assert all(len(view.placement.replicas) == len(KEYS) for view in site.views[since:])
    epochs = [view.placement.epoch for view in site.views]
    assert epochs == sorted(epochs)


def test_a_move_is_made_before_it_is_broken_and_is_rolled_back() -> None:
    site = Site()
    before = site.placement()
    key = next(key for key in KEYS if before[key] == {"h0"})
    site.take(MoveAsked(key=key, to="h1"))
    assert key in site.orders["h1"].target and site.orders["h1"].peers[key].name == "h0"
    site.run(4)
    assert site.placement() == {**before, key: {"h1"}}
    assert key not in site.orders["h0"].target
    site.take(RollbackAsked())
    site.run(4)
    assert site.placement() == before
    with pytest.raises(InvalidInput, match="after which a plan was applied"):
        site.take(RollbackAsked())
    history = site.state.journal.history
    assert [applied.is_undone for applied in history] == [True, True]
    always_complete(site)


def test_going_back_to_an_epoch_undoes_all_that_came_after_it() -> None:
    site = Site()
    before, epoch = site.placement(), site.views[-1].placement.epoch
    for key in [key for key in KEYS if before[key] == {"h0"}][:2]:
        site.take(MoveAsked(key=key, to="h2"))
        site.run(4)
    assert site.placement() != before
    site.take(RollbackAsked(epoch=epoch))
    site.run(6)
    assert site.placement() == before
    always_complete(site)


def test_a_hot_host_is_relieved_by_what_hosts_count() -> None:
    site = Site()
    hot = [key for key in KEYS if key[0] == 0 and site.placed(key) == ("h0",)]
    assert len(hot) == 2
    site.rates = dict.fromkeys(hot, 2000)
    site.run(12)
    assert status_of(site.state, "herd", ControllerInfo()).placement.imbalance[0] <= 1.2, "it was 3"
    applied = site.state.journal.history[-1]
    assert applied.predicted is not None and applied.realised is not None
    assert abs(applied.realised - applied.predicted) < 0.1
    placed, num_plans = site.placement(), len(site.state.journal.history)
    site.run(25)
    assert (site.placement(), len(site.state.journal.history)) == (placed, num_plans), "no to and fro"
    always_complete(site)


def test_without_rebalancing_the_load_moves_nothing_but_a_person_may() -> None:
    site = Site(steering=Steering(rebalances=False, extra_slots=1, policy=NOW))
    hot = [key for key in KEYS if site.placed(key) == ("h0",)]
    site.rates = dict.fromkeys(hot, 2000)
    before = site.placement()
    site.run(12)
    assert site.placement() == before and not site.state.journal.history
    site.take(PlanAsked(load=None))
    site.run(8)
    assert site.placement() != before
    always_complete(site)


def test_what_a_person_asked_for_is_left_alone_by_the_load() -> None:
    site = Site()
    hot = [key for key in KEYS if key[0] == 0 and site.placed(key) == ("h0",)]
    cold = next(key for key in KEYS if site.placed(key) == ("h1",))
    site.take(MoveAsked(key=cold, to="h2"))
    site.rates = dict.fromkeys(hot, 2000)
    site.run(15)
    assert len(site.state.journal.history) == 1
    assert "a person moved experts" in status_of(site.state, "herd", ControllerInfo()).placement.held_by


def test_a_drained_host_is_emptied_and_ends() -> None:
    site = Site()
    site.take(HostDrainAsked(name="h1"))
    site.run(12)
    assert site.left == {"h1"}
    assert all("h1" not in names for names in site.placement().values())
    assert "h1" not in site.state.hosts and "h1" not in site.views[-1].hosts
    always_complete(site)
    site.restart()
    site.run(6)
    assert "h1" not in site.state.hosts, "and the next life knows"
    with pytest.raises(InvalidInput, match="drained"):
        site.take(RollbackAsked(epoch=0))


def test_the_last_host_cannot_be_drained() -> None:
    site = Site()
    for name in ("h0", "h1"):
        site.take(HostDrainAsked(name=name))
        site.run(15)
    with pytest.raises(InvalidInput, match="last one"):
        site.take(HostDrainAsked(name="h2"))
    assert site.left == {"h0", "h1"}
    always_complete(site)


def test_an_expert_that_cannot_be_loaded_stays_and_people_are_told() -> None:
    site = Site()
    before = site.placement()
    key = next(key for key in KEYS if before[key] == {"h0"})
    site.broken.add((key, "h1"))
    site.take(MoveAsked(key=key, to="h1"))
    site.run(5)
    assert site.placement() == before and site.state.moving.is_done
    problems = status_of(site.state, "herd", ControllerInfo()).problems
    assert any("could not be loaded, and is given up: torn file" in problem for problem in problems)
    assert site.state.num_given_up == 1


def test_a_load_that_never_ends_is_given_up_at_its_deadline() -> None:
    site = Site(steering=Steering(extra_slots=1, limits=Limits(base_s=3.0)))
    before = site.placement()
    key = next(key for key in KEYS if before[key] == {"h0"})
    site.dead.add("h1")
    site.take(MoveAsked(key=key, to="h1"))
    site.run(2)
    site.dead.clear()
    site.broken.add((key, "h1"))
    site.orders["h1"] = replace(site.orders["h1"], number=0)
    site.run(6)
    assert site.placement()[key] == {"h0"} and site.state.moving.is_done
    assert site.state.num_given_up == 1


def test_nothing_is_given_up_for_a_host_that_died_meanwhile() -> None:
    site = Site()
    key = next(key for key in KEYS if site.placed(key) == ("h0",))
    site.take(TargetAsked(replicas={**site.state.journal.target, key: ("h0", "h1")}))
    site.run(4)
    assert site.placement()[key] == {"h0", "h1"}
    site.dead.add("h1")
    site.run(4)
    site.take(TargetAsked(replicas={**site.state.journal.target, key: ("h1",)}))
    site.run(6)
    assert site.placement()[key] == {"h0"}, "h1 cannot serve it"
    site.dead.clear()
    site.run(6)
    assert site.placement()[key] == {"h1"}


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (MoveAsked(key=(0, 99), to="h1"), "one that the model has"),
        (MoveAsked(key=(0, 0), to="h9"), "one of h0, h1, h2"),
        (HostDrainAsked(name="nobody"), "one of h0, h1, h2"),
        (RollbackAsked(epoch=5), "after which a plan was applied"),
        (TargetAsked(replicas={(0, 0): ("h0",)}), "every expert that there is"),
        (TargetAsked(replicas=dict.fromkeys(KEYS, ("h9",))), "hosts that are there"),
        (TargetAsked(replicas=dict.fromkeys(KEYS, ("h0", "h0"))), "each of them once"),
        (TargetAsked(replicas=dict.fromkeys(KEYS, ())), "at least 1 hosts"),
        (TargetAsked(replicas=dict.fromkeys(KEYS, ("h0",))), "must fit its 6 slots"),
    ],
)
def test_what_cannot_be_done_is_refused_and_changes_nothing(asked: Asked, words: str) -> None:
    site = Site()
    before = site.state
    with pytest.raises(InvalidInput, match=words):
        site.take(asked)
    assert site.state is before


def test_a_controller_that_is_killed_before_any_effect_of_a_plan_goes_on_with_it() -> None:
    """Enumerated: it dies before its n-th effect, and the next life has the disk and the hosts."""

    class Killed(Exception):
        pass

    for fatal in range(1, 200):
        site = Site(steering=Steering(extra_slots=1))
        goal = {**site.state.journal.target}
        for key in [key for key in KEYS if site.placed(key) == ("h0",)][:2]:
            goal[key] = ("h1", "h2")
        left = fatal

        def strike() -> None:
            nonlocal left
            left -= 1
            if left == 0:
                raise Killed

        site.before_effect = strike
        try:
            site.take(TargetAsked(replicas=goal))
            site.run(12)
        except Killed:
            site.before_effect = lambda: None
            site.restart()
            site.run(14)
            if not site.state.journal.history:
                # It died before the plan was on disk: nothing of it was begun.
                site.take(TargetAsked(replicas=goal))
                site.run(12)
            assert site.placement() == {key: set(names) for key, names in goal.items()}, fatal
            assert site.state.moving.is_done
            always_complete(site)
        else:
            assert fatal > 10
            return
    raise AssertionError("it never came to an end")


def spoiled(site: Site) -> Mapping[str, Load | None]:
    load = site.load.load(site.state, site.now)
    assert load is not None
    first = KEYS[0]
    return {
        "none": None,
        "stale": replace(load, at=site.now - 100.0),
        "ahead": replace(load, at=site.now + 100.0),
        "nan": replace(load, rows={**load.rows, first: float("nan")}),
        "negative": replace(load, rows={**load.rows, first: -1.0}),
        "absurd": replace(load, rows={**load.rows, first: 1e300}),
        "partial": replace(load, rows={first: 1.0}),
    }


@pytest.mark.parametrize("how", ["none", "stale", "ahead", "nan", "negative", "absurd", "partial"])
def test_a_load_that_cannot_be_trusted_holds_and_says_so(how: str) -> None:
    site = Site()
    before = site.placement()
    site.rates = dict.fromkeys([key for key in KEYS if site.placed(key) == ("h0",)], 2000)
    for _ in range(12):
        site.now += 0.5
        for name in HOSTS:
            site.obey(name)
        site.take(Tick())
        if site.now > 104.5:
            site.take(LoadRead(load=spoiled(site)[how]))
    assert site.placement() == before and not site.state.journal.history
    assert status_of(site.state, "herd", ControllerInfo()).placement.held_by


def uneven(site: Site) -> Load:
    """What is measured once one host is much busier than the others; the loop had no turn yet."""
    site.rates = dict.fromkeys([key for key in KEYS if site.placed(key) == ("h0",)], 2000)
    load: Load | None = None
    for _ in range(12):
        site.tick()
        load = site.load.load(site.state, site.now)
    assert load is not None
    return load


def test_a_plan_made_ahead_counts_only_for_the_state_that_it_was_made_for() -> None:
    site = Site()
    load, before = uneven(site), site.state.decisions
    question = plan_ahead(site.state, load, site.now)
    assert question is not None
    ahead = question.answer(site.now)
    assert ahead.plan.is_change
    site.take(LoadRead(load=replace(load, rows=dict.fromkeys(KEYS, 1.0)), ahead=ahead))
    assert not site.state.journal.history and site.state.decisions == before, "the load is another one"
    site.take(LoadRead(load=load, ahead=ahead))
    assert site.state.moving.goal == ahead.plan.target and len(site.state.journal.history) == 1
    assert site.state.decisions == {**before, "change": 1}
    moved = plan_ahead(site.state, load, site.now)
    assert moved is None, "while replicas move there is nothing to plan"


def test_what_the_loop_did_is_counted() -> None:
    site = Site()
    load = uneven(site)
    site.take(LoadRead(load=load))
    site.run(10)
    numbers, (applied, *_) = planner_of(site.state), site.state.journal.history
    assert numbers.moves_ended["done"] >= applied.loads > 0 and numbers.moves_ended["failed"] == 0
    assert numbers.moved_bytes == numbers.moves_ended["done"] * expert_bytes(site.state)
    assert 0.0 < numbers.move_s <= 0.5 * numbers.moves_ended["done"]
    assert numbers.decisions["change"] >= 1 and numbers.decisions["no_change"] >= 1
    site.take(LoadRead(load=None, missing="the wire is cut"))
    assert planner_of(site.state).holding == "the wire is cut" and planner_of(site.state).decisions["held"] >= 1
    assert status_of(site.state, "herd", ControllerInfo()).placement.held_by == "the wire is cut"


def test_rates_are_read_of_hosts_that_count_without_a_break() -> None:
    site = Site()
    key = next(key for key in KEYS if site.placed(key) == ("h0",))
    site.rates = {key: 500}
    site.run(5)
    load = site.load.load(site.state, site.now)
    assert load is not None and load.rows.keys() == set(KEYS)
    assert load.rows[key] == pytest.approx(500.0) and sum(load.rows.values()) == pytest.approx(500.0)
    assert site.load.load(site.state, site.now + 3.0) is None, "too old"
    # A new life of a host counts from nothing: what it had counted before says nothing about now.
    host = site.state.hosts["h0"]
    assert host.report is not None
    reborn = replace(host.report, incarnation=2, rows={}, num_shipments=0)
    site.take(HostReported(report=reborn, stream=site.stream))
    assert site.load.load(site.state, site.now) is None


def test_the_journal_keeps_moves_and_history() -> None:
    site = Site()
    site.take(MoveAsked(key=next(key for key in KEYS if site.placed(key) == ("h0",)), to="h1"))
    site.take(HostDrainAsked(name="h2"))
    journal = decode(json.loads(site.disk))
    assert journal.history == site.state.journal.history and journal.draining == {"h2"}
    assert journal.moves is not None and journal.moves.loading.keys() == site.state.moving.loading.keys()


def test_persons_cannot_give_a_host_more_than_it_has_room_for() -> None:
    site = Site()
    room = len(KEYS) // len(HOSTS) + 2
    with pytest.raises(InvalidInput, match="must have a free slot"):
        for key in [key for key in KEYS if site.placed(key) != ("h0",)]:
            site.take(MoveAsked(key=key, to="h0"))
            site.run(3)
    assert len(site.held["h0"]) == room + site.steering.limits.staging
    always_complete(site)
