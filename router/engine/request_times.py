"""How long requests waited, until their first token, between tokens, and in all, on one router.

Knows neither scheduler nor clock: instants are arguments, of one clock. What it holds of a request ends with it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from router.engine.request import Event, FinishEvent, FinishReason, Request
from router.histogram import Histogram


@dataclass(kw_only=True, eq=False)
class Durations:
    """Seconds, counted since the start. `queue`: until a request's first piece is computed. `first_token`: from
    arrival, of requests that no other router began. `between_tokens`: from one to the next. `whole`: from arrival to an
    end that is no error and that the client waited for."""

    queue: Histogram = field(default_factory=Histogram)
    first_token: Histogram = field(default_factory=Histogram)
    between_tokens: Histogram = field(default_factory=Histogram)
    whole: Histogram = field(default_factory=Histogram)


@dataclass(kw_only=True, eq=False)
class _Course:
    """Of one request: `last_at` is when its last token came."""

    arrival: float
    is_fresh: bool
    began: bool = False
    last_at: float | None = None


class RequestTimes:
    """Adds to `durations`. `came` may be called from any thread, the rest from one."""

    def __init__(self, durations: Durations) -> None:
        self._durations = durations
        self._courses: dict[str, _Course] = {}

    def came(self, request: Request) -> None:
        self._courses[request.request_id] = _Course(arrival=request.arrival, is_fresh=request.num_output == 0)

    def began(self, names: Iterable[str], at: float) -> None:
        """A step that began `at` computed pieces of these requests."""
        for name in names:
            course = self._courses.get(name)
            if course is not None and not course.began:
                course.began = True
                self._durations.queue.add(at - course.arrival)

    def told(self, event: Event, at: float) -> None:
        """A token or the end of a request went out."""
        if isinstance(event, FinishEvent):
            ended = self._courses.pop(event.request_id, None)
            if ended is not None and event.reason in (FinishReason.STOP, FinishReason.LENGTH):
                self._durations.whole.add(at - ended.arrival)
            return
        course = self._courses.get(event.request_id)
        if course is None:
            return
        if course.last_at is not None:
            self._durations.between_tokens.add(at - course.last_at)
        elif course.is_fresh:
            self._durations.first_token.add(at - course.arrival)
        course.last_at = at

    def longest_wait(self, now: float) -> float:
        """For how long the request waits that came first of those that have not begun; 0 when all have."""
        waiting = [course.arrival for course in list(self._courses.values()) if not course.began]
        return max(0.0, now - min(waiting, default=now))
