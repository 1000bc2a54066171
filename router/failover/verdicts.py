"""Judges hosts that are late, and says what follows: suspicion and hedges, fences and re-sends, probes."""

from __future__ import annotations

from collections.abc import Sequence

from router.failover.events import Effect, Entered, HostState, Reason
from router.failover.flight import Flight
from router.failover.flying import give_up, hedge, probe, send_elsewhere
from router.failover.health import MOST_OF_PEERS, Link
from router.failover.state import FailoverState

_FOREVER = float("inf")


def judge(state: FailoverState, now: float, effects: list[Effect]) -> None:
    """Everything that had come is known: whose answers are overdue, and who is to be probed."""
    at = state.attention.at(now)
    if at < state.check_at and now < state.probe_at:
        return
    for link in state.links.values():
        for flight in list(link.flights.values()):
            if at >= flight.overdue_at and not flight.is_overdue:
                _overdue(state, link, flight, now, effects)
        if link.is_hung(at):
            fence(state, link, now, effects)
        if link.wants_probes and now >= link.probe_at:
            probe(state, link, now, effects)
    state.check_at = min((link.check_at() for link in state.links.values()), default=_FOREVER)
    set_probe_timer(state)


def enter(state: FailoverState, link: Link, entered: HostState, effects: list[Effect]) -> None:
    """Note that the host is in another state, if it is."""
    if entered is not link.state:
        link.state = entered
        effects.append(Entered(host=link.host, state=entered))
        set_probe_timer(state)


def set_probe_timer(state: FailoverState) -> None:
    state.probe_at = min((link.probe_at for link in state.links.values() if link.wants_probes), default=_FOREVER)


def miss(state: FailoverState, link: Link, flight: Flight, now: float, effects: list[Effect]) -> None:
    """The host failed `flight`: one such thing makes it suspect until it answers, several in a row fence it."""
    after = link.missed(flight, state.attention.at(now))
    if after is HostState.FENCED and link.is_used:
        fence(state, link, now, effects)
    elif link.num_overdue:
        enter(state, link, after, effects)
    else:
        enter(state, link, link.excused(), effects)


def fence(state: FailoverState, link: Link, now: float, effects: list[Effect]) -> None:
    """No rows for the host while there is another, and what it has goes elsewhere."""
    link.troubled(state.attention.at(now), now)
    enter(state, link, HostState.FENCED, effects)
    held = [flight for flight in link.flights.values() if any(not part.settled for part in flight.parts)]
    state.failovers[Reason.FENCED] += len(held)
    send_elsewhere(state, [part for flight in held for part in flight.parts], now, effects)


def leave(state: FailoverState, links: Sequence[Link], now: float, effects: list[Effect]) -> None:
    """These links ended: their hosts are dead to this router, at once."""
    ended = [link for link in links if link.state is not HostState.DEAD]
    # All of them before anything is sent elsewhere: not to one of them.
    for link in ended:
        link.troubled(state.attention.at(now), now)
        enter(state, link, HostState.DEAD, effects)
    for link in ended:
        give_up(state, link, now, effects)


def deadline_passed(state: FailoverState, link: Link, flight: Flight, now: float, effects: list[Effect]) -> None:
    """A host that said nothing in all the time is silent; but while nobody looked, it may have answered."""
    at = state.attention.at(now)
    if now >= flight.deadline and at - flight.sent_at < (flight.deadline - flight.sent_clock) / 2:
        forget_asking(flight, link)
        enter(state, link, link.excused(), effects)
    elif link.heard_at > flight.sent_at:
        if flight.parts:
            miss(state, link, flight, now, effects)
    elif link.state is not HostState.SILENT:
        link.troubled(at, now)
        enter(state, link, HostState.SILENT, effects)


def forget_asking(flight: Flight, link: Link, but: frozenset[tuple[int, int]] = frozenset()) -> None:
    """The host may be asked again for the experts of `flight` that are not in `but`."""
    for part in flight.parts:
        if part.rows.key not in but:
            part.tried.remove((link.host, link.incarnation))


def compare(state: FailoverState) -> None:
    """What is usual among a host's peers bounds what may become usual for it."""
    known = [link for link in state.links.values() if link.usual.p99 is not None]
    for link in state.links.values():
        others = sorted(p99 for other in known if other is not link and (p99 := other.usual.p99) is not None)
        link.most_usual = MOST_OF_PEERS * others[len(others) // 2] if others else _FOREVER


def _overdue(state: FailoverState, link: Link, flight: Flight, now: float, effects: list[Effect]) -> None:
    flight.is_overdue = True
    if flight.parts:
        link.num_overdue += 1
        miss(state, link, flight, now, effects)
        hedge(state, flight, now, effects)
