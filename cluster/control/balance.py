"""How long each host of a fleet works for one layer, under a placement and a load; and what a change would do to it.

Rows of a replicated expert are split over its hosts. Routers split them so that hosts finish together, each seeing
only its own rows; so two splits are kept: the best one, which is what is predicted, and the even one. A placement has
to be good under both, or it would be good only with perfect routers. Under the even one rows are what counts, and they
count for the imbalance too: where reading weights is nearly all of the work, hosts with very different rows are done
together, but what their rows cost besides is not.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from cluster.control.fleet import HostSpec

EVEN = 0.7
"""What the even split counts beside the best one. Much less costs balance under even splits, more under best ones."""
MANY_ROWS = 1.05
"""More than so many times the mean of rows on one host is imbalance, even where all are done at the same time."""

Change = tuple[int, tuple[int, ...]]
"""An expert and the hosts that it would be on, all by index."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """A change that was tried: `finish_s` as it would be, and the new shares of the experts in it."""

    changes: tuple[Change, ...]
    finish_s: float
    shares: tuple[dict[int, float], ...]


class LayerBalance:
    """One layer. Hosts and experts are numbers: places in `hosts` and `rows`.

    `rows[expert]` are rows/s, `homes[expert]` the hosts it is on. Times are seconds of work per second.
    """

    def __init__(
        self, rows: Sequence[float], homes: Sequence[Sequence[int]], hosts: Sequence[HostSpec], dispatches: float
    ) -> None:
        self.rows = rows
        self.dispatches = dispatches
        self.row_s = [host.row_s + host.link_s for host in hosts]
        self.touch_s = [host.touch_s for host in hosts]
        self._touches: dict[tuple[int, int], float] = {}
        self._rows_per_touch = _mean(self.touch_s) / max(_mean(self.row_s), 1e-300)
        self._counts_touches = any(self.touch_s)
        total = sum(rows) * _mean(self.row_s)
        work = total + sum(self._touches_of(expert, 1) for expert in range(len(rows))) * _mean(self.touch_s)
        self._worth = work / total if self._counts_touches and total > 0.0 else 1.0
        """Of a row under the even split, as a multiple of what it costs: so that both splits are of as much work."""
        self.shares: list[dict[int, float]] = [dict.fromkeys(where, 1.0 / max(1, len(where))) for where in homes]
        self.even = [0.0] * len(hosts)
        self.best = [0.0] * len(hosts)
        for expert, where in enumerate(homes):
            for host in where:
                self.even[host] += self._row_weight(expert, host) / len(where)
                self.best[host] += self.weight(expert, host, len(where)) / len(where)
        self._settle(8, range(len(rows)))
        self._unit = len(hosts) / work if work > 0.0 else 1.0

    @cached_property
    def experts_on(self) -> list[set[int]]:
        """Of each host. Most layers are only looked at, so this and `_power` are made when they are wanted."""
        on: list[set[int]] = [set() for _ in self.best]
        for expert, share in enumerate(self.shares):
            for host in share:
                on[host].add(expert)
        return on

    @cached_property
    def _power(self) -> float:
        return self._potential(range(len(self.best)))

    @property
    def finish_s(self) -> float:
        """A smooth stand-in for the time of the slowest host, never below it: it falls with every step to balance."""
        return _root(self._power) / self._unit

    @property
    def slowest_s(self) -> float:
        slowest = max(self.best)
        return max(slowest, max(self._rows()) / MANY_ROWS) if self._counts_touches else slowest

    @property
    def mean_s(self) -> float:
        return sum(self.best) / len(self.best)

    @property
    def imbalance(self) -> float:
        """Time of the slowest host over the mean, or of the one with most rows; 1 where nothing is to be done."""
        mean = self.mean_s
        return self.slowest_s / mean if mean > 0.0 else 1.0

    def homes(self, expert: int) -> tuple[int, ...]:
        return tuple(self.shares[expert])

    @property
    def all_homes(self) -> list[tuple[int, ...]]:
        return [tuple(share) for share in self.shares]

    def seconds(self, expert: int, host: int) -> float:
        """What `host` works for its share of `expert`."""
        share = self.shares[expert]
        return share[host] * self.weight(expert, host, len(share))

    def even_seconds(self, expert: int, host: int) -> float:
        """The same if all its hosts had equal shares of its rows."""
        return self._row_weight(expert, host) / len(self.shares[expert])

    def try_(self, changes: tuple[Change, ...]) -> Trial:
        """What `changes`, of different experts, would do. Nothing is changed."""
        # Made when it is first wanted: before anything is taken away.
        power = self._power
        before: dict[int, tuple[float, float]] = {}
        best, even = self.best, self.even
        for expert, homes in changes:
            for host in (*self.shares[expert], *homes):
                if host not in before:
                    before[host] = (best[host], even[host])
            self._add(expert, self.shares[expert], -1.0)
        power -= self._potential_of(before.values())
        shares = []
        for expert, homes in changes:
            share = self._level(expert, homes)
            self._add(expert, share, 1.0)
            shares.append(share)
        if len(changes) > 1:
            # The first was levelled before the others were there.
            self._add(changes[0][0], shares[0], -1.0)
            shares[0] = self._level(*changes[0])
            self._add(changes[0][0], shares[0], 1.0)
        power += self._potential(before)
        for host, (was_best, was_even) in before.items():
            best[host], even[host] = was_best, was_even
        return Trial(changes=changes, finish_s=_root(power) / self._unit, shares=tuple(shares))

    def apply(self, trial: Trial) -> None:
        """Make the changes of `trial`, tried on this very state."""
        touched = {host for expert, homes in trial.changes for host in (*self.shares[expert], *homes)}
        moving = [expert for expert, _ in trial.changes]
        near = {expert for host in touched for expert in self.experts_on[host]}.union(moving)
        involved = touched.union(*(self.shares[expert] for expert in near if len(self.shares[expert]) > 1))
        power = self._power - self._potential(involved)
        for (expert, homes), share in zip(trial.changes, trial.shares, strict=True):
            old = self.shares[expert]
            self._add(expert, old, -1.0)
            self._add(expert, share, 1.0)
            for host in old:
                self.experts_on[host].discard(expert)
            for host in homes:
                self.experts_on[host].add(expert)
            self.shares[expert] = share
        self._settle(2, near)
        power += self._potential(involved)
        # A sum that has become small beside what it began with has lost its digits.
        lost = power < 0.1 * self._power
        self._power = self._potential(range(len(self.best))) if lost else power

    def settle(self, rounds: int) -> None:
        """Split the rows of replicated experts so that their hosts finish together, in turns until nothing moves."""
        self._settle(rounds, range(len(self.rows)))
        self.__dict__.pop("_power", None)

    def _settle(self, rounds: int, experts: Iterable[int]) -> None:
        best = self.best
        replicated = sorted([expert for expert in experts if len(self.shares[expert]) > 1])
        enough = 2e-3 * self.mean_s
        for _ in range(rounds):
            moved = False
            for expert in replicated:
                share = self.shares[expert]
                last = max([best[host] for host, part in share.items() if part > 0.0])
                if last - min([best[host] for host in share]) > enough:
                    self._share_anew(expert, share)
                    moved = True
            if not moved:
                break

    def _share_anew(self, expert: int, old: dict[int, float]) -> None:
        best, count = self.best, len(old)
        weights = {host: self.weight(expert, host, count) for host in old}
        for host, part in old.items():
            best[host] -= part * weights[host]
        new = self.shares[expert] = _level(best, weights)
        for host, part in new.items():
            best[host] += part * weights[host]

    def _add(self, expert: int, share: dict[int, float], sign: float) -> None:
        best, even, count = self.best, self.even, len(share)
        for host, part in share.items():
            weight = sign * self.weight(expert, host, count)
            best[host] += part * weight
            even[host] += sign * self._row_weight(expert, host) / count

    def weight(self, expert: int, host: int, count: int) -> float:
        """Seconds of all rows of `expert` on `host` when it is one of `count`: its share of them takes that share."""
        seconds = self.rows[expert] * self.row_s[host]
        if self._counts_touches:
            seconds += self.touch_s[host] * self._touches_of(expert, count)
        return seconds

    def _rows(self) -> list[float]:
        """What each host's rows would cost under the best split, were rows all that costs."""
        total = [0.0] * len(self.best)
        for expert, share in enumerate(self.shares):
            if self.rows[expert]:
                for host, part in share.items():
                    total[host] += part * self._row_weight(expert, host)
        return total

    def _row_weight(self, expert: int, host: int) -> float:
        return self.rows[expert] * self.row_s[host] * self._worth

    def _touches_of(self, expert: int, count: int) -> float:
        """Times per second that the weights are read on all of `count` hosts: rows fall into dispatches at random.

        Routers cut the rows of a dispatch over several hosts as far as they take longer than a read; otherwise they
        stay together, and hosts take turns.
        """
        touches = self._touches.get((expert, count))
        if touches is None:
            rows, dispatches = self.rows[expert], self.dispatches
            touches = rows if dispatches <= 0.0 else -dispatches * math.expm1(-rows / dispatches)
            if count > 1 and touches > 0.0:
                per_touch = rows / touches
                touches *= 1.0 + (count - 1) * per_touch / (per_touch + self._rows_per_touch)
            self._touches[expert, count] = touches
        return touches

    def _level(self, expert: int, homes: Sequence[int]) -> dict[int, float]:
        """Shares of `expert` over `homes` with which they finish together, beside what else they do."""
        count = len(homes)
        if count == 1:
            return {homes[0]: 1.0}
        return _level(self.best, {host: self.weight(expert, host, count) for host in homes})

    def _potential(self, hosts: Iterable[int]) -> float:
        best, even = self.best, self.even
        return self._potential_of([(best[host], even[host]) for host in hosts])

    def _potential_of(self, times: Iterable[tuple[float, float]]) -> float:
        """Sum of sixth powers: high enough to care for the slowest, low enough to feel every step."""
        total, unit = 0.0, self._unit
        for best, even in times:
            best *= unit
            even *= unit
            best *= best
            even *= even
            total += best * best * best + EVEN * even * even * even
        return total


def _level(busy: Sequence[float], weights: dict[int, float]) -> dict[int, float]:
    """Pour one unit over hosts that are `busy` already and need `weights[host]` for all of it, up to one level."""
    if min(weights.values()) < 1e-200:
        return dict.fromkeys(weights, 1.0 / len(weights))
    level, speed, amount = 0.0, 0.0, 1.0
    order = sorted(weights, key=busy.__getitem__)
    for host in order:
        if speed > 0.0 and level <= busy[host]:
            break
        pace = 1.0 / weights[host]
        speed += pace
        amount += busy[host] * pace
        level = amount / speed
    shares = {host: (level - busy[host]) / weight if level > busy[host] else 0.0 for host, weight in weights.items()}
    # Beside a billion times as much work a share is lost in rounding.
    return shares if sum(shares.values()) > 0.5 else dict.fromkeys(weights, 1.0 / len(weights))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _root(power: float) -> float:
    return math.pow(max(power, 0.0), 1.0 / 6.0)
