"""Takes a draft to better balance by small steps, each worth the bytes that it moves.

A step takes work from a layer's slowest host: another copy of one of its experts, an expert moved away, or two experts
exchanged. Estimates choose a few of all possible steps, which are then tried.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from cluster.control.balance import Change, LayerBalance, Trial
from cluster.control.draft import Draft

MOST_TRIALS, FEWEST_TRIALS = 120, 6
"""Of so many steps that look best, the best is taken: few when many layers share the time."""
EXPECTED_STEPS = 8
"""A layer needs about so many steps."""
GOOD_ENOUGH = 1.004
LEAST_GAIN = 1e-5


@dataclass(frozen=True, kw_only=True)
class Prices:
    """Shares of a layer's mean time that a step has to save: for each replica it loads, and for each that it puts on a
    node which has one of that expert already."""

    load: float = 0.0
    crowding: float = 0.02


def improve(draft: Draft, layers: Sequence[int], prices: Prices, max_trials: int) -> int:
    """Improve `layers` of `draft`, most seconds to win first, in about `max_trials` trials at most; returns how many it
    took. All layers share the hosts' free slots."""
    queue = [(-_excess(draft.layers[layer]), layer) for layer in layers]
    heapq.heapify(queue)
    effort = min(MOST_TRIALS, max(FEWEST_TRIALS, max_trials // (EXPECTED_STEPS * max(1, len(layers)))))
    trials = 0
    while queue and trials < max_trials:
        _, layer = heapq.heappop(queue)
        step, tried = _best_step(draft, layer, prices, effort)
        trials += tried
        if step is not None:
            draft.apply(layer, step)
            heapq.heappush(queue, (-_excess(draft.layers[layer]), layer))
    return trials


def _excess(balance: LayerBalance) -> float:
    return balance.slowest_s - balance.mean_s


def _best_step(draft: Draft, layer: int, prices: Prices, effort: int) -> tuple[Trial | None, int]:
    balance = draft.layers[layer]
    mean = balance.mean_s
    if max(balance.slowest_s, max(balance.even)) <= GOOD_ENOUGH * mean:
        return None, 1
    best, best_gain = None, LEAST_GAIN * mean
    steps = heapq.nsmallest(effort, _steps(draft, layer, 2 if effort > 30 else 1), key=_estimate)
    for _, step in steps:
        trial = balance.try_(step)
        gain = balance.finish_s - trial.finish_s - price(draft, layer, step, prices) * mean
        if gain > best_gain:
            best, best_gain = trial, gain
    return best, 1 + len(steps)


def price(draft: Draft, layer: int, changes: Iterable[Change], prices: Prices) -> float:
    """What `changes` cost, as a share of the layer's mean time: bytes, room and crowding."""
    total = 0.0
    for expert, homes in changes:
        before = draft.layers[layer].shares[expert]
        total += prices.load * sum(host not in before for host in homes)
        total += prices.crowding * (draft.crowding(homes) - draft.crowding(before))
        total += sum(draft.hosts[host].slot_price for host in homes)
        total -= sum(draft.hosts[host].slot_price for host in before)
    return total


def trim(draft: Draft, layers: Sequence[int], keep: float = 0.5) -> None:
    """Drop replicas that save less than `keep` times what their slots are worth to others on the same device."""
    for layer in layers:
        balance = draft.layers[layer]
        for host, spec in enumerate(draft.hosts):
            if spec.slot_price <= 0.0:
                continue
            for _, expert in _work_on(balance, host, even=False):
                if not draft.may_drop(layer, expert, host):
                    continue
                rest = tuple(home for home in balance.homes(expert) if home != host)
                trial = balance.try_(((expert, rest),))
                if trial.finish_s - balance.finish_s <= keep * spec.slot_price * balance.mean_s:
                    draft.apply(layer, trial)


_Step = tuple[float, tuple[Change, ...]]
"""A step and an estimate of how long its two hosts would then take."""


def _estimate(step: _Step) -> float:
    return step[0]


def _steps(draft: Draft, layer: int, width: int) -> Iterator[_Step]:
    """Possible steps from the `width` slowest hosts to four times as many of the fastest."""
    balance = draft.layers[layer]
    for times, even in ((balance.best, False), (balance.even, True)):
        lights = heapq.nsmallest(4 * width, draft.targets, key=times.__getitem__)
        theirs = {light: _work_on(balance, light, even) for light in lights}
        # Of three at most two are the hosts of the step themselves.
        free = heapq.nsmallest(3, [host for host in draft.targets if draft.free[host] > 0], key=times.__getitem__)
        for slow in heapq.nlargest(width, range(len(times)), key=times.__getitem__):
            work = _work_on(balance, slow, even)
            for light in lights:
                if times[light] >= times[slow]:
                    continue
                mine = [(seconds, e) for seconds, e in work if draft.may_come(layer, e, light)]
                if draft.free[light] > 0:
                    yield from _into_free_slot(draft, layer, mine, slow, light, times)
                elif free:
                    yield from _making_room(draft, layer, mine, slow, light, theirs[light], free, times)
                yield from _in_exchange(draft, layer, mine, slow, light, theirs[light], times)


def _work_on(balance: LayerBalance, host: int, even: bool) -> list[tuple[float, int]]:
    """(seconds, expert) of all that `host` does, least first."""
    scale = balance.even_seconds if even else balance.seconds
    return sorted((scale(expert, host), expert) for expert in balance.experts_on[host])


def _into_free_slot(
    draft: Draft, layer: int, mine: list[tuple[float, int]], slow: int, light: int, times: list[float]
) -> Iterator[_Step]:
    gap = times[slow] - times[light]
    for seconds, expert in mine:
        homes = draft.layers[layer].homes(expert)
        half = min(seconds, gap / 2)
        yield times[slow] - half, ((expert, (*homes, light)),)
        if seconds < gap and draft.may_leave(layer, expert, slow):
            after = max(times[slow] - seconds, times[light] + seconds)
            yield after, ((expert, _instead(homes, slow, light)),)


def _making_room(
    draft: Draft,
    layer: int,
    mine: list[tuple[float, int]],
    slow: int,
    light: int,
    theirs: list[tuple[float, int]],
    free: list[int],
    times: list[float],
) -> Iterator[_Step]:
    """Steps into a slot that is freed by moving what does least on `light` to a third host, where there is room."""
    third = next((host for host in free if host not in (slow, light)), None)
    if third is None:
        return
    able = (one for one in theirs if draft.may_leave(layer, one[1], light) and draft.may_come(layer, one[1], third))
    other_seconds, other = next(able, (0.0, -1))
    if other < 0:
        return
    there_s = times[third] + other_seconds
    there = (other, _instead(draft.layers[layer].homes(other), light, third))
    gap = times[slow] - times[light] + other_seconds
    for seconds, expert in mine:
        if there_s >= times[slow] or expert == other:
            continue
        homes = draft.layers[layer].homes(expert)
        yield max(times[slow] - min(seconds, gap / 2), there_s), ((expert, (*homes, light)), there)
        if seconds < gap and draft.may_leave(layer, expert, slow):
            after = max(times[slow] - seconds, times[slow] - gap + seconds, there_s)
            yield after, ((expert, _instead(homes, slow, light)), there)


def _in_exchange(
    draft: Draft,
    layer: int,
    mine: list[tuple[float, int]],
    slow: int,
    light: int,
    theirs: list[tuple[float, int]],
    times: list[float],
) -> Iterator[_Step]:
    """Steps that need no free slot: something else leaves `light`, for `slow` or because there are others of it."""
    balance = draft.layers[layer]
    gap = times[slow] - times[light]
    spare = [(seconds, expert) for seconds, expert in theirs if draft.may_drop(layer, expert, light)][:3]
    partners = [
        (seconds, expert)
        for seconds, expert in theirs
        if draft.may_come(layer, expert, slow) and draft.may_leave(layer, expert, light)
    ]
    for seconds, expert in mine:
        homes = balance.homes(expert)
        for other_seconds, other in spare:
            half = min(seconds, (gap + other_seconds) / 2)
            estimate = max(times[slow] - half, times[light] - other_seconds + half)
            others = tuple(host for host in balance.homes(other) if host != light)
            yield estimate + other_seconds / len(others), ((expert, (*homes, light)), (other, others))
        if not partners or not draft.may_leave(layer, expert, slow) or slow not in draft.targets:
            continue
        place = bisect_left(partners, (seconds - gap / 2, -1))
        for other_seconds, other in partners[max(0, place - 1) : place + 1]:
            shift = seconds - other_seconds
            if 0.0 < shift < gap:
                estimate = max(times[slow] - shift, times[light] + shift)
                there = _instead(balance.homes(other), light, slow)
                yield estimate, ((expert, _instead(homes, slow, light)), (other, there))


def _instead(homes: tuple[int, ...], old: int, new: int) -> tuple[int, ...]:
    return tuple(new if host == old else host for host in homes)
