"""Decides how a request lives through the deaths of its routers: which router, which attempt, when to give up.

Pure: `step(state, event, routers, now)` updates the state and says what to do next; whoever calls it owns the calls,
the clock and the client's connection. Times are `time.monotonic()` instants.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from experts.errors import InvalidInput, Overloaded
from router.affinity import rendezvous
from router.engine.request import FinishEvent, FinishReason, SamplingParams, TokenEvent

ROUTER_UNAVAILABLE = "router_unavailable"
DEADLINE_EXCEEDED = "deadline_exceeded"


@dataclass(frozen=True, kw_only=True)
class ResumePolicy:
    """`max_attempts` bounds how often a request is handed to a router that then fails it.

    An accepted request whose next router is full asks that router again after `full_pause_s`. A request goes to the
    router that its prompt prefers while that one has at most `affinity_gap` requests more than the least busy one, or
    `affinity_share` of that one's requests more, whichever is more. `eos_ids` are the model's end tokens.
    """

    max_attempts: int = 8
    full_pause_s: float = 0.5
    affinity_gap: int = 4
    affinity_share: float = 0.25
    eos_ids: frozenset[int] = frozenset()


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A router that is believed to be well; `in_flight` counts the requests that this ingress has on it."""

    name: str
    in_flight: int


@dataclass(frozen=True, kw_only=True)
class Begun:
    """The request arrived."""


@dataclass(frozen=True, kw_only=True)
class Woke:
    """The routers changed, or the instant of a `Wait` came."""


@dataclass(frozen=True, kw_only=True)
class Received:
    """A response of the open stream; without tokens and finish it is a sign of life."""

    tokens: tuple[TokenEvent, ...] = ()
    finish: FinishEvent | None = None


@dataclass(frozen=True, kw_only=True)
class Broken:
    """The open stream ended without a finish, or its router fell `silent`."""

    problem: str
    silent: bool = False


@dataclass(frozen=True, kw_only=True)
class Refused:
    """The router did not take the request."""

    error: Overloaded | InvalidInput


@dataclass(frozen=True, kw_only=True)
class Expired:
    """The deadline passed on a stream that is alive."""


@dataclass(frozen=True, kw_only=True)
class Stopped:
    """This ingress is closing."""


ResumeEvent = Begun | Woke | Received | Broken | Refused | Expired | Stopped


@dataclass(frozen=True, kw_only=True)
class Open:
    """Drop the open stream, if any, and submit to `router`."""

    router: str
    attempt: int
    emitted_ids: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Read:
    """Go on reading the open stream."""


@dataclass(frozen=True, kw_only=True)
class Wait:
    """Drop the open stream, if any; come back when the routers change or at `until`."""

    until: float


@dataclass(frozen=True, kw_only=True)
class End:
    """The request is over, and this is its terminal event."""

    finish: FinishEvent


@dataclass(frozen=True, kw_only=True)
class Fail:
    """The request was never begun: no event of it was handed out, and this error is the answer."""

    error: Overloaded | InvalidInput


Next = Open | Read | Wait | End | Fail


@dataclass(frozen=True, kw_only=True)
class Decision:
    """Hand `tokens` to the client, then do `then`."""

    tokens: tuple[TokenEvent, ...] = ()
    then: Next


@dataclass(kw_only=True, eq=False)
class Resumption:
    """State of one request over all its attempts.

    `emitted` are the output tokens that the client has, `router` the one that has the request now. `accepted` is set
    once any router took the request: from then on it is ours to finish, and full routers are waited for. `affinity` is
    the key of the prompt's beginning, empty where it shall not matter.
    """

    request_id: str
    sampling: SamplingParams
    deadline: float
    affinity: bytes = b""
    policy: ResumePolicy = field(default_factory=ResumePolicy)
    emitted: list[int] = field(default_factory=list)
    next_attempt: int = 0
    num_failed: int = 0
    router: str = ""
    accepted: bool = False
    failed_on: set[str] = field(default_factory=set)
    full: dict[str, tuple[Overloaded, float]] = field(default_factory=dict)
    """Routers that were full: their answer, and when to ask them again."""
    problem: str = "no router is ready"


def step(state: Resumption, event: ResumeEvent, routers: Iterable[Candidate], now: float) -> Decision:
    """Take `event` in and decide. Exactly one decision of a request is an `End` or a `Fail`, and it is the last."""
    if isinstance(event, Received):
        return _receive(state, event, routers, now)
    if isinstance(event, Broken):
        return Decision(then=_after_failure(state, event.problem, routers, now, counts=not event.silent))
    if isinstance(event, Refused):
        return Decision(then=_after_refusal(state, event.error, routers, now))
    if isinstance(event, Expired):
        return Decision(then=_error(state, DEADLINE_EXCEEDED, "the request did not finish by its deadline"))
    if isinstance(event, Stopped):
        return Decision(then=_error(state, ROUTER_UNAVAILABLE, "this server is shutting down"))
    return Decision(then=_next_router(state, routers, now))


def _receive(state: Resumption, event: Received, routers: Iterable[Candidate], now: float) -> Decision:
    state.accepted = True
    fresh: list[TokenEvent] = []
    for token in event.tokens:
        if token.index > len(state.emitted):
            # A router that skips a token is wrong about everything after it, a finish included.
            problem = f"router {state.router} sent token {token.index} where {len(state.emitted)} was next"
            return Decision(tokens=tuple(fresh), then=_after_failure(state, problem, routers, now))
        if token.index == len(state.emitted):
            state.emitted.append(token.token_id)
            fresh.append(token)
    return Decision(tokens=tuple(fresh), then=_after_tokens(state, event.finish, routers, now))


def _after_tokens(state: Resumption, finish: FinishEvent | None, routers: Iterable[Candidate], now: float) -> Next:
    if finish is None:
        return Read()
    if _gave_up(finish):
        return _after_failure(state, f"router {state.router} gave the request up", routers, now)
    return End(finish=finish)


def _gave_up(finish: FinishEvent) -> bool:
    """Whether the router stopped. Only this side cancels, and then it does not listen any more."""
    return finish.reason is FinishReason.CANCELLED or finish.code == ROUTER_UNAVAILABLE


def _after_failure(
    state: Resumption, problem: str, routers: Iterable[Candidate], now: float, *, counts: bool = True
) -> Next:
    """Silences do not count: each takes its time, so that the deadline bounds them, and a slow machine has many."""
    state.problem = problem
    state.num_failed += counts
    state.failed_on.add(state.router)
    if len(state.emitted) >= state.sampling.max_tokens:
        # Only the finish was lost, and it can be no other.
        return End(finish=FinishEvent(request_id=state.request_id, reason=_end_at_full_length(state)))
    if state.num_failed >= state.policy.max_attempts:
        return _error(state, ROUTER_UNAVAILABLE, f"{state.num_failed} attempts failed; the last: {problem}")
    return _next_router(state, routers, now)


def _end_at_full_length(state: Resumption) -> FinishReason:
    """As the scheduler has it: an end token counts before the length."""
    ends = set(state.sampling.stop_token_ids) | (set() if state.sampling.ignore_eos else state.policy.eos_ids)
    return FinishReason.STOP if ends.intersection(state.emitted[-1:]) else FinishReason.LENGTH


def _after_refusal(
    state: Resumption, error: Overloaded | InvalidInput, routers: Iterable[Candidate], now: float
) -> Next:
    if isinstance(error, Overloaded):
        state.full[state.router] = (error, now + state.policy.full_pause_s)
        return _next_router(state, routers, now)
    if not state.emitted:
        return Fail(error=error)
    return _error(state, "invalid_input", str(error))


def _next_router(state: Resumption, routers: Iterable[Candidate], now: float) -> Next:
    if now >= state.deadline:
        return _error(state, ROUTER_UNAVAILABLE, f"no router took the request in time: {state.problem}")
    free = [router for router in routers if not _is_full(state, router.name, now)]
    if free:
        return _open(state, _choose(state, free))
    if state.full and not state.accepted:
        return Fail(error=min((error for error, _ in state.full.values()), key=lambda e: e.retry_after_s))
    again = [until for _, until in state.full.values() if until > now]
    return Wait(until=min([state.deadline, *again]))


def _is_full(state: Resumption, name: str, now: float) -> bool:
    """Before a request is accepted every router is asked once; afterwards again and again."""
    if name not in state.full:
        return False
    return not state.accepted or now < state.full[name][1]


def _choose(state: Resumption, free: Sequence[Candidate]) -> Candidate:
    least = min(free, key=lambda router: _preference(state, router))
    # Once a router failed or was full, where the request can run matters more than where it would run best.
    if not state.affinity or state.failed_on or state.full:
        return least
    preferred = rendezvous(state.affinity, [router.name for router in free])
    gap = max(state.policy.affinity_gap, state.policy.affinity_share * least.in_flight)
    return next((r for r in free if r.name == preferred and r.in_flight - least.in_flight <= gap), least)


def _preference(state: Resumption, router: Candidate) -> tuple[bool, bool, int, str]:
    """Anew, the one that failed just now comes last."""
    failed = router.name in state.failed_on
    return (failed, failed and router.name == state.router, router.in_flight, router.name)


def _open(state: Resumption, router: Candidate) -> Open:
    state.router = router.name
    attempt = state.next_attempt
    state.next_attempt += 1
    return Open(router=router.name, attempt=attempt, emitted_ids=tuple(state.emitted))


def _error(state: Resumption, code: str, message: str) -> End:
    return End(finish=FinishEvent(request_id=state.request_id, reason=FinishReason.ERROR, code=code, message=message))
