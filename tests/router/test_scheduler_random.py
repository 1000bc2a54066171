"""The scheduler under random traces: whatever happens, in whatever order, its promises hold.

The tokens of a request are a fixed function of its name and their index, so that a request that was preempted, parked
or resumed must still have said exactly the same.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from experts.errors import Overloaded
from experts.placement import ExpertKey
from router.engine.kv_cache import KVCache, KVLayout
from router.engine.request import Event, FinishEvent, FinishReason, Phase, Request, SamplingParams
from router.engine.scheduler import Scheduler, SchedulerConfig, Step

EOS = 0
KINDS = st.sampled_from([(True, True), (True, True), (True, False), (False, True)])


def said(name: str, index: int) -> int:
    """Output token `index` of request `name`; about one in twenty is an end token."""
    return zlib.crc32(f"{name}/{index}".encode()) % 20


@dataclass(frozen=True, kw_only=True)
class Ask:
    """What a client wants. `num_emitted` tokens were said on another router; `patience` is in seconds."""

    num_prompt: int
    num_emitted: int
    max_tokens: int
    min_tokens: int
    ignore_eos: bool
    stop_token_ids: tuple[int, ...]
    patience: int | None


ASKS = st.builds(
    Ask,
    num_prompt=st.sampled_from([1, 2, 3, 4, 6, 9, 31]),
    num_emitted=st.sampled_from([0, 0, 0, 1, 4]),
    max_tokens=st.sampled_from([1, 5, 30, 30]),
    min_tokens=st.sampled_from([0, 0, 4]),
    ignore_eos=st.sampled_from([False, True, True]),
    stop_token_ids=st.sampled_from([(), (), (3,)]),
    patience=st.none() | st.integers(1, 60),
)


class SchedulerMachine(RuleBasedStateMachine):
    @initialize(
        kinds=KINDS,
        block_size=st.sampled_from([1, 1, 2, 2, 3, 4, 5, 7, 8]),
        chunk_size=st.none() | st.integers(1, 7),
        model_len=st.sampled_from([2, 5, 12, 16, 24, 32]),
        spare=st.tuples(st.integers(0, 3), st.integers(0, 3)),
        budget=st.integers(1, 12),
        running=st.sampled_from([1, 3, 4, 6]),
        waiting=st.integers(1, 4),
        waiting_tokens=st.sampled_from([20, 1000, 1000]),
        asks=st.lists(ASKS, min_size=2, max_size=8),
    )
    def start(
        self,
        kinds: tuple[bool, bool],
        block_size: int,
        chunk_size: int | None,
        model_len: int,
        spare: tuple[int, int],
        budget: int,
        running: int,
        waiting: int,
        waiting_tokens: int,
        asks: list[Ask],
    ) -> None:
        """Memory for one longest sequence and a little more, so that preemption is the rule."""
        has_global, has_local = kinds
        in_chunk = min(model_len, chunk_size) if chunk_size else model_len
        layout = KVLayout(
            block_size=block_size,
            num_global_blocks=(-(-model_len // block_size) + spare[0]) * has_global,
            num_local_blocks=(-(-in_chunk // block_size) + spare[1]) * has_local,
            chunk_size=chunk_size,
            has_global=has_global,
            has_local=has_local,
        )
        self.config = SchedulerConfig(
            max_batch_tokens=budget,
            max_running=running,
            max_waiting=waiting,
            max_waiting_tokens=waiting_tokens,
            max_model_len=model_len,
            eos_ids=frozenset({EOS}),
        )
        self.scheduler = Scheduler(KVCache(layout), self.config)
        self.now = 0.0
        self.step: Step | None = None
        self.requests: dict[str, Request] = {}
        self.heard: dict[str, int] = {}
        self.ends: dict[str, FinishEvent] = {}
        for ask in asks:
            self.submit(ask)

    # Moves

    @rule(ask=ASKS)
    def submit(self, ask: Ask) -> None:
        name = f"r{len(self.requests)}"
        num_prompt = min(ask.num_prompt, self.config.max_model_len - 1)
        num_emitted = min(ask.num_emitted, self.config.max_model_len - num_prompt)
        request = Request(
            request_id=name,
            token_ids=[1] * num_prompt + [said(name, index) for index in range(num_emitted)],
            num_prompt=num_prompt,
            sampling=SamplingParams(
                max_tokens=ask.max_tokens,
                min_tokens=ask.min_tokens,
                ignore_eos=ask.ignore_eos,
                stop_token_ids=ask.stop_token_ids,
            ),
            deadline=self.now + ask.patience if ask.patience else 1e9,
            arrival=self.now,
            attempt=1 if num_emitted else 0,
        )
        in_here, queued = len(self.scheduler.requests), self.tokens_waiting()
        try:
            events = self.scheduler.submit(request, self.now)
        except Overloaded as refusal:
            assert in_here == self.config.max_running + self.config.max_waiting or (
                queued and queued + request.num_known > self.config.max_waiting_tokens
            )
            assert 1.0 <= refusal.retry_after_s <= 30.0
            return
        self.requests[name] = request
        self.heard[name] = num_emitted
        self.listen(events)

    @precondition(lambda self: self.step is None and self.scheduler.requests)
    @rule()
    def schedule(self) -> None:
        before = self.scheduler.requests
        waited = [request for request in before if request.phase is Phase.WAITING]
        ran = [request for request in before if request.phase is Phase.RUNNING]
        had_work = self.scheduler.has_work
        step = self.scheduler.schedule(self.now)
        assert bool(step.pieces) == had_work == self.scheduler.has_work
        assert step.num_tokens <= self.config.max_batch_tokens
        assert len({piece.request.request_id for piece in step.pieces}) == len(step.pieces)
        for piece in step.pieces:
            assert piece.request.phase is Phase.RUNNING
            assert piece.start == piece.request.num_computed and piece.count >= 1
            assert piece.start + piece.count <= piece.request.num_known
            self.check_slots(piece.request, piece.start, piece.count)
        assert self.scheduler.num_running <= max(len(ran), self.config.max_running)
        assert all(request.phase is Phase.RUNNING for request in ran[:1]), "the earliest was preempted"
        admitted = [request.phase is Phase.RUNNING for request in waited]
        assert admitted == sorted(admitted, reverse=True), "somebody was overtaken"
        self.step = step if step.pieces else None

    @precondition(lambda self: self.step is not None)
    @rule(fates=st.lists(st.integers(0, 5), max_size=8))
    def update(self, fates: list[int]) -> None:
        """A piece is lost when its fate is 0."""
        assert self.step is not None
        doomed = [piece for piece, fate in zip(self.step.pieces, fates, strict=False) if fate == 0]
        self.finish_step({piece.request.request_id: frozenset({(0, piece.count)}) for piece in doomed})

    @precondition(lambda self: self.step is None and self.scheduler.has_work)
    @rule(num_steps=st.integers(1, 10))
    def run_undisturbed(self, num_steps: int) -> None:
        for _ in range(num_steps):
            self.schedule()
            if self.step is not None:
                self.finish_step({})
            self.everything_is_whole()

    @precondition(lambda self: self.scheduler.requests)
    @rule(choice=st.integers(0, 30), cancelled=st.booleans())
    def cancel_or_fail(self, choice: int, cancelled: bool) -> None:
        name = f"r{choice % (len(self.requests) + 1)}"
        alive = name in self.requests and name not in self.ends
        if cancelled:
            events = self.scheduler.cancel(name)
        else:
            events = self.scheduler.fail(name, "internal_error", "drawn")
        assert len(events) == alive
        self.listen(events)

    @precondition(lambda self: self.scheduler.requests)
    @rule(seconds=st.integers(1, 5))
    def expire(self, seconds: int) -> None:
        self.now += seconds
        parked = {request.request_id for request in self.scheduler.requests if request.phase is Phase.PARKED}
        due = self.scheduler.next_deadline()
        events = self.scheduler.expire(self.now)
        assert bool(events) == (due is not None and due <= self.now)
        for event in events:
            assert isinstance(event, FinishEvent) and self.requests[event.request_id].deadline <= self.now
            assert event.code == ("expert_unavailable" if event.request_id in parked else "deadline_exceeded")
        self.listen(events)

    @precondition(lambda self: self.scheduler.num_parked)
    @rule(draws=st.lists(st.booleans(), min_size=8, max_size=8))
    def unpark(self, draws: list[bool]) -> None:
        answers = iter(draws)
        num_parked = self.scheduler.num_parked
        num_back = self.scheduler.unpark(lambda missing: next(answers))
        assert self.scheduler.num_parked == num_parked - num_back

    # Promises

    @invariant()
    def everything_is_whole(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        self.scheduler.check_integrity()
        for piece in self.step.pieces if self.step else ():
            self.check_slots(piece.request, piece.start, piece.count)
        alive = [request.request_id for request in self.scheduler.requests]
        assert alive == [name for name in self.requests if name not in self.ends]
        for name, request in self.requests.items():
            assert (request.phase is Phase.DONE) == (name in self.ends)
            assert self.heard[name] == request.num_output
            output = request.token_ids[request.num_prompt :]
            assert output == [said(name, index) for index in range(len(output))]

    def teardown(self) -> None:
        """No faults any more: everyone must come to an end, in a bounded number of steps."""
        if not hasattr(self, "scheduler"):
            return
        if self.step is not None:
            self.finish_step({})
        self.scheduler.unpark(lambda missing: True)
        num_alive = len(self.scheduler.requests)
        # The earliest gets ahead in each step, or one of the others says a token.
        for _ in range(num_alive * (num_alive + 1) * self.config.max_model_len):
            self.schedule()
            if self.step is None:
                break
            self.finish_step({})
            self.everything_is_whole()
        assert not self.scheduler.requests, "somebody starved"
        assert self.ends.keys() == self.requests.keys()
        free, layout = self.scheduler.cache.num_free, self.scheduler.cache.layout
        assert free == (layout.num_global_blocks, layout.num_local_blocks)

    # Helpers

    def finish_step(self, lost: dict[str, frozenset[ExpertKey]]) -> None:
        assert self.step is not None
        sampled = {
            piece.request.request_id: said(piece.request.request_id, piece.request.num_output)
            for piece in self.step.pieces
            if piece.samples and piece.request.request_id not in lost
        }
        step, self.step = self.step, None
        parked_before = self.scheduler.num_parked
        alive = [name for name in lost if name not in self.ends]
        self.now += 0.25
        self.listen(self.scheduler.update(step, sampled, lost, self.now))
        assert self.scheduler.num_parked == parked_before + len(alive)

    def listen(self, events: list[Event]) -> None:
        for event in events:
            name = event.request_id
            assert name not in self.ends, "something was said after the end"
            if isinstance(event, FinishEvent):
                self.ends[name] = event
                self.check_end(self.requests[name], event.reason)
            else:
                assert event.index == self.heard[name] and event.token_id == said(name, event.index)
                self.heard[name] += 1

    def check_end(self, request: Request, reason: FinishReason) -> None:
        sampling = request.sampling
        if reason is FinishReason.STOP:
            assert request.num_output >= max(1, sampling.min_tokens)
            ends = {*sampling.stop_token_ids, *([] if sampling.ignore_eos else [EOS])}
            assert request.token_ids[-1] in ends
        elif reason is FinishReason.LENGTH:
            assert request.num_output >= sampling.max_tokens or request.num_known == self.config.max_model_len

    def check_slots(self, request: Request, start: int, count: int) -> None:
        """Every position that the piece writes, and every one it may read, has a slot."""
        layout = self.scheduler.cache.layout
        if layout.has_global:
            assert len(request.global_blocks) * layout.block_size >= start + count
        if layout.has_local:
            chunk = layout.chunk_size or self.config.max_model_len
            assert start // chunk == (start + count - 1) // chunk, "crosses a chunk border"
            assert len(request.local_blocks) * layout.block_size >= (start + count - 1) % chunk + 1

    def tokens_waiting(self) -> int:
        return sum(request.num_known for request in self.scheduler.requests if request.phase is Phase.WAITING)


TestSchedulerRandom = SchedulerMachine.TestCase
TestSchedulerRandom.settings = settings(max_examples=300, stateful_step_count=50, deadline=None)
