"""Brings the control loop and hosts together: what moves knows becomes orders, what hosts report becomes its events.

`ControllerState.moving` is the one owner of where an expert shall be. A host that stays away, a plan, a person: each
of them only sets a goal for it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from types import MappingProxyType

from cluster.control.costs import costs_of, node_of
from cluster.control.draft import Replica
from cluster.control.fleet import Fleet, HostSpec, Load
from cluster.control.loop import Inputs, LoopState, Question, cooling_from, question_of, turn
from cluster.control.move_state import (
    Alarm,
    Goal,
    HostAway,
    Loaded,
    Loading,
    MoveEffect,
    MoveEvent,
    MoveState,
    NotLoaded,
    TimePassed,
    same_replicas,
)
from cluster.control.moves import resume, seen, step, to_hold
from cluster.control.pack import target_by_host
from cluster.control.plan import Outcome, Plan, PlanState, plan
from cluster.control.rehome import rehome
from cluster.control.replicas import Replicas
from cluster.control.state import Alarmed, ControllerState, Effect, HostState, LoadRead
from cluster.control.trust import doubt_load
from experts.placement import ComputeCost, ExpertKey

MOST_ALARMS = 20
UNKNOWN_COST = ComputeCost(per_expert_s=0.0, per_row_s=1.0)
"""Rows alone count where nobody has measured."""


def advance(state: ControllerState, now: float, effects: list[Effect]) -> ControllerState:
    """Take in what hosts said and that time passed, for whatever moves."""
    if not state.is_resumed:
        return state
    if state.moving.is_done:
        return state
    for event in (*_heard(state), TimePassed()):
        if isinstance(event, Loaded):
            state = _serves(state, event.replica)
        state = move(state, event, now, effects)
    return state


def resume_moves(state: ControllerState, now: float) -> ControllerState:
    """Every host that lives has said what it holds, or had the time to: go on where the last life stopped."""
    # What a host shall serve and does not hold, it is loading by itself.
    known = state.moving.published.keys()
    held = {name: (_held(host) | host.duty) & known for name, host in state.hosts.items()}
    moving = resume(state.moving, held, now, state.steering.limits)
    return _with_moving(replace(state, is_resumed=True, planning=cooling(state)), moving)


def plan_ahead(state: ControllerState, load: Load | None, now: float) -> Question | None:
    """What a turn with `load` would plan for; None when it would not plan. Its answer may be made on another thread."""
    if not _has_turns(state):
        return None
    return question_of(_loop_of(state), _inputs(state, load, now), now)


def take_turn(state: ControllerState, event: LoadRead, now: float, effects: list[Effect]) -> ControllerState:
    """One turn of the control loop."""
    if not _has_turns(state):
        return state
    journal, load = state.journal, event.load
    loop, decided = turn(_loop_of(state), _inputs(state, load, now), now, event.ahead)
    made = decided.plan
    if made is not None and made.is_change:
        journal = replace(journal, target=made.target)
    if loop.history is not journal.history:
        journal = replace(journal, history=loop.history)
    state = replace(
        state,
        journal=journal,
        planning=loop.planning,
        planned_at=loop.planned_at,
        load=load,
        load_missing=event.missing,
        plan=made or state.plan,
        decisions=state.decisions if made is None else _one_more(state.decisions, made.outcome),
    )
    return _with_moving(_alarm(state, decided.effects, now, effects), loop.moving)


def doubt_of(state: ControllerState) -> str:
    """Why the load is not acted upon; empty when it is."""
    return state.load_missing or doubt_load(
        state.load, state.moving.goal, state.ticked_at, state.steering.policy.max_age_s
    )


def preview(state: ControllerState, load: Load | None, now: float) -> Plan:
    """What would be planned now from `load`, or from what was measured last where that is None, without patience."""
    steering = state.steering
    planning = replace(state.planning, uneven_since=MappingProxyType({}), futile=MappingProxyType({}))
    policy = replace(steering.policy, settle_s=0.0)
    fleet = fleet_of(state)
    placement = {key: tuple(name for name in names if name in fleet.hosts) for key, names in state.moving.goal.items()}
    return plan(load or state.load, fleet, placement, policy, planning, now)[0]


def aim(state: ControllerState, target: Replicas, now: float, effects: list[Effect]) -> ControllerState:
    """Let experts be where `target` says, as far as hosts are there."""
    state = replace(state, journal=replace(state.journal, target=MappingProxyType(dict(target))))
    return move(state, Goal(replicas=_reachable(state)), now, effects)


def lose_hosts(state: ControllerState, names: Iterable[str], now: float, effects: list[Effect]) -> ControllerState:
    """Give what hosts had that stay away to others, until they are back."""
    names = sorted(names)
    state = replace(state, journal=replace(state.journal, away=state.journal.away | set(names)))
    for name in names:
        state = move(state, HostAway(name=name), now, effects)
    return move(state, Goal(replicas=_reachable(state)), now, effects)


def welcome_hosts(state: ControllerState, names: Iterable[str], now: float, effects: list[Effect]) -> ControllerState:
    """Hosts that were away are there: they get what is theirs, and keep what they still have of it."""
    names = frozenset(names)
    state = replace(state, journal=replace(state.journal, away=state.journal.away - names))
    state = move(state, Goal(replicas=_reachable(state)), now, effects)
    moving, limits = state.moving, state.steering.limits
    kept = {
        (key, name): Loading(source="", begun=now, deadline=now + limits.deadline_s(expert_bytes(state)))
        for key, where in moving.goal.items()
        for name in names.intersection(where)
        if key in _held(state.hosts[name]) and name not in moving.published[key]
    }
    loading = MappingProxyType({**kept, **moving.loading})
    return _with_moving(state, replace(moving, loading=loading))


def move(state: ControllerState, event: MoveEvent, now: float, effects: list[Effect]) -> ControllerState:
    """Let one event happen to what moves."""
    limits = state.steering.limits
    moving, more = step(state.moving, event, fleet_of(state), limits, now, down(state))
    if isinstance(event, Loaded) and (loading := state.moving.loading.get(event.replica)) is not None:
        state = replace(state, num_loaded=state.num_loaded + 1, move_s=state.move_s + (now - loading.begun))
    if isinstance(event, NotLoaded) and event.replica not in moving.loading:
        state = replace(state, num_not_loaded=state.num_not_loaded + (event.replica in state.moving.loading))
    planning = cooling_from(state.planning, state.moving.published, moving.published, now)
    state = state if planning is state.planning else replace(state, planning=planning)
    return _with_moving(_alarm(state, more, now, effects), moving)


def fleet_of(state: ControllerState) -> Fleet:
    """The hosts that are not away. Each has room for its share, the extra slots, and what it is given anyway; but what
    is more than a person may give it is to be given back, by those that stay, and while nobody is sick."""
    journal = state.journal
    given = Counter(name for names in state.moving.goal.values() for name in names)
    sick, room = _sick(state), room_of(state)
    most = room + state.steering.limits.staging
    costs = {name: cost or UNKNOWN_COST for name, cost in costs_of(state.hosts).items()}
    return Fleet.of(
        [
            HostSpec(
                name=name,
                slots=max(room, given[name]),
                surplus=0 if sick or name in journal.draining else max(0, given[name] - most),
                row_s=costs[name].per_row_s,
                touch_s=costs[name].per_expert_s,
                node=node_of(state.hosts[name]),
                draining=name in journal.draining,
                is_sick=name in sick,
            )
            for name in _present(state)
        ],
        expert_bytes(state),
    )


def room_of(state: ControllerState) -> int:
    """How many experts a host has room for: its share of those that there are, and the extra slots."""
    steering, goal, sick = state.steering, state.moving.goal, _sick(state)
    staying = [name for name in _present(state) if name not in state.journal.draining]
    # Sick hosts keep what they have, and may never take their share.
    kept = sum(name in sick for names in goal.values() for name in names)
    needed = len(goal) * min(steering.num_replicas, max(1, len(staying))) - kept
    share = math.ceil(max(0, needed) / max(1, len(staying) - len(sick)))
    return share + steering.extra_slots * len({layer for layer, _ in goal})


def _present(state: ControllerState) -> list[str]:
    return [name for name in state.hosts if name not in state.journal.away]


def _sick(state: ControllerState) -> set[str]:
    draining = state.journal.draining
    return {name for name in _present(state) if name not in draining and is_sick(state.hosts[name], state)}


def is_sick(host: HostState, state: ControllerState) -> bool:
    """Whether routers cannot use it."""
    return host.trouble.is_sick(state.ticked_at)


def down(state: ControllerState) -> frozenset[Replica]:
    """Published replicas that their hosts do not hold just now."""
    return frozenset(
        (key, name)
        for name, host in state.hosts.items()
        if not host.duty <= host.serving
        for key in host.duty - host.serving
    )


def cooling(state: ControllerState) -> PlanState:
    """What the plans of the history added and removed stays so for a while."""
    added: dict[Replica, float] = {}
    removed: dict[Replica, float] = {}
    for applied in state.journal.history:
        at = applied.at + (applied.took_s or 0.0)
        for key, before, after in applied.changes:
            added.update(((key, name), at) for name in after if name not in before)
            removed.update(((key, name), at) for name in before if name not in after)
    return replace(state.planning, added=MappingProxyType(added), removed=MappingProxyType(removed))


def expert_bytes(state: ControllerState) -> int:
    reports = [host.report for host in state.hosts.values() if host.report is not None and host.report.held]
    return max((report.held_bytes // len(report.held) for report in reports), default=0) or 1


def with_targets(state: ControllerState) -> ControllerState:
    """Tell each host's state what it shall hold and serve."""
    hold = target_by_host(to_hold(state.moving), state.hosts)
    duty = target_by_host(state.moving.published, state.hosts)
    hosts = {
        name: host
        if (host.target, host.duty) == (hold[name], duty[name])
        else replace(host, target=hold[name], duty=duty[name])
        for name, host in state.hosts.items()
    }
    return replace(state, hosts=MappingProxyType(hosts))


def _has_turns(state: ControllerState) -> bool:
    return state.is_resumed and bool(state.moving.goal)


def _loop_of(state: ControllerState) -> LoopState:
    return LoopState(
        # What a plan is remembered by is the epoch that was published when it was made.
        moving=replace(state.moving, epoch=state.journal.epoch),
        planning=state.planning,
        history=state.journal.history,
        planned_at=state.planned_at,
    )


def _inputs(state: ControllerState, load: Load | None, now: float) -> Inputs:
    return Inputs(
        load=load,
        fleet=fleet_of(state),
        policy=state.steering.policy,
        limits=state.steering.limits,
        rebalances=state.steering.rebalances and now >= state.journal.kept_until,
        down=down(state),
    )


def _one_more(decisions: Mapping[Outcome, int], outcome: Outcome) -> Mapping[Outcome, int]:
    return MappingProxyType({**decisions, outcome: decisions.get(outcome, 0) + 1})


def _with_moving(state: ControllerState, moving: MoveState) -> ControllerState:
    """The journal is written only for what the next life needs to know."""
    before = state.moving
    state = replace(state, moving=moving)
    same = (
        dict(before.loading) == dict(moving.loading)
        and dict(before.draining) == dict(moving.draining)
        and same_replicas(before.goal, moving.goal)
        and same_replicas(before.published, moving.published)
    )
    if same and state.journal.moves is not None:
        return state
    return with_targets(replace(state, journal=replace(state.journal, moves=moving)))


def _heard(state: ControllerState) -> Iterator[MoveEvent]:
    """What hosts' reports mean for the loads under way. A report counts once it is of the order that said so."""
    heard = {
        name: host.report
        for name in dict.fromkeys(name for _, name in state.moving.loading)
        if (host := state.hosts.get(name)) is not None
        and host.report is not None
        and host.ordered is not None
        and not host.lost
        and host.report.order == host.ordered.number
    }
    yield from seen(state.moving, {name: report.held for name, report in heard.items()})
    for key, name in state.moving.loading:
        if name in heard and key in heard[name].failed:
            yield NotLoaded(replica=(key, name), why=heard[name].problem)


def _serves(state: ControllerState, replica: Replica) -> ControllerState:
    """A host that has been given back what it had still has it, however little it had to hold when it told so."""
    key, name = replica
    host = state.hosts[name]
    if key in host.serving:
        return state
    return replace(state, hosts=MappingProxyType({**state.hosts, name: replace(host, serving=host.serving | {key})}))


def _reachable(state: ControllerState) -> Replicas:
    """The target, with the experts of hosts that are away given to those that stay."""
    journal = state.journal
    staying = [name for name in state.hosts if name not in journal.draining]
    heirs = [name for name in staying if not is_sick(state.hosts[name], state)]
    # Without any other, a sick one is better than none.
    heirs = heirs if set(heirs) - journal.away else staying
    return MappingProxyType(dict(rehome(journal.target, journal.away, heirs)))


def _alarm(state: ControllerState, moved: Iterable[MoveEffect], now: float, effects: list[Effect]) -> ControllerState:
    texts = [effect.text for effect in moved if isinstance(effect, Alarm)]
    if not texts:
        return state
    effects += [Alarmed(text=text) for text in texts]
    alarms = (*state.alarms, *((now, text) for text in texts))[-MOST_ALARMS:]
    return replace(state, alarms=alarms, num_given_up=state.num_given_up + len(texts))


def _held(host: HostState) -> frozenset[ExpertKey]:
    return frozenset() if host.report is None or host.lost else host.report.held


def started(target: Replicas) -> MoveState:
    """A cluster in which nothing has to move: hosts load what is theirs, and serve it."""
    return MoveState(published=target, goal=target)
