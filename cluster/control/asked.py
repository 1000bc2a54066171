"""What persons ask of the placement: checked, and turned into goals. Raises InvalidInput and changes nothing then."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

from cluster.control.hosts import KEPT_S, ask_hosts, drain_hosts, kept_size
from cluster.control.plan import Plan
from cluster.control.remembered import remembered
from cluster.control.replicas import Replicas
from cluster.control.state import (
    Asked,
    ControllerState,
    Effect,
    HostDrainAsked,
    HostsAsked,
    MoveAsked,
    PlanAsked,
    RollbackAsked,
    TargetAsked,
)
from cluster.control.steer import aim, fleet_of, preview, room_of
from experts.errors import InvalidInput
from experts.placement import ExpertKey


def ask(state: ControllerState, event: Asked, now: float, effects: list[Effect]) -> ControllerState:
    """Begin what is asked for."""
    if not state.is_resumed:
        raise InvalidInput("controller", "starting", "must have heard of its hosts before it can move anything")
    match event:
        case PlanAsked(load=load):
            made = preview(state, load, now)
            if not made.is_change:
                return state
            # By the measured load, the loop would have come to the same.
            kept_s = 0.0 if load is None else KEPT_S
            return _apply(state, made.target, f"asked for: {made.why}", now, effects, made, kept_s)
        case TargetAsked(replicas=target):
            _check_target(state, target)
            return _apply(state, target, "a plan that was handed in", now, effects)
        case MoveAsked(key=key, to=to):
            return _apply(state, _moved(state, key, to), "a move that was asked for", now, effects)
        case HostDrainAsked(name=name):
            return _drain(state, name, now, effects)
        case HostsAsked(number=number):
            return ask_hosts(state, number, now, effects)
        case RollbackAsked(epoch=epoch):
            return _roll_back(state, epoch, now, effects)


def _apply(
    state: ControllerState,
    target: Replicas,
    why: str,
    now: float,
    effects: list[Effect],
    made: Plan | None = None,
    kept_s: float = KEPT_S,
) -> ControllerState:
    state = remembered(state, target, why, now, made)
    journal = replace(state.journal, kept_until=max(state.journal.kept_until, now + kept_s))
    return aim(replace(state, journal=journal), target, now, effects)


def _check_target(state: ControllerState, target: Mapping[ExpertKey, tuple[str, ...]]) -> None:
    goal = state.moving.goal
    if target.keys() != goal.keys():
        strange = sorted(target.keys() ^ goal.keys())[:3]
        raise InvalidInput("plan", f"layer and expert {strange}", "must name every expert that there is, and no other")
    fleet = fleet_of(state)
    least = min(state.steering.num_replicas, len(fleet.staying))
    for (layer, expert), names in target.items():
        where = f"expert {expert} of layer {layer} on {list(names)}"
        if len(set(names)) < len(names) or len(names) < least:
            raise InvalidInput("plan", where, f"must give every expert at least {least} hosts, each of them once")
        if not set(names) <= {*fleet.able, *set(fleet.staying).intersection(goal[layer, expert])}:
            raise InvalidInput(
                "plan", where, f"must name hosts that are there, stay and are not sick: {', '.join(fleet.able)}"
            )
    used = Counter(name for names in target.values() for name in names)
    for name, count in used.items():
        if count > fleet.hosts[name].slots:
            raise InvalidInput("plan", f"{count} experts on {name}", f"must fit its {fleet.hosts[name].slots} slots")


def _moved(state: ControllerState, key: ExpertKey, to: str) -> Replicas:
    target, fleet = state.journal.target, fleet_of(state)
    if key not in target:
        raise InvalidInput("expert", f"layer {key[0]}, expert {key[1]}", "must be one that the model has")
    _check_host(state, "to", to)
    if to not in fleet.able:
        raise InvalidInput("to", to, "must be a host that is there, stays, and can be used by all routers")
    names = target[key]
    if to in names:
        raise InvalidInput("to", to, "must not have the expert already")
    used = Counter(name for where in target.values() for name in where)
    gives = max(names, key=lambda name: (used[name], name))
    room = room_of(state) + state.steering.limits.staging
    if used[to] >= room:
        raise InvalidInput("to", to, f"must have a free slot; all {room} are taken")
    return {**target, key: tuple(to if name == gives else name for name in names)}


def _drain(state: ControllerState, name: str, now: float, effects: list[Effect]) -> ControllerState:
    _check_host(state, "host", name)
    if name in state.journal.draining:
        return state
    if not set(state.hosts) - state.journal.draining - state.journal.away - {name}:
        raise InvalidInput("host", name, "must not be the last one")
    return drain_hosts(kept_size(state, now), [name], now, effects)


def _roll_back(state: ControllerState, epoch: int | None, now: float, effects: list[Effect]) -> ControllerState:
    history = state.journal.history
    open_ones = [number for number, applied in enumerate(history) if not applied.is_undone]
    undone = open_ones[-1:] if epoch is None else [number for number in open_ones if history[number].epoch >= epoch]
    if not undone:
        told = "the last plan" if epoch is None else epoch
        raise InvalidInput("epoch", told, "must be one after which a plan was applied; see herd plan --history")
    target = dict(state.journal.target)
    for number in reversed(undone):
        target.update((key, before) for key, before, _ in history[number].changes)
    staying = set(state.hosts) - state.journal.draining
    for (layer, expert), names in target.items():
        if not staying.issuperset(names):
            where = f"expert {expert} of layer {layer} on {list(names)}"
            raise InvalidInput("epoch", where, "must not need a host that was drained")
    marked = tuple(replace(one, is_undone=one.is_undone or number in undone) for number, one in enumerate(history))
    state = replace(state, journal=replace(state.journal, history=marked, kept_until=now + KEPT_S))
    why = f"rolled back to before epoch {history[undone[0]].epoch + 1}"
    return aim(remembered(state, target, why, now, is_undone=True), target, now, effects)


def _check_host(state: ControllerState, field: str, name: str) -> None:
    if name not in state.hosts:
        raise InvalidInput(field, name, f"must be one of {', '.join(state.hosts)}")
