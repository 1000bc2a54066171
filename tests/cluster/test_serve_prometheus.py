"""A real Prometheus beside a running cluster under load: panels have data, nothing is alarmed, both readers agree."""

from __future__ import annotations

import random
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from grafana_files import DASHBOARDS, annotations, dashboard, expressions
from real_prometheus import Prometheus, needs_prometheus, running_prometheus
from serving import Cluster, serving, until

from cluster.control.fleet import Load
from cluster.control.prometheus_load import PrometheusLoad
from cluster.control.reading import Expected, Held, Page
from cluster.control.scrape_load import ScrapeLoad
from cluster.controller_process import TARGETS_PATH
from cluster.tiny import make_tiny
from experts.config import load_config

pytestmark = [pytest.mark.cluster, pytest.mark.soak, needs_prometheus]

RULES = Path(__file__).parents[2] / "deploy" / "prometheus"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("models") / "tiny-scout"
    make_tiny("scout", folder)
    targets = tmp_path_factory.mktemp("targets") / "herd.json"
    first = random.randrange(26000, 26400)
    flags = [
        "--hosts",
        "2",
        "--replicas",
        "2",
        "--routers",
        "2",
        "--kv-memory",
        "128MiB",
        "--targets-file",
        str(targets),
    ]
    flags += ["--metrics-ports", f"{first}-{first + 40}", "--name", "tiny.prometheus"]
    with serving(folder, tmp_path_factory.mktemp("state"), *flags) as cluster, busy(cluster):
        yield cluster
        assert '"tiny.prometheus"' in targets.read_text()
    assert not targets.exists()


class busy:
    """Requests until the end of the block."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._stopping = threading.Event()
        self._failed: list[BaseException] = []
        self._thread = threading.Thread(target=self._ask)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join()
        assert not self._failed, self._failed[0]

    def _ask(self) -> None:
        chance = random.Random(0)
        try:
            while not self._stopping.is_set():
                prompts = [[chance.randrange(200) for _ in range(chance.randrange(4, 90))] for _ in range(4)]
                self._cluster.complete_all(prompts, [24] * 4)
        except BaseException as error:
            self._failed.append(error)


@pytest.fixture(scope="module")
def prometheus(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """With the configuration that we ship, but for the port of the controller's page."""
    config = yaml.safe_load((RULES / "prometheus.yml").read_text())
    config["rule_files"] = [str(RULES / name) for name in config["rule_files"]]
    config["global"]["evaluation_interval"] = "1s"
    page = cluster.status()["controller"]["metrics_address"]
    (job,) = config["scrape_configs"]
    job["http_sd_configs"][0]["url"] = f"http://{page}{TARGETS_PATH}"
    with running_prometheus(tmp_path_factory.mktemp("prometheus"), yaml.safe_dump(config)) as server:
        until("all seven pages are scraped", lambda: len(server.query("up == 1")) == 7, 60.0)
        until("a rate can be made", lambda: server.query("herd:output_tokens:rate1m > 0"), 60.0)
        until("half a window is there", lambda: len(span(server)) == 2, 60.0)
        yield server


def span(server: Prometheus) -> list[Any]:
    return server.query("count_over_time(herd_host_slots[1m]) > 15")


def test_targets_have_names(prometheus: Prometheus) -> None:
    labels = [target["labels"] for target in prometheus.get("/api/v1/targets")["data"]["activeTargets"]]
    assert {one["cluster"] for one in labels} == {"tiny.prometheus"}
    assert sorted(one["role"] for one in labels) == ["controller", *["host"] * 2, *["ingress"] * 2, *["router"] * 2]
    assert {"host-0", "host-1", "controller"} <= {one["name"] for one in labels}


def test_every_panel_has_data(prometheus: Prometheus) -> None:
    empty = []
    for path in DASHBOARDS:
        for where, expression in expressions(dashboard(path), "tiny.prometheus", "15s"):
            samples = prometheus.query(expression)
            if all(sample["value"][1] == "NaN" for sample in samples):
                empty.append((where, expression))
        for _, expression in annotations(dashboard(path), "tiny.prometheus", "15s"):
            prometheus.query(expression)
    assert not empty


def test_a_cluster_in_good_health_alarms_nobody(prometheus: Prometheus) -> None:
    rules = [rule for group in prometheus.get("/api/v1/rules")["data"]["groups"] for rule in group["rules"]]
    assert all(rule["health"] == "ok" for rule in rules), [rule for rule in rules if rule["health"] != "ok"]
    firing = [rule["name"] for rule in rules if rule["type"] == "alerting" and rule["state"] == "firing"]
    assert not firing


def test_both_readers_see_the_same_load(cluster: Cluster, prometheus: Prometheus) -> None:
    status = cluster.status()
    config = load_config(Path(status_model(cluster)))
    expected = Expected(
        keys=frozenset((layer, expert) for layer in config.moe_layers for expert in range(config.num_experts)),
        hosts=tuple(Page(name=one["name"], address=one["metrics_address"]) for one in status["hosts"]),
        routers=tuple(Page(name=one["name"], address=one["metrics_address"]) for one in status["routers"]),
    )
    own, read = ScrapeLoad(window_s=10.0), PrometheusLoad(prometheus.url, "tiny.prometheus", window_s=10.0)
    until("the pages were read for a while", lambda: seen(own, expected) > 8.0)
    ours, theirs = own.load(expected, 0.0), read.load(expected, 0.0)
    assert isinstance(ours, Load) and isinstance(theirs, Load), (ours, theirs)
    assert set(ours.rows) == set(theirs.rows) == expected.keys
    # Of two windows a moment apart, under load that comes in waves: the same order of magnitude, no more is promised.
    total, their_total = sum(ours.rows.values()), sum(theirs.rows.values())
    assert total > 0 and their_total == pytest.approx(total, rel=0.5)
    assert ours.dispatches > 0 and theirs.dispatches > 0
    assert set(ours.busy) == set(theirs.busy) == {"host-0", "host-1"}
    assert ours.queue_s is not None and theirs.queue_s is not None
    stranger = PrometheusLoad(prometheus.url, "tiny").load(expected, 0.0)
    assert isinstance(stranger, Held), "a cluster whose name is the beginning of another's"


def seen(own: ScrapeLoad, expected: Expected) -> float:
    load = own.load(expected, 0.0)
    return load.window_s if isinstance(load, Load) else 0.0


def status_model(cluster: Cluster) -> str:
    return cluster.process.args[4]  # type: ignore[index,return-value]


def test_promtool_finds_no_fault_with_any_page(cluster: Cluster) -> None:
    import subprocess

    status = cluster.status()
    processes = [status["controller"], *status["hosts"], *status["routers"], *status["ingress"]]
    for process in processes:
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with direct.open(f"http://{process['metrics_address']}/metrics", timeout=20) as response:
            page = response.read()
        done = subprocess.run(
            ["promtool", "check", "metrics"], input=page, capture_output=True, check=False, timeout=60
        )
        assert done.returncode == 0, done.stderr.decode()
