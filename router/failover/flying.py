"""Sends parts, takes shipments down, and sends rows elsewhere that no host can be trusted with any more."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from router.failover.events import Effect, Lose, Probe, Reason, Send
from router.failover.flight import Dispatch, Flight, Part
from router.failover.health import FENCE_S, MISSES_TO_FENCE, Link
from router.failover.lanes import elsewhere
from router.failover.state import FailoverState

TRUSTED_RANK, ANY_RANK = 0, 2
NO_PARTS: tuple[Part, ...] = ()


def send(
    state: FailoverState,
    host: str,
    parts: Sequence[Part],
    now: float,
    effects: list[Effect],
    *,
    is_first: bool = True,
    is_hedge: bool = False,
) -> None:
    """Ship `parts`, all of one dispatch."""
    dispatch = parts[0].dispatch
    deadline = dispatch.deadline
    if not is_first:
        # Less than half of the bound is no fair chance. Sends are few, so their sum is bounded too.
        deadline = min(max(deadline, now + state.policy.base_s / 2), dispatch.give_up_at)
    link = state.links[host]
    flight = _take_off(state, link, parts, deadline, now)
    flight.is_hedge = is_hedge
    life = (host, link.incarnation)
    for part in parts:
        part.sends += 1
        part.tried.append(life)
        part.flights.append(flight)
    rows = tuple([part.rows for part in parts])
    effects.append(
        Send(
            shipment=flight.number,
            dispatch=dispatch.number,
            host=host,
            parts=rows,
            deadline=deadline,
            is_first=is_first,
        )
    )


def probe(state: FailoverState, link: Link, now: float, effects: list[Effect]) -> None:
    """Ask a host that is out of use for a sign of life."""
    link.probed(now)
    flight = _take_off(state, link, NO_PARTS, now + state.policy.probe_s, now)
    effects.append(Probe(shipment=flight.number, host=link.host, deadline=flight.deadline))


def land(state: FailoverState, flight: Flight) -> None:
    """No answer to `flight` is expected any more."""
    del state.flights[flight.number]
    state.links[flight.host].landed(flight)
    for part in flight.parts:
        part.flights.remove(flight)


def give_up(state: FailoverState, link: Link, now: float, effects: list[Effect]) -> None:
    """Nothing that was sent over `link` will be answered: everything goes elsewhere."""
    stranded: list[Part] = []
    for flight in list(link.flights.values()):
        land(state, flight)
        count_failure(state, flight, Reason.LOST)
        stranded += flight.parts
    send_elsewhere(state, stranded, now, effects)


def count_failure(state: FailoverState, flight: Flight, reason: Reason) -> None:
    """Count a shipment that brings no answer."""
    if flight.is_hedge:
        state.hedges["failed"] += 1
    if any(not part.settled for part in flight.parts):
        state.failovers[reason] += 1


def send_elsewhere(state: FailoverState, parts: Iterable[Part], now: float, effects: list[Effect]) -> None:
    """Re-send what is still wanted of `parts` and in no good hands. What nobody else serves waits for whoever has it,
    and is lost when nobody has."""
    wanted = [part for part in parts if not part.settled and not _in_good_hands(state, part)]
    placed, homeless = elsewhere(state, wanted, now, ANY_RANK)
    for host, own in placed.items():
        for group in _by_dispatch(own):
            send(state, host, group, now, effects, is_first=False)
    for group in _by_dispatch([part for part in homeless if not part.flights]):
        lose(state, group, effects)


def hedge(state: FailoverState, flight: Flight, now: float, effects: list[Effect]) -> None:
    """Ask other replicas too for what is late, as far as suspicion may cost."""
    wanted = [part for part in flight.parts if not part.settled and not _in_good_hands(state, part)]
    placed, _ = elsewhere(state, wanted, now, TRUSTED_RANK)
    if not placed:
        return
    if not state.budget.spend(len(placed)):
        state.hedges["denied"] += 1
        return
    state.failovers[Reason.SLOW] += 1
    for host, own in placed.items():
        send(state, host, own, now, effects, is_first=False, is_hedge=True)


def lose(state: FailoverState, parts: Sequence[Part], effects: list[Effect]) -> None:
    """`parts`, all of one dispatch, leave the step."""
    for part in parts:
        part.settled = True
    dispatch = parts[0].dispatch
    effects.append(Lose(dispatch=dispatch.number, parts=tuple([part.rows for part in parts])))
    close(state, dispatch, len(parts))


def close(state: FailoverState, dispatch: Dispatch, num_parts: int) -> None:
    """So many parts of `dispatch` are settled."""
    dispatch.num_open -= num_parts
    if not dispatch.num_open:
        del state.dispatches[dispatch.number]


def _take_off(state: FailoverState, link: Link, parts: Sequence[Part], deadline: float, now: float) -> Flight:
    num_rows = 0
    for part in parts:
        num_rows += part.rows.stop - part.rows.start
    cost_s = link.cost.of(len(parts), num_rows)
    expected_s = link.way_s + link.ahead_s + cost_s
    patience_s = link.patience_s(expected_s, state.policy.floor_s)
    at = state.attention.at(now)
    flight = Flight(
        number=state.next_shipment,
        host=link.host,
        parts=parts,
        sent_at=at,
        sent_clock=now,
        deadline=deadline,
        cost_s=cost_s,
        expected_s=expected_s,
        overdue_at=at + patience_s,
        fence_at=at + max(MISSES_TO_FENCE * patience_s, FENCE_S),
        pauses=state.attention.pauses,
    )
    state.next_shipment += 1
    state.flights[flight.number] = flight
    link.took_off(flight)
    if flight.overdue_at < state.check_at:
        state.check_at = flight.overdue_at
    return flight


def _in_good_hands(state: FailoverState, part: Part) -> bool:
    return any(not flight.is_overdue and state.links[flight.host].is_trusted for flight in part.flights)


def _by_dispatch(parts: Iterable[Part]) -> list[list[Part]]:
    groups: dict[int, list[Part]] = {}
    for part in parts:
        groups.setdefault(part.dispatch.number, []).append(part)
    return list(groups.values())
