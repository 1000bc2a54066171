"""One turn of the control loop: load in, orders out. Plans when nothing moves, and now and then when something does.

Keeps beside every plan that it applied what was predicted and what came of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import NamedTuple

from cluster.control.balance import LayerBalance
from cluster.control.draft import Replica
from cluster.control.fleet import Fleet, Load
from cluster.control.move_state import Goal, HostAway, Limits, MoveEffect, MoveEvent, MoveState, TimePassed
from cluster.control.moves import step
from cluster.control.plan import Plan, PlanState, Policy, plan
from cluster.control.replicas import Replicas
from cluster.control.trust import doubt_load
from experts.placement import ExpertKey

HISTORY = 50
REPLAN_S = 10.0
"""Long moves are thought over so often: the load may not be any more what they were for."""


@dataclass(frozen=True, kw_only=True)
class Applied:
    """A plan that was begun `at`, while the placement was that of `epoch`. Balances are mean over slowest host, of the
    worst layer that it changed; `realised` is measured once all its moves are done, None until then.

    `changes` are the experts that it changed, with their hosts before and after. `is_undone`: it was rolled back, or
    rolled back others.
    """

    at: float
    epoch: int
    loads: int
    moved_bytes: int
    before: float | None
    predicted: float | None
    why: str
    realised: float | None = None
    took_s: float | None = None
    changes: tuple[tuple[ExpertKey, tuple[str, ...], tuple[str, ...]], ...] = ()
    is_undone: bool = False


@dataclass(frozen=True, kw_only=True)
class LoopState:
    """All that the loop carries from turn to turn."""

    moving: MoveState
    planning: PlanState = field(default_factory=PlanState)
    history: tuple[Applied, ...] = ()
    planned_at: float = float("-inf")


@dataclass(frozen=True, kw_only=True)
class Turn:
    """What one turn decided: `plan` is None while replicas move and nothing speaks against it."""

    effects: tuple[MoveEffect, ...]
    plan: Plan | None = None


@dataclass(frozen=True, kw_only=True)
class Question:
    """All that a plan depends on, but the time. To answer it may take long, and touches nothing else."""

    load: Load | None
    fleet: Fleet
    placement: Replicas
    policy: Policy
    planning: PlanState

    def answer(self, now: float) -> Planned:
        return Planned(self, *plan(self.load, self.fleet, self.placement, self.policy, self.planning, now))


class Planned(NamedTuple):
    """A plan, and what it was made for."""

    question: Question
    plan: Plan
    planning: PlanState


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """The load and the fleet as they are now; hosts that are not in `fleet` are gone.

    Without `rebalances` only what has to be is planned. `down` is as in `moves.step`.
    """

    load: Load | None
    fleet: Fleet
    policy: Policy
    limits: Limits
    rebalances: bool = True
    down: Set[Replica] = frozenset()


def question_of(state: LoopState, inputs: Inputs, now: float) -> Question | None:
    """What a turn would have to plan for; None when it would not plan."""
    return _question(_prepared(state, inputs, now, []), inputs, now)


def turn(state: LoopState, inputs: Inputs, now: float, ahead: Planned | None = None) -> tuple[LoopState, Turn]:
    """Take a turn. Where `ahead` is of a state that has passed meanwhile, nothing is planned before the next one."""
    effects: list[MoveEffect] = []
    state = _prepared(state, inputs, now, effects)
    question = _question(state, inputs, now)
    if question is None or (ahead is not None and ahead.question != question):
        return state, Turn(effects=tuple(effects))
    _, made, planning = ahead or question.answer(now)
    state = replace(state, planning=planning, planned_at=now)
    if made.is_change:
        state = remember(state, _applied(made, state.moving, now))
        state = _move(state, Goal(replicas=made.target), inputs, now, effects)
    return state, Turn(effects=tuple(effects), plan=made)


def _prepared(state: LoopState, inputs: Inputs, now: float, effects: list[MoveEffect]) -> LoopState:
    """`state` with what is gone, late or done by now."""
    for name in sorted(_gone(state.moving, inputs.fleet)):
        state = _move(state, HostAway(name=name), inputs, now, effects)
    state = _move(state, TimePassed(), inputs, now, effects)
    return _realise(state, inputs.load, inputs.fleet, inputs.policy, now)


def _question(state: LoopState, inputs: Inputs, now: float) -> Question | None:
    is_due = state.moving.is_done or now - state.planned_at >= REPLAN_S
    if not (_is_wrong(state.moving, inputs.fleet) or (inputs.rebalances and is_due)):
        return None
    return Question(
        load=inputs.load if inputs.rebalances else None,
        fleet=inputs.fleet,
        placement=_live(state.moving, inputs.fleet),
        policy=inputs.policy,
        planning=state.planning,
    )


def remember(state: LoopState, applied: Applied) -> LoopState:
    """Add to the history, which is bounded."""
    return replace(state, history=(*state.history, applied)[-HISTORY:])


def changes_of(before: Replicas, after: Replicas) -> tuple[tuple[ExpertKey, tuple[str, ...], tuple[str, ...]], ...]:
    """Experts whose hosts differ, in whatever order they are named."""
    return tuple((key, before[key], after[key]) for key in sorted(before) if set(before[key]) != set(after[key]))


def told(
    state: LoopState, event: MoveEvent, fleet: Fleet, limits: Limits, now: float
) -> tuple[LoopState, tuple[MoveEffect, ...]]:
    """Take in what a host said about a load, or a goal that a person set."""
    moving, effects = step(state.moving, event, fleet, limits, now)
    planning = cooling_from(state.planning, state.moving.published, moving.published, now)
    return replace(state, moving=moving, planning=planning), tuple(effects)


def _move(state: LoopState, event: MoveEvent, inputs: Inputs, now: float, effects: list[MoveEffect]) -> LoopState:
    moving, more = step(state.moving, event, inputs.fleet, inputs.limits, now, inputs.down)
    effects += more
    planning = cooling_from(state.planning, state.moving.published, moving.published, now)
    return replace(state, moving=moving, planning=planning)


def cooling_from(planning: PlanState, before: Replicas, after: Replicas, now: float) -> PlanState:
    """What a plan adds or removes cools down from when it is published: loads and drains take their time."""
    if before is after:
        return planning

    def anew(times: Mapping[Replica, float]) -> Mapping[Replica, float]:
        changed = [(key, name) for key, name in times if (name in before[key]) != (name in after[key])]
        return MappingProxyType({**times, **dict.fromkeys(changed, now)}) if changed else times

    added, removed = anew(planning.added), anew(planning.removed)
    if added is planning.added and removed is planning.removed:
        return planning
    return replace(planning, added=added, removed=removed)


def _gone(moving: MoveState, fleet: Fleet) -> set[str]:
    named = {name for names in moving.published.values() for name in names}
    named |= {name for _, name in (*moving.loading, *moving.draining)}
    return named - fleet.hosts.keys()


def _is_wrong(moving: MoveState, fleet: Fleet) -> bool:
    """Whether the goal has an expert nowhere, or on a host that is gone or leaves."""
    staying = frozenset(fleet.staying)
    return any(not names or not staying.issuperset(names) for names in moving.goal.values())


def _live(moving: MoveState, fleet: Fleet) -> Replicas:
    if all(name in fleet.hosts for names in moving.goal.values() for name in names):
        return moving.goal
    return {key: tuple(name for name in names if name in fleet.hosts) for key, names in moving.goal.items()}


def _applied(made: Plan, moving: MoveState, now: float) -> Applied:
    changed = [note for note in made.layers if note.is_changed] or list(made.layers)
    before = [note.before for note in changed if note.before is not None]
    return Applied(
        at=now,
        epoch=moving.epoch,
        loads=len(made.loads),
        moved_bytes=made.moved_bytes,
        before=1.0 / max(before) if before else None,
        predicted=1.0 / max((note.after for note in changed), default=1.0),
        why=made.why or "what has to be, whatever the load",
        changes=changes_of(moving.goal, made.target),
    )


def _realise(state: LoopState, load: Load | None, fleet: Fleet, policy: Policy, now: float) -> LoopState:
    """Note what came of the last plan, from a load that was counted after its last move."""
    if not state.history or state.history[-1].realised is not None or not state.moving.is_done:
        return state
    published = state.moving.published
    if load is None or doubt_load(load, published, now, policy.max_age_s) or not any(load.rows.values()):
        return state
    last = state.history[-1]
    layers = {layer for (layer, _), _, _ in last.changes}
    reached = [value for layer, value in imbalances(load, fleet, published).items() if layer in layers or not layers]
    last = replace(last, realised=1.0 / max(reached, default=1.0), took_s=now - last.at)
    return replace(state, history=(*state.history[:-1], last))


def imbalances(load: Load, fleet: Fleet, replicas: Replicas) -> dict[int, float]:
    """Time of the slowest host over the mean, of each layer, when routers split rows well."""
    hosts = list(fleet.hosts.values())
    number = {host.name: place for place, host in enumerate(hosts)}
    layers: dict[int, tuple[list[float], list[list[int]]]] = {}
    for key in sorted(replicas):
        rows, homes = layers.setdefault(key[0], ([], []))
        rows.append(load.rows[key])
        homes.append([number[name] for name in replicas[key] if name in number])
    return {
        layer: LayerBalance(rows, homes, hosts, load.dispatches).imbalance for layer, (rows, homes) in layers.items()
    }
