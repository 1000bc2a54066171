"""Samples become a load, or the reason why there is none; whatever they are, nothing is raised and nothing guessed."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from recorded_pages import EXPECTED, HOSTS, KEYS, ROUTERS, Cluster, Reading, record, series_of, skewed

from cluster.control.fleet import Load
from cluster.control.reading import Expected, Held, Page
from cluster.control.samples import Series, load_of
from cluster.control.trust import doubt_load

START, NOW = 1000.0, 50.0
ROWS = skewed(1)


def read(series: list[Series], at: float = START + 11.5, expected: Expected = EXPECTED) -> Load | Held:
    return load_of(series, expected, at, 10.0, NOW)


def recorded(restarted_at: dict[str, float] | None = None) -> list[Reading]:
    return record(Cluster(rows=dict(ROWS), restarted_at=restarted_at or {}), START)


@functools.cache
def whole_series() -> tuple[Series, ...]:
    return tuple(series_of(recorded()))


METRICS = sorted({one.metric for one in whole_series()})


def test_rates_are_those_that_were_made() -> None:
    load = read(list(whole_series()))
    assert isinstance(load, Load)
    assert set(load.rows) == KEYS
    for key, rows in ROWS.items():
        assert load.rows[key] == pytest.approx(rows, abs=0.2)
    assert load.dispatches == pytest.approx(2 * 10.0, rel=0.02)
    assert load.busy == pytest.approx({"host-0": 0.25, "host-1": 0.25})
    assert load.queue_s == pytest.approx(0.5)
    # The oldest of the newest samples is that of the first page, half a second before `at`.
    assert load.at == pytest.approx(NOW - 0.5)
    assert doubt_load(load, KEYS, NOW, 30.0) == ""


def test_an_idle_cluster_has_a_load_of_zero_and_waits_for_nothing() -> None:
    idle = series_of(record(Cluster(rows=dict.fromkeys(KEYS, 0.0), dispatches=0.0, busy=0.0), START))
    load = read([one for one in idle if "queue_seconds" not in one.metric] + quiet(idle))
    assert isinstance(load, Load)
    assert set(load.rows.values()) == {0.0}
    assert load.queue_s == 0.0


def quiet(series: list[Series]) -> list[Series]:
    """Queue times that nobody was added to."""
    return [
        replace(one, points=tuple((at, 3.0) for at, _ in one.points)) for one in series if "queue_seconds" in one.metric
    ]


def test_where_nobody_was_begun_the_longest_wait_counts() -> None:
    series = list(whole_series())
    stuck = [one for one in series if "queue_seconds" not in one.metric and "longest" not in one.metric]
    waits = [replace(one, points=tuple((at, 7.0) for at, _ in one.points)) for one in series if "longest" in one.metric]
    load = read(stuck + quiet(series) + waits)
    assert isinstance(load, Load)
    assert load.queue_s == 7.0


def test_a_restarted_process_counts_from_zero() -> None:
    load = read(series_of(recorded(restarted_at={"host-0": 5.0})))
    whole = read(list(whole_series()))
    assert isinstance(load, Load) and isinstance(whole, Load)
    for key, rows in whole.rows.items():
        # What it counted between the last sample of the first life and its end is gone: at most one interval of ten.
        assert 0.85 * rows - 1.0 <= load.rows[key] <= rows + 0.5


def test_a_host_that_died_is_not_waited_for_and_what_it_did_counts() -> None:
    readings = [one for one in recorded() if one.page is not HOSTS[1] or one.at < START + 5.0]
    alone = replace(EXPECTED, hosts=HOSTS[:1], keys=frozenset(key for key in KEYS if key[1] % 2 == 0))
    assert isinstance(read(series_of(readings), expected=alone), Load)
    assert "host-1" in reason(read(series_of(readings)))
    everyone = read(series_of(readings), expected=replace(EXPECTED, hosts=HOSTS[:1]))
    assert "no rows were read of 4 experts" in reason(everyone), "nobody else has its experts"


def reason(load: Load | Held) -> str:
    assert isinstance(load, Held)
    return load.reason


def test_a_page_that_two_jobs_scrape_counts_once() -> None:
    series = list(whole_series())
    again = [replace(one, labels={**one.labels, "job": "second"}) for one in series]
    nameless = [replace(one, labels={**one.labels, "name": ""}) for one in series]
    assert read(series + again) == read(series) == read(series + nameless) == read(nameless)


def test_a_page_that_moved_is_the_same_process() -> None:
    series = list(whole_series())
    moved = replace(EXPECTED, hosts=(replace(HOSTS[0], address="127.0.0.1:1"), HOSTS[1]))
    assert read(series, expected=moved) == read(series)


DAMAGES: dict[str, tuple[Callable[[list[Reading]], list[Reading]], str]] = {
    "nothing": (lambda readings: [], "nothing was read of host host-0"),
    "no routers": (lambda all_: [one for one in all_ if one.page in HOSTS], "nothing was read of router router-a"),
    "a host is missing": (lambda all_: [one for one in all_ if one.page is not HOSTS[1]], "host host-1"),
    "a host is silent": (lambda all_: [one for one in all_ if one.page != HOSTS[1] or one.at < START + 4], "8 s old"),
    "just begun": (lambda all_: [one for one in all_ if one.at >= START + 10], "span only 1.0 of 10 s"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_missing_holds(damage: str) -> None:
    damaged, why = DAMAGES[damage]
    assert why in reason(read(series_of(damaged(recorded()))))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -1.0, 1e30])
@pytest.mark.parametrize("metric", METRICS)
def test_one_number_that_cannot_be_holds(metric: str, value: float) -> None:
    series = list(whole_series())
    place = next(place for place, one in enumerate(series) if one.metric == metric)
    points = series[place].points
    series[place] = replace(series[place], points=(*points[:4], (points[4][0], value), *points[5:]))
    assert f"{metric} of " in reason(read(series))


def test_old_and_future_samples_hold() -> None:
    series = list(whole_series())
    assert "s old" in reason(read(series, at=START + 18.0))
    assert "out of time" in reason(read(series, at=START - 20.0))
    assert "nothing was read" in reason(read(series, at=START + 900.0))


def test_an_expert_that_nobody_counts_holds() -> None:
    series = [one for one in list(whole_series()) if one.labels.get("expert") != "2"]
    assert "no rows were read of 2 experts, such as 2 of layer 1" in reason(read(series))


@pytest.mark.parametrize("layer", ["", "x", "-1", "1.0", "٣", "9" * 40])
def test_an_expert_that_cannot_be_holds(layer: str) -> None:
    series = list(whole_series())
    strange = [replace(one, labels={**one.labels, "layer": layer}) for one in series if "expert" in one.labels][:1]
    assert "cannot be" in reason(read(series + strange))


def test_an_absurd_rate_is_doubted() -> None:
    series = list(whole_series())
    place = next(place for place, one in enumerate(series) if one.metric == "herd_expert_rows_total")
    points = series[place].points
    series[place] = replace(series[place], points=(*points[:-1], (points[-1][0], 1e16)))
    load = read(series)
    assert isinstance(load, Load)
    assert "cannot be" in doubt_load(load, KEYS, NOW, 30.0)


INSTANTS = st.one_of(st.floats(min_value=START, max_value=START + 12), st.floats())
SERIES = st.builds(
    Series,
    metric=st.sampled_from(METRICS),
    labels=st.dictionaries(
        st.sampled_from(["layer", "expert", "host", "name", "instance"]),
        st.one_of(st.sampled_from(["0", "1", "3", *(page.name for page in (*HOSTS, *ROUTERS))]), st.text(max_size=4)),
    ),
    points=st.lists(st.tuples(INSTANTS, st.floats()), max_size=4).map(tuple),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(SERIES, max_size=6), st.sets(st.integers(min_value=0, max_value=33)))
def test_no_samples_make_it_raise_or_answer_with_what_cannot_be(more: list[Series], dropped: set[int]) -> None:
    series = [one for place, one in enumerate(list(whole_series())) if place not in dropped]
    load = read(series + more)
    if isinstance(load, Load):
        assert set(load.rows) == KEYS
        assert all(math.isfinite(rows) and rows >= 0.0 for rows in load.rows.values())
        assert load.at <= NOW + 5.0
    else:
        assert load.reason


def test_pages_are_known_by_their_address_where_nobody_names_them() -> None:
    nobody = Page(name="host-9", address="127.0.0.1:9")
    assert "host-9 at 127.0.0.1:9" in reason(read(list(whole_series()), expected=replace(EXPECTED, hosts=(nobody,))))


def elsewhere(series: tuple[Series, ...], name: str) -> list[Series]:
    """What was read of process `name`, as if from another page."""
    return [
        replace(one, labels={**one.labels, "instance": "10.0.0.9:9100"}) for one in series if one.labels["name"] == name
    ]


def test_two_pages_of_one_name_at_a_time_hold() -> None:
    """Such as two clusters of one name in one Prometheus: the sum of them is nobody's load."""
    for page in (HOSTS[1], ROUTERS[0]):
        load = read([*whole_series(), *elsewhere(whole_series(), page.name)])
        assert isinstance(load, Held)
        assert page.name in load.reason
        assert "10.0.0.9:9100" in load.reason


def test_what_others_say_is_shown_without_its_control_characters() -> None:
    assert Held(reason="503: \x1b[31mno\nway\x00").reason == "503:  [31mno way "


def test_a_life_after_another_one_is_no_second_page() -> None:
    moved = [
        replace(one, points=tuple(point for point in one.points if (point[0] < START + 4.0) == early))
        for early, some in ((True, elsewhere(whole_series(), HOSTS[0].name)), (False, list(whole_series())))
        for one in some
    ]
    others = [one for one in whole_series() if one.labels["name"] != HOSTS[0].name]
    assert isinstance(read([*others, *(one for one in moved if one.labels["name"] == HOSTS[0].name)]), Load)
