"""A router's failover machine among scripted hosts, in virtual time: what it sends is answered when the hosts see fit.

The driver does what `router.dispatch` does, minus rows: poll first, then judge; and it checks what must always hold.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import count

from experts.placement import ClusterView, ComputeCost, ExpertKey, HostInfo, Placement
from router.dispatch import SHORTEST_WAIT_S
from router.failover.core import step
from router.failover.events import (
    Answered,
    Begin,
    Entered,
    Event,
    Failed,
    HostState,
    Linked,
    Looked,
    Lose,
    Probe,
    Reason,
    RowsOf,
    Send,
    StepBegun,
    Take,
    Tick,
    Viewed,
)
from router.failover.state import FailoverState, Policy, is_available, next_timer

COST = ComputeCost(per_expert_s=1e-4, per_row_s=1e-5)
ON_TIME_S = 0.002
MOST_LOOKS = 10_000


@dataclass
class Host:
    """Answers `latency_s` after a shipment came; None: never. `lacks` are experts it does not hold, whatever the
    placement says."""

    latency_s: float | None = ON_TIME_S
    is_linked: bool = True
    incarnation: int = 1
    lacks: frozenset[ExpertKey] = frozenset()
    probe_latency_s: float | None = None
    """Where it differs."""


@dataclass
class Layer:
    """What became of the rows of one dispatch."""

    rows: Mapping[ExpertKey, int]
    placement: Placement
    began: float
    taken: Counter[tuple[ExpertKey, int]] = field(default_factory=Counter)
    lost: Counter[tuple[ExpertKey, int]] = field(default_factory=Counter)
    sends: Counter[tuple[ExpertKey, int]] = field(default_factory=Counter)
    took_s: float = 0.0

    @property
    def lost_keys(self) -> set[ExpertKey]:
        return {key for key, _ in self.lost}


class World:
    """`replicas` as in a placement; one letter per host: `{(0, 3): "ab"}`."""

    def __init__(self, replicas: Mapping[ExpertKey, str], policy: Policy | None = None) -> None:
        self.now = 100.0
        self.state = FailoverState(policy=policy or Policy())
        self.hosts = {name: Host() for name in sorted({name for names in replicas.values() for name in names})}
        self.sent: list[Send] = []
        self.probed: list[tuple[float, str]] = []
        self.entered: list[tuple[float, str, HostState]] = []
        self.layers: dict[int, Layer] = {}
        self._numbers = count(1)
        self._ties = count()
        self._coming: list[tuple[float, int, Event]] = []
        self._on_way: dict[int, tuple[str, float, Send | Probe]] = {}
        self.version = 0
        self.view(replicas)
        self.begin_step()

    # ---- what a test does

    def view(
        self, replicas: Mapping[ExpertKey, str] | None = None, costs: Mapping[str, ComputeCost] | None = None
    ) -> None:
        """Publish a view: the hosts as they are and, when given, a new placement."""
        self.version += 1
        before = self.state.newest
        table = before.replicas if replicas is None else {key: tuple(names) for key, names in replicas.items()}
        epoch = before.epoch + (replicas is not None)
        infos = {
            name: HostInfo(name=name, incarnation=host.incarnation, address=name, cost=(costs or {}).get(name, COST))
            for name, host in self.hosts.items()
        }
        placement = Placement(epoch=epoch, replicas=table)
        self.decide(Viewed(view=ClusterView(version=self.version, placement=placement, hosts=infos)))
        self.tell_links()

    def begin_step(self, give_up_at: float = float("inf")) -> None:
        self.decide(StepBegun(give_up_at=give_up_at))

    def kill(self, name: str) -> None:
        """The link ends: all that was sent there fails, and `linked` tells."""
        self.hosts[name].is_linked = False
        self._coming = [item for item in self._coming if self._host_of(item[2]) != name]
        heapq.heapify(self._coming)
        for number, (host, _, _) in list(self._on_way.items()):
            if host == name:
                self._come(self.now, Failed(shipment=number, reason=Reason.LOST))

    def restart(self, name: str) -> None:
        self.hosts[name].incarnation += 1
        self.hosts[name].is_linked = True
        self.view()

    def hang(self, name: str) -> None:
        """Nothing more comes, not even what was asked before."""
        self.hosts[name].latency_s = None
        self._coming = [item for item in self._coming if self._host_of(item[2]) != name]
        heapq.heapify(self._coming)

    def wake(self, name: str, latency_s: float = ON_TIME_S) -> None:
        """The end of `hang`: everything is answered."""
        self.hosts[name].latency_s = latency_s
        for number, (host, _, what) in list(self._on_way.items()):
            if host == name:
                self._come(self.now + latency_s, self._outcome(self.hosts[name], number, what))

    def dispatch(self, rows: Mapping[ExpertKey, int]) -> Layer:
        """One layer from its beginning to its end."""
        number = self.begin(rows)
        self.finish(number)
        return self.layers[number]

    def begin(self, rows: Mapping[ExpertKey, int]) -> int:
        self.look(0.0)
        number = next(self._numbers)
        self.layers[number] = Layer(rows=rows, placement=self.state.placement, began=self.now)
        self.decide(Begin(dispatch=number, rows=rows))
        return number

    def finish(self, number: int) -> None:
        for _ in range(MOST_LOOKS):
            if number not in self.state.dispatches:
                break
            timer = next_timer(self.state)
            assert timer < float("inf"), "something waits without a timer"
            self.look(max(timer, self.now + SHORTEST_WAIT_S))
        assert number not in self.state.dispatches, "it goes on for ever"
        layer = self.layers[number]
        layer.took_s = self.now - layer.began
        check_whole(layer)

    def run(self, rows: Mapping[ExpertKey, int], times: int, pause_s: float = 0.0) -> list[Layer]:
        layers = []
        for _ in range(times):
            layers.append(self.dispatch(rows))
            self.sleep(pause_s)
        return layers

    def sleep(self, seconds: float) -> None:
        """Be busy with something else; nobody looks."""
        self.now += seconds

    def idle(self, seconds: float) -> None:
        """Look now and then, as an engine without work for hosts does."""
        end = self.now + seconds
        while self.now < end:
            self.sleep(min(0.05, end - self.now))
            self.look(0.0)

    def available(self, *keys: ExpertKey) -> bool:
        self.look(0.0)
        return is_available(self.state, frozenset(keys))

    # ---- how a router looks

    def look(self, until: float, late_s: float = 0.0) -> None:
        """Wait for the first answer until `until`; `late_s`: how much later than it could the router is back."""
        if not any(at <= self.now for at, _, _ in self._coming):
            first = min((at for at, _, _ in self._coming), default=float("inf"))
            ends = min([first, *(at for _, at, _ in self._on_way.values())])
            self.now = max(self.now, min(until, ends))
        self.now += late_s
        self.decide(Looked(until=until))
        self.tell_links()
        lost = False
        for event in self._arrived():
            self.decide(event)
            lost |= isinstance(event, Failed) and event.reason is Reason.LOST
        if lost:
            self.tell_links()
        self.decide(Tick())

    def tell_links(self) -> None:
        self.decide(Linked(hosts=frozenset(name for name, host in self.hosts.items() if host.is_linked)))

    def decide(self, event: Event) -> None:
        self.state, effects = step(self.state, event, self.now)
        for effect in effects:
            match effect:
                case Send():
                    self._check_send(effect)
                    self.sent.append(effect)
                    self._ship(effect.shipment, effect.host, effect.deadline, effect)
                case Probe():
                    self.probed.append((self.now, effect.host))
                    self._ship(effect.shipment, effect.host, effect.deadline, effect)
                case Take():
                    self.layers[effect.dispatch].taken.update(rows_of(effect.parts))
                case Lose():
                    self.layers[effect.dispatch].lost.update(rows_of(effect.parts))
                case Entered():
                    self.entered.append((self.now, effect.host, effect.state))
        check_state(self.state)

    def _ship(self, number: int, name: str, deadline: float, what: Send | Probe) -> None:
        host = self.hosts[name]
        if not host.is_linked:
            self._come(self.now, Failed(shipment=number, reason=Reason.LOST))
            self._on_way[number] = (name, deadline, what)
            return
        self._on_way[number] = (name, deadline, what)
        latency_s = host.latency_s
        if isinstance(what, Probe) and host.probe_latency_s is not None:
            latency_s = host.probe_latency_s
        if latency_s is not None:
            self._come(self.now + latency_s, self._outcome(host, number, what))

    def _outcome(self, host: Host, number: int, what: Send | Probe) -> Event:
        asked = {part.key for part in what.parts} if isinstance(what, Send) else set()
        if asked & host.lacks:
            return Failed(shipment=number, reason=Reason.NOT_HOSTED, missing=frozenset(asked & host.lacks))
        return Answered(shipment=number)

    def _come(self, at: float, event: Event) -> None:
        heapq.heappush(self._coming, (at, next(self._ties), event))

    def _arrived(self) -> list[Event]:
        events: list[Event] = []
        while self._coming and self._coming[0][0] <= self.now:
            _, _, event = heapq.heappop(self._coming)
            assert isinstance(event, Answered | Failed)
            if self._on_way.pop(event.shipment, None) is not None:
                events.append(event)
        for number, (_, deadline, _) in list(self._on_way.items()):
            if deadline <= self.now:
                del self._on_way[number]
                events.append(Failed(shipment=number, reason=Reason.DEADLINE))
        return events

    def _host_of(self, event: Event) -> str | None:
        assert isinstance(event, Answered | Failed)
        return self._on_way[event.shipment][0] if event.shipment in self._on_way else None

    def _check_send(self, send: Send) -> None:
        layer = self.layers[send.dispatch]
        for row in rows_of(send.parts):
            key = row[0]
            layer.sends[row] += 1
            assert layer.sends[row] <= len(layer.placement.hosts_of(key)) + 1, f"{row} was sent too often"
            listed = {*layer.placement.hosts_of(key), *self.state.newest.hosts_of(key)}
            assert send.host in listed, f"{send.host} is not listed for {key}"
        assert send.deadline > self.now or send.deadline == self.state.give_up_at

    # ---- what a test asks

    def states(self) -> dict[str, HostState]:
        return {name: link.state for name, link in self.state.links.items()}

    def sends_to(self, name: str, since: int = 0) -> list[Send]:
        return [send for send in self.sent[since:] if send.host == name]


def rows_of(parts: tuple[RowsOf, ...]) -> list[tuple[ExpertKey, int]]:
    return [(part.key, row) for part in parts for row in range(part.start, part.stop)]


def check_whole(layer: Layer) -> None:
    """Every row was answered exactly once, or lost exactly once."""
    expected = Counter((key, row) for key, rows in layer.rows.items() for row in range(rows))
    assert layer.taken + layer.lost == expected


def check_state(state: FailoverState) -> None:
    """What holds after every event."""
    for link in state.links.values():
        late = sum(flight.is_overdue and not flight.is_probe for flight in link.flights.values())
        assert late == link.num_overdue
        assert link.state is not HostState.SUSPECT or late, f"{link.host} is suspect for nothing"
        assert link.state is not HostState.DEAD or not link.flights
        assert all(state.flights[number] is flight for number, flight in link.flights.items())
    assert sum(len(link.flights) for link in state.links.values()) == len(state.flights)
    carried = {part.dispatch.number for flight in state.flights.values() for part in flight.parts if not part.settled}
    assert carried == set(state.dispatches), "an open dispatch has nothing under way, or the other way round"
    firsts = state.next_shipment
    hedges = sum(count for outcome, count in state.hedges.items() if outcome != "denied")
    assert hedges <= 0.1 * firsts + 1e-9
