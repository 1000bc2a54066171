"""Who computed the rows of which expert, looked at again and again; and what that says about a load that shifted."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from cluster.control.draft import Replica
from experts.placement import ExpertKey
from experts.reports import CountedRows

SEEN_LATE_S = 2.5
"""Hosts report each second, and streams end their answers first: what was there before a shift is seen to work so soon
after it."""


@dataclass(frozen=True, kw_only=True)
class Sight:
    """All rows that were counted until `at`, of every expert on every host that there is."""

    at: float
    rows: Mapping[Replica, int]
    hosts: tuple[str, ...]


def look(fetch: Callable[[], list[CountedRows]]) -> Sight:
    """The rows of all lives of each host together."""
    rows: Counter[Replica] = Counter()
    counted = fetch()
    for one in counted:
        rows.update({(key, one.host): total for key, total in one.rows.items()})
    return Sight(at=time.perf_counter(), rows=rows, hosts=tuple(sorted({one.host for one in counted})))


def new_replicas(sights: Sequence[Sight], shift: float, keys: Iterable[ExpertKey]) -> dict[Replica, float]:
    """Replicas of `keys` that began to work after the others, with the seconds from `shift` to when that was seen."""
    wanted = frozenset(keys)
    early = [sight for sight in sights if sight.at <= shift + SEEN_LATE_S]
    known = {replica for replica, total in early[-1].rows.items() if total > early[0].rows.get(replica, 0)}
    begun: dict[Replica, float] = {}
    for before, sight in pairwise(sights):
        for replica, total in sight.rows.items():
            is_new = replica not in known and replica[0] in wanted and sight.at > shift + SEEN_LATE_S
            if is_new and total > before.rows.get(replica, 0):
                begun.setdefault(replica, sight.at - shift)
    return begun


def imbalance(first: Sight, last: Sight) -> float:
    """Rows of the busiest host over the mean, between two sights, in the layer where that is most."""
    layers: dict[int, Counter[str]] = {}
    for (key, host), total in last.rows.items():
        layers.setdefault(key[0], Counter())[host] += total - first.rows.get((key, host), 0)
    num_hosts = max(1, len(last.hosts))
    ratios = [num_hosts * max(rows.values()) / rows.total() for rows in layers.values() if rows.total() > 0]
    return max(ratios, default=1.0)


def share_of(first: Sight, last: Sight, experts: Iterable[int]) -> float:
    """What share of all rows between two sights `experts` had."""
    wanted = frozenset(experts)
    rows: Counter[bool] = Counter()
    for replica, total in last.rows.items():
        (_, expert), _ = replica
        rows[expert in wanted] += total - first.rows.get(replica, 0)
    return rows[True] / max(1, rows.total())
