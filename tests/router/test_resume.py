"""The life of a request over several routers, as transcripts and on random traces."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experts.errors import InvalidInput, Overloaded
from router.engine.request import FinishEvent, FinishReason, SamplingParams, TokenEvent
from router.resume import (
    Begun,
    Broken,
    Candidate,
    Decision,
    End,
    Expired,
    Fail,
    Open,
    Read,
    Received,
    Refused,
    ResumeEvent,
    ResumePolicy,
    Resumption,
    Stopped,
    Wait,
    Woke,
    step,
)

POLICY = ResumePolicy(max_attempts=3, full_pause_s=0.5)
FULL = Overloaded("full", 7.0)
INVALID = InvalidInput("top_p", 2.0, "must be at most 1")
DEADLINE = 100.0
LAST = 1001


def request(max_tokens: int = 10) -> Resumption:
    sampling = SamplingParams(max_tokens=max_tokens)
    return Resumption(request_id="r", sampling=sampling, deadline=DEADLINE, policy=POLICY)


def routers(**in_flight: int) -> list[Candidate]:
    return [Candidate(name=name, in_flight=count) for name, count in in_flight.items()]


def token(index: int) -> TokenEvent:
    return TokenEvent(request_id="r", index=index, token_id=1000 + index)


def tokens(*indices: int) -> tuple[TokenEvent, ...]:
    return tuple(token(index) for index in indices)


def finish(reason: FinishReason, code: str = "") -> FinishEvent:
    return FinishEvent(request_id="r", reason=reason, code=code)


def opens(router: str, attempt: int, num_emitted: int = 0) -> Decision:
    emitted = tuple(1000 + index for index in range(num_emitted))
    return Decision(then=Open(router=router, attempt=attempt, emitted_ids=emitted))


def end_code(decision: Decision) -> str:
    assert isinstance(decision.then, End), decision
    assert decision.then.finish.reason is FinishReason.ERROR
    return decision.then.finish.code


def play(state: Resumption, *events: ResumeEvent, on: list[Candidate], now: float = 0.0) -> Decision:
    for event in events:
        decision = step(state, event, on, now)
    return decision


def test_the_least_busy_router_gets_the_request_and_names_break_ties() -> None:
    assert step(request(), Begun(), routers(c=2, b=1, a=4, d=1), 0.0) == opens("b", 0)


def test_tokens_are_handed_out_once_and_a_finish_ends() -> None:
    state = request()
    assert play(state, Begun(), Received(), on=routers(a=0)) == Decision(then=Read())
    assert play(state, Received(tokens=tokens(0, 1)), on=[]) == Decision(tokens=tokens(0, 1), then=Read())
    done = finish(FinishReason.STOP)
    last = play(state, Received(tokens=tokens(1, 2), finish=done), on=[])
    assert last == Decision(tokens=tokens(2), then=End(finish=done))


def test_a_broken_stream_goes_on_at_a_router_that_has_not_failed_with_what_was_emitted() -> None:
    state = request()
    play(state, Begun(), Received(tokens=tokens(0, 1)), on=routers(a=0, b=5))
    assert play(state, Broken(problem="gone"), on=routers(a=0, b=5)) == opens("b", 1, 2)
    play(state, Received(tokens=tokens(2)), on=routers(a=0, b=5))
    assert play(state, Broken(problem="gone"), on=routers(a=0)) == opens("a", 2, 3)


def test_without_a_router_it_waits_and_takes_the_first_that_comes() -> None:
    state = request()
    assert play(state, Begun(), on=[]) == Decision(then=Wait(until=DEADLINE))
    assert play(state, Woke(), on=[], now=50.0) == Decision(then=Wait(until=DEADLINE))
    assert play(state, Woke(), on=routers(a=0), now=60.0) == opens("a", 0)


def test_attempts_and_time_are_bounded() -> None:
    state = request()
    broken = Broken(problem="gone")
    last = play(state, Begun(), broken, broken, broken, on=routers(a=0))
    assert end_code(last) == "router_unavailable"
    assert end_code(play(request(), Begun(), broken, on=[], now=DEADLINE)) == "router_unavailable"
    assert end_code(play(request(), Begun(), Expired(), on=routers(a=0))) == "deadline_exceeded"
    assert end_code(play(request(), Begun(), Stopped(), on=routers(a=0))) == "router_unavailable"


def test_a_router_that_gives_its_requests_up_has_failed() -> None:
    for gave_up in (finish(FinishReason.CANCELLED), finish(FinishReason.ERROR, "router_unavailable")):
        state = request()
        play(state, Begun(), on=routers(a=0, b=0))
        decision = play(state, Received(tokens=tokens(0), finish=gave_up), on=routers(a=0, b=0))
        assert decision == Decision(tokens=tokens(0), then=opens("b", 1, 1).then)


def test_other_errors_of_a_router_are_final() -> None:
    error = finish(FinishReason.ERROR, "expert_unavailable")
    assert play(request(), Begun(), Received(finish=error), on=routers(a=0, b=0)).then == End(finish=error)


def test_a_lost_finish_after_the_last_token_is_not_asked_for_again() -> None:
    state = request(max_tokens=2)
    last = play(state, Begun(), Received(tokens=tokens(0, 1)), Broken(problem="gone"), on=routers(a=0, b=0))
    assert last == Decision(then=End(finish=finish(FinishReason.LENGTH)))


@pytest.mark.parametrize(
    ("fields", "reason"),
    [({}, FinishReason.STOP), ({"ignore_eos": True}, FinishReason.LENGTH),
     ({"ignore_eos": True, "stop_token_ids": (LAST,)}, FinishReason.STOP)],
)  # fmt: skip
def test_a_lost_finish_after_an_end_token_was_a_stop(fields: dict[str, Any], reason: FinishReason) -> None:
    sampling = SamplingParams(max_tokens=2, **fields)
    policy = ResumePolicy(eos_ids=frozenset({LAST}))
    state = Resumption(request_id="r", sampling=sampling, deadline=DEADLINE, policy=policy)
    last = play(state, Begun(), Received(tokens=tokens(0, 1)), Broken(problem="gone"), on=routers(a=0, b=0))
    assert last == Decision(then=End(finish=finish(reason)))


def test_a_gap_is_a_failure_and_nothing_after_it_counts() -> None:
    state = request()
    gap = Received(tokens=tokens(0, 2, 3), finish=finish(FinishReason.STOP))
    decision = play(state, Begun(), gap, on=routers(a=0, b=0))
    assert decision == Decision(tokens=tokens(0), then=opens("b", 1, 1).then)


def test_every_full_router_is_asked_once_and_the_shortest_wait_is_the_answer() -> None:
    state = request()
    soon = Overloaded("full", 2.0)
    assert play(state, Begun(), Refused(error=FULL), on=routers(a=0, b=0)) == opens("b", 1)
    assert play(state, Refused(error=soon), on=routers(a=0, b=0), now=9.0) == Decision(then=Fail(error=soon))


def test_an_accepted_request_waits_for_full_routers() -> None:
    state = request()
    play(state, Begun(), Received(tokens=tokens(0)), Broken(problem="gone"), on=routers(a=0, b=0))
    waits = play(state, Refused(error=FULL), on=routers(b=0), now=10.0)
    assert waits == Decision(then=Wait(until=10.5))
    assert play(state, Woke(), on=routers(b=0), now=10.2) == Decision(then=Wait(until=10.5))
    assert play(state, Woke(), on=routers(b=0), now=10.5) == opens("b", 2, 1)


def test_invalid_input_is_raised_before_the_first_token_and_an_error_event_after() -> None:
    assert play(request(), Begun(), Refused(error=INVALID), on=routers(a=0)).then == Fail(error=INVALID)
    events = (Begun(), Received(tokens=tokens(0)), Broken(problem="gone"), Refused(error=INVALID))
    assert end_code(play(request(), *events, on=routers(a=0))) == "invalid_input"


@st.composite
def responses(draw: st.DrawFn, num_emitted: int, max_tokens: int) -> Received:
    """What a router that continues after `num_emitted` tokens may send, repeats and gaps included."""
    start = max(0, num_emitted + draw(st.sampled_from([0, 0, 0, -2, 1])))
    stop = min(max_tokens, start + draw(st.sampled_from([3, 2, 1, 0])))
    reasons = [FinishReason.LENGTH] if stop == max_tokens else [FinishReason.STOP, FinishReason.CANCELLED]
    reason = draw(st.sampled_from([*reasons, None, None, None]))
    return Received(tokens=tokens(*range(start, stop)), finish=finish(reason) if reason else None)


@settings(deadline=None, max_examples=300)
@given(data=st.data())
def test_any_life_yields_every_token_once_and_ends_once(data: st.DataObject) -> None:
    state = request(max_tokens=6)
    handed: list[TokenEvent] = []
    now, num_opens, refusals = 0.0, 0, 0
    event: ResumeEvent = Begun()
    while True:
        names = data.draw(st.sets(st.sampled_from("abc"), max_size=3), label="routers")
        decision = step(state, event, routers(**dict.fromkeys(names, 0)), now)
        handed += decision.tokens
        match decision.then:
            case End() | Fail():
                break
            case Open() as opened:
                assert opened.router in names
                assert list(opened.emitted_ids) == [event.token_id for event in handed]
                assert (opened.attempt, now < DEADLINE) == (num_opens, True)
                num_opens += 1
                refused = st.builds(Refused, error=st.sampled_from([FULL, FULL, INVALID]))
                event = data.draw(st.just(Received()) | refused | st.just(Broken(problem="gone")), label="opened")
                refusals += isinstance(event, Refused)
            case Wait() as wait:
                assert now < wait.until <= DEADLINE
                now = data.draw(st.sampled_from([wait.until, now]), label="now")
                event = Woke()
            case Read():
                response = responses(len(handed), state.sampling.max_tokens)
                event = data.draw(response | st.just(Broken(problem="gone")) | st.just(Expired()), label="read")
        now += data.draw(st.sampled_from([9.0, 0.0, 0.3, 2.0]), label="passed")
    assert handed == [token(index) for index in range(len(handed))]
    assert num_opens <= POLICY.max_attempts + refusals
    assert not (isinstance(decision.then, Fail) and handed)
    assert len(handed) <= state.sampling.max_tokens


def test_silences_are_bounded_by_the_deadline_alone() -> None:
    state, both = request(), routers(a=0, b=0)
    assert step(state, Begun(), both, 0.0) == opens("a", 0)
    for attempt in range(1, 50):
        silent = Broken(problem="said nothing", silent=True)
        assert step(state, silent, both, float(attempt)) == opens("ab"[attempt % 2], attempt)
    end = step(state, Broken(problem="said nothing", silent=True), both, DEADLINE).then
    assert isinstance(end, End) and end.finish.code == "router_unavailable"
