"""A Prometheus page per process, made from the plain counters that its parts keep anyway.

The only file that knows prometheus-client. Nothing here is on the path of a token: a page may fail and serving goes on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from threading import Thread
from typing import TYPE_CHECKING
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, ProcessCollector, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from experts.errors import InvalidInput
from experts.load import LoadSnapshot
from experts.reports import ClusterStatus

if TYPE_CHECKING:
    # At run time only their attributes are read: the controller's page must not load torch.
    from router.dispatch_stats import DispatchStats
    from router.engine.engine import EngineStats
    from router.engine.kv_cache import KVNumbers

Families = Iterable[Metric]

HOST_STATES = ("up", "returning", "suspect", "fenced", "silent", "dead")
"""Those of `router.failover.events.HostState`."""


@dataclass(frozen=True, kw_only=True)
class HostNumbers:
    """A host's counters; `held_bytes` are those of the weights in its `slots`."""

    name: str
    load: LoadSnapshot
    slots: int
    held_bytes: int


@dataclass(frozen=True, kw_only=True)
class RouterNumbers:
    """A router's counters and gauges. `dispatch` is None and `inner` set where it computes experts itself."""

    engine: EngineStats
    running: int
    waiting: int
    parked: int
    kv: KVNumbers
    max_model_len: int
    dispatch: DispatchStats | None = None
    inner: HostNumbers | None = None


@dataclass(frozen=True, kw_only=True)
class IngressNumbers:
    """An ingress's counters: responses by HTTP status, and requests in progress."""

    responses: Mapping[int, int] = field(default_factory=dict)
    active: int = 0


class MetricsPage:
    """`/metrics` of one process, on the first free port of `ports` or on any. `families` is called per scrape."""

    def __init__(self, families: Callable[[], Families], *, bind: str, ports: range | None = None) -> None:
        registry = CollectorRegistry()
        registry.register(_Reader(families))
        ProcessCollector(registry=registry)
        self._server, self._thread, port = _listen(registry, bind, ports)
        self.address = f"{bind}:{port}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Reader(Collector):
    def __init__(self, families: Callable[[], Families]) -> None:
        self._families = families

    def collect(self) -> Families:
        return self._families()

    def describe(self) -> Families:
        """Nothing is read before the first scrape: the parts may not be there yet."""
        return ()


def host_families(numbers: HostNumbers) -> Iterator[Metric]:
    """What an expert host shows."""
    rows = _counter("herd_expert_rows", "Rows computed.", ("layer", "expert", "host"))
    for (layer, expert), count in numbers.load.rows.items():
        rows.add_metric([str(layer), str(expert), numbers.name], count)
    yield rows
    yield _counter("herd_host_shipments", "Shipments computed.", value=numbers.load.num_shipments)
    yield _counter("herd_host_compute_seconds", "Time spent computing shipments.", value=numbers.load.compute_s)
    yield _gauge("herd_host_slots", "Experts held.", value=numbers.slots)
    yield _gauge("herd_host_held_bytes", "Bytes of the weights held.", value=numbers.held_bytes)


def router_families(numbers: RouterNumbers) -> Iterator[Metric]:
    """What a router shows."""
    engine = numbers.engine
    requests = _counter("herd_router_requests_finished", "Requests that ended, by reason.", ("reason",))
    for reason, count in dict(engine.finished).items():
        requests.add_metric([str(reason)], count)
    yield requests
    yield _counter("herd_router_prompt_tokens", "Prompt tokens of requests taken in.", value=engine.prompt_tokens)
    yield _counter("herd_router_output_tokens", "Tokens generated.", value=engine.output_tokens)
    yield _counter("herd_router_computed_tokens", "Tokens put through the model.", value=engine.computed_tokens)
    yield _counter("herd_router_steps", "Steps run.", value=engine.steps)
    yield _counter("herd_router_step_seconds", "Time spent in steps.", value=engine.step_s)
    now = _gauge("herd_router_requests", "Requests now, by state.", ("state",))
    for state, count in (("running", numbers.running), ("waiting", numbers.waiting), ("parked", numbers.parked)):
        now.add_metric([state], count)
    yield now
    yield from _kv_families(numbers)
    if numbers.dispatch is not None:
        yield from _dispatch_families(numbers.dispatch)
    if numbers.inner is not None:
        yield from host_families(numbers.inner)


def _kv_families(numbers: RouterNumbers) -> Iterator[Metric]:
    kv = numbers.kv
    yield _gauge("herd_router_kv_use_ratio", "Share of the KV cache that requests hold.", value=kv.used)
    yield _gauge("herd_router_kv_cached_ratio", "Share of it that is free but may be found again.", value=kv.cached)
    room = _gauge("herd_router_kv_capacity_tokens", "Tokens that fit: of one sequence, and of each pool.", ("of",))
    for of, tokens in (("sequence", numbers.max_model_len), ("global", kv.global_tokens), ("local", kv.local_tokens)):
        room.add_metric([of], tokens)
    yield room
    yield _counter("herd_router_prefix_lookup_tokens", "Tokens looked for in the cache.", value=kv.looked_up_tokens)
    yield _counter("herd_router_prefix_hit_tokens", "Tokens found there, not computed.", value=kv.hit_tokens)
    yield _counter("herd_router_kv_evicted_blocks", "Cached blocks given up for others.", value=kv.evicted_blocks)


def _dispatch_families(stats: DispatchStats) -> Iterator[Metric]:
    yield _counter("herd_router_dispatches", "Layers whose rows were sent to hosts.", value=stats.dispatches)
    yield _counter("herd_router_dispatch_wait_seconds", "Time spent waiting for hosts.", value=stats.wait_s)
    yield _counter("herd_router_shipments", "Shipments sent.", value=stats.shipments)
    yield _counter("herd_router_resends", "Shipments sent once more, hedges among them.", value=stats.resends)
    yield _counter("herd_router_probes", "Signs of life asked of hosts out of use.", value=stats.probes)
    yield _counter("herd_router_rows_sent", "Rows sent to hosts.", value=stats.rows_sent)
    yield _counter("herd_router_rows_lost", "Rows that left a step without their expert.", value=stats.rows_lost)
    yield _counter("herd_router_decisions", "Calls of the failover machine.", value=stats.decisions)
    yield _counter("herd_router_decision_seconds", "Time spent in them.", value=stats.decision_s)
    yield _gauge("herd_router_placement_epoch", "Number of the placement that steps use.", value=stats.epoch)
    yield _counters("herd_router_shipment_failures", "Shipments without a result, by error.", "error", stats.failures)
    yield _counters("herd_router_hedges", "Shipments asked of a second host, by outcome.", "outcome", stats.hedges)
    yield _counters("herd_router_failovers", "Shipments that another host had to do.", "reason", stats.failovers)
    yield from _seen_host_families(stats)
    yield _round_trips(stats)


def _seen_host_families(stats: DispatchStats) -> Iterator[Metric]:
    now = _gauge("herd_router_host_state", "1 for the state that a host is in, as seen here.", ("host", "state"))
    for host, state in dict(stats.hosts).items():
        for each in HOST_STATES:
            now.add_metric([host, each], float(each == state))
    yield now
    text = "When a host last entered a state, as seen here."
    entered = _gauge("herd_router_host_state_entered_timestamp_seconds", text, ("host", "state"))
    for (host, state), at in dict(stats.entered_at).items():
        entered.add_metric([host, state], at)
    yield entered


def _round_trips(stats: DispatchStats) -> Metric:
    text = "From the dispatch of a layer's rows to their last answer."
    family = HistogramMetricFamily("herd_router_dispatch_round_trip_seconds", text, labels=("layer",))
    for layer, trips in dict(stats.round_trips).items():
        totals = list(accumulate(trips.counts))
        bounds = [*(str(bound) for bound in trips.bounds_s), "+Inf"]
        family.add_metric([str(layer)], list(zip(bounds, totals, strict=True)), trips.total_s)
    return family


def ingress_families(numbers: IngressNumbers) -> Iterator[Metric]:
    """What an ingress shows."""
    responses = _counter("herd_ingress_responses", "HTTP responses begun, by status.", ("status",))
    for status, count in dict(numbers.responses).items():
        responses.add_metric([str(status)], count)
    yield responses
    yield _gauge("herd_ingress_active_requests", "HTTP requests in progress.", value=numbers.active)


def controller_families(status: ClusterStatus) -> Iterator[Metric]:
    """What the controller shows."""
    yield _gauge("herd_controller_epoch", "Number of the published placement.", value=status.controller.epoch)
    yield _gauge("herd_controller_term", "Lives of the controller so far.", value=status.controller.term)
    hosts = _gauge("herd_controller_hosts", "Hosts, by state.", ("state",))
    by_state = Counter(host.state for host in status.hosts)
    for state in ("loading", "ready", "lost"):
        hosts.add_metric([state], by_state[state])
    yield hosts
    yield _gauge("herd_controller_routers", "Routers that report.", value=len(status.routers))
    yield _gauge("herd_controller_ingresses", "Ingresses that report.", value=len(status.ingresses))
    yield _gauge("herd_controller_replicas_held", "Wanted replicas that are held.", value=status.replicas_held)
    yield _gauge("herd_controller_replicas_wanted", "Replicas that shall be held.", value=status.replicas_wanted)
    yield _gauge("herd_controller_problems", "Things that are wrong now.", value=len(status.problems))


def _counter(name: str, text: str, labels: tuple[str, ...] = (), value: float | None = None) -> CounterMetricFamily:
    """Exported as `name`_total."""
    return CounterMetricFamily(name, text, value=value, labels=None if value is not None else labels)


def _counters(name: str, text: str, label: str, counts: Mapping[str, int]) -> CounterMetricFamily:
    family = _counter(name, text, (label,))
    for value, count in dict(counts).items():
        family.add_metric([str(value)], count)
    return family


def _gauge(name: str, text: str, labels: tuple[str, ...] = (), value: float | None = None) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, text, value=value, labels=None if value is not None else labels)


def _listen(registry: CollectorRegistry, bind: str, ports: range | None) -> tuple[WSGIServer, Thread, int]:
    for port in ports or [0]:
        try:
            server, thread = start_http_server(port, addr=bind, registry=registry)
        except OSError:
            continue
        return server, thread, server.server_port
    raise InvalidInput("metrics-ports", f"{ports}", f"none of them is free on {bind}")
