"""A scheduler, its clients and its runner, moved by whoever holds it; after every move all promises are checked.

The tokens of a request are a fixed function of its voice and their index, so that a request that was preempted, parked
or resumed must still have said exactly the same. Prompts come in families that begin alike.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kv_contents import KVContents

from experts.errors import Overloaded
from experts.placement import ExpertKey
from router.engine.images import ImageInput, PlacedImage
from router.engine.kv_cache import KVCache
from router.engine.kv_layout import KVLayout
from router.engine.request import Event, FinishEvent, FinishReason, Phase, Request, SamplingParams
from router.engine.scheduler import Piece, Scheduler, SchedulerConfig, Step

EOS = 0
PATCH = 50
PICTURED = range(1, 4)
"""Positions of the patches in prompts that have a picture."""


@dataclass(frozen=True, kw_only=True)
class Ask:
    """What a client wants. `num_emitted` tokens were said on another router; `patience` is in seconds.

    The prompt begins with `num_common` tokens of a family; `picture` 0 is none.
    """

    num_prompt: int
    num_emitted: int = 0
    max_tokens: int
    min_tokens: int = 0
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    patience: int | None = None
    priority: int = 0
    salt: str = ""
    family: int = 0
    num_common: int = 0
    voice: int = 0
    picture: int = 0


@dataclass(frozen=True, kw_only=True)
class World:
    """Memory for one longest sequence and `spare` blocks more, so that preemption is the rule."""

    kinds: tuple[bool, bool]
    block_size: int
    chunk_size: int | None
    model_len: int
    spare: tuple[int, int]
    budget: int
    running: int
    waiting: int
    waiting_tokens: int
    stretch: float
    prefix_cache: bool

    def layout(self) -> KVLayout:
        has_global, has_local = self.kinds
        in_chunk = min(self.model_len, self.chunk_size) if self.chunk_size else self.model_len
        return KVLayout(
            block_size=self.block_size,
            num_global_blocks=(-(-self.model_len // self.block_size) + self.spare[0]) * has_global,
            num_local_blocks=(-(-in_chunk // self.block_size) + self.spare[1]) * has_local,
            chunk_size=self.chunk_size,
            has_global=has_global,
            has_local=has_local,
        )

    def config(self) -> SchedulerConfig:
        return SchedulerConfig(
            max_batch_tokens=self.budget,
            max_running=self.running,
            max_waiting=self.waiting,
            max_waiting_tokens=self.waiting_tokens,
            max_model_len=self.model_len,
            decode_stretch=self.stretch,
            eos_ids=frozenset({EOS}),
        )


class Trace:
    """Everything from the first request on. `seen` counts what is worth having happened."""

    def __init__(self, world: World) -> None:
        self.config = world.config()
        self.scheduler = Scheduler(KVCache(world.layout(), prefix_cache=world.prefix_cache), self.config)
        self.contents = KVContents(self.scheduler.cache.layout)
        self.now = 0.0
        self.step: Step | None = None
        self.requests: dict[str, Request] = {}
        self.asks: dict[str, Ask] = {}
        self.heard: dict[str, int] = {}
        self.ends: dict[str, FinishEvent] = {}
        self.preempted: set[str] = set()
        self.seen: Counter[str] = Counter()

    # Moves

    def submit(self, ask: Ask) -> None:
        name = f"r{len(self.requests)}"
        self.asks[name] = ask
        request = self.make(name, ask)
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
        self.heard[name] = request.num_output
        self.listen(events)

    def make(self, name: str, ask: Ask) -> Request:
        num_prompt = min(ask.num_prompt, self.config.max_model_len - 1)
        num_emitted = min(ask.num_emitted, self.config.max_model_len - num_prompt)
        prompt = [100 + 10 * ask.family + index % 7 for index in range(min(ask.num_common, num_prompt))]
        prompt += [1000 + len(self.requests)] * (num_prompt - len(prompt))
        images: tuple[PlacedImage, ...] = ()
        if ask.picture and num_prompt >= PICTURED.stop:
            prompt[PICTURED.start : PICTURED.stop] = [PATCH] * len(PICTURED)
            image = ImageInput(digest=bytes([ask.picture]) * 8, num_tiles=1, pixels=b"")
            images = (PlacedImage(image=image, positions=tuple(PICTURED)),)
        return Request(
            request_id=name,
            token_ids=prompt + [self.said(name, index) for index in range(num_emitted)],
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
            priority=ask.priority,
            cache_salt=ask.salt,
            images=images,
        )

    def said(self, name: str, index: int) -> int:
        """Output token `index` of request `name`; about one in twenty is an end token."""
        return zlib.crc32(f"{self.asks[name].voice}/{index}".encode()) % 20

    def schedule(self) -> None:
        assert self.step is None
        before = sorted(self.scheduler.requests, key=lambda request: request.priority)
        waited = [request for request in before if request.phase is Phase.WAITING]
        ran = [request for request in before if request.phase is Phase.RUNNING]
        held = {request.request_id for request in before if request.global_blocks or request.local_blocks}
        had_work = self.scheduler.has_work
        evicted_before = self.scheduler.cache.numbers().evicted_blocks
        step = self.scheduler.schedule(self.now)
        self.seen["evicted"] += self.scheduler.cache.numbers().evicted_blocks - evicted_before
        assert bool(step.pieces) == had_work == self.scheduler.has_work
        self.step = step if step.pieces else None
        self.check_step(step)
        assert self.scheduler.num_running <= max(len(ran), self.config.max_running)
        self.check_order(step, ran, waited, held)
        lost = {request.request_id for request in before if not (request.global_blocks or request.local_blocks)}
        self.preempted |= held & lost
        self.note_hits(step, waited)

    def check_step(self, step: Step) -> None:
        assert step.num_tokens <= self.config.max_batch_tokens
        assert len({piece.request.request_id for piece in step.pieces}) == len(step.pieces)
        for piece in step.pieces:
            assert piece.request.phase is Phase.RUNNING
            assert piece.start == piece.request.num_computed and piece.count >= 1
            assert piece.start + piece.count <= piece.request.num_known
            self.check_slots(piece)
            self.contents.check(piece)

    def check_order(self, step: Step, ran: list[Request], waited: list[Request], held: set[str]) -> None:
        """Both lists have the most urgent first; `held` had blocks."""
        if ran:
            assert any(piece.request is ran[0] for piece in step.pieces), "the most urgent did not advance"
        admitted = [request.phase is Phase.RUNNING for request in waited]
        assert admitted == sorted(admitted, reverse=True), "somebody was overtaken"
        # Without global layers one at a border has no blocks, and nothing to give.
        kept = [request.phase is Phase.RUNNING for request in ran if request.request_id in held]
        assert kept == sorted(kept, reverse=True), "somebody less urgent was left alone"

    def note_hits(self, step: Step, waited: list[Request]) -> None:
        border = self.scheduler.cache.layout.border
        for piece in step.pieces:
            if not piece.start or piece.request not in waited:
                continue
            self.seen["hit"] += 1
            self.seen["hit after preemption"] += piece.request.request_id in self.preempted
            self.seen["hit in pictures"] += bool(piece.request.images)
            self.seen["hit in output"] += piece.start > piece.request.num_prompt
            if border:
                self.seen["hit at a border" if piece.start % border == 0 else "hit with local blocks"] += 1

    def finish_step(self, lost: dict[str, frozenset[ExpertKey]], elapsed_s: float = 0.25) -> None:
        assert self.step is not None
        sampled = {
            piece.request.request_id: self.said(piece.request.request_id, piece.request.num_output)
            for piece in self.step.pieces
            if piece.samples and piece.request.request_id not in lost
        }
        for piece in self.step.pieces:
            self.contents.write(piece, lost=piece.request.request_id in lost)
        step, self.step = self.step, None
        parked_before = self.scheduler.num_parked
        alive = [name for name in lost if name not in self.ends]
        self.now += elapsed_s
        self.listen(self.scheduler.update(step, sampled, lost, self.now))
        assert self.scheduler.num_parked == parked_before + len(alive)

    def lose(self, fates: Sequence[int], elapsed_s: float) -> None:
        """The step ends; a piece is lost when its fate is 0."""
        assert self.step is not None
        doomed = [piece for piece, fate in zip(self.step.pieces, fates, strict=False) if fate == 0]
        self.finish_step({piece.request.request_id: frozenset({(0, piece.count)}) for piece in doomed}, elapsed_s)

    def end(self, name: str, *, cancelled: bool) -> None:
        alive = name in self.requests and name not in self.ends
        if cancelled:
            events = self.scheduler.cancel(name)
        else:
            events = self.scheduler.fail(name, "internal_error", "drawn")
        assert len(events) == alive
        self.listen(events)

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

    def unpark(self, available: Callable[[], bool]) -> None:
        num_parked = self.scheduler.num_parked
        num_back = self.scheduler.unpark(lambda missing: available())
        assert self.scheduler.num_parked == num_parked - num_back

    def finish(self) -> None:
        """No faults any more: everyone must come to an end, in a bounded number of steps."""
        if self.step is not None:
            self.finish_step({})
        self.unpark(lambda: True)
        num_alive = len(self.scheduler.requests)
        # The most urgent gets ahead in each step.
        for _ in range(num_alive * (num_alive + 1) * self.config.max_model_len):
            self.schedule()
            if self.step is None:
                break
            self.finish_step({})
            self.check()
        assert not self.scheduler.requests, "somebody starved"
        assert self.ends.keys() == self.requests.keys()
        free, layout = self.scheduler.cache.num_free, self.scheduler.cache.layout
        assert free == (layout.num_global_blocks, layout.num_local_blocks)

    # Promises

    def check(self) -> None:
        self.scheduler.check_integrity()
        for piece in self.step.pieces if self.step else ():
            self.check_slots(piece)
        alive = [request.request_id for request in self.scheduler.requests]
        assert alive == [name for name in self.requests if name not in self.ends]
        for name, request in self.requests.items():
            assert (request.phase is Phase.DONE) == (name in self.ends)
            assert self.heard[name] == request.num_output
        for request in self.scheduler.requests:
            output = request.token_ids[request.num_prompt :]
            assert output == [self.said(request.request_id, index) for index in range(len(output))]

    def listen(self, events: list[Event]) -> None:
        for event in events:
            name = event.request_id
            assert name not in self.ends, "something was said after the end"
            if isinstance(event, FinishEvent):
                self.ends[name] = event
                self.check_end(self.requests[name], event.reason)
            else:
                assert event.index == self.heard[name] and event.token_id == self.said(name, event.index)
                self.heard[name] += 1

    def check_end(self, request: Request, reason: FinishReason) -> None:
        sampling = request.sampling
        if reason is FinishReason.STOP:
            assert request.num_output >= max(1, sampling.min_tokens)
            ends = {*sampling.stop_token_ids, *([] if sampling.ignore_eos else [EOS])}
            assert request.token_ids[-1] in ends
        elif reason is FinishReason.LENGTH:
            assert request.num_output >= sampling.max_tokens or request.num_known == self.config.max_model_len

    def check_slots(self, piece: Piece) -> None:
        """Every position that the piece writes, and every one it may read, has a slot."""
        request, start, count = piece.request, piece.start, piece.count
        layout = self.scheduler.cache.layout
        if layout.has_global:
            assert len(request.global_blocks) * layout.block_size >= start + count
        if layout.has_local:
            chunk = layout.chunk_size or self.config.max_model_len
            assert start // chunk == (start + count - 1) // chunk, "crosses a chunk border"
            assert len(request.local_blocks) * layout.block_size >= (start + count - 1) % chunk + 1

    def tokens_waiting(self) -> int:
        return sum(request.num_known for request in self.scheduler.requests if request.phase is Phase.WAITING)
