"""What an ingress shows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from prometheus_client.metrics_core import Metric

from cluster.metrics.families import counters, gauge, histogram
from router.histogram import Histogram


@dataclass(frozen=True, kw_only=True)
class IngressNumbers:
    """An ingress's counters: responses by HTTP status, requests in progress, and how long generations took."""

    responses: Mapping[int, int] = field(default_factory=dict)
    active: int = 0
    generations: Histogram = field(default_factory=Histogram)


def ingress_families(numbers: IngressNumbers) -> Iterator[Metric]:
    responses = {"200": 0} | {str(status): count for status, count in numbers.responses.items()}
    yield counters("herd_ingress_responses", "HTTP responses begun, by status.", "status", responses)
    yield gauge("herd_ingress_active_requests", "HTTP requests in progress.", numbers.active)
    text = "From a request for a completion to the end of its answer, of those that were answered with 200."
    yield histogram("herd_ingress_request_seconds", text, numbers.generations)
