"""Each process's Prometheus page: names by the book, numbers as counted, a port of its own."""

import socket
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator

import pytest
from prometheus_client.parser import text_string_to_metric_families

from cluster.control.numbers import REPLICA_STATES, ControllerNumbers, PlannerNumbers
from cluster.metrics.controller import controller_families
from cluster.metrics.families import Families
from cluster.metrics.host import HostNumbers, host_families
from cluster.metrics.ingress import IngressNumbers, ingress_families
from cluster.metrics.page import MetricsPage
from cluster.metrics.router import ENDS, FAILOVERS, HOST_STATES, RouterNumbers, router_families
from experts.errors import InvalidInput
from experts.load import LoadSnapshot
from experts.placement import HostInfo
from experts.reports import ClusterStatus, ControllerInfo
from router.dispatch_stats import DispatchStats
from router.engine.engine import EngineStats
from router.engine.kv_cache import KVNumbers
from router.engine.request import FinishReason
from router.engine.request_times import Durations
from router.failover.events import HostState, Reason
from router.histogram import SECONDS, Histogram

TRIPS = Histogram()
for seconds in (0.0015, 0.3, 900.0):
    TRIPS.add(seconds)
LOAD = LoadSnapshot(rows={(1, 0): 5, (3, 2): 7}, rows_total=12, num_shipments=4, compute_s=0.25, queue_s=0.5)
HOST = HostNumbers(name="host-0", load=LOAD, held=frozenset({(1, 0), (3, 2), (3, 3)}), held_bytes=4096, queue_depth=2)
ROUTER = RouterNumbers(
    engine=EngineStats(
        steps=3,
        step_s=1.5,
        prompt_tokens=10,
        output_tokens=6,
        finished=Counter({FinishReason.STOP: 2}),
        rejected=Counter(Overloaded=4),
        durations=Durations(first_token=TRIPS),
    ),
    running=1,
    waiting=2,
    parked=3,
    kv=KVNumbers(used=0.5, cached=0.25, looked_up_tokens=90, hit_tokens=64, evicted_blocks=7, global_tokens=640),
    max_model_len=512,
    longest_wait_s=1.25,
    dispatch=DispatchStats(
        shipments=9,
        resends=1,
        decisions=40,
        decision_s=0.5,
        epoch=7,
        failures=Counter(HostLost=1),
        hedges=Counter(won=2),
        failovers=Counter({Reason.FENCED: 3}),
        hosts={"a": "up", "b": "fenced"},
        entered_at={("b", "fenced"): 1.5e9},
        round_trips={3: TRIPS},
    ),
)
STATUS = ClusterStatus(
    controller=ControllerInfo(epoch=4, term=2),
    hosts=(
        HostInfo(name="a", incarnation=1, address="", state="ready"),
        HostInfo(name="b", incarnation=1, address="", state="lost"),
    ),
    replicas_held=3,
    replicas_wanted=6,
)


@pytest.fixture
def scrape() -> Iterator[Callable[[Callable[[], Families]], dict[str, float]]]:
    """Serve families, read the page back over HTTP: "name{label=value}" → number."""
    pages: list[MetricsPage] = []

    def read(families: Callable[[], Families]) -> dict[str, float]:
        page = MetricsPage(families, bind="127.0.0.1")
        pages.append(page)
        with urllib.request.urlopen(f"http://{page.address}/metrics", timeout=20) as response:
            text = response.read().decode()
        values = {}
        for family in text_string_to_metric_families(text):
            assert ":" not in family.name
            assert family.documentation
            for sample in family.samples:
                if family.type == "counter":
                    assert sample.name.endswith("_total")
                labels = ",".join(f"{name}={value}" for name, value in sorted(sample.labels.items()))
                values[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
        return values

    yield read
    for page in pages:
        page.close()


Scrape = Callable[[Callable[[], Families]], dict[str, float]]


def test_a_host_shows_rows_per_expert(scrape: Scrape) -> None:
    values = scrape(lambda: host_families(HOST))
    assert values["herd_expert_rows_total{expert=2,host=host-0,layer=3}"] == 7
    assert values["herd_host_compute_seconds_total"] == 0.25
    assert values["herd_expert_rows_total{expert=3,host=host-0,layer=3}"] == 0, "held, and nothing came yet"
    assert (values["herd_host_queue_seconds_total"], values["herd_host_queue_depth"]) == (0.5, 2)
    assert values["herd_host_slots"] == 3
    assert values["herd_host_held_bytes"] == 4096
    assert "process_resident_memory_bytes" in values


def test_a_router_shows_requests_tokens_and_shipments(scrape: Scrape) -> None:
    values = scrape(lambda: router_families(ROUTER))
    assert values["herd_router_requests_finished_total{reason=stop}"] == 2
    assert values["herd_router_requests_finished_total{reason=error}"] == 0
    assert values["herd_router_requests_rejected_total{error=Overloaded}"] == 4
    assert values["herd_router_longest_wait_seconds"] == 1.25
    assert values["herd_router_time_to_first_token_seconds_bucket{le=0.0001}"] == 0
    assert values["herd_router_time_to_first_token_seconds_bucket{le=100.0}"] == 2
    assert values["herd_router_time_to_first_token_seconds_count"] == 3
    assert values["herd_router_inter_token_seconds_count"] == 0
    assert values["herd_router_requests{state=parked}"] == 3
    assert values["herd_router_output_tokens_total"] == 6
    assert values["herd_router_resends_total"] == 1
    assert (values["herd_router_kv_use_ratio"], values["herd_router_kv_cached_ratio"]) == (0.5, 0.25)
    assert values["herd_router_prefix_lookup_tokens_total"] == 90
    assert values["herd_router_prefix_hit_tokens_total"] == 64
    assert values["herd_router_kv_evicted_blocks_total"] == 7
    capacity = {of: values[f"herd_router_kv_capacity_tokens{{of={of}}}"] for of in ("sequence", "global", "local")}
    assert capacity == {"sequence": 512, "global": 640, "local": 0}
    assert values["herd_router_shipment_failures_total{error=HostLost}"] == 1
    assert not any(name.startswith("herd_host") for name in values)


def test_a_router_shows_what_became_of_shipments_and_how_it_sees_hosts(scrape: Scrape) -> None:
    values = scrape(lambda: router_families(ROUTER))
    assert values["herd_router_hedges_total{outcome=won}"] == 2
    assert values["herd_router_failovers_total{reason=fenced}"] == 3
    assert (values["herd_router_decisions_total"], values["herd_router_decision_seconds_total"]) == (40, 0.5)
    assert values["herd_router_placement_epoch"] == 7
    states = {state: values[f"herd_router_host_state{{host=b,state={state}}}"] for state in HOST_STATES}
    assert states == {state: float(state == "fenced") for state in HostState}
    assert values["herd_router_host_state_entered_timestamp_seconds{host=b,state=fenced}"] == 1.5e9
    trips = "herd_router_dispatch_round_trip_seconds"
    buckets = {bound: values[f"{trips}_bucket{{layer=3,le={bound}}}"] for bound in ("0.001", "0.002", "0.5", "+Inf")}
    assert buckets == {"0.001": 0, "0.002": 1, "0.5": 2, "+Inf": 3}
    assert values[f"{trips}_sum{{layer=3}}"] == pytest.approx(900.3015)


def test_values_of_labels_are_those_of_the_parts_that_count() -> None:
    assert set(ENDS) == set(FinishReason)
    assert set(FAILOVERS) == set(Reason)
    assert (SECONDS[0], SECONDS[-1]) == (0.0001, 100.0)


def test_a_router_that_computes_itself_shows_its_inner_host(scrape: Scrape) -> None:
    numbers = RouterNumbers(
        engine=EngineStats(), running=0, waiting=0, parked=0, kv=KVNumbers(), max_model_len=2, inner=HOST
    )
    values = scrape(lambda: router_families(numbers))
    assert values["herd_expert_rows_total{expert=0,host=host-0,layer=1}"] == 5
    assert "herd_router_shipments_total" not in values


def test_an_ingress_shows_responses(scrape: Scrape) -> None:
    values = scrape(lambda: ingress_families(IngressNumbers(responses={200: 3, 404: 1}, active=2)))
    assert values["herd_ingress_responses_total{status=404}"] == 1
    assert values["herd_ingress_active_requests"] == 2


def test_the_controller_shows_hosts_by_state(scrape: Scrape) -> None:
    values = scrape(lambda: controller_families(ControllerNumbers(status=STATUS)))
    assert values["herd_controller_hosts{state=ready}"] == values["herd_controller_hosts{state=lost}"] == 1
    assert values["herd_controller_hosts{state=loading}"] == 0
    assert values["herd_controller_epoch"] == 4
    assert (values["herd_controller_replicas_held"], values["herd_controller_replicas_wanted"]) == (3, 6)


def test_the_controller_shows_replicas_by_state(scrape: Scrape) -> None:
    numbers = ControllerNumbers(status=STATUS, replicas={(1, 0): {"serving": 2, "loading": 1}, (3, 7): {}})
    values = scrape(lambda: controller_families(numbers))
    replicas = {name: value for name, value in values.items() if name.startswith("herd_expert_replicas")}
    assert replicas == {
        "herd_expert_replicas{expert=0,layer=1,state=serving}": 2,
        "herd_expert_replicas{expert=0,layer=1,state=loading}": 1,
        "herd_expert_replicas{expert=7,layer=3,state=serving}": 0,
    }
    assert "serving" in REPLICA_STATES


def test_the_controller_shows_what_a_planner_does_and_zeros_before_there_is_one(scrape: Scrape) -> None:
    idle = scrape(lambda: controller_families(ControllerNumbers(status=STATUS)))
    planner = PlannerNumbers(
        is_planning=True,
        holding="no load was measured",
        imbalance={3: 1.5},
        balance_predicted=0.9,
        decisions={"change": 2},
        moves={"loading": 1},
        moves_ended={"done": 7},
        moved_bytes=1 << 40,
        move_s=2.5,
        hosts_wanted=4,
    )
    busy = scrape(lambda: controller_families(ControllerNumbers(status=STATUS, planner=planner)))
    for name, value in {
        "herd_planner_active": 1,
        "herd_planner_holding": 1,
        "herd_planner_balance_ratio{kind=predicted}": 0.9,
        "herd_planner_decisions_total{outcome=change}": 2,
        "herd_moves{state=loading}": 1,
        "herd_moves_ended_total{outcome=done}": 7,
        "herd_moved_bytes_total": 1 << 40,
        "herd_move_seconds_total": 2.5,
        "herd_planner_hosts_wanted": 4,
    }.items():
        assert (idle[name], busy[name]) == (0, value), name
    assert busy["herd_planner_layer_imbalance_ratio{layer=3}"] == 1.5


def test_few_metrics_have_a_sample_for_every_expert() -> None:
    status = ControllerNumbers(status=STATUS, replicas={(1, 0): {"serving": 1}})
    families = [*host_families(HOST), *router_families(ROUTER), *controller_families(status)]
    by_expert = {family.name for family in families for sample in family.samples if "expert" in sample.labels}
    assert by_expert == {"herd_expert_rows", "herd_expert_replicas"}
    names = [family.name for family in families]
    assert len(set(names)) == len(names)
    assert all(name.startswith("herd_") for name in names)


def test_documents_lie_beside_the_page() -> None:
    page = MetricsPage(lambda: (), bind="127.0.0.1", documents={"/targets": lambda: b"[1]"})
    with urllib.request.urlopen(f"http://{page.address}/targets", timeout=20) as response:
        assert (response.read(), response.headers["Content-Type"]) == (b"[1]", "application/json")
    with urllib.request.urlopen(f"http://{page.address}/metrics", timeout=20) as response:
        assert b"process_cpu_seconds_total" in response.read()
    page.close()


def test_pages_take_ports_of_their_range_and_never_share_one() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    page = MetricsPage(lambda: (), bind="127.0.0.1", ports=range(port, port + 1))
    assert page.address == f"127.0.0.1:{port}"
    with pytest.raises(InvalidInput) as caught:
        MetricsPage(lambda: (), bind="127.0.0.1", ports=range(port, port + 1))
    assert caught.value.field == "metrics-ports"
    page.close()
