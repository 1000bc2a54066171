"""How many hosts there are: added and drained while they serve, by persons or by their use; and what new ones get."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from types import MappingProxyType

from cluster.control.fleet import Load
from cluster.control.remembered import remembered
from cluster.control.scale import ScaleState, size
from cluster.control.share import with_share
from cluster.control.state import Alarmed, AskRoom, ControllerState, Effect, EndHost, HostState, LoadRead
from cluster.control.steer import aim, fleet_of, preview, take_turn
from cluster.control.trust import doubt_load
from experts.errors import InvalidInput
from experts.placement import ExpertKey
from experts.reports import MemberKind

MAX_HOSTS = 4096
KEPT_S = 600.0
"""What a person asked for, the load leaves alone for so long."""
EVEN_ROWS = 1000.0
"""Per second and expert, where nobody has measured any: so many that no chance is seen in them."""


def ask_hosts(state: ControllerState, number: int, now: float, effects: list[Effect]) -> ControllerState:
    """A person wants `number` hosts. Raises InvalidInput."""
    least = state.steering.num_replicas
    if not state.moving.goal:
        raise InvalidInput("hosts", number, "must not be asked for where routers compute experts themselves")
    if not least <= number <= MAX_HOSTS:
        raise InvalidInput("hosts", number, f"must be from {least}, the replicas of each expert, to {MAX_HOSTS}")
    return _resize(kept_size(state, now), number, now, effects)


def kept_size(state: ControllerState, now: float) -> ControllerState:
    """A person has decided how many hosts there are: the load does not, for a while."""
    return replace(state, journal=replace(state.journal, sized_until=now + KEPT_S))


def follow_use(state: ControllerState, load: Load | None, now: float, effects: list[Effect]) -> ControllerState:
    """Add or drain hosts by how busy they are and how long requests wait, where that is allowed.

    Nothing is decided, and whatever lasted begins anew, while hosts come, leave or are away, and while anything that
    it takes is not known.
    """
    scaling, journal = state.steering.scaling, state.journal
    if scaling is None or not state.is_resumed:
        return state
    settled = not journal.away and not journal.draining & state.hosts.keys() and now >= journal.sized_until
    doubt = doubt_load(load, state.moving.goal, now, state.steering.policy.max_age_s)
    if load is None or doubt or not settled or state.draining:
        return replace(state, sizing=ScaleState())
    fleet = fleet_of(state)
    held = Counter(name for names in state.moving.goal.values() for name in names)
    # Hosts have room for what must be, however few they are, down to the number that the cluster began with.
    wanted, sizing = size(_with_idle(state, _with_wait(state, load)), fleet, held, 0, scaling, state.sizing, now)
    state = replace(state, sizing=sizing)
    if wanted.hosts <= len(fleet.staying) and not wanted.drain:
        return state
    effects.append(Alarmed(text=wanted.why))
    state = replace(state, sizing=ScaleState())
    if wanted.drain:
        return drain_hosts(state, wanted.drain, now, effects)
    return _resize(state, wanted.hosts, now, effects)


def welcome(state: ControllerState, now: float, effects: list[Effect]) -> ControllerState:
    """Give hosts that were added their share of the experts, once they are there."""
    if not state.is_resumed:
        return state
    fleet = fleet_of(state)
    used = {name for names in state.moving.goal.values() for name in names}
    new = [name for name in state.journal.added if name in fleet.able and name not in used | state.welcomed]
    if not new:
        return state
    state = replace(state, welcomed=state.welcomed | set(new))
    load = _known_load(state, now)
    made = preview(state, load, now)
    target = made.target
    for name in new:
        target = with_share(target, name, fleet, load.rows)
    if target == state.moving.goal:
        return state
    state = remembered(state, target, f"{', '.join(new)} came", now, made)
    return aim(state, target, now, effects)


def drain_hosts(state: ControllerState, names: Iterable[str], now: float, effects: list[Effect]) -> ControllerState:
    """Empty hosts, and end them then. Those that never came are not waited for any more."""
    names = frozenset(names)
    coming = {name for name in names if _is_coming(state, name)}
    state = _forget(state, coming, effects)
    journal, leaving = state.journal, names - coming
    if leaving:
        # Others have what a host had that is away; it need not come back.
        target = state.moving.goal if leaving & journal.away else journal.target
        journal = replace(journal, draining=journal.draining | leaving, away=journal.away - leaving, target=target)
        again = LoadRead(load=state.load, missing=state.load_missing)
        state = take_turn(replace(state, journal=journal), again, now, effects)
    effects.append(AskRoom(num_hosts=len(_wanted(state))))
    return state


def _resize(state: ControllerState, number: int, now: float, effects: list[Effect]) -> ControllerState:
    missing = number - len(_wanted(state))
    if missing > 0:
        effects.append(AskRoom(num_hosts=number))
        return _grow(state, missing, now)
    leavers = sorted(_wanted(state), key=lambda name: _worth(state, name))[: max(0, -missing)]
    return drain_hosts(state, leavers, now, effects) if leavers else state


def _wanted(state: ControllerState) -> list[str]:
    return [name for name in state.hosts if name not in state.journal.draining]


def _worth(state: ControllerState, name: str) -> tuple[bool, bool, float, int]:
    """What leaves first: who never came, who is away, who does least, who came last."""
    goal, trusted = state.moving.goal, state.planning.trusted
    known = trusted is not None and trusted.rows.keys() == goal.keys() and any(trusted.rows.values())
    rows = trusted.rows if trusted is not None and known else dict.fromkeys(goal, 1.0)
    does = sum(rows[key] / len(names) for key, names in goal.items() if name in names)
    return not _is_coming(state, name), name not in state.journal.away, does, -list(state.hosts).index(name)


def _is_coming(state: ControllerState, name: str) -> bool:
    """Whether it was added, and was never there in this life of the controller."""
    journal, host = state.journal, state.hosts[name]
    return name in journal.added and name in journal.away and host.report is None


def _grow(state: ControllerState, number: int, now: float) -> ControllerState:
    journal, taken = state.journal, state.hosts.keys() | state.journal.draining
    names: list[str] = []
    next_host = journal.next_host
    while len(names) < number:
        if (name := f"host-{next_host}") not in taken:
            names.append(name)
        next_host += 1
    nothing: frozenset[ExpertKey] = frozenset()
    host = HostState(target=nothing, duty=nothing, start_at=now, heard_at=now)
    journal = replace(journal, added=(*journal.added, *names), next_host=next_host, away=journal.away.union(names))
    hosts = MappingProxyType({**state.hosts, **dict.fromkeys(names, host)})
    return replace(state, journal=journal, hosts=hosts)


def _forget(state: ControllerState, names: Iterable[str], effects: list[Effect]) -> ControllerState:
    for name in sorted(names):
        effects.append(EndHost(name=name))
        state = without_host(state, name)
    return state


def without_host(state: ControllerState, name: str) -> ControllerState:
    """Host `name` is no part of the cluster any more. One that was there at the start is not started again by a next
    life; names of others are never used again."""
    hosts = MappingProxyType({key: one for key, one in state.hosts.items() if key != name})
    journal = state.journal
    if name in journal.added:
        added = tuple(other for other in journal.added if other != name)
        journal = replace(journal, added=added, draining=journal.draining - {name}, away=journal.away - {name})
    return replace(state, journal=journal, hosts=hosts)


def _known_load(state: ControllerState, now: float) -> Load:
    """The load that was trusted last, if it is fresh; else as if all experts were used alike."""
    trusted, goal = state.planning.trusted, state.moving.goal
    fresh = not doubt_load(trusted, goal, now, state.steering.policy.max_age_s)
    if trusted is not None and fresh and any(trusted.rows.values()):
        return trusted
    return Load(at=now, rows=dict.fromkeys(goal, EVEN_ROWS))


def _with_wait(state: ControllerState, load: Load) -> Load:
    """What routers say of their queues, where the load says nothing; nobody knows while one of them does not say."""
    if load.queue_s is not None:
        return load
    reports = [member.report for member in state.members.values() if member.report.kind is MemberKind.ROUTER]
    waits = [report.longest_wait_s for report in reports if report.longest_wait_s is not None]
    return replace(load, queue_s=max(waits) if waits and len(waits) == len(reports) else None)


def _with_idle(state: ControllerState, load: Load) -> Load:
    """Of hosts that hold nothing the load says nothing: they are not busy."""
    idle = [name for name, host in state.hosts.items() if host.report is not None and not host.report.held]
    return replace(load, busy={**dict.fromkeys(idle, 0.0), **load.busy})
