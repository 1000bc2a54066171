"""Since when a load is what it is now: what was counted before its last shift says nothing about what comes. Pure."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from itertools import accumulate, pairwise

from experts.placement import ExpertKey

NUM_PARTS = 12
"""A window is looked at in so many parts."""
LEAST_PARTS = 2
"""So many at least must lie before a shift, and after it."""
SHIFT = 0.4
"""The load has shifted when this share of it went elsewhere, on average over the layers, beyond what chance does."""

Counts = list[float]
"""Rows of an expert in each part of a window."""


def steady_since(
    counted: Iterable[tuple[ExpertKey, tuple[tuple[float, float], ...]]], begin: float, end: float
) -> float:
    """The instant of the last shift between `begin` and `end`; `begin` where there was none.

    `counted` are samples (instant, value) of counters of rows, any number for each expert, up to `end` at least.
    """
    step = (end - begin) / NUM_PARTS
    if step <= 0.0:
        return begin
    layers: dict[int, dict[ExpertKey, Counts]] = defaultdict(dict)
    for key, points in counted:
        counts = layers[key[0]].setdefault(key, [0.0] * NUM_PARTS)
        for (since, before), (at, after) in pairwise(points):
            _spread(counts, (since - begin) / step, (at - begin) / step, after - before if after >= before else after)
    shifted = [_shifted(list(experts.values())) for experts in layers.values()]
    most, part = max(
        (sum(shares[part] for shares in shifted) / max(1, len(shifted)), part)
        for part in range(LEAST_PARTS, NUM_PARTS - LEAST_PARTS + 1)
    )
    return begin + part * step if most > SHIFT else begin


def _spread(counts: Counts, first: float, last: float, rows: float) -> None:
    """Count `rows` evenly between two places: pages are read at instants of their own, and some rarely."""
    per_part = rows / (last - first)
    for part in range(max(0, math.floor(first)), min(NUM_PARTS, math.ceil(last))):
        counts[part] += per_part * (min(last, part + 1.0) - max(first, float(part)))


def _shifted(experts: list[Counts]) -> list[float]:
    """What share of a layer's rows went elsewhere after each of its parts, less what chance explains."""
    sums = [list(accumulate(counts, initial=0.0)) for counts in experts]
    totals = [sum(parts) for parts in zip(*sums, strict=True)]
    shares = []
    for part, before in enumerate(totals):
        after = totals[-1] - before
        if before <= 0.0 or after <= 0.0:
            shares.append(0.0)
            continue
        moved = sum(abs(own[part] / before - (own[-1] - own[part]) / after) for own in sums) / 2.0
        # Of as many rows, drawn from the same experts, this much seems to have moved.
        shares.append(moved - 0.4 * math.sqrt(len(experts) * (1.0 / before + 1.0 / after)))
    return shares
