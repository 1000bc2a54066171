"""Where the control loop's load comes from: the counters in hosts' own reports, or whatever else can read them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from types import MappingProxyType
from typing import Protocol

from cluster.control import reading
from cluster.control.fleet import Load
from cluster.control.reading import Expected, Held, expected_of
from cluster.control.state import ControllerState, Count, HostState
from experts.placement import ExpertKey
from experts.reports import HostReport

WINDOW_S = 3.0
"""Short enough that a shift of the load is seen whole when an imbalance has lasted as long as it must."""
LEAST_WINDOW_S = 1.5
FRESH_S = 2.5
"""Hosts report every second."""
COUNT_EVERY_S = 0.5
MOST_COUNTS = 16


class LoadSource(Protocol):
    """Measures the load of all experts. Called on a thread of its own, one call at a time. `problem` is why the last
    reading came to nothing, for people; empty where there is nothing to tell."""

    @property
    def problem(self) -> str: ...

    def read(self, state: ControllerState, now: float) -> Load | None:
        """The load of the last seconds, its `at` by the clock of `now`; None when it is not known. Must not raise for
        what may be wrong outside, and must return in bounded time. What is absurd is left to `trust.doubt_load`."""
        ...


class MeasuredLoad:
    """What is read of metrics pages, by Prometheus or by ourselves. `make` gets a function that tells what has to be
    there: that is as the state said when a load was read last. `problem` is why there is none now."""

    def __init__(self, make: Callable[[Callable[[], Expected]], reading.LoadSource]) -> None:
        self._expected = Expected()
        self._source = make(lambda: self._expected)
        self.problem = ""

    def read(self, state: ControllerState, now: float) -> Load | None:
        self._expected = expected_of(state)
        load = self._source.load(now)
        self.problem = load.reason if isinstance(load, Held) else ""
        return None if isinstance(load, Held) else load


class ReportedLoad:
    """What hosts count themselves and send along with their reports."""

    problem = ""

    def read(self, state: ControllerState, now: float) -> Load | None:
        """None until every host that is not away has counted for a while, and lately."""
        present = [host for name, host in state.hosts.items() if name not in state.journal.away]
        spans = [span for host in present if (span := _span(host, now)) is not None]
        if not spans or len(spans) < len(present):
            return None
        keys = state.moving.published
        rows = dict.fromkeys(keys, 0.0)
        for first, last in spans:
            for key, rate in _rates(first, last):
                if key in rows:
                    rows[key] += rate
        layers = max(1, len({layer for layer, _ in keys}))
        shipments = max((last.shipments - first.shipments) / (last.at - first.at) for first, last in spans)
        names = [name for name in state.hosts if name not in state.journal.away]
        busy = {
            name: (last.compute_s - first.compute_s) / (last.at - first.at)
            for name, (first, last) in zip(names, spans, strict=True)
        }
        return Load(
            at=min(last.at for _, last in spans),
            rows=MappingProxyType(rows),
            window_s=min(last.at - first.at for first, last in spans),
            # A step of a router sends a host one shipment for each layer, if it sends it any.
            dispatches=shipments / layers,
            busy=MappingProxyType(busy),
        )


def count(host: HostState, report: HostReport, now: float) -> HostState:
    """`host` with the counters of `report`, which has just come. A new life counts from nothing."""
    same_life = host.report is not None and host.report.incarnation == report.incarnation
    counts = host.counts if same_life else ()
    if counts and now - counts[-1].at < COUNT_EVERY_S:
        return host
    fresh = Count(at=now, rows=report.rows, shipments=report.num_shipments, compute_s=report.compute_s)
    return replace(host, counts=(*counts, fresh)[-MOST_COUNTS:])


def _span(host: HostState, now: float) -> tuple[Count, Count] | None:
    """The first and the last count of the window."""
    if host.lost or not host.counts or now - host.counts[-1].at > FRESH_S:
        return None
    last = host.counts[-1]
    first = next(one for one in host.counts if one.at >= last.at - WINDOW_S - COUNT_EVERY_S / 2)
    return (first, last) if last.at - first.at >= LEAST_WINDOW_S else None


def _rates(first: Count, last: Count) -> Iterable[tuple[ExpertKey, float]]:
    for key, total in last.rows.items():
        yield key, (total - first.rows.get(key, 0)) / (last.at - first.at)
