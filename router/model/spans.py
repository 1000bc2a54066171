"""Which rows of a packed batch belong to which sequence, and where its keys and values are. Knows no tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

Runs = tuple[range, ...]
"""Slots of consecutive positions, as few ranges of consecutive slots as there are."""


@dataclass(frozen=True, kw_only=True)
class Span:
    """Consecutive tokens of one request in a packed batch.

    Rows [row, row + count) hold positions [position, position + count). `global_runs` are the slots of positions
    0 … position + count − 1, `local_runs` those from the start of the current attention chunk on: a span never crosses
    a chunk border, so plain causal order among these is all the masking there is.
    """

    row: int
    count: int
    position: int
    global_runs: Runs
    local_runs: Runs

    @property
    def rows(self) -> slice:
        return slice(self.row, self.row + self.count)

    def runs(self, chunked: bool) -> Runs:
        return self.local_runs if chunked else self.global_runs

    def past(self, chunked: bool) -> Runs:
        """The runs without this span's own slots."""
        runs = self.runs(chunked)
        return clip_runs(runs, num_slots(runs) - self.count)

    def own(self, chunked: bool) -> Runs:
        """The slots of this span's tokens alone."""
        return _last_slots(self.runs(chunked), self.count)


def num_slots(runs: Runs) -> int:
    return sum(map(len, runs))


def clip_runs(runs: Runs, count: int) -> Runs:
    """The first `count` slots."""
    clipped: list[range] = []
    for run in runs:
        if count <= 0:
            break
        clipped.append(run[:count])
        count -= len(run)
    return tuple(clipped)


def _last_slots(runs: Runs, count: int) -> Runs:
    kept: list[range] = []
    for run in reversed(runs):
        if count <= 0:
            break
        kept.append(run[-count:])
        count -= len(run)
    return tuple(reversed(kept))


def close_up(spans: Sequence[Span]) -> Iterator[Span]:
    """The spans with their rows laid end to end again, after some have left."""
    row = 0
    for span in spans:
        yield replace(span, row=row)
        row += span.count
