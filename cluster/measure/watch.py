"""Looks over a runner's shoulder: what each step computed, and where its time went."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from types import TracebackType

import torch

from cluster.measure.floor import StepShape
from router.engine.engine import Runner
from router.engine.runner import StepOutcome
from router.engine.scheduler import Step
from router.model.decoder import Pending, RoutedExperts
from router.routed import Combined, Routing
from router.stacked_experts import StackedExperts


class StopWatch:
    """Seconds by the name of a part, since they were last taken away."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def time(self, part: str) -> _Lap:
        return _Lap(self.seconds, part)


class _Lap:
    """One stretch of time; a class, since generators cost more than some of what is timed."""

    __slots__ = ("_part", "_seconds", "_started")

    def __init__(self, seconds: dict[str, float], part: str) -> None:
        self._seconds = seconds
        self._part = part
        self._started = 0.0

    def __enter__(self) -> None:
        self._started = time.perf_counter()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._seconds[self._part] = self._seconds.get(self._part, 0.0) + time.perf_counter() - self._started


@dataclass(frozen=True, kw_only=True)
class Seen:
    """One step: its spans and samples, which experts its tokens chose in each layer, and seconds by part. `counted` are
    the rows by layer and expert of a step in a fixed shape, where nobody sees what is chosen."""

    spans: tuple[tuple[int, int], ...]
    num_samples: int
    chosen: dict[int, torch.Tensor]
    seconds: dict[str, float]
    counted: dict[int, torch.Tensor] = field(default_factory=dict)

    def is_decode_of(self, batch: int) -> bool:
        """Whether it computed one token of each of `batch` sequences."""
        return len(self.spans) == batch and all(count == 1 for _, count in self.spans)

    def shape(self) -> StepShape:
        counts = {
            layer: torch.bincount(expert_TK.flatten()) for layer, expert_TK in self.chosen.items()
        } or self.counted
        rows = {layer: count_E[count_E > 0].tolist() for layer, count_E in counts.items()}
        return StepShape(spans=self.spans, num_samples=self.num_samples, expert_rows=rows)


@dataclass
class Record:
    """All steps in order, and what the tokens of the step that runs have chosen so far. No step is computed while
    someone has `hold`."""

    steps: list[Seen] = field(default_factory=list)
    chosen: dict[int, torch.Tensor] = field(default_factory=dict)
    hold: threading.Lock = field(default_factory=threading.Lock)


class WatchedExperts:
    """Passes rows on, notes what they chose and times their way out and back."""

    def __init__(self, inner: RoutedExperts, watch: StopWatch, record: Record) -> None:
        self._inner = inner
        self._watch = watch
        self._record = record

    def dispatch(self, layer: int, x_TH: torch.Tensor, routing: Routing) -> Pending:
        self._record.chosen[layer] = routing.expert_TK
        with self._watch.time("experts"):
            return WatchedPending(self._inner.dispatch(layer, x_TH, routing), self._watch)


@dataclass(frozen=True)
class WatchedPending:
    """Times the wait for rows."""

    inner: Pending
    watch: StopWatch

    def combine(self) -> Combined:
        with self.watch.time("experts"):
            return self.inner.combine()


class WatchedRunner:
    """Runs steps on `inner` and notes them. `at_hand` counts the rows of steps that dispatch none."""

    def __init__(self, inner: Runner, watch: StopWatch, record: Record, at_hand: StackedExperts | None = None) -> None:
        self._inner = inner
        self._watch = watch
        self._record = record
        self._at_hand = at_hand

    def run(self, step: Step) -> StepOutcome:
        spans = tuple((piece.start, piece.count) for piece in step.pieces)
        num_samples = sum(piece.samples for piece in step.pieces)
        self._watch.seconds, self._record.chosen = {}, {}
        with self._record.hold:
            pass
        before_LE = self._at_hand.rows_LE.clone() if self._at_hand else None
        outcome = self._inner.run(step)
        counted: dict[int, torch.Tensor] = {}
        if self._at_hand is not None and before_LE is not None:
            counted = dict(zip(self._at_hand.layers, self._at_hand.rows_LE - before_LE, strict=True))
        seen = Seen(
            spans=spans,
            num_samples=num_samples,
            chosen=self._record.chosen,
            seconds=self._watch.seconds,
            counted=counted,
        )
        self._record.steps.append(seen)
        return outcome
