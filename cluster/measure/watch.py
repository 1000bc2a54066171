"""Looks over a runner's shoulder: what each step computed, and where its time went."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from cluster.measure.floor import StepShape
from router.engine.engine import Runner
from router.engine.runner import StepOutcome
from router.engine.scheduler import Step
from router.model.decoder import Pending, RoutedExperts
from router.routed import Combined, Routing


class StopWatch:
    """Seconds by the name of a part, since they were last taken away."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def time(self, part: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - started


@dataclass(frozen=True, kw_only=True)
class Seen:
    """One step: what it computed, and seconds by part."""

    shape: StepShape
    seconds: dict[str, float]


@dataclass
class Record:
    """All steps in order, and the rows by expert of the step that runs."""

    steps: list[Seen] = field(default_factory=list)
    expert_rows: dict[int, list[int]] = field(default_factory=dict)


class WatchedExperts:
    """Passes rows on, counts them by expert and times their way out and back."""

    def __init__(self, inner: RoutedExperts, watch: StopWatch, record: Record) -> None:
        self._inner = inner
        self._watch = watch
        self._record = record

    def dispatch(self, layer: int, x_TH: torch.Tensor, routing: Routing) -> Pending:
        counts = torch.bincount(routing.expert_TK.flatten())
        self._record.expert_rows[layer] = counts[counts > 0].tolist()
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
    """Runs steps on `inner` and notes them."""

    def __init__(self, inner: Runner, watch: StopWatch, record: Record) -> None:
        self._inner = inner
        self._watch = watch
        self._record = record

    def run(self, step: Step) -> StepOutcome:
        spans = tuple((piece.start, piece.count) for piece in step.pieces)
        num_samples = sum(piece.samples for piece in step.pieces)
        self._watch.seconds, self._record.expert_rows = {}, {}
        outcome = self._inner.run(step)
        shape = StepShape(spans=spans, num_samples=num_samples, expert_rows=self._record.expert_rows)
        self._record.steps.append(Seen(shape=shape, seconds=self._watch.seconds))
        return outcome
