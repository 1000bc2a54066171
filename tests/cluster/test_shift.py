"""Since when a load is what it is: shifts are found where they were, and chance is none."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from cluster.control.fleet import Load
from cluster.control.reading import Expected, Page
from cluster.control.samples import Series, load_of
from cluster.control.shift import steady_since
from experts.placement import ExpertKey

Shares = Callable[[float], list[float]]
BEGIN, END = 100.0, 112.0


def counted(
    shares: Shares, rows_per_s: float, rng: random.Random, layers: int = 2, every_s: float = 1.0
) -> list[tuple[ExpertKey, tuple[tuple[float, float], ...]]]:
    """Counters read each `every_s`, of rows that fall to experts by chance, as often as `shares(at)` says."""
    found = []
    for layer in range(layers):
        totals = [0.0] * len(shares(BEGIN))
        points: list[list[tuple[float, float]]] = [[] for _ in totals]
        at = BEGIN
        while at <= END:
            for expert, own in enumerate(points):
                own.append((at, totals[expert]))
            at += every_s
            for expert in rng.choices(range(len(totals)), shares(at), k=round(rows_per_s * every_s)):
                totals[expert] += 1.0
        found += [((layer, expert), tuple(own)) for expert, own in enumerate(points)]
    return found


def even(_: float) -> list[float]:
    return [1.0] * 16


def skewed(_: float) -> list[float]:
    return [1.0 / (1 + expert) for expert in range(16)]


def shifts_at(instant: float, part: float = 0.8) -> Shares:
    """A hot set that is another one from `instant` on, and has `part` of all rows."""
    cold = (1.0 - part) / 16
    return lambda at: [cold + (part / 2 if expert // 2 == (at > instant) else 0.0) for expert in range(16)]


@pytest.mark.parametrize("shares", [even, skewed])
@pytest.mark.parametrize("rows_per_s", [3.0, 30.0, 1000.0])
def test_chance_is_no_shift(shares: Shares, rows_per_s: float) -> None:
    rng = random.Random(7)
    for _ in range(60):
        assert steady_since(counted(shares, rows_per_s, rng), BEGIN, END) == BEGIN


@pytest.mark.parametrize("ago_s", [2.0, 3.0, 6.0, 9.0])
def test_a_shift_is_found_where_it_was(ago_s: float) -> None:
    rng = random.Random(8)
    for _ in range(50):
        since = steady_since(counted(shifts_at(END - ago_s), 100.0, rng), BEGIN, END)
        assert since == pytest.approx(END - ago_s, abs=1e-6)


def test_a_shift_of_a_tenth_is_none_and_one_of_few_rows_neither() -> None:
    rng = random.Random(9)
    assert steady_since(counted(shifts_at(106.0, part=0.1), 1000.0, rng), BEGIN, END) == BEGIN
    assert steady_since(counted(shifts_at(106.0), 1.0, rng), BEGIN, END) == BEGIN


def test_what_begins_or_ends_is_no_shift() -> None:
    first = [((0, 0), tuple((BEGIN + second, 50.0 * max(0, second - 6)) for second in range(13)))]
    assert steady_since(first, BEGIN, END) == BEGIN
    last = [((0, 0), tuple((BEGIN + second, 50.0 * min(6, second)) for second in range(13)))]
    assert steady_since(last, BEGIN, END) == BEGIN
    assert steady_since([], BEGIN, END) == BEGIN


def test_a_counter_that_begins_anew_counts_from_zero() -> None:
    """A host that died took its counts along: what its expert did before and after is as much."""
    points = tuple((BEGIN + second, 50.0 * (second % 6)) for second in range(13))
    steady = tuple((BEGIN + second, 45.0 * second) for second in range(13))
    assert steady_since([((0, 0), points), ((0, 1), steady)], BEGIN, END) == BEGIN


def series_of(rows: list[tuple[ExpertKey, tuple[tuple[float, float], ...]]]) -> list[Series]:
    own = [
        Series(
            metric="herd_expert_rows_total",
            labels={"name": "h", "layer": str(layer), "expert": str(expert), "host": "h"},
            points=points,
        )
        for (layer, expert), points in rows
    ]
    instants = [at for at, _ in rows[0][1]]

    def one(metric: str, name: str, per_s: float) -> Series:
        return Series(metric=metric, labels={"name": name}, points=tuple((at, per_s * (at - BEGIN)) for at in instants))

    routers = ("herd_router_dispatches_total", "herd_router_queue_seconds_sum", "herd_router_queue_seconds_count")
    idle = one("herd_router_longest_wait_seconds", "r", 0.0)
    return [
        *own,
        one("herd_host_compute_seconds_total", "h", 0.3),
        *(one(metric, "r", 20.0) for metric in routers),
        idle,
    ]


def test_only_what_came_after_a_shift_is_the_load() -> None:
    rows = counted(shifts_at(END - 4.0), 200.0, random.Random(10))
    expected = Expected(
        keys=frozenset(key for key, _ in rows),
        hosts=(Page(name="h", address=""),),
        routers=(Page(name="r", address=""),),
    )
    load = load_of(series_of(rows), expected, END, END - BEGIN, 50.0)
    assert isinstance(load, Load)
    assert load.steady_s == pytest.approx(4.0)
    assert load.window_s == pytest.approx(4.0)
    assert load.rows[0, 0] < 10.0 < 60.0 < load.rows[0, 2], "the set of before has nothing left"
    assert load.dispatches == pytest.approx(10.0), "a rate of those four seconds"
    calm = load_of(series_of(counted(even, 200.0, random.Random(11))), expected, END, END - BEGIN, 50.0)
    assert isinstance(calm, Load)
    assert calm.steady_s == float("inf")
    assert calm.window_s == pytest.approx(12.0)
