"""How long requests took: told by events and instants alone."""

from __future__ import annotations

import pytest

from router.engine.request import FinishEvent, FinishReason, Request, SamplingParams, TokenEvent
from router.engine.request_times import Durations, RequestTimes
from router.histogram import SECONDS, Histogram


def request(name: str, arrival: float, emitted: int = 0) -> Request:
    return Request(
        request_id=name,
        token_ids=[1, 2, 3, *range(emitted)],
        num_prompt=3,
        sampling=SamplingParams(max_tokens=9),
        deadline=1e9,
        arrival=arrival,
    )


def token(name: str, index: int) -> TokenEvent:
    return TokenEvent(request_id=name, index=index, token_id=0)


def end(name: str, reason: FinishReason = FinishReason.LENGTH) -> FinishEvent:
    return FinishEvent(request_id=name, reason=reason)


@pytest.fixture
def durations() -> Durations:
    return Durations()


@pytest.fixture
def times(durations: Durations) -> RequestTimes:
    return RequestTimes(durations)


def summed(histogram: Histogram) -> tuple[int, float]:
    return sum(histogram.counts), pytest.approx(histogram.total)


def test_a_request_waits_begins_and_goes_on(times: RequestTimes, durations: Durations) -> None:
    times.came(request("a", arrival=10.0))
    assert times.longest_wait(now=10.5) == 0.5
    times.began(["a"], 11.0)
    times.began(["a"], 12.0)
    assert times.longest_wait(now=99.0) == 0.0
    for index, at in enumerate((13.0, 13.25, 14.0)):
        times.told(token("a", index), at)
    times.told(end("a"), 14.0)
    assert summed(durations.queue) == (1, 1.0)
    assert summed(durations.first_token) == (1, 3.0)
    assert summed(durations.between_tokens) == (2, 1.0)
    assert summed(durations.whole) == (1, 4.0)


def test_a_request_that_another_router_began_has_no_first_token_here(times: RequestTimes, durations: Durations) -> None:
    times.came(request("a", arrival=0.0, emitted=2))
    times.began(["a"], 1.0)
    times.told(token("a", 2), 5.0)
    times.told(token("a", 3), 6.0)
    assert summed(durations.first_token) == (0, 0.0)
    assert summed(durations.between_tokens) == (1, 1.0)


@pytest.mark.parametrize("reason", [FinishReason.CANCELLED, FinishReason.ERROR])
def test_what_ends_badly_is_no_whole_request(times: RequestTimes, durations: Durations, reason: FinishReason) -> None:
    times.came(request("a", arrival=0.0))
    times.told(end("a", reason), 3.0)
    assert summed(durations.whole) == (0, 0.0)
    assert times.longest_wait(now=9.0) == 0.0, "it is gone"
    times.told(token("a", 0), 4.0)
    times.began(["a"], 4.0)
    assert summed(durations.queue) == (0, 0.0)


def test_the_oldest_of_those_that_have_not_begun(times: RequestTimes) -> None:
    for place, name in enumerate("abc"):
        times.came(request(name, arrival=float(place)))
    times.began(["a"], 3.0)
    assert times.longest_wait(now=10.0) == 9.0


def test_a_histogram_counts_what_is_at_most_its_bound() -> None:
    histogram = Histogram((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 2.0, 3.0):
        histogram.add(value)
    assert (histogram.counts, histogram.total) == ([2, 2, 1], 8.0)
    assert list(SECONDS) == sorted(SECONDS)
