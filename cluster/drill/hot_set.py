"""Shifts the load of a steerable model from some experts to others, and tells how soon and how well hosts follow."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise

from cluster.drill.hot_rows import Sight, imbalance, look, new_replicas, share_of
from cluster.load.client import Answered, Client
from cluster.load.settings import LoadSettings
from experts.errors import ControllerUnreachable, HerdError, InvalidInput
from experts.placement import ExpertKey
from experts.reports import CountedRows

LOOK_S = 0.25
SETTLED_S = 5.0
"""Before this long after the last new replica began, and after a shift, nothing is measured of what it brought."""
PROMPT_TOKENS = 12
PROMPTS = 3
"""Of each stream and set, in turn."""
LEAST_SHARE = 0.7


@dataclass(frozen=True, kw_only=True)
class ShiftSettings:
    """`streams` at a time, each on one of `hot` experts: for `before_s` of one set, then for `after_s` of another."""

    url: str
    model: str
    streams: int = 10
    hot: int = 2
    output: int = 40
    before_s: float = 40.0
    after_s: float = 30.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, most in (("streams", 4096), ("hot", 1024), ("output", 4096)):
            if not 1 <= getattr(self, name) <= most:
                raise InvalidInput(name, getattr(self, name), f"must be between 1 and {most}")
        for name in ("before_s", "after_s"):
            if not 10.0 <= getattr(self, name) <= 3600.0:
                raise InvalidInput(name, getattr(self, name), "must be between 10 and 3600")


@dataclass(frozen=True, kw_only=True)
class ShiftResult:
    """Seconds from the shift until the first and the last replica that it called for worked, as hosts' reports tell
    each second; rows of the busiest host over the mean in the worst layer, and the 99th percentile of gaps between
    pieces: before, until the last new replica worked, and afterwards."""

    streams: int
    hot: int
    requests: int
    failed: int
    unequal: int
    new_replicas: int
    first_s: float | None
    last_s: float | None
    imbalance_before: float
    imbalance_shifted: float
    imbalance_after: float
    gap_p99_before_ms: float
    gap_p99_moving_ms: float
    gap_p99_after_ms: float


@dataclass(eq=False)
class _Streams:
    """Closed loops over the prompts of a set of experts, and what their clients saw."""

    client: Client
    prompts: Sequence[Sequence[bytes]]
    expected: dict[bytes, str] = field(default_factory=dict)
    gaps: list[tuple[float, float]] = field(default_factory=list)
    """(when it ended, how long it was)."""
    requests: int = 0
    failed: int = 0
    unequal: int = 0
    ending: bool = False

    async def run(self, number: int) -> None:
        turn = number
        while not self.ending:
            mine = self.prompts[number % len(self.prompts)]
            await self._ask(mine[turn % len(mine)])
            turn += 1

    async def _ask(self, body: bytes) -> None:
        outcome = await self.client.send(body)
        self.requests += 1
        if not isinstance(outcome, Answered):
            self.failed += 1
            return
        # The first answer, whoever else was being answered, is what all later ones are compared with.
        self.unequal += self.expected.setdefault(body, outcome.text) != outcome.text
        self.gaps += [(after, after - before) for before, after in pairwise(outcome.times)]


async def bench_shift(
    settings: ShiftSettings,
    token_ids: Sequence[int],
    fetch: Callable[[], tuple[list[CountedRows], frozenset[ExpertKey]]],
) -> ShiftResult:
    """Run it. `fetch` asks the controller for rows and experts.

    Raises InvalidInput where the model has too few experts or does not do as it is told.
    """
    _, keys = await asyncio.to_thread(fetch)
    experts = sorted({expert for _, expert in keys})
    if len(experts) < 2 * settings.hot:
        raise InvalidInput("hot", settings.hot, f"must be at most half of the model's {len(experts)} experts")
    rng = random.Random(settings.seed)
    chosen = rng.sample(experts, 2 * settings.hot)
    first, second = chosen[: settings.hot], chosen[settings.hot :]
    async with Client(LoadSettings(url=settings.url)) as client:
        streams = _Streams(client, _bodies(settings, first, len(experts), token_ids, rng))
        sights: list[Sight] = []
        looking = asyncio.create_task(_look_for_ever(lambda: fetch()[0], sights))
        running = [asyncio.create_task(streams.run(number)) for number in range(settings.streams)]
        try:
            await asyncio.sleep(settings.before_s)
            _check_steered(sights, first)
            streams.prompts = _bodies(settings, second, len(experts), token_ids, rng)
            shift = time.perf_counter()
            await asyncio.sleep(settings.after_s)
        finally:
            streams.ending = True
            looking.cancel()
            await asyncio.gather(*running)
    return _result(settings, streams, sights, shift, [key for key in keys if key[1] in second])


async def _look_for_ever(fetch: Callable[[], list[CountedRows]], sights: list[Sight]) -> None:
    while True:
        # Not seen for a moment is seen later.
        with suppress(ControllerUnreachable):
            sights.append(await asyncio.to_thread(look, fetch))
        await asyncio.sleep(LOOK_S)


def _check_steered(sights: Sequence[Sight], experts: Sequence[int]) -> None:
    if not sights:
        raise HerdError("the controller told of no rows")
    share = share_of(_sight_at(sights, sights[-1].at - SETTLED_S), sights[-1], experts)
    if share < LEAST_SHARE:
        told = f"must be a steerable one: of prompts for {len(experts)} experts these computed {share:.0%} of all rows"
        raise InvalidInput("model", list(experts), told)


def _bodies(
    settings: ShiftSettings, hot: Sequence[int], num_experts: int, token_ids: Sequence[int], rng: random.Random
) -> list[list[bytes]]:
    """For each stream some prompts whose tokens all go to one expert: a steerable model goes by id modulo experts."""
    able = {expert: [token for token in token_ids if token % num_experts == expert] for expert in hot}
    if not all(able.values()):
        raise HerdError(f"the server's vocabulary shows no token for some of experts {list(hot)}")
    fixed = {"model": settings.model, "max_tokens": settings.output, "temperature": 0, "ignore_eos": True}
    return [
        [
            json.dumps({**fixed, "stream": True, "prompt": rng.choices(able[hot[stream % len(hot)]], k=PROMPT_TOKENS)})
            .encode()
            for _ in range(PROMPTS)
        ]
        for stream in range(settings.streams)
    ]  # fmt: skip


def _result(
    settings: ShiftSettings, streams: _Streams, sights: Sequence[Sight], shift: float, keys: Sequence[ExpertKey]
) -> ShiftResult:
    begun = new_replicas(sights, shift, keys)
    last_s = max(begun.values(), default=None)
    moved = shift + (last_s or 0.0)
    before, shifted = _sight_at(sights, shift - 10.0), _sight_at(sights, shift)
    settled = _sight_at(sights, max(moved, shift) + SETTLED_S)
    return ShiftResult(
        streams=settings.streams,
        hot=settings.hot,
        requests=streams.requests,
        failed=streams.failed,
        unequal=streams.unequal,
        new_replicas=len(begun),
        first_s=_round(min(begun.values(), default=None)),
        last_s=_round(last_s),
        imbalance_before=round(imbalance(before, shifted), 3),
        imbalance_shifted=round(imbalance(shifted, _sight_at(sights, shift + 3.0)), 3),
        imbalance_after=round(imbalance(settled, sights[-1]), 3),
        gap_p99_before_ms=_p99_ms(_gaps(streams, shift - 20.0, shift)),
        gap_p99_moving_ms=_p99_ms(_gaps(streams, shift, moved + 1.0)),
        gap_p99_after_ms=_p99_ms(_gaps(streams, moved + 1.0, float("inf"))),
    )


def _sight_at(sights: Sequence[Sight], at: float) -> Sight:
    """The last one until then, or the first of all."""
    return next((sight for sight in reversed(sights) if sight.at <= at), sights[0])


def _gaps(streams: _Streams, since: float, until: float) -> Iterator[float]:
    return (gap for at, gap in streams.gaps if since <= at < until)


def _p99_ms(gaps: Iterator[float]) -> float:
    ordered = sorted(gaps)
    return round(1e3 * ordered[int(0.99 * (len(ordered) - 1))], 1) if ordered else 0.0


def _round(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 1)
