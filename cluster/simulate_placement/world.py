"""A cluster that is not there: hosts that load and evict as they are told, and a load that is counted with its noise.

The control loop is the real one. Time passes in ticks; what is loaded by the end of a tick serves from then on.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field, replace

from cluster.control.draft import Replica
from cluster.control.fleet import Fleet, Load
from cluster.control.loop import Inputs, LoopState, imbalances, told, turn
from cluster.control.move_state import (
    Alarm,
    EvictReplica,
    Limits,
    Loaded,
    LoadReplica,
    MoveEffect,
    MoveEvent,
    MoveState,
    TimePassed,
)
from cluster.control.plan import Plan, Policy
from cluster.control.replicas import Replicas
from cluster.simulate_placement.loads import Rows, Source
from experts.placement import ExpertKey


@dataclass(frozen=True, kw_only=True)
class Sight:
    """A tick as it went. `imbalance` is of the true load, layer by layer; `unserved` is the share of rows whose expert
    no host had; `waiting` the share of hosts' time that went by until the slowest of a layer was done."""

    at: float
    load: Load
    imbalance: dict[int, float]
    unserved: float
    waiting: float
    loads: int
    loaded_bytes: int
    under_way: int
    epoch: int
    plan: Plan | None
    alarms: tuple[str, ...]


@dataclass
class World:
    """`fleet` may be changed between ticks: hosts that vanish take what they held along."""

    source: Source
    fleet: Fleet
    policy: Policy
    limits: Limits
    rng: random.Random
    start: Replicas
    tick_s: float = 5.0
    disk_factor: float = 4.0
    """A load from disk takes so many times as long as one from a host."""
    now: float = 0.0
    state: LoopState = field(init=False)
    held: dict[str, set[ExpertKey]] = field(init=False)
    loading: dict[Replica, float] = field(default_factory=dict)
    """When each load will be done."""

    def __post_init__(self) -> None:
        self.state = LoopState(moving=MoveState(published=self.start, goal=self.start))
        self.held = {name: set() for name in self.fleet.hosts}
        for key, names in self.start.items():
            for name in names:
                self.held[name].add(key)

    def tick(self) -> Sight | None:
        """Let one tick pass; None when the load has ended."""
        rows = self.source.step(self.tick_s)
        if rows is None:
            return None
        self.now += self.tick_s
        self._lose_hosts()
        effects = self._arrivals()
        self.state, decided = turn(self.state, self._inputs(rows), self.now)
        effects += decided.effects
        self._carry_out(decided.effects, self.now)
        return self._sight(rows, effects, decided.plan)

    def measure(self, rows: Rows) -> Load | None:
        """Rows as counted: so many are few that chance shows."""
        gauss, window_s = self.rng.gauss, self.tick_s
        counted = {key: max(0.0, rate + gauss(0.0, 1.0) * math.sqrt(rate / window_s)) for key, rate in rows.items()}
        return Load(at=self.now, rows=counted, window_s=window_s)

    def _inputs(self, rows: Rows) -> Inputs:
        return Inputs(load=self.measure(rows), fleet=self.fleet, policy=self.policy, limits=self.limits)

    def _lose_hosts(self) -> None:
        for name in self.held.keys() - self.fleet.hosts.keys():
            del self.held[name]
        for name in self.fleet.hosts:
            self.held.setdefault(name, set())
        self.loading = {replica: at for replica, at in self.loading.items() if replica[1] in self.held}

    def _arrivals(self) -> list[MoveEffect]:
        """What hosts say and time brings during the tick that ends now."""
        effects: list[MoveEffect] = []
        at = self.now - self.tick_s
        while at < self.now and not self.state.moving.is_done:
            at = self._next_event(at)
            events: list[MoveEvent] = [
                Loaded(replica=replica) for replica, due in sorted(self.loading.items()) if due <= at
            ]
            for event in (*events, TimePassed()):
                if isinstance(event, Loaded):
                    if event.replica not in self.loading:
                        # What came before it in this very moment had it given up.
                        continue
                    del self.loading[event.replica]
                    self.held[event.replica[1]].add(event.replica[0])
                self.state, more = told(self.state, event, self.fleet, self.limits, at)
                self._carry_out(more, at)
                effects += more
        return effects

    def _next_event(self, at: float) -> float:
        """When a load ends, the next may begin, a replica has drained or a load is given up; the tick's end at most."""
        moving = self.state.moving
        times = [moving.next_load_at, *self.loading.values(), *moving.draining.values()]
        times += [loading.deadline for loading in moving.loading.values()]
        return min([self.now, *(time for time in times if time > at)])

    def _carry_out(self, effects: tuple[MoveEffect, ...], now: float) -> None:
        for effect in effects:
            if isinstance(effect, LoadReplica):
                seconds = self.fleet.expert_bytes / self.limits.bytes_per_s
                self.loading[effect.replica] = now + seconds * (1.0 if effect.source else self.disk_factor)
            elif isinstance(effect, EvictReplica):
                key, name = effect.replica
                self.loading.pop(effect.replica, None)
                self.held.get(name, set()).discard(key)

    def _sight(self, rows: Rows, effects: list[MoveEffect], plan: Plan | None) -> Sight:
        published = self.state.moving.published
        load = Load(at=self.now, rows=rows)
        worst = imbalances(load, self.fleet, published)
        lost = sum(rate for key, rate in rows.items() if not published[key])
        loads = sum(isinstance(effect, LoadReplica) for effect in effects)
        return Sight(
            at=self.now,
            load=load,
            imbalance=worst,
            unserved=lost / max(sum(rows.values()), 1e-300),
            waiting=1.0 - len(worst) / max(sum(worst.values()), 1e-300),
            loads=loads,
            loaded_bytes=loads * self.fleet.expert_bytes,
            under_way=len(self.loading),
            epoch=self.state.moving.epoch,
            plan=plan,
            alarms=tuple(effect.text for effect in effects if isinstance(effect, Alarm)),
        )


def with_draining(fleet: Fleet, name: str) -> Fleet:
    """`fleet` with host `name` to be emptied."""
    hosts = [replace(host, draining=host.draining or host.name == name) for host in fleet.hosts.values()]
    return Fleet.of(hosts, fleet.expert_bytes)
