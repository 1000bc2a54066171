"""The load that a host has seen: rows per (layer, expert) and compute time. No torch, no clock."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING

from experts.placement import ExpertKey

if TYPE_CHECKING:
    from experts.transport.base import Segment


@dataclass(frozen=True, kw_only=True)
class LoadSnapshot:
    """Counters since the window began; they only grow. `rows` has an entry for every expert ever computed. `queue_s` is
    how long shipments waited for others, all together."""

    rows: Mapping[ExpertKey, int]
    rows_total: int
    num_shipments: int
    compute_s: float
    queue_s: float = 0.0

    def with_rows(self, more: Mapping[ExpertKey, int]) -> LoadSnapshot:
        """These counters and rows that were counted elsewhere."""
        rows = {key: self.rows.get(key, 0) + more.get(key, 0) for key in self.rows.keys() | more.keys()}
        return replace(self, rows=MappingProxyType(rows), rows_total=sum(rows.values()))


class LoadWindow:
    """Counts computed shipments; safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._rows: dict[ExpertKey, int] = {}
        self._num_shipments = 0
        self._compute_s = 0.0
        self._queue_s = 0.0

    def record(self, segments: Iterable[Segment], seconds: float, waited_s: float = 0.0) -> None:
        """Count one computed shipment of `segments` that took `seconds`, and waited before."""
        rows: dict[ExpertKey, int] = {}
        for segment in segments:
            rows[segment.key] = rows.get(segment.key, 0) + segment.num_rows
        self.count(rows, seconds, waited_s)

    def count(self, rows: Mapping[ExpertKey, int], seconds: float, waited_s: float = 0.0) -> None:
        """Count one computation of so many rows of each expert."""
        with self._lock:
            for key, num_rows in rows.items():
                self._rows[key] = self._rows.get(key, 0) + num_rows
            self._num_shipments += 1
            self._compute_s += seconds
            self._queue_s += waited_s

    def snapshot(self) -> LoadSnapshot:
        """The counters now, all of the same instant."""
        with self._lock:
            rows = dict(self._rows)
            return LoadSnapshot(
                rows=MappingProxyType(rows),
                rows_total=sum(rows.values()),
                num_shipments=self._num_shipments,
                compute_s=self._compute_s,
                queue_s=self._queue_s,
            )
