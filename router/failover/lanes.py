"""Who may have which rows, and who of them gets which: turns what is known of hosts into lanes to split rows over."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from experts.placement import ExpertKey
from router.failover.events import RowsOf
from router.failover.flight import Dispatch, Part
from router.failover.health import Link
from router.failover.split import Lane, Want, split
from router.failover.state import FailoverState

EQUALS = 0.7
"""Paces that differ by less than this from what is typical are typical: no pace is known any better, and hosts that are
alike should share the work instead of the luckiest having it all."""


def assign(
    state: FailoverState, dispatch: Dispatch, rows: Mapping[ExpertKey, int], now: float
) -> tuple[dict[str, list[Part]], list[RowsOf]]:
    """The parts that each host gets, in order, and the rows that nobody serves."""
    # A dispatch is of one layer.
    layer = next((layer for layer, _ in rows), 0)
    lanes = _Lanes(state, layer, state.attention.at(now))
    replicas = dispatch.placement.replicas
    wants: list[Want] = []
    unserved = []
    for key, count in rows.items():
        found = lanes.of(replicas.get(key, ()))
        if found:
            wants.append((len(found) > 1, -count, key, found))
        elif count:
            unserved.append(RowsOf(key, 0, count))
    by_host = split(wants)
    for pieces in by_host.values():
        pieces.sort()
    return {
        host: [Part(RowsOf(key, start, stop), dispatch) for key, start, stop in pieces]
        for host, pieces in by_host.items()
    }, unserved


class _Lanes:
    """The lanes of one dispatch, made as they are asked for."""

    def __init__(self, state: FailoverState, layer: int, at: float) -> None:
        self._state = state
        self._layer = layer
        self._at = at
        self._by_host: dict[str, tuple[int, Lane]] = {}
        self._by_hosts: dict[tuple[str, ...], list[Lane]] = {}

    def of(self, hosts: tuple[str, ...]) -> list[Lane]:
        """The best of `hosts`."""
        found = self._by_hosts.get(hosts)
        if found is None:
            ranked = [ranked for host in hosts if (ranked := self._ranked(host)) is not None]
            best = min((rank for rank, _ in ranked), default=0)
            found = self._by_hosts[hosts] = [lane for rank, lane in ranked if rank == best]
        return found

    def _ranked(self, host: str) -> tuple[int, Lane] | None:
        known = self._by_host.get(host)
        link = self._state.links.get(host)
        if known is not None or link is None:
            return known
        rank = link.rank_for_dispatch()
        if rank is None:
            return None
        known = self._by_host[host] = rank, make_lane(self._state, link, self._layer, self._at)
        return known


def elsewhere(
    state: FailoverState, parts: Iterable[Part], now: float, worst_rank: int
) -> tuple[dict[str, list[Part]], list[Part]]:
    """Another host for each of `parts`, of `worst_rank` or better, that was not asked yet; and those without one."""
    at = state.attention.at(now)
    lanes: dict[str, Lane] = {}
    placed: dict[str, list[Part]] = {}
    homeless = []
    for part in sorted(parts, key=lambda part: (-part.num_rows, part.rows)):
        links = _untried(state, part, now, worst_rank)
        if not links:
            homeless.append(part)
            continue
        for link in links:
            lanes.setdefault(link.host, make_lane(state, link, part.rows.key[0], at))
        lane = min((lanes[link.host] for link in links), key=lambda lane: _finish(lane, part))
        lane.finish_s = _finish(lane, part)
        placed.setdefault(lane.host, []).append(part)
    for own in placed.values():
        own.sort(key=lambda part: part.rows)
    return placed, homeless


def make_lane(state: FailoverState, link: Link, layer: int, at: float) -> Lane:
    """What the cost model and experience say of a host now, for rows of `layer`."""
    pace = link.pace_at(at, state.typical_pace)
    if EQUALS * state.typical_pace <= pace <= state.typical_pace / EQUALS:
        pace = state.typical_pace
    cost = link.cost
    begin_s = pace * (link.way_s + link.ahead_s)
    return Lane(link.host, begin_s, pace * cost.per_expert_s, pace * cost.per_row_s, link.recent.of(layer, at))


def _untried(state: FailoverState, part: Part, now: float, worst_rank: int) -> list[Link]:
    """The best of those that may be asked for `part`, by the placement that it was made under, else by the newest."""
    dispatch, key = part.dispatch, part.rows.key
    if now >= dispatch.give_up_at or part.sends > len(dispatch.placement.hosts_of(key)):
        return []
    for placement in (dispatch.placement, state.newest):
        usable = [
            (rank, link)
            for link in state.usable(placement, key)
            if (rank := link.rank()) is not None
            and rank <= worst_rank
            and (link.host, link.incarnation) not in part.tried
        ]
        if usable:
            best = min(rank for rank, _ in usable)
            return [link for rank, link in usable if rank == best]
    return []


def _finish(lane: Lane, part: Part) -> float:
    return (lane.finish_s or lane.begin_s) + lane.per_expert_s + lane.per_row_s * part.num_rows
