"""Moving replicas, told as transcripts; and what must hold at every moment, whatever happens and whenever it stops."""

import json
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from cluster.control.draft import Replica
from cluster.control.fleet import Fleet, HostSpec
from cluster.control.move_journal import decode_moves, encode_moves
from cluster.control.move_state import (
    Alarm,
    EvictReplica,
    Goal,
    HostAway,
    Limits,
    Loaded,
    LoadReplica,
    MoveEffect,
    MoveEvent,
    MoveState,
    NotLoaded,
    PublishReplicas,
    TimePassed,
)
from cluster.control.moves import moves, resume, seen, step, to_hold
from cluster.control.pack import target_by_host
from cluster.control.replicas import Replicas
from experts.errors import InvalidInput
from experts.placement import ExpertKey

A, B, C = (1, 0), (1, 1), (1, 2)


@dataclass
class Site:
    """Hosts that do as they are told, and a machine that tells them."""

    state: MoveState
    slots: int = 2
    limits: Limits = field(default_factory=lambda: Limits(drain_s=1.0, bytes_per_s=1.0, base_s=10.0, patience=0.0))
    now: float = 0.0
    names: tuple[str, ...] = ("h0", "h1", "h2")
    held: dict[str, set[ExpertKey]] = field(init=False)
    loading: dict[Replica, str] = field(default_factory=dict)
    alarms: list[str] = field(default_factory=list)
    epochs: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.held = {name: set() for name in self.names}
        for key, names in self.state.published.items():
            for name in names:
                self.held[name].add(key)

    @property
    def fleet(self) -> Fleet:
        return Fleet.of([HostSpec(name=name, slots=self.slots) for name in self.held])

    def take(self, event: MoveEvent) -> list[str]:
        self.state, effects = step(self.state, event, self.fleet, self.limits, self.now)
        return [self.do(effect) for effect in effects]

    def do(self, effect: MoveEffect) -> str:
        match effect:
            case LoadReplica():
                key, name = effect.replica
                if effect.source:
                    assert key in self.held[effect.source], "sources have what they send"
                self.loading[effect.replica] = effect.source
                return f"load {key[1]} on {name} from {effect.source or 'disk'}"
            case PublishReplicas():
                self.epochs.append(effect.epoch)
                return f"publish {effect.epoch}: " + told(effect.replicas)
            case EvictReplica():
                key, name = effect.replica
                assert name not in self.state.published[key], "what is published is held"
                self.loading.pop(effect.replica, None)
                self.held[name].discard(key)
                return f"evict {key[1]} on {name}"
            case Alarm():
                self.alarms.append(effect.text)
                return f"alarm: {effect.text}"

    def finish(self, replica: Replica) -> list[str]:
        del self.loading[replica]
        self.held[replica[1]].add(replica[0])
        return self.take(Loaded(replica=replica))

    def wait(self, seconds: float) -> list[str]:
        self.now += seconds
        return self.take(TimePassed())

    def run(self) -> None:
        """Until nothing is left to do."""
        for _ in range(200):
            if self.state.is_done:
                return
            for replica in list(self.loading):
                self.finish(replica)
            self.wait(1.0)
        raise AssertionError(f"never done: {self.state}")


def told(replicas: Replicas) -> str:
    return ", ".join(f"{key[1]}@{'+'.join(names)}" for key, names in sorted(replicas.items()))


def test_a_move_makes_before_it_breaks() -> None:
    site = Site(moves({A: ("h0",), B: ("h1",)}, {A: ("h2",), B: ("h1",)}))
    assert site.take(TimePassed()) == ["load 0 on h2 from h0"]
    assert site.wait(0.5) == []
    assert site.finish((A, "h2")) == ["publish 1: 0@h2, 1@h1"]
    assert site.wait(0.9) == []
    assert site.wait(0.2) == ["evict 0 on h0"]
    assert site.state.is_done


def test_an_expert_keeps_its_old_hosts_until_all_its_new_ones_serve() -> None:
    site = Site(moves({A: ("h0",)}, {A: ("h1", "h2")}))
    assert site.take(TimePassed()) == ["load 0 on h1 from h0"]
    assert site.finish((A, "h1")) == ["publish 1: 0@h0+h1"]
    assert site.wait(1.0) == ["load 0 on h2 from h0"]
    assert site.finish((A, "h2")) == ["publish 2: 0@h1+h2"]


def test_loads_are_spread_over_time_and_hosts() -> None:
    site = Site(moves({A: ("h0",), B: ("h0",), C: ("h0",)}, {A: ("h1",), B: ("h2",), C: ("h1",)}), slots=3)
    assert site.take(TimePassed()) == ["load 0 on h1 from h0"]
    assert site.wait(0.5) == [], "one byte per second"
    assert site.wait(0.5) == ["load 1 on h2 from disk"], "h0 sends to one at a time"
    assert site.wait(5.0) == [], "each host loads one at a time"
    assert site.finish((A, "h1")) == ["publish 1: 0@h1, 1@h0, 2@h0", "load 2 on h1 from h0"]


def test_what_a_peer_cannot_send_is_read_from_disk_and_what_nobody_can_load_is_given_up() -> None:
    site = Site(moves({A: ("h0",)}, {A: ("h1",)}))
    site.take(TimePassed())
    assert site.take(NotLoaded(replica=(A, "h1"), why="checksum")) == ["load 0 on h1 from disk"]
    assert site.take(NotLoaded(replica=(A, "h1"), why="no such file")) == [
        "alarm: expert 0 of layer 1 on host h1 could not be loaded, and is given up: no such file"
    ]
    assert site.state.is_done
    assert site.state.published == {A: ("h0",)}


def test_a_stuck_load_is_given_up_at_its_deadline() -> None:
    site = Site(moves({A: ("h0",)}, {A: ("h0", "h1")}))
    site.take(TimePassed())
    assert site.wait(9.9) == []
    assert site.wait(0.2) == [
        "evict 0 on h1",
        "alarm: expert 0 of layer 1 on host h1 did not come in time, and is given up",
    ]
    assert site.state.is_done
    assert site.take(Loaded(replica=(A, "h1"))) == [], "what comes after all is not served"


def test_full_hosts_give_up_what_others_have_before_they_load() -> None:
    limits = Limits(staging=0, drain_s=1.0)
    start = {A: ("h0", "h1"), B: ("h0",), C: ("h1",)}
    site = Site(moves(start, {A: ("h1",), B: ("h0",), C: ("h1", "h0")}), limits=limits)
    assert site.take(TimePassed()) == ["publish 1: 0@h1, 1@h0, 2@h1"]
    assert site.wait(1.0) == ["evict 0 on h0", "load 2 on h0 from h1"]


def test_an_exchange_without_any_room_is_given_up() -> None:
    limits = Limits(staging=0)
    site = Site(moves({A: ("h0",), B: ("h1",)}, {A: ("h1",), B: ("h0",)}), slots=1, limits=limits)
    [alarm] = site.take(TimePassed())
    assert "find no room" in alarm
    assert site.state.is_done
    assert site.state.published == {A: ("h0",), B: ("h1",)}


def test_an_exchange_needs_one_slot_for_staging() -> None:
    site = Site(moves({A: ("h0",), B: ("h1",)}, {A: ("h1",), B: ("h0",)}), slots=1)
    site.run()
    assert site.state.published == {A: ("h1",), B: ("h0",)}
    assert not site.alarms


def test_back_is_a_goal_like_any_other() -> None:
    start: Replicas = {A: ("h0",), B: ("h1",)}
    site = Site(moves(start, {A: ("h2",), B: ("h1",)}))
    site.take(TimePassed())
    site.finish((A, "h2"))
    # h0 has not evicted it yet.
    assert site.take(Goal(replicas=start)) == ["publish 2: 0@h0, 1@h1"]
    site.run()
    assert site.held == {"h0": {A}, "h1": {B}, "h2": set()}


def test_orders_and_reports_are_enough_to_drive_it() -> None:
    """As the controller does it: hosts are told all that they shall hold, and say what they do hold."""
    start: Replicas = {A: ("h0",), B: ("h1",), C: ("h2",)}
    goal: Replicas = {A: ("h1", "h2"), B: ("h0",), C: ("h2",)}
    site = Site(moves(start, goal), slots=2)
    for _ in range(60):
        site.wait(1.0)
        for event in seen(site.state, site.held):
            site.take(event)
        site.loading = {}
        orders = target_by_host(to_hold(site.state), site.names)
        assert all(len(keys) <= site.slots + site.limits.staging for keys in orders.values())
        served = target_by_host(site.state.published, site.names)
        assert all(served[name] <= orders[name] & site.held[name] for name in site.names)
        # Each host loads one thing at a time and evicts at once.
        for name, keys in orders.items():
            site.held[name] = (site.held[name] & keys) | set(sorted(keys - site.held[name])[:1])
    assert site.state.is_done
    assert site.held == {"h0": {B}, "h1": {A}, "h2": {A, C}}


def test_goals_must_name_every_expert() -> None:
    with pytest.raises(InvalidInput, match="target: must name every expert"):
        moves({A: ("h0",)}, {A: ("h0",), B: ("h0",)})
    with pytest.raises(InvalidInput, match="at least one host"):
        moves({A: ("h0",)}, {A: ()})
    with pytest.raises(InvalidInput, match="each host once"):
        moves({A: ("h0",)}, {A: ("h0", "h0")})


def test_a_controller_may_be_killed_before_and_after_every_effect() -> None:
    """Enumerated: it stops after n effects, the next life has the journal and what hosts hold, and arrives."""
    start = {A: ("h0",), B: ("h1", "h0"), C: ("h2",)}
    goal = {A: ("h1", "h2"), B: ("h2",), C: ("h0",)}
    for stop in range(100):
        site = Site(moves(start, goal), slots=3)
        journal = json.dumps(encode_moves(site.state))
        left, killed = stop, False
        for _ in range(60):
            event: MoveEvent = TimePassed()
            if site.loading:
                replica = next(iter(site.loading))
                del site.loading[replica]
                site.held[replica[1]].add(replica[0])
                event = Loaded(replica=replica)
            site.now += 0.7
            site.state, effects = step(site.state, event, site.fleet, site.limits, site.now)
            journal = json.dumps(encode_moves(site.state))
            for effect in effects:
                if left == 0:
                    killed = True
                    break
                site.do(effect)
                left -= 1
            if killed:
                break
        if not killed:
            assert stop > 10
            break
        site.state = resume(decode_moves(json.loads(journal)), site.held, site.now, site.limits)
        assert all(key in site.held[name] for key, names in site.state.published.items() for name in names)
        assert all(site.state.published.values()), f"nothing is lost by a stop after {stop} effects"
        site.run()
        assert {key: set(names) for key, names in site.state.published.items()} == {k: set(v) for k, v in goal.items()}
        assert site.held == {"h0": {C}, "h1": {A}, "h2": {A, B}}
        assert site.epochs == sorted(set(site.epochs)), "epochs only grow"
    else:
        raise AssertionError("it never ended by itself")


def test_journals_that_do_not_fit_together_are_refused() -> None:
    good = encode_moves(moves({A: ("h0",)}, {A: ("h1",)}))
    assert decode_moves(json.loads(json.dumps(good))) == replace(moves({A: ("h0",)}, {A: ("h1",)}))
    for name, value in (("epoch", -1), ("goal", {"hosts": [], "experts": []}), ("draining", [[9, 9, "h0"]])):
        with pytest.raises(ValueError, match="journal"):
            decode_moves({**good, name: value})


HOSTS = ("h0", "h1", "h2", "h3")
KEYS = ((0, 0), (0, 1), (2, 0), (2, 1), (2, 2))
goals = st.fixed_dictionaries(
    {key: st.lists(st.sampled_from(HOSTS), min_size=1, max_size=3, unique=True).map(tuple) for key in KEYS}
)


class AnyOrder(RuleBasedStateMachine):
    """Goals, loads that end well or badly, losses, stops and time in any order."""

    @initialize(start=goals)
    def begin(self, start: Replicas) -> None:
        self.site = Site(moves(start, start), slots=5, names=HOSTS)
        self.lost: set[str] = set()

    @rule(goal=goals)
    def aim(self, goal: Replicas) -> None:
        live = {key: tuple(name for name in names if name not in self.lost) for key, names in goal.items()}
        if all(live.values()):
            self.site.take(Goal(replicas=live))

    @rule(seconds=st.sampled_from([0.5, 1.0, 12.0]))
    def pass_time(self, seconds: float) -> None:
        self.site.wait(seconds)

    @precondition(lambda self: self.site.loading)
    @rule(data=st.data(), fails=st.booleans())
    def end_load(self, data: st.DataObject, fails: bool) -> None:
        replica = data.draw(st.sampled_from(sorted(self.site.loading)))
        if fails:
            del self.site.loading[replica]
            self.site.take(NotLoaded(replica=replica, why="chance"))
        else:
            self.site.finish(replica)

    @precondition(lambda self: len(self.lost) < 2)
    @rule(name=st.sampled_from(HOSTS))
    def lose(self, name: str) -> None:
        if name in self.lost:
            return
        self.lost.add(name)
        del self.site.held[name]
        self.site.loading = {replica: at for replica, at in self.site.loading.items() if replica[1] != name}
        self.site.take(HostAway(name=name))

    @rule()
    def restart(self) -> None:
        before = self.site.state.epoch
        self.site.loading = {}
        left = decode_moves(json.loads(json.dumps(encode_moves(self.site.state))))
        self.site.state = resume(left, self.site.held, self.site.now, self.site.limits)
        assert self.site.state.epoch >= before

    @invariant()
    def published_is_held_once_and_fits(self) -> None:
        for key, names in self.site.state.published.items():
            assert len(set(names)) == len(names)
            assert all(key in self.site.held[name] for name in names)
        for name, keys in self.site.held.items():
            inbound = sum(replica[1] == name for replica in self.site.loading)
            assert len(keys) + inbound <= self.site.slots + self.site.limits.staging

    @invariant()
    def epochs_only_grow(self) -> None:
        assert self.site.epochs == sorted(set(self.site.epochs))

    @invariant()
    def an_expert_is_away_only_when_its_hosts_were_lost(self) -> None:
        for key, names in self.site.state.published.items():
            assert names or self.lost, f"{key} is nowhere"

    def teardown(self) -> None:
        if hasattr(self, "site"):
            live = {
                key: tuple(name for name in names if name not in self.lost) or (sorted(self.site.held)[0],)
                for key, names in self.site.state.goal.items()
            }
            self.site.take(Goal(replicas=live))
            self.site.run()


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)
