"""The engine: one thread that turns submitted requests into token events, step after step.

The shell around the pure scheduler: it owns the thread, the clock and the lock, and knows neither sockets nor texts.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Protocol

from experts.errors import HerdError, InvalidInput, RouterLost
from experts.placement import ExpertKey
from experts.threads import Threads
from router.engine.images import ImageInput, ImageRules, place_images
from router.engine.kv_cache import KVNumbers
from router.engine.request import Event, FinishEvent, Request, SamplingParams
from router.engine.request_times import Durations, RequestTimes
from router.engine.runner import StepOutcome
from router.engine.scheduler import Scheduler, Step
from router.histogram import POWERS_OF_TWO, Histogram

log = logging.getLogger(__name__)

MAX_FAILED_STEPS_IN_A_ROW = 5
NO_TOKEN = ("model_error", "the model's output for this request allows no next token")
FIRST_RETRY_S, LAST_RETRY_S = 0.02, 1.0
IDLE_WAIT_S = 0.5


class Runner(Protocol):
    """Computes a step. Raises only for bugs; experts that are away are part of the outcome."""

    def run(self, step: Step) -> StepOutcome: ...


@dataclass
class EngineStats:
    """Plain counters since start; times in seconds. `finished` by reason, `rejected` by error, `batch` the number of
    requests in each step."""

    steps: int = 0
    step_s: float = 0.0
    prompt_tokens: int = 0
    output_tokens: int = 0
    computed_tokens: int = 0
    parked: int = 0
    finished: Counter[str] = field(default_factory=Counter)
    rejected: Counter[str] = field(default_factory=Counter)
    batch: Histogram = field(default_factory=lambda: Histogram(POWERS_OF_TWO))
    durations: Durations = field(default_factory=Durations)


class _Sink(NamedTuple):
    """Where the events of one attempt go, and the id they carry there."""

    request_id: str
    on_event: Callable[[Event], None]


class Engine:
    """Serves requests until stopped. `available` tells whether experts can be reached now; `begin_step` is told when a
    step begins, and when the last of its requests ends at the latest. They and `runner` are only called from the
    engine's thread. `image_rules` is None for a model that takes no images."""

    def __init__(
        self,
        *,
        scheduler: Scheduler,
        runner: Runner,
        vocab_size: int,
        available: Callable[[frozenset[ExpertKey]], bool],
        begin_step: Callable[[float], None] = lambda give_up_at: None,
        image_rules: ImageRules | None = None,
        clock: Callable[[], float] = time.monotonic,
        threads: Threads = threading,
    ) -> None:
        self.stats = EngineStats()
        self._times = RequestTimes(self.stats.durations)
        self._scheduler = scheduler
        self._runner = runner
        self._vocab_size = vocab_size
        self._available = available
        self._begin_step = begin_step
        self._image_rules = image_rules
        self._clock = clock
        self._changed = threads.Condition()
        self._sinks: dict[str, _Sink] = {}
        self._cancels: list[str] = []
        self._early: list[Event] = []
        self._retry_at: dict[str, tuple[float, float]] = {}
        self._stopping = False
        self._failed_steps = 0
        self._thread = threads.Thread(target=self._serve, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the engine's thread runs; False before `start`, after `stop` and after too many failed steps."""
        return self._thread.is_alive()

    @property
    def max_model_len(self) -> int:
        return self._scheduler.config.max_model_len

    def load(self) -> tuple[int, int, int]:
        """Numbers of running, waiting and parked requests."""
        with self._changed:
            scheduler = self._scheduler
            return scheduler.num_running, scheduler.num_waiting, scheduler.num_parked

    def longest_wait_s(self) -> float:
        """How long the oldest of the requests has waited that no step has begun."""
        return self._times.longest_wait(self._clock())

    def kv_numbers(self) -> KVNumbers:
        """How full the KV cache is, and what sharing prefixes saves."""
        with self._changed:
            return self._scheduler.cache.numbers()

    def submit(
        self,
        request_id: str,
        attempt: int,
        prompt_ids: list[int],
        emitted_ids: list[int],
        sampling: SamplingParams,
        deadline: float,
        on_event: Callable[[Event], None],
        images: Sequence[ImageInput] = (),
        priority: int = 0,
        cache_salt: str = "",
    ) -> None:
        """Take in a request from any thread. `on_event` is called from the engine's thread: token events, then
        exactly one finish event. `images` belong to the prompt's patch tokens, in order.

        Raises InvalidInput, ContextOverflow, Overloaded or RouterLost, and then calls nothing. Attempts of one
        request are strangers to each other here: an older one that lingers does not stand in a newer one's way.
        """
        try:
            request = self._request(
                request_id, attempt, prompt_ids, emitted_ids, sampling, deadline, images, priority, cache_salt
            )
            with self._changed:
                self._take_in(request, _Sink(request_id, on_event))
        except HerdError as error:
            with self._changed:
                self.stats.rejected[type(error).__name__] += 1
            raise

    def _request(
        self,
        request_id: str,
        attempt: int,
        prompt_ids: list[int],
        emitted_ids: list[int],
        sampling: SamplingParams,
        deadline: float,
        images: Sequence[ImageInput],
        priority: int,
        cache_salt: str,
    ) -> Request:
        sampling.check(self._vocab_size)
        known = [*prompt_ids, *emitted_ids]
        for token in (min(known, default=0), max(known, default=0)):
            if not 0 <= token < self._vocab_size:
                raise InvalidInput("prompt", token, f"token ids must be in 0 … {self._vocab_size - 1}")
        return Request(
            request_id=_name(request_id, attempt),
            token_ids=known,
            num_prompt=len(prompt_ids),
            sampling=sampling,
            deadline=deadline,
            arrival=self._clock(),
            attempt=attempt,
            priority=priority,
            cache_salt=cache_salt,
            images=place_images(prompt_ids, images, self._image_rules),
        )

    def _take_in(self, request: Request, sink: _Sink) -> None:
        if self._stopping or not self.alive:
            raise RouterLost("this router is stopping")
        self._early += self._scheduler.submit(request, self._clock())
        self._sinks[request.request_id] = sink
        self._times.came(request)
        self.stats.prompt_tokens += request.num_prompt
        self._changed.notify_all()

    def cancel(self, request_id: str, attempt: int) -> None:
        """End a request from any thread, within a step; nothing happens when that attempt is not here any more."""
        with self._changed:
            self._cancels.append(_name(request_id, attempt))
            self._changed.notify_all()

    def wake(self) -> None:
        """Look again: a link or the placement changed."""
        with self._changed:
            self._changed.notify_all()

    def stop(self) -> None:
        """End every request with an error that the client may retry elsewhere, and the thread."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        if self._thread.ident is not None:
            self._thread.join(timeout=30.0)

    # The engine's thread

    def _serve(self) -> None:
        try:
            while self._turn():
                pass
        except Exception:
            log.exception("the engine's thread ends on an error of its own")
        with self._changed:
            events, self._early = self._early, []
            for request in self._scheduler.requests:
                events += self._scheduler.fail(request.request_id, "router_unavailable", "the router stopped")
        self._emit(events)

    def _turn(self) -> bool:
        """One step, or one wait for something to do. False when it is time to end."""
        with self._changed:
            if self._stopping or self._failed_steps >= MAX_FAILED_STEPS_IN_A_ROW:
                return False
            events = self._take_changes()
        self._emit(events)
        self._unpark()
        with self._changed:
            step = self._scheduler.schedule(self._clock())
            if not step.pieces:
                self._wait()
        if not step.pieces:
            # Who has no work hears of hosts that went and came all the same, and says so.
            self._available(frozenset())
            return True
        outcome = self._run(step)
        if outcome is None:
            return True
        with self._changed:
            events = [event for name in outcome.failed for event in self._scheduler.fail(name, *NO_TOKEN)]
            events += self._scheduler.update(step, outcome.sampled, outcome.lost, self._clock(), outcome.logprobs)
        self._count(step, outcome)
        self._emit(events)
        return True

    def _take_changes(self) -> list[Event]:
        events, self._early = self._early, []
        cancels, self._cancels = self._cancels, []
        for name in cancels:
            events += self._scheduler.cancel(name)
        return events + self._scheduler.expire(self._clock())

    def _unpark(self) -> None:
        """Bring parked requests back whose experts are reachable, each after a pause that doubles every time its
        experts turn out to be away after all."""
        now = self._clock()
        with self._changed:
            parked = [request for request in self._scheduler.requests if request.missing]
        wanted = {request.missing for request in parked if self._retry_at[request.request_id][0] <= now}
        back = {missing for missing in wanted if self._available(missing)}
        if back:
            with self._changed:
                self._scheduler.unpark(lambda missing: missing in back)

    def _wait(self) -> None:
        """Sleep, the lock given back, until something changes or a deadline or retry is due."""
        if self._early or self._cancels or self._stopping:
            return
        now = self._clock()
        due = [now + IDLE_WAIT_S, *(at for at, _ in self._retry_at.values() if at > now)]
        deadline = self._scheduler.next_deadline()
        self._changed.wait(timeout=max(0.0, min([*due, deadline] if deadline is not None else due) - now))

    def _run(self, step: Step) -> StepOutcome | None:
        """Run a step. A step that raises ends its own requests and nothing else."""
        self._times.began((piece.request.request_id for piece in step.pieces), step.started)
        try:
            self._begin_step(max(piece.request.deadline for piece in step.pieces))
            outcome = self._runner.run(step)
        except Exception:
            log.exception("a step failed; its %d requests end", len(step.pieces))
            self._failed_steps += 1
            self._emit(self._abandon(step))
            return None
        self._failed_steps = 0
        return outcome

    def _abandon(self, step: Step) -> list[Event]:
        events: list[Event] = []
        with self._changed:
            for piece in step.pieces:
                name = piece.request.request_id
                events += self._scheduler.fail(name, "internal_error", "the server failed to compute this request")
            # Every piece's request is done now: this only takes their blocks back.
            return events + self._scheduler.update(step, {}, {}, self._clock())

    def _count(self, step: Step, outcome: StepOutcome) -> None:
        now = self._clock()
        self.stats.steps += 1
        self.stats.step_s += now - step.started
        self.stats.computed_tokens += step.num_tokens
        self.stats.output_tokens += len(outcome.sampled)
        self.stats.parked += len(outcome.lost)
        self.stats.batch.add(len(step.pieces))
        for piece in step.pieces:
            name = piece.request.request_id
            if name in outcome.lost:
                pause = min(2 * self._retry_at.get(name, (0.0, FIRST_RETRY_S / 2))[1], LAST_RETRY_S)
                self._retry_at[name] = (now + pause, pause)
            else:
                self._retry_at.pop(name, None)

    def _emit(self, events: list[Event]) -> None:
        now = self._clock()
        for event in events:
            self._times.told(event, now)
            sink = self._sinks[event.request_id]
            if isinstance(event, FinishEvent):
                with self._changed:
                    del self._sinks[event.request_id]
                self._retry_at.pop(event.request_id, None)
                self.stats.finished[event.reason] += 1
            try:
                sink.on_event(replace(event, request_id=sink.request_id))
            except Exception:
                log.exception("whoever listens to a request failed; the request goes on")


def _name(request_id: str, attempt: int) -> str:
    return f"{request_id}/{attempt}"
