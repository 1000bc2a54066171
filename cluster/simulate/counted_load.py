"""The load of a simulated cluster, which has no pages: what its hosts count, as they told the controller."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from cluster.control.fleet import Load
from cluster.control.state import ControllerState
from experts.placement import ExpertKey

WINDOW_S = 3.0
LEAST_WINDOW_S = 1.5
FRESH_S = 2.5
"""Hosts report every second."""


@dataclass(frozen=True, kw_only=True)
class Count:
    """What life `incarnation` of a host had counted since its start when it reported `at`."""

    at: float
    incarnation: int
    rows: Mapping[ExpertKey, int]
    shipments: int
    compute_s: float


class CountedLoad:
    """Remembers the reports of the last seconds. Asked once a second."""

    def __init__(self) -> None:
        self._counts: dict[str, deque[Count]] = {}

    def load(self, state: ControllerState, now: float) -> Load | None:
        """None until every host that is not away has counted for a while, without a break and lately."""
        present = [name for name in state.hosts if name not in state.journal.away]
        for name in present:
            self._take(name, state)
        spans = {name: span for name in present if (span := self._span(name, state, now)) is not None}
        if not spans or len(spans) < len(present):
            return None
        keys = state.moving.published
        rows = dict.fromkeys(keys, 0.0)
        for first, last in spans.values():
            for key in last.rows.keys() & keys:
                rows[key] += (last.rows[key] - first.rows.get(key, 0)) / (last.at - first.at)
        layers = max(1, len({layer for layer, _ in keys}))
        shipments = max((last.shipments - first.shipments) / (last.at - first.at) for first, last in spans.values())
        return Load(
            at=min(last.at for _, last in spans.values()),
            rows=MappingProxyType(rows),
            window_s=min(last.at - first.at for first, last in spans.values()),
            # A step of a router sends a host one shipment for each layer, if it sends it any.
            dispatches=shipments / layers,
            busy=MappingProxyType(
                {
                    name: (last.compute_s - first.compute_s) / (last.at - first.at)
                    for name, (first, last) in spans.items()
                }
            ),
        )

    def _take(self, name: str, state: ControllerState) -> None:
        host = state.hosts[name]
        counts = self._counts.setdefault(name, deque(maxlen=16))
        report = host.report
        if report is None:
            return
        if counts and counts[-1].incarnation != report.incarnation:
            # A new life counts from nothing.
            counts.clear()
        if counts and host.heard_at <= counts[-1].at:
            return
        counts.append(
            Count(
                at=host.heard_at,
                incarnation=report.incarnation,
                rows=report.rows,
                shipments=report.num_shipments,
                compute_s=report.compute_s,
            )
        )

    def _span(self, name: str, state: ControllerState, now: float) -> tuple[Count, Count] | None:
        """The first and the last count of the window."""
        counts = self._counts[name]
        if state.hosts[name].lost or not counts or now - counts[-1].at > FRESH_S:
            return None
        last = counts[-1]
        first = next(one for one in counts if one.at >= last.at - WINDOW_S)
        return (first, last) if last.at - first.at >= LEAST_WINDOW_S else None


def _busy(first: Count, last: Count) -> float:
    return (last.compute_s - first.compute_s) / (last.at - first.at)
