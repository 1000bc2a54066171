"""What an expert host shows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from prometheus_client.core import CounterMetricFamily
from prometheus_client.metrics_core import Metric

from cluster.metrics.families import counter, gauge
from experts.load import LoadSnapshot
from experts.placement import ExpertKey


@dataclass(frozen=True, kw_only=True)
class HostNumbers:
    """A host's counters. `held` are the experts in its slots and `held_bytes` their weights; `queue_depth` are the
    shipments that are here and not answered."""

    name: str
    load: LoadSnapshot
    held: frozenset[ExpertKey]
    held_bytes: int
    queue_depth: int = 0


def host_families(numbers: HostNumbers) -> Iterator[Metric]:
    load = numbers.load
    yield _rows(numbers)
    yield counter("herd_host_shipments", "Shipments computed.", load.num_shipments)
    yield counter("herd_host_compute_seconds", "Time spent computing shipments.", load.compute_s)
    yield counter("herd_host_queue_seconds", "Time that shipments waited for earlier ones.", load.queue_s)
    yield gauge("herd_host_queue_depth", "Shipments here that are not answered yet.", numbers.queue_depth)
    yield gauge("herd_host_slots", "Experts held.", len(numbers.held))
    yield gauge("herd_host_held_bytes", "Bytes of the weights held.", numbers.held_bytes)


def _rows(numbers: HostNumbers) -> Metric:
    """Of each expert held, 0 before its first row: who reads it can tell an idle expert from one that nobody counts."""
    family = CounterMetricFamily("herd_expert_rows", "Rows computed.", labels=("layer", "expert", "host"))
    for key in sorted(numbers.held | numbers.load.rows.keys()):
        family.add_metric([str(key[0]), str(key[1]), numbers.name], numbers.load.rows.get(key, 0))
    return family
