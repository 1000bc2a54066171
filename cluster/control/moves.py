"""Takes a placement to another one while it serves: load, publish, drain, evict. `step(state, event, now)`.

Make before break: a replica is given up only when every replica that the goal has of its expert serves, and never the
last one. Wherever it is interrupted, what is published is complete and held, and the state says how to go on.
Going back to an old placement, emptying a host and moving one expert by hand are goals like any other.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import replace
from types import MappingProxyType
from typing import TypeVar

from cluster.control.draft import Replica
from cluster.control.fleet import Fleet
from cluster.control.move_state import (
    Alarm,
    EvictReplica,
    Goal,
    HostAway,
    Limits,
    Loaded,
    Loading,
    LoadReplica,
    MoveEffect,
    MoveEvent,
    MoveState,
    NotLoaded,
    PublishReplicas,
    TimePassed,
    same_replicas,
)
from cluster.control.replicas import Replicas
from experts.errors import InvalidInput
from experts.placement import ExpertKey

V = TypeVar("V")


def moves(current: Replicas, target: Replicas, epoch: int = 0) -> MoveState:
    """The beginning of the way from `current` to `target`, which must name every expert; else InvalidInput."""
    return MoveState(published=_checked(current, current), goal=_checked(target, current), epoch=epoch)


def resume(state: MoveState, held: Mapping[str, Set[ExpertKey]], now: float, limits: Limits) -> MoveState:
    """Go on after a stop, with what hosts turn out to hold: `held` has every host that lives.

    Loads that ended meanwhile are served, others are begun anew; what is held and wanted by nobody is drained first,
    since routers may still use it.
    """
    there = {(key, name) for name, keys in held.items() for key in keys}
    published = {}
    for key, names in state.published.items():
        arrived = [name for (what, name) in state.loading if what == key and (key, name) in there]
        published[key] = tuple(dict.fromkeys(name for name in (*names, *arrived) if (key, name) in there))
    serving = {(key, name) for key, names in published.items() for name in names}
    changed = not same_replicas(published, state.published)
    return replace(
        state,
        published=MappingProxyType(published),
        epoch=state.epoch + changed,
        loading=MappingProxyType({}),
        draining=MappingProxyType(dict.fromkeys(sorted(there - serving), now + limits.drain_s)),
        next_load_at=float("-inf"),
    )


def step(
    state: MoveState, event: MoveEvent, fleet: Fleet, limits: Limits, now: float, down: Set[Replica] = frozenset()
) -> tuple[MoveState, list[MoveEffect]]:
    """Take one event in. Effects are to be carried out in order, after the new state was made durable.

    `down` are published replicas that cannot be used just now: nothing is given up that counts on them.
    """
    effects: list[MoveEffect] = []
    before = state.published
    match event:
        case Goal():
            state = _towards(state, event.replicas, effects)
        case Loaded():
            state = _serve(state, event.replica)
        case NotLoaded():
            state = _not_loaded(state, event, effects)
        case HostAway():
            state = _without_host(state, event.name)
        case TimePassed():
            pass
    state = _give_up_late(state, now, effects)
    state = _retire(state, fleet, limits, now, down)
    if not same_replicas(before, state.published):
        state = replace(state, epoch=state.epoch + 1)
        effects.append(PublishReplicas(epoch=state.epoch, replicas=state.published))
    state = _evict(state, now, effects)
    return _load(state, fleet, limits, now, down, effects), effects


def to_hold(state: MoveState) -> Replicas:
    """What hosts shall hold now, and load if they do not: what is published, comes, or must not be evicted yet."""
    held = dict(state.published)
    for key, name in (*state.loading, *state.draining):
        held[key] = (*held[key], name)
    return MappingProxyType(held)


def seen(state: MoveState, held: Mapping[str, Set[ExpertKey]]) -> list[Loaded]:
    """What hosts' reports of what they hold mean for the loads under way."""
    return [Loaded(replica=(key, name)) for key, name in state.loading if key in held.get(name, ())]


def _checked(replicas: Replicas, names_of: Replicas) -> Replicas:
    if replicas.keys() != names_of.keys():
        raise InvalidInput("target", sorted(replicas.keys() ^ names_of.keys())[:3], "must name every expert there is")
    for key, names in replicas.items():
        if not names or len(set(names)) < len(names):
            raise InvalidInput("target", {key: names}, "must give every expert at least one host, each host once")
    return replicas


def _towards(state: MoveState, goal: Replicas, effects: list[MoveEffect]) -> MoveState:
    _checked(goal, state.published)
    unwanted = [replica for replica in state.loading if replica[1] not in goal[replica[0]]]
    effects += [EvictReplica(replica=replica) for replica in unwanted]
    state = replace(state, goal=goal, loading=_without(state.loading, unwanted))
    # What drains but is wanted again is still there.
    back = [(key, name) for key, name in state.draining if name in goal[key]]
    published = dict(state.published)
    for key, name in back:
        published[key] = (*published[key], name)
    return replace(state, published=MappingProxyType(published), draining=_without(state.draining, back))


def _serve(state: MoveState, replica: Replica) -> MoveState:
    """What nobody waits for any more is not served: it was given up, and its host was told."""
    if replica not in state.loading:
        return state
    key, name = replica
    published = {**state.published, key: (*state.published[key], name)}
    return replace(state, published=MappingProxyType(published), loading=_without(state.loading, (replica,)))


def _not_loaded(state: MoveState, event: NotLoaded, effects: list[MoveEffect]) -> MoveState:
    loading = state.loading.get(event.replica)
    if loading is None:
        return state
    if loading.source:
        # The next try is from disk.
        again = replace(loading, source="")
        effects.append(LoadReplica(replica=event.replica, source=""))
        return replace(state, loading=MappingProxyType({**state.loading, event.replica: again}))
    effects.append(Alarm(text=f"{_told(event.replica)} could not be loaded, and is given up: {event.why}"))
    return _abandon(state, (event.replica,))


def _give_up_late(state: MoveState, now: float, effects: list[MoveEffect]) -> MoveState:
    late = [replica for replica, loading in state.loading.items() if now >= loading.deadline]
    for replica in late:
        effects.append(EvictReplica(replica=replica))
        effects.append(Alarm(text=f"{_told(replica)} did not come in time, and is given up"))
    return _abandon(state, late)


def _abandon(state: MoveState, replicas: Sequence[Replica]) -> MoveState:
    """Take `replicas` out of the goal. An expert that would lose its last new host stays where it is."""
    if not replicas:
        return state
    goal = dict(state.goal)
    for key, name in replicas:
        rest = tuple(other for other in goal[key] if other != name)
        goal[key] = rest or state.published[key] or goal[key]
    loading = _without(state.loading, replicas)
    return replace(state, goal=MappingProxyType(goal), loading=loading)


def _without_host(state: MoveState, name: str) -> MoveState:
    def rest(replicas: Replicas, *, even_last: bool) -> Replicas:
        kept = {key: tuple(host for host in names if host != name) for key, names in replicas.items()}
        return MappingProxyType({key: names if names or even_last else replicas[key] for key, names in kept.items()})

    # A goal without any host would be reached at once; the next plan gives the expert a new one.
    return replace(
        state,
        published=rest(state.published, even_last=True),
        goal=rest(state.goal, even_last=False),
        loading=_without(state.loading, [replica for replica in state.loading if replica[1] == name]),
        draining=_without(state.draining, [replica for replica in state.draining if replica[1] == name]),
    )


def _retire(state: MoveState, fleet: Fleet, limits: Limits, now: float, down: Set[Replica]) -> MoveState:
    """Stop publishing what the goal does not have, of experts whose every wanted replica serves; then, of hosts that
    are too full for what they shall load, what others serve too."""
    published = dict(state.published)
    leaving: list[Replica] = []
    for key, names in state.published.items():
        wanted = state.goal[key]
        if names is not wanted and set(wanted) <= set(names) and not any((key, name) in down for name in wanted):
            leaving += [(key, name) for name in names if name not in wanted]
            published[key] = wanted
    for key, name in _in_the_way(replace(state, published=published), fleet, limits, down):
        if _others_serve(key, name, published[key], down):
            published[key] = tuple(other for other in published[key] if other != name)
            leaving.append((key, name))
    if not leaving and all(published[key] is names for key, names in state.published.items()):
        return state
    draining = {**state.draining, **dict.fromkeys(leaving, now + limits.drain_s)}
    return replace(state, published=MappingProxyType(published), draining=MappingProxyType(draining))


def _others_serve(key: ExpertKey, name: str, names: Sequence[str], down: Set[Replica]) -> bool:
    return any(other != name and (key, other) not in down for other in names)


def _in_the_way(state: MoveState, fleet: Fleet, limits: Limits, down: Set[Replica]) -> list[Replica]:
    """Of each host without room for its next load, one replica that shall go and that others serve meanwhile."""
    missing = _missing(state, limits)
    if not missing:
        return []
    used = _used(state)
    full = {
        name for _, name in missing if name in fleet.hosts and used[name] >= fleet.hosts[name].slots + limits.staging
    }
    full -= {name for _, name in (*state.draining, *state.loading)}
    found: dict[str, Replica] = {}
    for key, names in state.published.items():
        for name in names:
            is_unwanted = name in full and name not in state.goal[key]
            if is_unwanted and name not in found and _others_serve(key, name, names, down):
                found[name] = (key, name)
    return list(found.values())


def _evict(state: MoveState, now: float, effects: list[MoveEffect]) -> MoveState:
    due = [replica for replica, at in state.draining.items() if now >= at]
    effects += [EvictReplica(replica=replica) for replica in due]
    return replace(state, draining=_without(state.draining, due)) if due else state


def _load(
    state: MoveState, fleet: Fleet, limits: Limits, now: float, down: Set[Replica], effects: list[MoveEffect]
) -> MoveState:
    missing = _missing(state, limits)
    if not missing:
        return state
    used = _used(state)
    loaders = {name for _, name in state.loading}
    senders = {loading.source for loading in state.loading.values()} - {""}
    loading = dict(state.loading)
    next_at = max(state.next_load_at, now)
    stuck = not state.loading and not state.draining
    for replica in missing:
        key, name = replica
        is_short = _is_short(state, key, limits)
        if not is_short and (
            any(_is_short(state, other, limits) for other, _ in loading)
            or len(loading) >= limits.loads_at_once
            or next_at > now
        ):
            stuck = False
            break
        host = fleet.hosts.get(name)
        busy = loaders if is_short else loaders | senders
        if host is None or host.is_sick or name in busy or used[name] >= host.slots + limits.staging:
            continue
        # Who is mended by a replica may send another one meanwhile.
        silent = (senders if is_short else busy) | {host for what, host in down if what == key} | {name}
        source = _source(state, key, silent, fleet)
        loading[replica] = Loading(source=source, begun=now, deadline=now + limits.deadline_s(fleet.expert_bytes))
        effects.append(LoadReplica(replica=replica, source=source))
        used[name] += 1
        loaders.add(name)
        senders |= {source} - {""}
        next_at += fleet.expert_bytes / limits.bytes_per_s
        stuck = False
    if stuck:
        given_up = _abandon(state, missing)
        if not same_replicas(given_up.goal, state.goal):
            told = f"{len(missing)} replicas find no room, and are given up: {_told(missing[0])} first"
            effects.append(Alarm(text=told))
        return given_up
    return replace(state, loading=MappingProxyType(loading), next_load_at=next_at)


def _is_short(state: MoveState, key: ExpertKey, limits: Limits) -> bool:
    """Whether an expert has fewer replicas than it must have, where there are hosts enough for them."""
    return len(state.published[key]) < min(limits.min_replicas, len(state.goal[key]))


def _missing(state: MoveState, limits: Limits) -> list[Replica]:
    """Experts that nobody serves come first, then those with too few replicas. One that drains is loaded again only
    when it is gone."""
    missing = [
        (key, name)
        for key, names in state.goal.items()
        if names is not state.published[key]
        for name in names
        if name not in state.published[key] and (key, name) not in state.loading and (key, name) not in state.draining
    ]
    return sorted(missing, key=lambda one: (bool(state.published[one[0]]), not _is_short(state, one[0], limits)))


def _source(state: MoveState, key: ExpertKey, busy: set[str], fleet: Fleet) -> str:
    """A host that has it and sends to nobody else; the disk where there is none."""
    able = (name for name in state.published[key] if name not in busy and name in fleet.hosts)
    return next((name for name in able if not fleet.hosts[name].is_sick), "")


def _used(state: MoveState) -> Counter[str]:
    used = Counter(name for names in state.published.values() for name in names)
    used.update(name for _, name in (*state.loading, *state.draining))
    return used


def _without(mapping: Mapping[Replica, V], replicas: Iterable[Replica]) -> Mapping[Replica, V]:
    gone = set(replicas)
    return MappingProxyType({key: value for key, value in mapping.items() if key not in gone}) if gone else mapping


def _told(replica: Replica) -> str:
    (layer, expert), name = replica
    return f"expert {expert} of layer {layer} on host {name}"
