"""A load out of samples of metrics pages, whoever took them: Prometheus or the controller itself. Pure.

Counters are read raw and turned into rates here, so that the same samples give the same load wherever they come from.
What is missing, old, or no number there can be makes it `Held`: nothing is ever taken for zero because nobody saw it.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from types import MappingProxyType
from typing import NamedTuple

from cluster.control.fleet import Load
from cluster.control.reading import Expected, Held, Page
from cluster.control.shift import steady_since
from cluster.control.trust import CLOCK_SLACK_S
from experts.placement import ExpertKey

ROWS = "herd_expert_rows_total"
COMPUTE = "herd_host_compute_seconds_total"
DISPATCHES = "herd_router_dispatches_total"
QUEUE_SUM = "herd_router_queue_seconds_sum"
QUEUE_COUNT = "herd_router_queue_seconds_count"
LONGEST_WAIT = "herd_router_longest_wait_seconds"
OF_A_ROUTER = (DISPATCHES, QUEUE_SUM, QUEUE_COUNT, LONGEST_WAIT)
WANTED = frozenset({ROWS, COMPUTE, *OF_A_ROUTER})

MOST = 1e18
"""No counter of ours comes this far."""
FRESH = 0.25
"""What is older than this share of the window is no news of a process."""
LEAST_SPAN = 0.4
"""Share of the window that must have been seen before a rate means anything."""
WHOLE_SPAN = 0.7
"""A process that was seen for this share of what others were is measured by its own time; one that came or went
meanwhile by theirs, since it did nothing in the rest."""


@dataclass(frozen=True, kw_only=True)
class Series:
    """Samples (instant, value) of one metric under its labels, in order of time. Labels `instance` and `name` say whose
    page it was."""

    metric: str
    labels: Mapping[str, str]
    points: tuple[tuple[float, float], ...]


class _Target(NamedTuple):
    """A page: its address and the name of its process, empty where that is unknown."""

    instance: str
    name: str


class _Unusable(Exception):
    """Why samples say nothing."""


def load_of(series: Iterable[Series], expected: Expected, at: float, window_s: float, now: float) -> Load | Held:
    """The load in the `window_s` before `at`, by the clock of the samples; that instant is `now` by the caller's.

    Where it has shifted in that time, only what came after counts.
    """
    try:
        window = _Window(series, expected, at, at - window_s, FRESH * window_s)
        load = window.load(now)
        since = window.steady_since(at - (now - load.at))
        if since <= at - window_s:
            return load
        after = _Window(series, expected, at, since, FRESH * window_s)
        # Where pages are read rarely, it takes a while until anything is known of what came after.
        steady_s = at - since if after.has_measured(window) else 0.0
        return replace(after.load(now) if steady_s else load, steady_s=steady_s)
    except _Unusable as error:
        return Held(reason=str(error))


class _Window:
    """Samples between `begin` and `at`, by metric, page and own labels. News are `fresh_s` old at most."""

    def __init__(self, series: Iterable[Series], expected: Expected, at: float, begin: float, fresh_s: float) -> None:
        self._expected = expected
        self._at = at
        self._begin = begin
        self._fresh_s = fresh_s
        self._by_metric: dict[str, dict[tuple[_Target, str], Series]] = defaultdict(dict)
        names = {page.address: page.name for page in (*expected.hosts, *expected.routers)}
        for one in series:
            self._add(one, names)
        self._seen = self._first_and_last()
        self._span = max((last - first for first, last in self._seen.values()), default=0.0)

    def _add(self, series: Series, names: Mapping[str, str]) -> None:
        if series.metric not in WANTED:
            return
        _check(series, self._at)
        points = tuple([point for point in series.points if point[0] >= self._begin])
        if not points:
            return
        instance = series.labels.get("instance", "")
        target = _Target(instance, series.labels.get("name") or names.get(instance, ""))
        own = ",".join(series.labels.get(label, "") for label in ("layer", "expert", "host"))
        known = self._by_metric[series.metric].get((target, own))
        # Twice where a page is scraped by two jobs: it must not count twice.
        if known is None or known.points[-1][0] < points[-1][0]:
            fresh = Series(metric=series.metric, labels=series.labels, points=points)
            self._by_metric[series.metric][target, own] = fresh

    def _first_and_last(self) -> dict[_Target, tuple[float, float]]:
        seen: dict[_Target, tuple[float, float]] = {}
        for by_target in self._by_metric.values():
            for (target, _), series in by_target.items():
                first, last = seen.get(target, (math.inf, -math.inf))
                seen[target] = min(first, series.points[0][0]), max(last, series.points[-1][0])
        return seen

    def load(self, now: float) -> Load:
        hosts = {page.name: self._newest(page, (COMPUTE,), "host") for page in self._expected.hosts}
        routers = {page.name: self._newest(page, OF_A_ROUTER, "router") for page in self._expected.routers}
        if not hosts or not routers:
            raise _Unusable(f"there is no {'router' if hosts else 'host'}")
        if self._span < LEAST_SPAN * (self._at - self._begin):
            raise _Unusable(f"samples span only {self._span:.1f} of {self._at - self._begin:.0f} s")
        oldest = min(self._seen[target][1] for target in (*hosts.values(), *routers.values()))
        layers = {layer for layer, _ in self._expected.keys}
        return Load(
            at=now - (self._at - oldest),
            rows=self._rows(),
            window_s=self._span,
            dispatches=self._sum(DISPATCHES) / max(1, len(layers)),
            busy=MappingProxyType({name: self._of(COMPUTE, target) for name, target in hosts.items()}),
            queue_s=self._queue_s(routers.values()),
        )

    def steady_since(self, until: float) -> float:
        """See `shift.steady_since`. Up to `until` everything is known."""
        rows = ((_key(series), series.points) for series in self._by_metric[ROWS].values())
        return steady_since(rows, self._begin, until)

    def has_measured(self, longer: _Window) -> bool:
        """Whether every process whose rates can be told in a `longer` window has some in this one."""
        news = self._at - self._fresh_s
        told = [target for target, (first, last) in longer._seen.items() if first < last and last >= news]
        return all(target in self._seen and self._seen[target][0] < self._seen[target][1] for target in told)

    def _newest(self, page: Page, metrics: Iterable[str], role: str) -> _Target:
        """The life of a process that was seen last, and not too long ago, with all of `metrics`."""
        found = [target for target in self._seen if target.name == page.name]
        if not found:
            raise _Unusable(f"nothing was read of {role} {page.name} at {page.address}")
        target = max(found, key=lambda target: self._seen[target][1])
        first, last = self._seen[target]
        for other in found:
            # One life ends before the next one begins; what is seen beside another is not the same process.
            if other != target and self._seen[other][1] > first:
                raise _Unusable(f"{role} {page.name} is read at {target.instance} and at {other.instance} at a time")
        if self._at - last > self._fresh_s:
            raise _Unusable(f"what was read of {role} {page.name} is {self._at - last:.0f} s old")
        for metric in metrics:
            series = self._by_metric[metric].get((target, ",,"))
            if series is None or series.points[-1][0] < last:
                raise _Unusable(f"{metric} is missing of {role} {page.name}")
        return target

    def _rows(self) -> Mapping[ExpertKey, float]:
        rows = dict.fromkeys(self._expected.keys, 0.0)
        fresh: set[ExpertKey] = set()
        for (target, _), series in self._by_metric[ROWS].items():
            key = _key(series)
            last = series.points[-1][0]
            if last == self._seen[target][1] and self._at - last <= self._fresh_s:
                fresh.add(key)
            # Of an expert that this model does not have: a cluster of the same name, a moment ago.
            if key in rows:
                rows[key] += self._rate(series, target)
        missing = self._expected.keys - fresh
        if missing:
            layer, expert = min(missing)
            raise _Unusable(f"no rows were read of {len(missing)} experts, such as {expert} of layer {layer}")
        return MappingProxyType(rows)

    def _queue_s(self, routers: Iterable[_Target]) -> float:
        """Mean of the requests that were begun; where there were none, how long the oldest one waits."""
        begun = self._sum(QUEUE_COUNT)
        if begun > 0.0:
            return self._sum(QUEUE_SUM) / begun
        waits = (self._by_metric[LONGEST_WAIT][target, ",,"].points[-1][1] for target in routers)
        return max(waits, default=0.0)

    def _sum(self, metric: str) -> float:
        return sum(self._rate(series, target) for (target, _), series in self._by_metric[metric].items())

    def _of(self, metric: str, target: _Target) -> float:
        return self._rate(self._by_metric[metric][target, ",,"], target)

    def _rate(self, series: Series, target: _Target) -> float:
        first, last = self._seen[target]
        seconds = last - first if last - first >= WHOLE_SPAN * self._span else self._span
        return _increase(series.points) / seconds


def _increase(points: tuple[tuple[float, float], ...]) -> float:
    """What a counter grew by. Where it falls its process began anew, from zero."""
    return sum(after - before if after >= before else after for (_, before), (_, after) in pairwise(points))


def _check(series: Series, at: float) -> None:
    before = -math.inf
    whose = series.labels.get("name") or series.labels.get("instance") or "somebody"
    for instant, value in series.points:
        if not before < instant <= at + CLOCK_SLACK_S:
            raise _Unusable(f"{series.metric} of {whose} has samples out of time")
        if not 0.0 <= value <= MOST:
            raise _Unusable(f"{series.metric} of {whose} cannot be {value}")
        before = instant


def _key(series: Series) -> ExpertKey:
    layer, expert = series.labels.get("layer", ""), series.labels.get("expert", "")
    if not all(text.isascii() and text.isdecimal() and len(text) <= 9 for text in (layer, expert)):
        raise _Unusable(f"{series.metric} is of expert {expert[:20]!r} of layer {layer[:20]!r}, which cannot be")
    return int(layer), int(expert)
