"""The free blocks of a pool as extents, runs of consecutive ids, each as long as it can be.

Attention reads a table of consecutive blocks without copying, so a table goes on in the block after its last one
whenever that is free. A table that begins, or cannot go on, does so in the longest extent. If that is long, it begins
at its middle, since the table before it may want to grow into the first half, but early enough for all blocks it is
known to want.
"""

from __future__ import annotations

from heapq import heapify, heappop, heappush

LONG = 64
"""An extent of more blocks is worth keeping in halves."""
SLACK = 64
"""Entries of the heap that may be out of date however few there are."""


class FreeExtents:
    """A set of block ids out of 0 … num_blocks − 1, all of them at first. Every operation costs O(log n) a run."""

    def __init__(self, num_blocks: int) -> None:
        self._end_of: dict[int, int] = {}
        self._start_of: dict[int, int] = {}
        self._longest: list[tuple[int, int]] = []
        """A heap of (−length, start); entries of extents that are no more are dropped when they come up."""
        self._num_free = num_blocks
        self._put(0, num_blocks)

    def __len__(self) -> int:
        return self._num_free

    def blocks(self) -> list[int]:
        """All of them, in no order."""
        return [block for start, end in self._end_of.items() for block in range(start, end)]

    def add(self, block: int) -> None:
        """Give a block back: it joins the extents on both sides."""
        start = self._start_of.get(block, block)
        end = self._end_of.get(block + 1, block + 1)
        self._remove(start, block)
        self._remove(block + 1, end)
        self._put(start, end)
        self._num_free += 1

    def take(self, count: int, last: int | None, wanted: int) -> list[int]:
        """`count` blocks, at most as many as there are, for a table whose last block is `last`, if it has any, and
        that is going to want `wanted` ≥ `count` in all."""
        taken: list[int] = []
        while len(taken) < count:
            start = None if last is None else last + 1
            if start not in self._end_of:
                start = self._place(wanted - len(taken))
            run = self._carve(start, count - len(taken))
            taken += run
            last = run[-1]
        return taken

    def _place(self, wanted: int) -> int:
        """Where to begin: see above. Nobody grows into an extent at the very beginning."""
        start, end = self._longest_extent()
        half = (end - start) // 2 if start and end - start > LONG else 0
        offset = max(0, min(half, end - start - wanted))
        if offset:
            self._remove(start, end)
            self._put(start, start + offset)
            self._put(start + offset, end)
        return start + offset

    def _carve(self, start: int, most: int) -> range:
        """The first blocks of the extent that begins at `start`."""
        end = self._end_of[start]
        run = range(start, min(end, start + most))
        self._remove(start, end)
        self._put(run.stop, end)
        self._num_free -= len(run)
        return run

    def _longest_extent(self) -> tuple[int, int]:
        while True:
            length, start = -self._longest[0][0], self._longest[0][1]
            if self._end_of.get(start) == start + length:
                return start, start + length
            heappop(self._longest)

    def _put(self, start: int, end: int) -> None:
        if start == end:
            return
        self._end_of[start], self._start_of[end] = end, start
        heappush(self._longest, (start - end, start))
        if len(self._longest) > 4 * len(self._end_of) + SLACK:
            self._longest = [(start - end, start) for start, end in self._end_of.items()]
            heapify(self._longest)

    def _remove(self, start: int, end: int) -> None:
        if start != end:
            del self._end_of[start], self._start_of[end]
