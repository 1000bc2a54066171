"""Prometheus finds the pages: what the list says, the file it is kept in, and the port it is asked at."""

from __future__ import annotations

import json
import stat
import threading
import urllib.request
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
from real_prometheus import needs_promtool, promtool
from serving import until

from cluster.config import ServeSettings
from cluster.control.core import start, step
from cluster.control.numbers import replicas_of
from cluster.control.reading import Page, expected_of
from cluster.control.state import HostReported, Journal, MemberReported, Tick
from cluster.control.targets import targets_json
from cluster.controller_process import TARGETS_PATH, ControllerProcess
from cluster.targets_file import TargetsFile, replace_file
from cluster.tiny import make_tiny
from cluster.topology import Role, metrics_ports
from experts.errors import InvalidInput
from experts.placement import HostInfo, IngressInfo, RouterInfo
from experts.reports import ClusterStatus, ControllerInfo, HostReport, MemberKind, MemberReport

STATUS = ClusterStatus(
    name="herd",
    controller=ControllerInfo(metrics_address="10.0.0.1:7400"),
    ingresses=(IngressInfo(name="ingress-a", metrics_address="10.0.0.1:7401"),),
    routers=(RouterInfo(name="router-a", address="", metrics_address="10.0.0.1:7402"),),
    hosts=(
        HostInfo(name="host-0", incarnation=1, address="", metrics_address="10.0.0.2:7401", state="lost"),
        HostInfo(name="host-1", incarnation=0, address=""),
        HostInfo(name="router-b-local", incarnation=1, address="", transport="local", metrics_address="10.0.0.1:7403"),
    ),
)


def test_every_process_with_a_page_is_listed_under_its_name() -> None:
    groups = json.loads(targets_json(STATUS))
    assert groups == [
        {"targets": [address], "labels": {"cluster": "herd", "role": role, "name": name}}
        for role, name, address in [
            ("controller", "controller", "10.0.0.1:7400"),
            ("ingress", "ingress-a", "10.0.0.1:7401"),
            ("router", "router-a", "10.0.0.1:7402"),
            ("host", "host-0", "10.0.0.2:7401"),
        ]
    ]


@needs_promtool
def test_the_list_is_one_that_prometheus_reads(tmp_path: Path) -> None:
    (tmp_path / "targets.json").write_bytes(targets_json(STATUS))
    (tmp_path / "prometheus.yml").write_text(
        "scrape_configs: [{job_name: herd, file_sd_configs: [{files: [targets.json]}]}]"
    )
    promtool("check", "config", "prometheus.yml", cwd=tmp_path)


def test_the_file_follows_and_is_never_seen_half_written(tmp_path: Path) -> None:
    path, said = tmp_path / "targets.json", [b"[]" * 50_000, b"[1]"]
    seen: set[bytes] = set()
    stopping = threading.Event()

    def look() -> None:
        while not stopping.is_set():
            seen.add(path.read_bytes())

    turns = iter(range(10**6))
    file = TargetsFile(path, lambda: said[next(turns) % 2], every_s=0.001)
    reader = threading.Thread(target=look)
    reader.start()
    until("both were seen", lambda: seen >= set(said))
    stopping.set()
    reader.join()
    file.close()
    assert seen <= {b"[]", *said}
    assert stat.S_IMODE(path.stat().st_mode) == 0o644, "Prometheus is another user"
    assert [one.name for one in tmp_path.iterdir()] == ["targets.json"]
    file.remove()
    assert not list(tmp_path.iterdir())


def test_a_list_that_cannot_be_made_now_is_made_later(tmp_path: Path) -> None:
    turns = iter([False, True, True])

    def make() -> bytes:
        if next(turns, True):
            return b"[2]"
        raise TimeoutError("the controller is busy")

    file = TargetsFile(tmp_path / "targets.json", make, every_s=0.001)
    until("it is there", lambda: (tmp_path / "targets.json").read_bytes() == b"[2]")
    file.close()


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput) as caught:
        TargetsFile(tmp_path / "nowhere" / "targets.json", lambda: b"[]")
    assert caught.value.field == "targets-file"
    with pytest.raises(OSError):
        replace_file(tmp_path, b"[]")
    assert not list(tmp_path.iterdir())


def test_the_first_port_is_the_controllers() -> None:
    settings = ServeSettings(model_dir=Path("/m"), metrics_ports=range(7400, 7403))
    assert list(metrics_ports(settings, Role.CONTROLLER) or ()) == [7400, 7401, 7402]
    assert list(metrics_ports(settings, Role.HOST) or ()) == [7401, 7402, 7400]
    assert metrics_ports(replace(settings, metrics_ports=None), Role.HOST) is None


@pytest.mark.parametrize(
    "url",
    ["127.0.0.1:9090", "ftp://a", "http://", "http://a:0", "http://a:b", "http://u:p@a", "http://a?q", "http://a b"],
)
def test_a_prometheus_that_cannot_be_one_is_named(url: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        ServeSettings(model_dir=Path("/m"), prometheus=url)
    assert caught.value.field == "prometheus"


@pytest.mark.parametrize("url", ["http://127.0.0.1:9090", "https://prometheus.example/prefix/", "http://[::1]:9090"])
def test_a_prometheus_is_a_url(url: str) -> None:
    assert ServeSettings(model_dir=Path("/m"), prometheus=url).prometheus == url


class NoExecutor:
    """Starts nothing."""

    def ensure_host(self, name: str) -> None: ...

    def end_host(self, name: str) -> None: ...

    def ask_room(self, num_hosts: int) -> None: ...

    def leave(self, hosts: Iterable[str]) -> None: ...


def test_the_controller_serves_and_writes_the_list_and_tells_of_prometheus(tmp_path: Path) -> None:
    make_tiny("maverick", tmp_path / "tiny")
    targets = tmp_path / "targets.json"
    settings = ServeSettings(
        model_dir=tmp_path / "tiny",
        hosts=2,
        state_dir=str(tmp_path / "state"),
        targets_file=str(targets),
        prometheus="http://127.0.0.1:9090",
    )
    process = ControllerProcess(settings, node="127.0.0.1", bind="127.0.0.1", life_name="s", executor=NoExecutor())
    process.start()
    status = process.server.status()
    assert status.controller.prometheus == "http://127.0.0.1:9090"
    page = status.controller.metrics_address
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with direct.open(f"http://{page}{TARGETS_PATH}", timeout=20) as response:
        groups = json.loads(response.read())
    assert [group["targets"] for group in groups] == [[page]]
    until("the file says the same", lambda: json.loads(targets.read_text()) == groups)
    with direct.open(f"http://{page}/metrics", timeout=20) as response:
        text = response.read().decode()
    assert 'herd_expert_replicas{expert="0",layer="1",state="serving"} 0.0' in text
    assert 'herd_expert_replicas{expert="0",layer="1",state="loading"} 1.0' in text
    process.stop()
    assert targets.exists(), "the next life goes on with it"
    process.remove_files()
    assert not targets.exists()


def test_replicas_and_expected_processes_follow_reports() -> None:
    target = {(1, 0): ("a",), (1, 1): ("a", "b")}
    state, _ = start(Journal(digest="d", target=target), ["a", "b"], 0.0)
    empty = HostReport(name="a", incarnation=1, address="a", metrics_address="a:1")
    state, _ = step(state, HostReported(report=empty, stream=ord("a")), 0.5)
    assert expected_of(state).hosts == (), "nobody holds anything"
    held = frozenset({(1, 0), (1, 1), (1, 2)})
    for name in ("a", "b"):
        report = HostReport(name=name, incarnation=1, address=name, metrics_address=f"{name}:1", held=held)
        state, _ = step(state, HostReported(report=report, stream=ord(name)), 1.0)
    router = MemberReport(kind=MemberKind.ROUTER, name="r", metrics_address="r:1")
    for member in (router, replace(router, kind=MemberKind.INGRESS, name="i")):
        state, _ = step(state, MemberReported(report=member), 1.0)
    expected = expected_of(state)
    assert expected.keys == target.keys()
    assert expected.hosts == (Page(name="a", address="a:1"), Page(name="b", address="b:1"))
    assert expected.routers == (Page(name="r", address="r:1"),)
    assert {key: dict(counts) for key, counts in replicas_of(state).items()} == {
        (1, 0): {"serving": 1, "draining": 1},
        (1, 1): {"serving": 2},
        (1, 2): {"draining": 2},
    }
    report = HostReport(name="a", incarnation=1, address="a", metrics_address="a:1", held=held)
    for at in range(2, 9):
        state, _ = step(state, HostReported(report=report, stream=ord("a")), float(at))
        state, _ = step(state, Tick(), float(at))
    assert [page.name for page in expected_of(state).hosts] == ["a"], "b is lost"
    assert replicas_of(state)[1, 1] == {"serving": 1, "lost": 1}
