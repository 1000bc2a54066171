"""What the controller shows: epochs, processes, replicas, and what its control loop measures and does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from cluster.control.numbers import REPLICA_STATES, ControllerNumbers, PlannerNumbers
from cluster.metrics.families import counter, counters, gauge, gauges
from experts.reports import ClusterStatus

HOST_PHASES = ("loading", "ready", "lost")
DECISIONS = ("change", "no_change", "held")
MOVES = ("loading", "draining")
MOVES_ENDED = ("done", "failed", "abandoned")


def controller_families(numbers: ControllerNumbers) -> Iterator[Metric]:
    yield from _status_families(numbers.status)
    yield _replicas(numbers)
    yield _imbalance(numbers)
    yield from _planner_families(numbers.planner)


def _status_families(status: ClusterStatus) -> Iterator[Metric]:
    yield gauge("herd_controller_epoch", "Number of the published placement.", status.controller.epoch)
    yield gauge("herd_controller_term", "Lives of the controller so far.", status.controller.term)
    hosts = dict.fromkeys(HOST_PHASES, 0) | Counter(host.state for host in status.hosts)
    yield gauges("herd_controller_hosts", "Hosts, by state.", "state", hosts)
    yield gauge("herd_controller_routers", "Routers that report.", len(status.routers))
    yield gauge("herd_controller_ingresses", "Ingresses that report.", len(status.ingresses))
    yield gauge("herd_controller_replicas_held", "Wanted replicas that are held.", status.replicas_held)
    yield gauge("herd_controller_replicas_wanted", "Replicas that shall be held.", status.replicas_wanted)
    yield gauge("herd_controller_problems", "Things that are wrong now.", len(status.problems))


def _replicas(numbers: ControllerNumbers) -> Metric:
    """Serving ones always; of other states those that there are, because nearly all would be 0."""
    family = GaugeMetricFamily(
        "herd_expert_replicas", "Replicas of an expert, by state.", labels=("layer", "expert", "state")
    )
    for (layer, expert), by_state in sorted(numbers.replicas.items()):
        for state in REPLICA_STATES:
            count = by_state.get(state, 0)
            if count or state == "serving":
                family.add_metric([str(layer), str(expert), state], count)
    return family


def _imbalance(numbers: ControllerNumbers) -> Metric:
    text = "Time of a layer's slowest host over the mean, as the control loop measured it; 0 before it has."
    layers = {layer: 0.0 for layer, _ in sorted(numbers.replicas)} | dict(numbers.planner.imbalance)
    by_name = {str(layer): ratio for layer, ratio in layers.items()}
    return gauges("herd_planner_layer_imbalance_ratio", text, "layer", by_name)


def _planner_families(planner: PlannerNumbers) -> Iterator[Metric]:
    yield gauge("herd_planner_active", "1 where a control loop plans placements.", float(planner.is_planning))
    yield gauge("herd_planner_holding", "1 while it trusts no load and changes nothing.", float(bool(planner.holding)))
    yield gauge("herd_planner_load_age_seconds", "Age of the last load that it trusted.", planner.load_age_s)
    balances = {
        "before": planner.balance_before,
        "predicted": planner.balance_predicted,
        "realised": planner.balance_realised,
    }
    text = "Mean over slowest host in the worst layer that the last plan changed; 0 before there is one."
    yield gauges("herd_planner_balance_ratio", text, "kind", balances)
    decisions = dict.fromkeys(DECISIONS, 0) | dict(planner.decisions)
    yield counters("herd_planner_decisions", "Plans made, by what they say.", "outcome", decisions)
    yield gauge("herd_planner_hosts_wanted", "Hosts that there should be; 0 until counted.", planner.hosts_wanted)
    yield gauges("herd_moves", "Replicas on their way, by state.", "state", dict.fromkeys(MOVES, 0) | {**planner.moves})
    ended = dict.fromkeys(MOVES_ENDED, 0) | dict(planner.moves_ended)
    yield counters("herd_moves_ended", "Moves that ended, by outcome.", "outcome", ended)
    yield counter("herd_moved_bytes", "Bytes of weights loaded by moves.", planner.moved_bytes)
    yield counter("herd_move_seconds", "Time that moves took, from order to serving.", planner.move_s)
