"""Random spans in a random store, and what attention over them is, spelled out in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from random import Random

import torch

from router.model.spans import Runs, Span

ELSEWHERE = (range(1 << 30, (1 << 30) + 1),)
"""Runs of the other kind of layer, which nobody may look at."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """Spans over `num_slots` slots of a store; those that no span may read hold no numbers."""

    query_TND: torch.Tensor
    keys_SGD: torch.Tensor
    values_SGD: torch.Tensor
    spans: tuple[Span, ...]
    chunked: bool


def break_up(random: Random, count: int, free: list[int], cuts: int) -> Runs:
    """Slots for `count` positions, in up to `cuts` + 1 runs; takes them from `free`, the starts of free extents."""
    borders = sorted({0, count, *(random.randrange(count) for _ in range(cuts))})
    runs = []
    for begin, end in pairwise(borders):
        start = free.pop(random.randrange(len(free)))
        runs.append(range(start, start + end - begin))
    return tuple(runs)


def make_span(row: int, count: int, runs: Runs, chunked: bool) -> Span:
    position = sum(map(len, runs)) - count
    return Span(
        row=row,
        count=count,
        position=position,
        global_runs=ELSEWHERE if chunked else runs,
        local_runs=runs if chunked else ELSEWHERE,
    )


def random_case(seed: int, pieces: Sequence[tuple[int, int]], heads: tuple[int, int, int], dtype: torch.dtype) -> Case:
    """`pieces`: (tokens before, tokens in the batch) of each sequence. `heads`: of keys, queries on each, size."""
    random, generator = Random(seed), torch.Generator().manual_seed(seed)
    num_kv, per_kv, head_dim = heads
    longest = max(past + count for past, count in pieces)
    extents = 5 * len(pieces)
    free = [number * longest for number in range(extents)]
    spans, row, chunked = [], 0, bool(random.randrange(2))
    for past, count in pieces:
        spans.append(make_span(row, count, break_up(random, past + count, free, random.randrange(4)), chunked))
        row += count
    keys, values = (torch.full((extents * longest, num_kv, head_dim), math.nan) for _ in range(2))
    for span in spans:
        for run in span.runs(chunked):
            for whole in (keys, values):
                whole[run.start : run.stop] = torch.randn(len(run), num_kv, head_dim, generator=generator)
    query = 2 * torch.randn(row, num_kv * per_kv, head_dim, generator=generator)
    return Case(
        query_TND=query.to(dtype), keys_SGD=keys.to(dtype), values_SGD=values.to(dtype), spans=tuple(spans),
        chunked=chunked,
    )  # fmt: skip


def spelled_out(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """float64 [T, N, D]: the mixed values, and the same mix of the values' sizes, which rounding is relative to."""
    mixed, sizes = (torch.empty(case.query_TND.shape, dtype=torch.float64) for _ in range(2))
    per_kv = case.query_TND.shape[1] // case.keys_SGD.shape[1]
    for span in case.spans:
        slots = [slot for run in span.runs(case.chunked) for slot in run]
        for number in range(span.count):
            seen = slots[: len(slots) - span.count + number + 1]
            for head in range(case.query_TND.shape[1]):
                query = case.query_TND[span.row + number, head].double()
                score = case.keys_SGD[seen, head // per_kv].double() @ query / math.sqrt(len(query))
                share = torch.softmax(score, dim=0)
                values = case.values_SGD[seen, head // per_kv].double()
                mixed[span.row + number, head] = share @ values
                sizes[span.row + number, head] = share @ values.abs()
    return mixed, sizes
