"""Who computes which tokens in the next step, and what the step's result means for each request.

State + event → state + events: time is an argument, nothing waits, nothing is computed. Knows nothing of
models, clients or where experts are.

All requests are in one dict, in order of arrival; the phase of a request says the rest. One is more *urgent* than
another when its priority is the lower number or, with equal priorities, when it came earlier.

    WAITING → RUNNING   admitted
    RUNNING → WAITING   preempted: its blocks are gone, its tokens stay known
    RUNNING → PARKED    its experts were away
    PARKED → RUNNING    they are back
    PARKED → WAITING    they are back, but its blocks were taken meanwhile
    any → DONE          with exactly one FinishEvent

Why every request ends: a running request takes blocks from less urgent ones and never from more urgent ones, and has
a token of every step kept for it, so the most urgent one always advances; waiting requests are admitted in order of
urgency and never overtaken. Only a stream of more urgent requests can keep one waiting, as priorities mean it. A parked
request makes no progress, so it gives way to whoever can.

Prompts beside running streams get as much of a step as `pace` thinks the streams can bear.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from operator import attrgetter
from types import MappingProxyType

from experts.errors import ContextOverflow, ExpertUnavailable, InvalidInput, Overloaded
from experts.placement import ExpertKey
from router.engine.kv_cache import KVCache, Prefix
from router.engine.kv_layout import BlockCount
from router.engine.pace import Pace
from router.engine.request import Event, FinishEvent, FinishReason, Phase, Request, TokenEvent, TokenLogprobs

PACE_WINDOW_S = 10.0
"""Busy time over which the pace of finishing requests is averaged, for Retry-After."""
MIN_RETRY_AFTER_S = 1.0
MAX_RETRY_AFTER_S = 30.0


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """Bounds, all positive, and the model's end tokens.

    `max_batch_tokens` limits one step. `max_running` limits admission: requests that come back from parking
    may exceed it for a while. No more than `max_running + max_waiting` requests are accepted at one time.
    `max_waiting_tokens` limits the known tokens of waiting requests, but one request may always wait.
    `max_image_bytes` limits the pixels of all requests that are here, which stay until their requests end; again one
    request may have more. `max_model_len` limits prompt + output.
    `decode_stretch` ≥ 1 is what prompts may do to running streams: how many times as long as a step of streams alone a
    step with prompts may take. More of it ends prompts sooner; infinity lets them fill every step.
    """

    max_batch_tokens: int
    max_running: int
    max_waiting: int
    max_waiting_tokens: int
    max_model_len: int
    max_image_bytes: int = 2 << 30
    decode_stretch: float = 2.0
    eos_ids: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        for bound in fields(self):
            value = getattr(self, bound.name)
            if bound.name.startswith("max_") and value < 1:
                raise InvalidInput(bound.name, value, "must be at least 1")
        if not self.decode_stretch >= 1:
            raise InvalidInput("decode_stretch", self.decode_stretch, "must be at least 1")


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Tokens [start, start + count) of a request, computed in one step. A decode is a piece of one token."""

    request: Request
    start: int
    count: int

    @property
    def samples(self) -> bool:
        """Whether the last row's logits choose the next token. Meaningful until `update`."""
        return self.start + self.count == self.request.num_known


@dataclass(frozen=True, kw_only=True)
class Step:
    """One packed batch: at most one piece per request, none across a chunk border; empty when there is no
    work."""

    pieces: tuple[Piece, ...]
    started: float

    @property
    def num_tokens(self) -> int:
        return sum(piece.count for piece in self.pieces)

    @property
    def num_decodes(self) -> int:
        """Pieces that a single token was left of. Meaningful until `update`."""
        return sum(piece.count == 1 and piece.samples for piece in self.pieces)


class Scheduler:
    """All requests of one router. `schedule` and `update` alternate; anything else may be called in
    between."""

    def __init__(self, cache: KVCache, config: SchedulerConfig) -> None:
        longest = cache.layout.capacity_tokens(config.max_model_len)
        assert longest == config.max_model_len, f"one sequence alone must fit, and {longest} tokens do"
        self.cache = cache
        self.config = config
        self._live: dict[str, Request] = {}
        self._in_flight: Step | None = None
        self._num_finished = 0
        self._finished_per_s = 1.0
        self._pace = Pace(config.decode_stretch)

    # What is here

    @property
    def requests(self) -> tuple[Request, ...]:
        """All requests that are not done, in order of arrival."""
        return tuple(self._live.values())

    @property
    def num_running(self) -> int:
        return len(self._in_phase(Phase.RUNNING))

    @property
    def num_waiting(self) -> int:
        return len(self._in_phase(Phase.WAITING))

    @property
    def num_parked(self) -> int:
        return len(self._in_phase(Phase.PARKED))

    @property
    def has_work(self) -> bool:
        """Whether `schedule` would return pieces: it does whenever not everyone is parked."""
        return any(request.phase is not Phase.PARKED for request in self._live.values())

    def next_deadline(self) -> float | None:
        """The earliest instant at which `expire` has something to do; None when nothing is here."""
        return min((request.deadline for request in self._live.values()), default=None)

    def _in_phase(self, phase: Phase) -> list[Request]:
        return [request for request in self._live.values() if request.phase is phase]

    def _by_urgency(self, *phases: Phase) -> list[Request]:
        """The most urgent first: the dict is in order of arrival, and sorting keeps that among equals."""
        chosen = [request for request in self._live.values() if request.phase in phases]
        return sorted(chosen, key=attrgetter("priority"))

    # A request comes

    def submit(self, request: Request, now: float) -> list[Event]:
        """Take in a fresh or resumed request.

        One that has ended before it began (by the tokens it emitted elsewhere, or by its deadline) gets its
        finish event here, and nothing is computed. Raises InvalidInput for an empty prompt or an id that is
        still here (cancel the older attempt first), ContextOverflow for a prompt that leaves no room for
        output, and Overloaded when a bound on what may wait is hit.
        """
        assert request.phase is Phase.WAITING and request.num_computed == 0, "a request is submitted once"
        assert request.num_output >= 0, "num_prompt exceeds the known tokens"
        if request.request_id in self._live:
            raise InvalidInput("request_id", request.request_id, "must not be that of a request in progress")
        if request.num_prompt < 1:
            raise InvalidInput("prompt", request.num_prompt, "must have at least one token")
        if request.num_prompt >= self.config.max_model_len:
            raise ContextOverflow(request.num_prompt, 0, self.config.max_model_len)
        reason = self._end_of(request)
        if reason is not None:
            return [self._finish(request, reason)]
        if request.deadline <= now:
            return [self._finish(request, FinishReason.ERROR, *_lateness(request))]
        self._refuse_overload(request)
        self._live[request.request_id] = request
        return []

    def retry_after_s(self) -> float:
        """Seconds until as many requests have finished as wait now, at the recent pace; kept within
        bounds."""
        estimate = self.num_waiting / max(self._finished_per_s, 1e-3)
        return min(max(estimate, MIN_RETRY_AFTER_S), MAX_RETRY_AFTER_S)

    def _refuse_overload(self, request: Request) -> None:
        if len(self._live) >= self.config.max_running + self.config.max_waiting:
            raise Overloaded(f"{len(self._live)} requests are in progress or waiting", self.retry_after_s())
        queued = sum(waiting.num_known for waiting in self._in_phase(Phase.WAITING))
        if queued and queued + request.num_known > self.config.max_waiting_tokens:
            raise Overloaded(f"{queued} tokens are waiting", self.retry_after_s())
        held = sum(other.image_bytes for other in self._live.values()) if request.images else 0
        if held and held + request.image_bytes > self.config.max_image_bytes:
            raise Overloaded(f"{held} bytes of images are in progress or waiting", self.retry_after_s())

    # A step begins

    def schedule(self, now: float) -> Step:
        """Choose the next step: decodes of running requests, then their prefills, then admissions, each in
        order of urgency. A step that is not empty must go through `update` before the next call."""
        assert self._in_flight is None, "the last step has not been updated"
        running = self._by_urgency(Phase.RUNNING)
        draft = self._draft(running)
        for request in sorted(running, key=lambda request: not _decodes(request)):
            if request.phase is Phase.RUNNING:  # else preempted a moment ago for a more urgent one
                self._add_piece(draft, request)
        self._admit(draft)
        step = Step(pieces=tuple(draft.pieces.values()), started=now)
        self._in_flight = step if step.pieces else None
        return step

    def _draft(self, running: list[Request]) -> _Draft:
        """An empty step, with the bounds that follow from who runs."""
        budget = self.config.max_batch_tokens
        if not any(_decodes(request) for request in running):
            return _Draft(decode_budget=budget, budget=budget, prompt_budget=budget)
        urgent_prompt = not _decodes(running[0])
        beside = self._pace.prompt_tokens(may_pause=not urgent_prompt)
        return _Draft(decode_budget=budget - urgent_prompt, budget=budget, prompt_budget=int(min(budget, beside)))

    def _add_piece(self, draft: _Draft, request: Request) -> None:
        count = min(_num_behind(request), draft.room_for(request))
        count = self.cache.layout.clip_to_chunk(request.num_computed, count)
        if count and self._make_room(draft, request, count):
            self.cache.extend(request, count)
            draft.add(Piece(request=request, start=request.num_computed, count=count))

    def _make_room(self, draft: _Draft, request: Request, count: int) -> bool:
        """Preempt others until `request` can compute `count` more tokens. False when only more urgent requests
        are left to take from: then it sits this step out, and keeps its blocks."""
        while not self.cache.can_extend(request, count):
            victim = self._parked_victim() or self._running_victim(request)
            if victim is None:
                return False
            draft.drop(victim)
            self._preempt(victim)
        return True

    def _admit(self, draft: _Draft) -> None:
        """Start waiting requests, in order, while there is a place and room for all tokens they know. Admitting
        more than that ends in preemption, which throws computed tokens away."""
        waiting = self._by_urgency(Phase.WAITING)
        if not waiting:
            return
        num_running = self.num_running
        spare = self._spare_blocks()
        for request in waiting:
            if not draft.room_for_prompts or num_running >= self.config.max_running:
                return
            prefix = self.cache.find_prefix(request)
            if num_running == 0:
                spare = self._reclaim_parked_for(request, prefix)
            need = self.cache.cost_of_admission(request, prefix)
            if not spare.covers(need):
                return
            self.cache.take_prefix(request, prefix)
            request.phase = Phase.RUNNING
            self._add_piece(draft, request)
            num_running += 1
            spare = spare.minus(need)

    def _spare_blocks(self) -> BlockCount:
        """Free blocks less those that running requests still need for the tokens they know."""
        spare = self.cache.num_free
        for request in self._in_phase(Phase.RUNNING):
            spare = spare.minus(self.cache.still_needed(request))
        return spare

    def _reclaim_parked_for(self, request: Request, prefix: Prefix) -> BlockCount:
        """Nothing runs: parked requests must not keep a waiting one out, or one lost expert stops everyone.
        Returns the spare blocks, which cover what `request` needs beyond `prefix`. Nothing of that goes: what a parked
        request gives up is free, but still there."""
        while not self.cache.num_free.covers(self.cache.cost_of_admission(request, prefix)):
            victim = self._parked_victim()
            assert victim is not None, "one sequence alone must fit"
            self._preempt(victim)
        return self.cache.num_free

    def _parked_victim(self) -> Request | None:
        """The least urgent of the parked requests that hold blocks."""
        holders = (request for request in reversed(self._by_urgency(Phase.PARKED)) if _holds_blocks(request))
        return next(holders, None)

    def _running_victim(self, request: Request) -> Request | None:
        """The least urgent of the running requests that hold blocks and are less urgent than `request`."""
        for other in reversed(self._by_urgency(Phase.RUNNING)):
            if other is request:
                break
            if _holds_blocks(other):
                return other
        return None

    def _preempt(self, request: Request) -> None:
        """Take the blocks back; all known tokens will be computed again, but for what is found in the cache. Its
        place in the order of arrival puts a running request before every waiting one of its priority that was never
        admitted; a parked one stays parked."""
        self.cache.free(request)
        if request.phase is Phase.RUNNING:
            request.phase = Phase.WAITING

    # A step ends

    def update(
        self,
        step: Step,
        sampled: Mapping[str, int],
        lost: Mapping[str, frozenset[ExpertKey]],
        now: float,
        logprobs: Mapping[str, TokenLogprobs] = MappingProxyType({}),
    ) -> list[Event]:
        """Take in the result of `step`.

        `lost` maps request ids to the experts that were away: their pieces count as not computed, and they
        are parked. `sampled` maps request ids to token ids, for every other piece that samples, and
        `logprobs` those whose requests asked to what their tokens' events carry. Pieces of requests that ended while
        the step ran are ignored.

        Every sampled token is reported, an end token too (the ingress drops its text), before the finish
        event.
        """
        assert step is self._in_flight, "not the step that schedule returned last"
        self._in_flight = None
        if not lost:  # else it may have waited for experts
            self._pace.learn(step.num_decodes, step.num_tokens - step.num_decodes, now - step.started)
        events: list[Event] = []
        for piece in step.pieces:
            request = piece.request
            if request.phase is Phase.DONE:
                self.cache.free(request)
            elif request.request_id in lost:
                request.phase = Phase.PARKED
                request.missing = lost[request.request_id]
            else:
                events += self._advance(piece, sampled, logprobs)
        self._measure_finishing(now - step.started)
        return events

    def _advance(self, piece: Piece, sampled: Mapping[str, int], logprobs: Mapping[str, TokenLogprobs]) -> list[Event]:
        request = piece.request
        samples = piece.samples
        self.cache.commit(request, piece.count)
        if not samples:
            return []
        name = request.request_id
        token_id, index = sampled[name], request.num_output
        request.token_ids.append(token_id)
        events: list[Event] = [TokenEvent(request_id=name, index=index, token_id=token_id, logprobs=logprobs.get(name))]
        reason = self._end_of(request)
        if reason is not None:
            events.append(self._finish(request, reason))
        return events

    def _end_of(self, request: Request) -> FinishReason | None:
        """Why the known tokens end the request; None when they do not. Below `min_tokens` no end token
        counts."""
        sampling = request.sampling
        if request.num_output and request.num_output >= sampling.min_tokens:
            last = request.token_ids[-1]
            if last in sampling.stop_token_ids or (last in self.config.eos_ids and not sampling.ignore_eos):
                return FinishReason.STOP
        if request.num_output >= sampling.max_tokens or request.num_known >= self.config.max_model_len:
            return FinishReason.LENGTH
        return None

    def _measure_finishing(self, elapsed_s: float) -> None:
        remembered = 1 - min(1.0, elapsed_s / PACE_WINDOW_S)
        learnt = self._num_finished / max(elapsed_s, PACE_WINDOW_S)
        self._finished_per_s = remembered * self._finished_per_s + learnt
        self._num_finished = 0

    # Something happens to requests

    def unpark(self, available: Callable[[frozenset[ExpertKey]], bool]) -> int:
        """Bring back the parked requests whose missing experts are `available`; returns how many."""
        back = [request for request in self._in_phase(Phase.PARKED) if available(request.missing)]
        for request in back:
            request.phase = Phase.RUNNING if _holds_blocks(request) else Phase.WAITING
            request.missing = frozenset()
        return len(back)

    def cancel(self, request_id: str) -> list[Event]:
        """The client left. Nothing happens when the request has already ended."""
        request = self._live.get(request_id)
        return [self._finish(request, FinishReason.CANCELLED)] if request else []

    def fail(self, request_id: str, code: str, message: str) -> list[Event]:
        """End a request by an error from outside. Nothing happens when the request has already ended.

        When a whole step fails: fail its requests, then `update` it with empty results.
        """
        request = self._live.get(request_id)
        return [self._finish(request, FinishReason.ERROR, code, message)] if request else []

    def expire(self, now: float) -> list[Event]:
        """End every request whose deadline has come."""
        late = [request for request in self._live.values() if request.deadline <= now]
        return [self._finish(request, FinishReason.ERROR, *_lateness(request)) for request in late]

    def _finish(self, request: Request, reason: FinishReason, code: str = "", message: str = "") -> FinishEvent:
        self._live.pop(request.request_id, None)
        self._num_finished += 1
        request.phase = Phase.DONE
        if not self._is_in_flight(request):  # else the step may be using its blocks, and update frees them
            self.cache.free(request)
        return FinishEvent(request_id=request.request_id, reason=reason, code=code, message=message)

    def _is_in_flight(self, request: Request) -> bool:
        step = self._in_flight
        return step is not None and any(piece.request is request for piece in step.pieces)

    # What must hold between any two calls

    def check_integrity(self) -> None:
        """Assert it. For tests and debugging: the cost grows with the size of the cache."""
        in_flight = [piece.request for piece in self._in_flight.pieces] if self._in_flight else []
        ended = [request for request in in_flight if request.phase is Phase.DONE]
        self.cache.check_integrity([*self._live.values(), *ended])
        assert len(self._live) <= self.config.max_running + self.config.max_waiting
        for name, request in self._live.items():
            assert request.request_id == name and request.phase is not Phase.DONE, name
            assert request.num_computed < request.num_known < self.config.max_model_len, name
            assert (request.phase is Phase.PARKED) == bool(request.missing), f"{name}: parked for what?"
            assert request.phase is not Phase.WAITING or not _holds_blocks(request), f"{name}: has blocks"


@dataclass(kw_only=True)
class _Draft:
    """A step being put together: its pieces by request id, and how many tokens it may still take; of decodes, of
    anything, and of prompts."""

    decode_budget: int
    budget: int
    prompt_budget: int
    pieces: dict[str, Piece] = field(default_factory=dict)

    @property
    def room_for_prompts(self) -> int:
        return min(self.budget, self.prompt_budget)

    def room_for(self, request: Request) -> int:
        return min(self.budget, self.decode_budget) if _decodes(request) else self.room_for_prompts

    def add(self, piece: Piece) -> None:
        self.pieces[piece.request.request_id] = piece
        self._spend(piece, piece.count)

    def drop(self, request: Request) -> None:
        piece = self.pieces.pop(request.request_id, None)
        if piece is not None:
            self._spend(piece, -piece.count)

    def _spend(self, piece: Piece, count: int) -> None:
        self.budget -= count
        if _decodes(piece.request):
            self.decode_budget -= count
        else:
            self.prompt_budget -= count


def _decodes(request: Request) -> bool:
    """Whether a single token is left to compute, so that nothing is shorter than its piece."""
    return _num_behind(request) == 1


def _num_behind(request: Request) -> int:
    return request.num_known - request.num_computed


def _holds_blocks(request: Request) -> bool:
    return bool(request.global_blocks or request.local_blocks)


def _lateness(request: Request) -> tuple[str, str]:
    """Code and message of the error of a request whose deadline has come."""
    if request.phase is Phase.PARKED:
        return "expert_unavailable", str(ExpertUnavailable(request.missing))
    return "deadline_exceeded", f"not finished by its deadline, after {request.num_output} tokens of output"
