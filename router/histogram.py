"""Counts of how long things took, cheap enough for the path of a token: one search among twenty bounds."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

SECONDS = (*(digit * 10.0**power for power in range(-4, 2) for digit in (1, 2, 5)), 100.0)
"""From 0.1 ms to 100 s."""
POWERS_OF_TWO = tuple(float(1 << power) for power in range(13))
"""From 1 to 4096."""


class Histogram:
    """`counts[i]` values were at most `bounds[i]` and more than the bound before; the last count is of those above all
    bounds. One thread adds; others may read, and then see counts that differ by what is being added."""

    def __init__(self, bounds: Sequence[float] = SECONDS) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def add(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value
