"""What a router shows: requests and steps, the KV cache, and what it saw of hosts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from cluster.metrics.families import counter, counters, gauge, gauges, histogram, histograms
from cluster.metrics.host import HostNumbers, host_families

if TYPE_CHECKING:
    # At run time only their attributes are read: no page must load torch.
    from router.dispatch_stats import DispatchStats
    from router.engine.engine import EngineStats
    from router.engine.kv_cache import KVNumbers
    from router.engine.request_times import Durations

HOST_STATES = ("up", "returning", "suspect", "fenced", "silent", "dead")
"""Those of `router.failover.events.HostState`."""
REFUSALS = ("Overloaded", "ContextOverflow", "InvalidInput", "RouterLost")
"""The errors of `Engine.submit`."""
HEDGES = ("won", "late", "failed", "denied")
FAILOVERS = ("lost", "slow", "fenced", "deadline", "not_hosted", "failed", "bad_frame")
"""Those of `router.failover.events.Reason`."""
ENDS = ("stop", "length", "cancelled", "error")
"""Those of `router.engine.request.FinishReason`."""


@dataclass(frozen=True, kw_only=True)
class RouterNumbers:
    """A router's counters and gauges. `dispatch` is None and `inner` set where it computes experts itself."""

    engine: EngineStats
    running: int
    waiting: int
    parked: int
    kv: KVNumbers
    max_model_len: int
    longest_wait_s: float = 0.0
    dispatch: DispatchStats | None = None
    inner: HostNumbers | None = None


def router_families(numbers: RouterNumbers) -> Iterator[Metric]:
    yield from _request_families(numbers)
    yield from _duration_families(numbers.engine.durations)
    yield from _step_families(numbers.engine)
    yield from _kv_families(numbers)
    if numbers.dispatch is not None:
        yield from _dispatch_families(numbers.dispatch)
    if numbers.inner is not None:
        yield from host_families(numbers.inner)


def _request_families(numbers: RouterNumbers) -> Iterator[Metric]:
    engine = numbers.engine
    # All values from the start, because a rate needs a first zero.
    finished = dict.fromkeys(ENDS, 0) | {str(reason): count for reason, count in dict(engine.finished).items()}
    yield counters("herd_router_requests_finished", "Requests that ended, by reason.", "reason", finished)
    rejected = dict.fromkeys(REFUSALS, 0) | dict(engine.rejected)
    yield counters("herd_router_requests_rejected", "Requests not taken in, by error.", "error", rejected)
    now = {"running": numbers.running, "waiting": numbers.waiting, "parked": numbers.parked}
    yield gauges("herd_router_requests", "Requests now, by state.", "state", now)
    text = "How long the oldest request has waited that no step has begun."
    yield gauge("herd_router_longest_wait_seconds", text, numbers.longest_wait_s)
    yield counter("herd_router_prompt_tokens", "Prompt tokens of requests taken in.", engine.prompt_tokens)
    yield counter("herd_router_output_tokens", "Tokens generated.", engine.output_tokens)


def _duration_families(durations: Durations) -> Iterator[Metric]:
    text = "From a request's arrival to the step that begins it."
    yield histogram("herd_router_queue_seconds", text, durations.queue)
    text = "From a request's arrival to its first token, of requests that no other router began."
    yield histogram("herd_router_time_to_first_token_seconds", text, durations.first_token)
    yield histogram("herd_router_inter_token_seconds", "From a token to the next.", durations.between_tokens)
    text = "From a request's arrival to its end, of requests that ended well."
    yield histogram("herd_router_request_seconds", text, durations.whole)


def _step_families(engine: EngineStats) -> Iterator[Metric]:
    yield counter("herd_router_computed_tokens", "Tokens put through the model.", engine.computed_tokens)
    yield counter("herd_router_steps", "Steps run.", engine.steps)
    yield counter("herd_router_step_seconds", "Time spent in steps.", engine.step_s)
    yield counter("herd_router_parkings", "Times that a request left a step for want of an expert.", engine.parked)
    yield histogram("herd_router_batch_requests", "Requests in a step.", engine.batch)


def _kv_families(numbers: RouterNumbers) -> Iterator[Metric]:
    kv = numbers.kv
    yield gauge("herd_router_kv_use_ratio", "Share of the KV cache that requests hold.", kv.used)
    yield gauge("herd_router_kv_cached_ratio", "Share of it that is free but may be found again.", kv.cached)
    room = {"sequence": numbers.max_model_len, "global": kv.global_tokens, "local": kv.local_tokens}
    text = "Tokens that fit: of one sequence, and of each pool."
    yield gauges("herd_router_kv_capacity_tokens", text, "of", room)
    yield counter("herd_router_prefix_lookup_tokens", "Tokens looked for in the cache.", kv.looked_up_tokens)
    yield counter("herd_router_prefix_hit_tokens", "Tokens found there, not computed.", kv.hit_tokens)
    yield counter("herd_router_kv_evicted_blocks", "Cached blocks given up for others.", kv.evicted_blocks)


def _dispatch_families(stats: DispatchStats) -> Iterator[Metric]:
    yield counter("herd_router_dispatches", "Layers whose rows were sent to hosts.", stats.dispatches)
    yield counter("herd_router_dispatch_wait_seconds", "Time spent waiting for hosts.", stats.wait_s)
    yield counter("herd_router_shipments", "Shipments sent.", stats.shipments)
    yield counter("herd_router_resends", "Shipments sent once more, hedges among them.", stats.resends)
    yield counter("herd_router_probes", "Signs of life asked of hosts out of use.", stats.probes)
    yield counter("herd_router_rows_sent", "Rows sent to hosts.", stats.rows_sent)
    yield counter("herd_router_rows_lost", "Rows that left a step without their expert.", stats.rows_lost)
    yield counter("herd_router_decisions", "Calls of the failover machine.", stats.decisions)
    yield counter("herd_router_decision_seconds", "Time spent in them.", stats.decision_s)
    yield gauge("herd_router_placement_epoch", "Number of the placement that steps use.", stats.epoch)
    yield counters("herd_router_shipment_failures", "Shipments without a result, by error.", "error", stats.failures)
    hedges = dict.fromkeys(HEDGES, 0) | dict(stats.hedges)
    yield counters("herd_router_hedges", "Shipments asked of a second host, by outcome.", "outcome", hedges)
    failovers = dict.fromkeys(FAILOVERS, 0) | {str(reason): count for reason, count in dict(stats.failovers).items()}
    yield counters("herd_router_failovers", "Shipments that another host had to do.", "reason", failovers)
    yield from _seen_host_families(stats)
    text = "From the dispatch of a layer's rows to their last answer."
    trips = {str(layer): times for layer, times in dict(stats.round_trips).items()}
    yield histograms("herd_router_dispatch_round_trip_seconds", text, "layer", trips)


def _seen_host_families(stats: DispatchStats) -> Iterator[Metric]:
    text = "1 for the state that a host is in, as seen here."
    now = GaugeMetricFamily("herd_router_host_state", text, labels=("host", "state"))
    for host, state in dict(stats.hosts).items():
        for each in HOST_STATES:
            now.add_metric([host, each], float(each == state))
    yield now
    text = "When a host last entered a state, as seen here."
    entered = GaugeMetricFamily("herd_router_host_state_entered_timestamp_seconds", text, labels=("host", "state"))
    for (host, state), at in dict(stats.entered_at).items():
        entered.add_metric([host, state], at)
    yield entered
