"""Decides where rows go and what to do when a host dies, hangs, slows down or lacks an expert: state + event → effects.

Pure: no clock, no network, no tensors. A host whose link ends is dead: its rows go elsewhere at once. One whose answer
is overdue is suspect: its rows are asked of another replica too, and the first answer counts. One that is overdue
several times in a row is fenced: it gets nothing while there is another, and returns through probes and a growing
share. Where there is no other it goes on being used, up to the hard bound of a dispatch; then rows are lost to their
step, never made up.
"""

from __future__ import annotations

from experts.placement import HostInfo
from router.failover.events import (
    Answered,
    Begin,
    Effect,
    Event,
    Failed,
    HostState,
    Linked,
    Looked,
    Lose,
    Reason,
    Revived,
    StepBegun,
    Take,
    Tick,
    Viewed,
)
from router.failover.flight import Dispatch, Flight
from router.failover.flying import close, count_failure, land, send, send_elsewhere
from router.failover.health import Link
from router.failover.lanes import assign
from router.failover.state import ASSUMED_COST, TYPICAL_WEIGHT, WAY_S, WAY_WITHIN_NODE_S, FailoverState
from router.failover.verdicts import compare, deadline_passed, enter, forget_asking, judge, leave, miss


def step(state: FailoverState, event: Event, now: float) -> tuple[FailoverState, list[Effect]]:
    """What follows from `event` at the monotonic instant `now`. `state` itself is changed, for speed, and returned."""
    effects: list[Effect] = []
    match event:
        case Looked():
            state.attention.look(event.until, now)
        case Tick():
            judge(state, now, effects)
        case Answered():
            _answered(state, event, now, effects)
        case Begin():
            _begin(state, event, now, effects)
        case StepBegun():
            state.placement, state.give_up_at = state.newest, event.give_up_at
        case Failed():
            _failed(state, event, now, effects)
        case Linked():
            _linked(state, event, now, effects)
        case Revived():
            _revived(state, event, now, effects)
        case Viewed():
            _viewed(state, event, now, effects)
    return state, effects


def _begin(state: FailoverState, event: Begin, now: float, effects: list[Effect]) -> None:
    state.attention.look(0.0, now)
    bound = now + state.policy.base_s + state.policy.per_row_s * sum(event.rows.values())
    dispatch = Dispatch(
        number=event.dispatch,
        placement=state.placement,
        deadline=min(bound, state.give_up_at),
        give_up_at=state.give_up_at,
    )
    by_host, unserved = assign(state, dispatch, event.rows, now)
    dispatch.num_open = sum(map(len, by_host.values()))
    if by_host:
        state.dispatches[dispatch.number] = dispatch
    for host, parts in by_host.items():
        send(state, host, parts, now, effects)
    state.budget.earn(len(by_host))
    if unserved:
        effects.append(Lose(dispatch=dispatch.number, parts=tuple(unserved)))


def _answered(state: FailoverState, event: Answered, now: float, effects: list[Effect]) -> None:
    flight = state.flights.get(event.shipment)
    if flight is None:
        # Of a life that has ended, or come twice.
        state.late_answers += 1
        return
    link = state.links[flight.host]
    land(state, flight)
    at = state.attention.at(now)
    if flight.parts and flight.pauses == state.attention.pauses:
        if link.learn(flight, now - flight.sent_clock, at, state.typical_pace):
            compare(state)
        state.typical_pace += TYPICAL_WEIGHT * (link.pace - state.typical_pace)
    enter(state, link, link.heard(flight, at, now), effects)
    if flight.parts:
        _settle(state, flight, effects)


def _settle(state: FailoverState, flight: Flight, effects: list[Effect]) -> None:
    """Take what no other answer brought before."""
    fresh = [part for part in flight.parts if not part.settled]
    if flight.is_hedge:
        state.hedges["won" if fresh else "late"] += 1
    if not fresh:
        state.late_answers += 1
        return
    for part in fresh:
        part.settled = True
    dispatch = fresh[0].dispatch
    close(state, dispatch, len(fresh))
    parts = tuple([part.rows for part in fresh])
    effects.append(Take(shipment=flight.number, dispatch=dispatch.number, parts=parts))


def _failed(state: FailoverState, event: Failed, now: float, effects: list[Effect]) -> None:
    flight = state.flights.get(event.shipment)
    if flight is None:
        return
    link = state.links[flight.host]
    if event.reason is Reason.LOST:
        # The link may be there again by now: it ended all the same, and so did all that was under way.
        leave(state, [link], now, effects)
        return
    land(state, flight)
    count_failure(state, flight, event.reason)
    if event.reason is Reason.DEADLINE:
        deadline_passed(state, link, flight, now, effects)
    elif event.reason is Reason.NOT_HOSTED:
        forget_asking(flight, link, but=event.missing)
        enter(state, link, link.heard(flight, state.attention.at(now), now), effects)
    else:
        miss(state, link, flight, now, effects)
    send_elsewhere(state, flight.parts, now, effects)


def _linked(state: FailoverState, event: Linked, now: float, effects: list[Effect]) -> None:
    leave(state, [link for link in state.links.values() if link.host not in event.hosts], now, effects)
    for link in state.links.values():
        if link.host in event.hosts and link.state is HostState.DEAD:
            enter(state, link, link.linked(now), effects)


def _revived(state: FailoverState, event: Revived, now: float, effects: list[Effect]) -> None:
    for host in event.hosts:
        link = state.links.get(host)
        if link is not None and link.state is HostState.SILENT:
            link.probe_at = now
            enter(state, link, HostState.FENCED, effects)


def _viewed(state: FailoverState, event: Viewed, now: float, effects: list[Effect]) -> None:
    hosts = event.view.hosts
    state.newest = event.view.placement
    if not state.placement.replicas:
        state.placement = state.newest
    ended = [
        link for name, link in state.links.items() if name not in hosts or hosts[name].incarnation != link.incarnation
    ]
    leave(state, ended, now, effects)
    for link in ended:
        del state.links[link.host]
    for name, info in hosts.items():
        known = state.links.get(name)
        if known is None:
            state.links[name] = _new_link(state, info)
        elif info.cost is not None:
            known.cost = info.cost


def _new_link(state: FailoverState, info: HostInfo) -> Link:
    is_near = bool(state.node) and info.node == state.node
    return Link(
        host=info.name,
        incarnation=info.incarnation,
        cost=info.cost or ASSUMED_COST,
        way_s=WAY_WITHIN_NODE_S if is_near else WAY_S,
    )
