"""Loads from Prometheus and from the pages themselves: the same from the same samples, and held whatever goes wrong."""

from __future__ import annotations

import contextlib
import json
import math
import random
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families
from real_prometheus import needs_prometheus, promtool, running_prometheus
from recorded_pages import EXPECTED, KEYS, PLACEMENT, Cluster, Reading, page_text, record, series_of, skewed
from scripted_http import answering, whole

from cluster.control.fleet import Fleet, HostSpec, Load
from cluster.control.http_get import get
from cluster.control.page_samples import parse_page
from cluster.control.plan import Plan, PlanState, Policy, plan
from cluster.control.prometheus_answer import parse_series, parse_time
from cluster.control.prometheus_load import PrometheusLoad, selector
from cluster.control.reading import Expected, Held, LoadSource, Page
from cluster.control.samples import WANTED, load_of
from cluster.control.scrape_load import PageWindow, ScrapeLoad
from cluster.metrics.families import Families, counter
from cluster.metrics.page import MetricsPage

NOW, WINDOW_S = 40.0, 100.0
FLEET = Fleet.of([HostSpec(name=page.name, slots=6, row_s=1e-4) for page in EXPECTED.hosts])


def made_plan(load: Load | Held) -> Plan:
    """What is planned once an imbalance has lasted."""
    assert isinstance(load, Load), load
    _, state = plan(load, FLEET, PLACEMENT, Policy(), PlanState(), NOW)
    made, _ = plan(replace(load, at=load.at + 5.0), FLEET, PLACEMENT, Policy(), state, NOW + 5.0)
    return made


def answer_of(readings: list[Reading]) -> bytes:
    """As Prometheus would answer, had it scraped these pages."""
    result = [
        {
            "metric": {"__name__": one.metric, **one.labels},
            "values": [[at, repr(value)] for at, value in one.points],
        }
        for one in series_of(readings)
    ]
    return json.dumps({"status": "success", "data": {"resultType": "matrix", "result": result}}).encode()


def time_of(at: float) -> bytes:
    return json.dumps({"status": "success", "data": {"resultType": "scalar", "result": [at, str(at)]}}).encode()


READINGS = record(Cluster(rows=skewed(3)), 1000.0)
ENDED = 1011.5


def prometheus_load(url: str, timeout_s: float = 5.0) -> PrometheusLoad:
    return PrometheusLoad(url, "herd", window_s=10.0, timeout_s=timeout_s)


def scripted(matrix: bytes, at: bytes = time_of(ENDED)) -> Callable[[str, socket.socket], None]:
    def answer(path: str, connection: socket.socket) -> None:
        connection.sendall(whole(at if "time%28%29" in path else matrix))

    return answer


# One computation


@needs_prometheus
def test_real_prometheus_and_the_pages_themselves_give_the_same_plan(tmp_path: Path) -> None:
    start = math.floor(time.time()) - 62.0
    readings = record(Cluster(rows=skewed(7)), start, seconds=60)
    (tmp_path / "recorded").write_text("".join(open_metrics(readings)) + "# EOF\n")
    promtool("tsdb", "create-blocks-from", "openmetrics", str(tmp_path / "recorded"), str(tmp_path / "data"))
    with running_prometheus(tmp_path, "global: {}\n") as server:
        asked = PrometheusLoad(server.url, "herd", window_s=WINDOW_S).load(EXPECTED, NOW)
        assert "span only" in held(PrometheusLoad(server.url, "herd", window_s=300.0).load(EXPECTED, NOW))
        nobody = PrometheusLoad(server.url, "her", window_s=WINDOW_S)
        assert "nothing was read" in held(nobody.load(EXPECTED, NOW)), "a name that another one begins with"
    window = PageWindow(WINDOW_S)
    for reading in readings:
        window.take(reading.page, reading.at, reading.text)
    own = load_of(window.series(), EXPECTED, time.time(), WINDOW_S, NOW)
    assert isinstance(asked, Load) and isinstance(own, Load), (asked, own)
    assert replace(asked, at=0.0) == replace(own, at=0.0)
    assert 0.0 <= asked.at - own.at < WINDOW_S / 2, "ages differ by how long the second took"
    assert made_plan(replace(asked, at=own.at)) == made_plan(own)
    assert made_plan(own).is_change, "else it shows nothing"


def held(load: Load | Held) -> str:
    assert isinstance(load, Held), load
    return load.reason


def open_metrics(readings: list[Reading]) -> Iterator[str]:
    """What `promtool` makes blocks of; a stranger's cluster among it."""
    for cluster in ("herd", "herd2"):
        for reading in readings:
            for sample in parse_page(reading.text, WANTED):
                labels = {
                    **dict(sample.labels), "instance": reading.page.address, "name": reading.page.name,
                    "cluster": cluster, "job": "herd",
                }  # fmt: skip
                inside = ",".join(f'{name}="{value}"' for name, value in labels.items())
                yield f"{sample.metric}{{{inside}}} {sample.value * (1 if cluster == 'herd' else 9)} {reading.at:.3f}\n"


def test_an_answer_in_prometheus_form_gives_the_same_plan_as_the_pages() -> None:
    window = PageWindow(10.0)
    for reading in READINGS:
        window.take(reading.page, reading.at, reading.text)
    own = load_of(window.series(), EXPECTED, ENDED, 10.0, NOW)
    with answering(scripted(answer_of(READINGS))) as url:
        source: LoadSource = prometheus_load(url)
        asked = source.load(EXPECTED, NOW)
    assert asked == own
    assert made_plan(asked) == made_plan(own)


@pytest.mark.parametrize("every_s", [1, 5, 15])
def test_the_window_is_as_wide_as_scrapes_are_rare_and_no_wider(every_s: int) -> None:
    cluster = Cluster(rows=skewed(5))
    taken = [one for one in record(cluster, 1000.0, seconds=300) if int(one.at) % every_s == 0]
    now = {"at": 1150.0}
    asked: list[float] = []

    def answer(path: str, connection: socket.socket) -> None:
        if "time%28%29" in path:
            connection.sendall(whole(time_of(now["at"])))
            return
        found = re.search(r"%5B(\d+)ms%5D", path)
        assert found is not None
        asked.append(int(found[1]) / 1000)
        seen = [one for one in taken if now["at"] - asked[-1] < one.at <= now["at"]]
        connection.sendall(whole(answer_of(seen)))

    with answering(answer) as url:
        source = PrometheusLoad(url, "herd", window_s=12.0)
        loads = []
        for turn in range(100):
            now["at"] = 1150.0 + turn
            loads.append(source.load(EXPECTED, NOW + turn))
    assert all(isinstance(load, Load) for load in loads[10:]), loads
    assert asked[-1] == {1: 12.0, 5: 24.0, 15: 96.0}[every_s]
    assert max(asked) <= 96.0


@pytest.mark.parametrize("empty_s", range(4))
def test_a_prometheus_that_has_lost_its_data_is_of_use_again_soon(empty_s: int) -> None:
    taken = record(Cluster(rows=skewed(5)), 1000.0, seconds=60)
    now = {"at": 0.0}

    def answer(path: str, connection: socket.socket) -> None:
        if "time%28%29" in path:
            connection.sendall(whole(time_of(now["at"])))
            return
        found = re.search(r"%5B(\d+)ms%5D", path)
        assert found is not None
        connection.sendall(whole(answer_of([one for one in taken if 0.0 <= now["at"] - one.at < int(found[1]) / 1000])))

    with answering(answer) as url:
        source = PrometheusLoad(url, "herd", window_s=12.0)
        for turn in range(-empty_s, 60):
            now["at"] = 1000.9 + turn
            if isinstance(source.load(EXPECTED, NOW + turn), Load):
                break
    assert turn <= 10, "held until what was read spans a window that is wider than it has to be"


# What a Prometheus may do


def slowly(path: str, connection: socket.socket) -> None:
    """A byte now and then, for ever: each of them in time."""
    for byte in whole(b" " * 10_000):
        connection.sendall(bytes([byte]))
        time.sleep(0.05)


def never(path: str, connection: socket.socket) -> None:
    connection.recv(1)


def status(code: str, body: bytes = b"{}") -> Callable[[str, socket.socket], None]:
    return lambda path, connection: connection.sendall(whole(body, code))


def raw(body: bytes) -> Callable[[str, socket.socket], None]:
    return lambda path, connection: connection.sendall(body)


ERROR = b'{"status":"error","errorType":"timeout","error":"query timed out"}'
EMPTY = b'{"status":"success","data":{"resultType":"matrix","result":[]}}'
VECTOR = b'{"status":"success","data":{"resultType":"vector","result":[]}}'
PARTIAL = json.dumps({**json.loads(answer_of(READINGS)), "warnings": ["one store did not answer"]}).encode()

FAULTS: dict[str, tuple[Callable[[str, socket.socket], None], str]] = {
    "an HTTP error": (status("503 Service Unavailable"), "answers with 503"),
    "a refusal": (status("422 Unprocessable Entity", ERROR), "query timed out"),
    "a redirect": (raw(whole(b"", "302 Found", "Location: http://127.0.0.1:1/\r\n")), "answers with 302"),
    "an error with status 200": (scripted(ERROR), "Prometheus refuses: query timed out"),
    "warnings": (scripted(PARTIAL), "Prometheus warns: ['one store did not answer']"),
    "nothing found": (scripted(EMPTY), "nothing was read of host host-0"),
    "another kind": (scripted(VECTOR), "is no matrix"),
    "half of it": (scripted(answer_of(READINGS)[:5000]), "no JSON"),
    "no JSON": (scripted(b"<html>"), "no JSON"),
    "deep JSON": (scripted(b"[" * 200_000), "no JSON"),
    "a list": (scripted(b"[]"), "no object"),
    "no result": (scripted(b'{"status":"success","data":{"resultType":"matrix"}}'), "cannot be read"),
    "huge numbers": (scripted(answer_of(READINGS).replace(b"1011.1", b"1" * 400)), "cannot be"),
    "no time": (scripted(EMPTY, b'{"status":"success","data":{"resultType":"scalar"}}'), "cannot be read"),
    "a time that is none": (scripted(EMPTY, time_of(math.nan).replace(b"NaN", b"null")), "cannot be read"),
    "an old answer": (scripted(answer_of(READINGS), time_of(ENDED + 60)), "nothing was read of host host-0"),
    "a part is missing": (scripted(answer_of([one for one in READINGS if one.page.name != "host-1"])), "host host-1"),
    "no HTTP": (raw(b"hello\r\n\r\n"), "cannot be asked"),
    "an early end": (raw(whole(b"x" * 100)[:-50]), "did not answer to the end"),
    "a broken chunk": (raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n"), "cannot be asked"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_prometheus_holds(fault: str) -> None:
    answer, why = FAULTS[fault]
    with answering(answer) as url:
        assert why in held(prometheus_load(url).load(EXPECTED, NOW))


@pytest.mark.parametrize("answer", [never, slowly])
def test_a_prometheus_that_takes_too_long_is_left(answer: Callable[[str, socket.socket], None]) -> None:
    with answering(answer) as url:
        assert "did not answer" in held(prometheus_load(url, timeout_s=0.3).load(EXPECTED, NOW))


def test_an_answer_of_unknown_length_that_drips_is_cut_off() -> None:
    was_cut = threading.Event()

    def drips(path: str, connection: socket.socket) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n")
        try:
            for _ in range(200):
                connection.sendall(b" ")
                time.sleep(0.05)
        except OSError:
            was_cut.set()
            raise

    with answering(drips) as url:
        assert "did not answer" in held_bytes(get(url, 0.3, 1_000_000))
        assert was_cut.wait(10.0), "it was read to the end"


def test_answers_without_end_are_left() -> None:
    def endless(path: str, connection: socket.socket) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        while True:
            connection.sendall(b"x" * 65536)

    with answering(endless) as url:
        assert "more than 1000000 bytes" in held_bytes(get(url, 30.0, 1_000_000))
    assert "cannot be asked" in held(prometheus_load(url).load(EXPECTED, NOW)), "nobody listens any more"


def held_bytes(body: bytes | Held) -> str:
    assert isinstance(body, Held)
    return body.reason


def test_the_question_names_the_cluster_and_nothing_else() -> None:
    assert selector("a.b", 10.0).endswith(',cluster=~"|a\\\\.b"}[10000ms]')


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=5) | st.sampled_from(["NaN", "1", "matrix", "success"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["status", "data", "result", "resultType", "metric", "values", "__name__"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(JSON, st.sampled_from(["matrix", "scalar"]))
def test_no_answer_makes_the_reader_raise(result: object, kind: str) -> None:
    for answer in (result, {"status": "success", "data": {"resultType": kind, "result": result}}):
        body = json.dumps(answer).encode()
        series, at = parse_series(body), parse_time(body)
        assert isinstance(at, Held) or math.isfinite(at)
        if isinstance(series, list):
            assert isinstance(load_of(series, EXPECTED, ENDED, 10.0, NOW), Held)


@pytest.mark.parametrize("seed", range(30))
def test_damaged_answers_hold_or_are_as_good_as_whole(seed: int) -> None:
    """A few bytes changed at random: what can still be read is never a load of other experts or of no numbers."""
    chance, whole_one = random.Random(seed), bytearray(answer_of(READINGS))
    for _ in range(chance.randrange(1, 4)):
        whole_one[chance.randrange(len(whole_one))] = chance.randrange(256)
    series = parse_series(bytes(whole_one))
    load = series if isinstance(series, Held) else load_of(series, EXPECTED, ENDED, 10.0, NOW)
    if isinstance(load, Load):
        assert set(load.rows) == KEYS
        assert all(math.isfinite(rows) and rows >= 0 for rows in load.rows.values())


# Pages


@settings(max_examples=200, deadline=None)
@given(
    # Names that begin with two underscores are reserved.
    st.dictionaries(st.from_regex(r"[a-zA-Z][a-zA-Z0-9_]{0,5}", fullmatch=True), st.text(max_size=6), max_size=3),
    st.floats(),
)
def test_what_prometheus_client_writes_and_reads_is_read_alike(labels: dict[str, str], value: float) -> None:
    family = counter("herd_expert_rows", "A text with \\ and\nan end.", 0.0)
    family.samples.clear()
    family.add_sample("herd_expert_rows_total", labels, value)
    text = page_text(lambda: [family])
    theirs = [sample for one in text_string_to_metric_families(text) for sample in one.samples]
    ours = parse_page(text, WANTED)
    assert [(one.metric, dict(one.labels)) for one in ours] == [(one.name, one.labels) for one in theirs]
    assert repr(ours[0].value) == repr(theirs[0].value)


PAGE = READINGS[-1].text


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=60), st.integers(min_value=0, max_value=len(PAGE)), st.integers(min_value=0, max_value=40))
def test_no_page_makes_the_reader_raise_anything_else(text: str, place: int, length: int) -> None:
    for page in (text, f"herd_expert_rows_total{text}", PAGE[:place] + text + PAGE[place + length :]):
        with contextlib.suppress(ValueError):
            assert all(sample.metric in WANTED for sample in parse_page(page, WANTED))


@pytest.mark.parametrize(
    "line",
    [
        "herd_expert_rows_total", "herd_expert_rows_total{", 'herd_expert_rows_total{a="1" 3',
        "herd_expert_rows_total x",
        'herd_expert_rows_total{a="1",a="2"} 3', 'herd_expert_rows_total{a="\\x"} 3', "herd_expert_rows_total 1 2 3",
        "herd_expert_rows_total 1\nherd_expert_rows_total 1", "herd_expert_rows_total 1_0",
    ],
)  # fmt: skip
def test_a_page_with_a_line_that_is_none_is_refused_whole(line: str) -> None:
    with pytest.raises(ValueError):
        parse_page(f"{PAGE}{line}\n", WANTED)


# The controller's own reading


class Clock:
    """Stands still between two settings."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def pages() -> Iterator[tuple[Cluster, Expected]]:
    """The pages of a made-up cluster, served."""
    cluster = Cluster(rows=skewed(5))

    def families_of(page: Page) -> Callable[[], Families]:
        return lambda: cluster.families(page, cluster.seconds)

    made = {
        page.name: MetricsPage(families_of(page), bind="127.0.0.1") for page in (*EXPECTED.hosts, *EXPECTED.routers)
    }
    moved = [replace(page, address=made[page.name].address) for page in (*EXPECTED.hosts, *EXPECTED.routers)]
    yield cluster, replace(EXPECTED, hosts=tuple(moved[:2]), routers=tuple(moved[2:]))
    for page in made.values():
        page.close()


def test_pages_are_scraped_and_become_a_load(pages: tuple[Cluster, Expected]) -> None:
    cluster, expected = pages
    clock = Clock()
    source = ScrapeLoad(window_s=10.0, clock=clock)
    nowhere = replace(expected, hosts=tuple(replace(page, address="") for page in expected.hosts))
    assert "nothing was read" in held(source.load(nowhere, NOW))
    load: Load | Held = Held(reason="")
    for second in range(12):
        cluster.seconds = float(second)
        clock.now += 1.0
        load = source.load(expected, NOW)
    assert isinstance(load, Load), load
    assert load.rows == pytest.approx(skewed(5), abs=0.2)
    assert load.at == NOW


def test_a_page_that_cannot_be_read_is_named(pages: tuple[Cluster, Expected]) -> None:
    _, expected = pages
    with answering(lambda path, connection: connection.sendall(whole(b"herd_expert_rows_total x\n"))) as url:
        broken = replace(expected.hosts[1], address=url.removeprefix("http://"))
        expected = replace(expected, hosts=(expected.hosts[0], broken))
        told = held(ScrapeLoad().load(expected, NOW))
    assert "cannot be read" in told and "host-1" in told


def test_a_page_that_never_answers_is_left_and_the_others_count(pages: tuple[Cluster, Expected]) -> None:
    cluster, expected = pages
    clock = Clock()
    source = ScrapeLoad(window_s=10.0, timeout_s=0.3, clock=clock)
    with answering(never) as url:
        silent = replace(expected.hosts[1], address=url.removeprefix("http://"))
        half = replace(expected, hosts=(expected.hosts[0], silent))
        for second in range(5):
            cluster.seconds = float(second)
            assert "of host host-1" in held(source.load(half, NOW))
            clock.now += 1.0
    alone = replace(expected, keys=frozenset(key for key in KEYS if PLACEMENT[key] == ("host-0",)))
    load = source.load(replace(alone, hosts=expected.hosts[:1]), NOW)
    assert isinstance(load, Load) and load.window_s == 5.0
