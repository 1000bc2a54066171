"""The scheduler's decisions, as transcripts: one line per step, pieces on the left, events on the right.

`a 0+4` is tokens 0 to 3 of request a, computed; `!` after it means that the piece was lost. `a2=7` is output token 2
of request a with id 7; `a stop` is its end.
"""

from __future__ import annotations

from collections.abc import Callable
from math import inf

import pytest

from experts.errors import ContextOverflow, InvalidInput, Overloaded
from experts.placement import ExpertKey
from router.engine.kv_cache import KVCache
from router.engine.kv_layout import KVLayout
from router.engine.request import Event, FinishEvent, Phase, Request, SamplingParams, TokenEvent
from router.engine.scheduler import Scheduler, SchedulerConfig, Step

EOS = 9
AWAY: frozenset[ExpertKey] = frozenset({(3, 1)})


def show(event: Event) -> str:
    if isinstance(event, TokenEvent):
        return f"{event.request_id}{event.index}={event.token_id}"
    return " ".join(filter(None, [event.request_id, event.reason.value, event.code]))


class Desk:
    """A scheduler and the hands that work it. Every request has all its blocks checked after every move."""

    def __init__(
        self,
        *,
        budget: int = 16,
        running: int = 8,
        waiting: int = 8,
        waiting_tokens: int = 1000,
        model_len: int = 64,
        block_size: int = 4,
        num_global: int = 64,
        num_local: int = 0,
        chunk: int | None = None,
        prefix_cache: bool = False,
        stretch: float = inf,
    ) -> None:
        layout = KVLayout(
            block_size=block_size,
            num_global_blocks=num_global,
            num_local_blocks=num_local,
            chunk_size=chunk,
            has_global=num_global > 0,
            has_local=num_local > 0,
        )
        config = SchedulerConfig(
            max_batch_tokens=budget,
            max_running=running,
            max_waiting=waiting,
            max_waiting_tokens=waiting_tokens,
            max_model_len=model_len,
            decode_stretch=stretch,
            eos_ids=frozenset({EOS}),
        )
        self.scheduler = Scheduler(KVCache(layout, prefix_cache=prefix_cache), config)
        self.made: dict[str, Request] = {}
        self.now = 0.0

    def submit(
        self,
        name: str,
        num_prompt: int,
        *,
        max_tokens: int = 50,
        emitted: tuple[int, ...] = (),
        deadline: float = 1e9,
        min_tokens: int = 0,
        ignore_eos: bool = False,
        stop_token_ids: tuple[int, ...] = (),
        priority: int = 0,
        salt: str = "",
    ) -> list[str]:
        request = Request(
            request_id=name,
            priority=priority,
            cache_salt=salt,
            token_ids=[1] * num_prompt + list(emitted),
            num_prompt=num_prompt,
            sampling=SamplingParams(
                max_tokens=max_tokens,
                min_tokens=min_tokens,
                ignore_eos=ignore_eos,
                stop_token_ids=stop_token_ids,
            ),
            deadline=deadline,
            arrival=self.now,
            attempt=1 if emitted else 0,
        )
        events = self.scheduler.submit(request, self.now)
        self.made[name] = request
        self.scheduler.check_integrity()
        return [show(event) for event in events]

    def schedule(self) -> Step:
        step = self.scheduler.schedule(self.now)
        assert bool(step.pieces) == self.scheduler.has_work
        self.scheduler.check_integrity()
        return step

    def update(self, step: Step, tokens: dict[str, int] | None = None, lost: str = "") -> list[str]:
        """Sampled tokens are 5 unless told otherwise; `lost` names the requests whose experts are away."""
        pieces = {piece.request.request_id: piece for piece in step.pieces}
        sampled = {name: (tokens or {}).get(name, 5) for name, piece in pieces.items() if piece.samples}
        events = self.scheduler.update(step, sampled, dict.fromkeys(lost.split(), AWAY), self.now)
        self.scheduler.check_integrity()
        return [show(event) for event in events]

    def step(self, tokens: dict[str, int] | None = None, lost: str = "") -> str:
        step = self.schedule()
        line = ", ".join(
            f"{piece.request.request_id} {piece.start}+{piece.count}"
            + ("!" if piece.request.request_id in lost.split() else "")
            for piece in step.pieces
        )
        if not step.pieces:
            return "nothing"
        return " → ".join(filter(None, [line, ", ".join(self.update(step, tokens, lost))]))

    def timed_step(self, seconds: Callable[[int, int], float]) -> str:
        """A step that takes as long as `seconds` says of its decodes and of its tokens of prompts."""
        step = self.schedule()
        line = ", ".join(f"{piece.request.request_id} {piece.start}+{piece.count}" for piece in step.pieces)
        self.now += seconds(step.num_decodes, step.num_tokens - step.num_decodes)
        self.update(step)
        return line

    def unpark(self) -> int:
        return self.scheduler.unpark(lambda missing: True)

    def counts(self) -> tuple[int, int, int]:
        """Running, waiting, parked."""
        return self.scheduler.num_running, self.scheduler.num_waiting, self.scheduler.num_parked

    @property
    def everything_is_free(self) -> bool:
        layout, free = self.scheduler.cache.layout, self.scheduler.cache.num_free
        return free == (layout.num_global_blocks, layout.num_local_blocks)


# The batch


def test_one_request_from_prompt_to_end() -> None:
    desk = Desk()
    assert desk.step() == "nothing"
    assert desk.submit("a", 3) == []
    assert desk.step({"a": 7}) == "a 0+3 → a0=7"
    assert desk.step({"a": 8}) == "a 3+1 → a1=8"
    assert desk.step({"a": EOS}) == "a 4+1 → a2=9, a stop"
    assert desk.step() == "nothing"
    assert desk.made["a"].phase is Phase.DONE and desk.everything_is_free


def test_requests_join_and_leave_at_every_step() -> None:
    desk = Desk()
    desk.submit("a", 3, max_tokens=4)
    assert desk.step() == "a 0+3 → a0=5"
    desk.submit("b", 2, max_tokens=1)
    desk.submit("c", 4, max_tokens=2)
    assert desk.step() == "a 3+1, b 0+2, c 0+4 → a1=5, b0=5, b length, c0=5"
    assert desk.step() == "a 4+1, c 4+1 → a2=5, c1=5, c length"
    assert desk.step() == "a 5+1 → a3=5, a length"
    assert desk.everything_is_free


def test_a_long_prompt_is_cut_and_running_streams_go_first() -> None:
    desk = Desk(budget=5)
    desk.submit("a", 2)
    assert desk.step() == "a 0+2 → a0=5"
    desk.submit("long", 11)
    desk.submit("c", 3)
    assert desk.step() == "a 2+1, long 0+4 → a1=5"
    assert desk.step() == "a 3+1, long 4+4 → a2=5"
    assert desk.step() == "a 4+1, long 8+3, c 0+1 → a3=5, long0=5"
    assert desk.step() == "a 5+1, long 11+1, c 1+2 → a4=5, long1=5, c0=5"


def test_pieces_stop_at_chunk_borders() -> None:
    desk = Desk(num_local=4, chunk=6, budget=32)
    desk.submit("a", 15, max_tokens=2)
    assert desk.step() == "a 0+6"
    assert desk.made["a"].local_blocks == []
    assert desk.step() == "a 6+6"
    assert desk.step() == "a 12+3 → a0=5"
    assert (len(desk.made["a"].global_blocks), len(desk.made["a"].local_blocks)) == (4, 1)
    assert desk.step() == "a 15+1 → a1=5, a length"
    assert desk.everything_is_free


def test_without_local_layers_there_are_no_borders() -> None:
    desk = Desk(num_global=16, num_local=0, chunk=6, budget=32)
    desk.submit("a", 15)
    assert desk.step() == "a 0+15 → a0=5"


def test_admission_waits_for_a_place_and_keeps_order() -> None:
    desk = Desk(running=2, budget=6)
    for name in "abcd":
        desk.submit(name, 2, max_tokens=2)
    assert desk.step() == "a 0+2, b 0+2 → a0=5, b0=5"
    assert desk.counts() == (2, 2, 0)
    assert desk.step() == "a 2+1, b 2+1 → a1=5, a length, b1=5, b length"
    assert desk.step() == "c 0+2, d 0+2 → c0=5, d0=5"


def test_admission_never_overtakes_a_big_request_that_waits_for_room() -> None:
    desk = Desk(num_global=4, model_len=16)
    desk.submit("a", 8, max_tokens=2)
    desk.submit("big", 12, max_tokens=1)
    desk.submit("small", 1, max_tokens=1)
    assert desk.step() == "a 0+8 → a0=5"
    assert desk.step() == "a 8+1 → a1=5, a length"
    assert desk.step() == "big 0+12, small 0+1 → big0=5, big length, small0=5, small length"


def test_admission_leaves_room_for_what_running_prompts_still_need() -> None:
    desk = Desk(num_global=4, num_local=8, chunk=4, model_len=16)
    desk.submit("a", 12, max_tokens=1)
    desk.submit("b", 5)
    assert desk.step() == "a 0+4"  # three blocks are free, b would take two, but a still needs two
    assert desk.step() == "a 4+4"
    assert desk.step() == "a 8+4 → a0=5, a length"
    assert desk.step() == "b 0+4"


def test_admission_looks_at_both_pools() -> None:
    desk = Desk(num_global=16, num_local=3, chunk=8, model_len=16)
    desk.submit("a", 10, max_tokens=2)
    desk.submit("b", 5)
    assert desk.step() == "a 0+8"
    assert desk.counts() == (1, 1, 0)  # one local block is free, and b needs two
    assert desk.step() == "a 8+2, b 0+5 → a0=5, b0=5"  # a has passed a border


# Memory runs out


def test_the_latest_running_request_is_preempted_and_computes_again() -> None:
    desk = Desk(num_global=4, model_len=16)
    desk.submit("a", 7)
    desk.submit("b", 7)
    assert desk.step() == "a 0+7, b 0+7 → a0=5, b0=5"
    assert desk.step({"b": 6}) == "a 7+1, b 7+1 → a1=5, b1=6"
    assert desk.step() == "a 8+1 → a2=5"  # b's place is gone
    assert desk.counts() == (1, 1, 0)
    desk.submit("c", 1)
    assert desk.step() == "a 9+1 → a3=5"  # c does not overtake b, which needs three blocks
    assert desk.scheduler.cancel("a") != []
    assert desk.step() == "b 0+9, c 0+1 → b2=5, c0=5"  # its nine tokens are known, nothing is said twice
    assert desk.made["b"].token_ids[7:] == [5, 6, 5]


def test_a_piece_is_given_back_when_an_earlier_request_needs_the_blocks() -> None:
    desk = Desk(num_global=6, model_len=24, budget=5)
    desk.submit("early", 15)
    desk.submit("mid", 8)
    desk.submit("late", 2)
    assert desk.step(lost="early") == "early 0+5!"
    assert desk.step(lost="mid") == "mid 0+5!"
    assert desk.step() == "late 0+2 → late0=5"
    desk.unpark()
    assert desk.step() == "late 2+1, early 0+4 → late1=5"
    assert desk.step() == "late 3+1, early 4+4 → late2=5"
    # Decodes come first: late takes the last block for token 4, then early needs it for token 8. The token that
    # late gives back goes to mid.
    assert desk.step() == "early 8+4, mid 0+1"
    assert desk.counts() == (2, 1, 0)
    assert desk.step() == "early 12+3, mid 1+2 → early0=5"


def test_a_later_request_sits_out_rather_than_take_from_an_earlier_one() -> None:
    desk = Desk(num_global=4, model_len=16)
    desk.submit("a", 6, max_tokens=2)
    desk.submit("b", 8)
    assert desk.step() == "a 0+6, b 0+8 → a0=5, b0=5"
    assert desk.step() == "a 6+1 → a1=5, a length"
    assert desk.counts() == (1, 0, 0) and desk.made["b"].num_computed == 8
    assert desk.step() == "b 8+1 → b1=5"


def test_one_request_alone_always_fits() -> None:
    desk = Desk(num_global=4, num_local=2, chunk=8, model_len=16)
    desk.submit("a", 2)
    lines = [desk.step() for _ in range(16)]
    assert "a length" in lines[-3]
    with pytest.raises(AssertionError, match="alone must fit"):
        Desk(num_global=4, model_len=17)
    with pytest.raises(AssertionError, match="alone must fit"):
        Desk(num_global=4, num_local=1, chunk=8, model_len=5)


# Priorities


def test_waiting_requests_are_admitted_by_priority_then_arrival() -> None:
    desk = Desk(running=2)
    desk.submit("a", 2, max_tokens=1)
    desk.submit("later", 2, priority=5, max_tokens=1)
    desk.submit("b", 2, max_tokens=1)
    desk.submit("urgent", 2, priority=-1, max_tokens=1)
    assert desk.step() == "urgent 0+2, a 0+2 → urgent0=5, urgent length, a0=5, a length"
    assert desk.step() == "b 0+2, later 0+2 → b0=5, b length, later0=5, later length"


def test_the_less_urgent_never_overtake_one_that_waits_for_room() -> None:
    desk = Desk(num_global=4, model_len=16)
    desk.submit("a", 8, max_tokens=2, priority=3)
    assert desk.step() == "a 0+8 → a0=5"
    desk.submit("small", 1, max_tokens=1, priority=1)
    desk.submit("big", 12, max_tokens=1)
    assert desk.step() == "a 8+1 → a1=5, a length"
    assert desk.step() == "big 0+12, small 0+1 → big0=5, big length, small0=5, small length"


def test_the_least_urgent_is_preempted_however_early_it_came() -> None:
    desk = Desk(num_global=6, model_len=24)
    desk.submit("low", 7, priority=2)
    desk.submit("high", 7)
    desk.submit("mid", 7, priority=1)
    assert desk.step() == "high 0+7, mid 0+7, low 0+2 → high0=5, mid0=5"
    assert desk.step() == "high 7+1, mid 7+1, low 2+5 → high1=5, mid1=5, low0=5"
    assert desk.step() == "high 8+1, mid 8+1 → high2=5, mid2=5"  # both from low
    assert desk.counts() == (2, 1, 0) and desk.made["low"].global_blocks == []
    desk.submit("new", 1, priority=1)
    assert desk.step() == "high 9+1, mid 9+1 → high3=5, mid3=5"  # two running ones hold all blocks
    desk.scheduler.cancel("high")
    assert desk.step() == "mid 10+1, new 0+1, low 0+8 → mid4=5, new0=5, low1=5"  # low has its old place no more


def test_a_less_urgent_stream_leaves_the_most_urgent_prompt_a_token_of_every_step() -> None:
    desk = Desk(budget=1)
    desk.submit("stream", 1, priority=1)
    assert desk.step() == "stream 0+1 → stream0=5"
    desk.submit("urgent", 3)
    assert desk.step() == "stream 1+1 → stream1=5"  # not admitted yet: the step is full
    desk.scheduler.cancel("stream")
    desk.submit("stream", 2, priority=1)
    assert desk.step() == "urgent 0+1"
    assert desk.step() == "urgent 1+1"
    assert desk.step() == "urgent 2+1 → urgent0=5"
    desk = Desk(budget=2, running=3)
    desk.submit("b", 1, priority=1)
    desk.submit("c", 1, priority=1)
    assert desk.step() == "b 0+1, c 0+1 → b0=5, c0=5"
    desk.scheduler.cancel("c")
    desk.submit("urgent", 3)
    assert desk.step() == "b 1+1, urgent 0+1 → b1=5"
    desk.submit("c", 1, priority=1)
    assert desk.step() == "b 2+1, urgent 1+1 → b2=5"


# Prefixes


def test_what_another_request_has_computed_is_not_computed_again() -> None:
    desk = Desk(prefix_cache=True, num_local=8, chunk=16)
    desk.submit("a", 10, max_tokens=1)
    desk.submit("b", 10, max_tokens=1)
    assert desk.step() == "a 0+10, b 0+6 → a0=5, a length"  # at the same time nobody has anything yet
    assert desk.step() == "b 6+4 → b0=5, b length"
    desk.submit("c", 10, max_tokens=1)
    desk.submit("d", 9, max_tokens=1)
    desk.submit("e", 8, max_tokens=1)  # one token must be left: the first block alone
    desk.submit("stranger", 9, max_tokens=1, salt="other")
    assert desk.step().startswith("c 8+2, d 8+1, e 4+4, stranger 0+9 → ")
    assert desk.everything_is_free


def test_a_preempted_request_finds_its_own_tokens_again() -> None:
    desk = Desk(num_global=4, model_len=16, prefix_cache=True)
    desk.submit("a", 7)
    desk.submit("b", 7, salt="b")
    assert desk.step() == "a 0+7, b 0+7 → a0=5, b0=5"
    assert desk.step({"b": 6}) == "a 7+1, b 7+1 → a1=5, b1=6"
    assert desk.step() == "a 8+1 → a2=5"  # the last block of b went to a
    assert desk.scheduler.cancel("a") != []
    assert desk.step() == "b 4+5 → b2=5"
    assert desk.made["b"].token_ids[7:] == [5, 6, 5]


def test_a_resumed_request_finds_prompt_and_output() -> None:
    desk = Desk(prefix_cache=True)
    desk.submit("a", 5, max_tokens=8)
    for _ in range(8):
        desk.step()
    desk.submit("b", 5, emitted=(5,) * 6, max_tokens=8)
    assert desk.step() == "b 8+3 → b6=5"


def test_lost_and_cancelled_pieces_are_found_by_nobody() -> None:
    desk = Desk(prefix_cache=True, budget=64)
    desk.submit("a", 9)
    desk.submit("b", 9, salt="b")
    step = desk.schedule()
    desk.scheduler.cancel("b")
    desk.update(step, lost="a")
    desk.submit("c", 9)
    desk.submit("d", 9, salt="b")
    assert desk.step() == "c 0+9, d 0+9 → c0=5, d0=5"


def test_a_hit_in_use_by_others_needs_no_room_of_its_own() -> None:
    desk = Desk(prefix_cache=True, num_global=4, model_len=16)
    desk.submit("a", 9)
    assert desk.step() == "a 0+9 → a0=5"
    desk.submit("b", 9)
    assert desk.step() == "a 9+1, b 8+1 → a1=5, b0=5"  # one block was free, and one is all b takes
    assert desk.made["a"].global_blocks[:2] == desk.made["b"].global_blocks[:2]
    desk.scheduler.cancel("b")
    desk.scheduler.cancel("a")
    desk.submit("new", 8, salt="new", max_tokens=1)
    assert desk.step() == "new 0+8 → new0=5, new length"
    assert desk.step() == "nothing"
    desk.submit("a again", 9)  # its two blocks are idle, and count once: as found, not as free
    desk.submit("other", 8, salt="other")
    assert desk.step() == "a again 8+1 → a again0=5"
    assert desk.counts() == (1, 1, 0)


def test_a_prefix_that_parked_requests_hold_survives_taking_their_blocks() -> None:
    desk = Desk(prefix_cache=True, num_global=4, model_len=16)
    desk.submit("a", 13)
    assert desk.step() == "a 0+13 → a0=5"
    assert desk.step(lost="a") == "a 13+1!"
    desk.submit("b", 12)
    assert desk.step() == "b 8+4 → b0=5"
    assert desk.made["a"].global_blocks == []


# Running streams and long prompts


def machine_time(num_decodes: int, num_prompt_tokens: int) -> float:
    """About what two cores take."""
    return 0.030 * bool(num_decodes) + 0.003 * num_decodes + 0.0003 * num_prompt_tokens


def long_prompt_beside_streams(stretch: float) -> tuple[float, float]:
    """The longest step of 16 streams while a prompt of 16,384 tokens comes in, in steps without it; and that prompt's
    time to its first token, in times without streams."""
    desk = Desk(
        budget=1024, running=32, waiting=32, waiting_tokens=20_000, model_len=20_000, num_global=10_000, stretch=stretch
    )
    for number in range(16):
        desk.submit(f"s{number}", 4, max_tokens=10_000)
    for _ in range(20):
        desk.timed_step(machine_time)
    alone = machine_time(16, 0)
    begin = desk.now
    desk.submit("long", 16_384)
    longest = 0.0
    while desk.made["long"].num_output == 0:
        before = desk.now
        assert desk.timed_step(machine_time).count("s") == 16, "a stream was left out"
        longest = max(longest, desk.now - before)
    return longest / alone, (desk.now - begin) / (16_384 * 0.0003)


def test_a_long_prompt_does_not_stall_running_streams() -> None:
    longest, prompt_time = long_prompt_beside_streams(stretch=2.0)
    assert 1.8 < longest < 2.2
    assert prompt_time < 2.3
    longest, prompt_time = long_prompt_beside_streams(stretch=inf)
    assert longest > 4.5 and prompt_time < 1.4


def test_a_prompt_alone_fills_the_step() -> None:
    desk = Desk(budget=1024, model_len=5000, num_global=2000, waiting_tokens=5000, stretch=2.0)
    desk.submit("long", 4000)
    assert [desk.timed_step(machine_time) for _ in range(2)] == ["long 0+1024", "long 1024+1024"]


# Experts are away


def test_a_lost_piece_parks_its_request_and_nobody_else() -> None:
    desk = Desk()
    desk.submit("a", 4)
    desk.submit("b", 4)
    assert desk.step() == "a 0+4, b 0+4 → a0=5, b0=5"
    assert desk.step(lost="a") == "a 4+1!, b 4+1 → b1=5"
    request = desk.made["a"]
    assert (request.phase, request.missing, request.num_computed) == (Phase.PARKED, AWAY, 4)
    assert len(request.global_blocks) == 2
    assert desk.step() == "b 5+1 → b2=5"
    assert desk.scheduler.unpark(lambda missing: missing != AWAY) == 0
    assert desk.scheduler.unpark(lambda missing: missing == AWAY) == 1
    assert request.missing == frozenset()
    assert desk.step() == "a 4+1, b 6+1 → a1=5, b3=5"


def test_a_lost_prefill_piece_is_computed_again() -> None:
    desk = Desk(budget=4, num_local=4, chunk=6)
    desk.submit("a", 9)
    assert desk.step() == "a 0+4"
    assert desk.step(lost="a") == "a 4+2!"
    assert not desk.scheduler.has_work and desk.step() == "nothing"
    desk.unpark()
    assert desk.step() == "a 4+2"
    assert desk.step() == "a 6+3 → a0=5"


def test_parked_requests_give_way_before_running_ones() -> None:
    desk = Desk(num_global=4, model_len=16)
    desk.submit("a", 4)
    desk.submit("b", 4)
    desk.submit("c", 4)
    assert desk.step(lost="a") == "a 0+4!, b 0+4, c 0+4 → b0=5, c0=5"
    assert desk.step() == "b 4+1, c 4+1 → b1=5, c1=5"  # a's block went to c
    assert desk.counts() == (2, 0, 1) and desk.made["a"].global_blocks == []
    desk.unpark()
    assert desk.counts() == (2, 1, 0)
    desk.scheduler.cancel("b")
    assert desk.step() == "c 5+1, a 0+4 → c2=5, a0=5"


def test_parked_requests_do_not_keep_a_new_one_out_when_nothing_runs() -> None:
    desk = Desk(num_global=4, model_len=16)
    desk.submit("a", 6)
    desk.submit("b", 6)
    assert desk.step(lost="a b") == "a 0+6!, b 0+6!"
    desk.submit("c", 3)
    assert desk.step() == "c 0+3 → c0=5"
    assert len(desk.made["a"].global_blocks) == 2 and desk.made["b"].global_blocks == []
    desk.submit("d", 8)
    assert desk.step() == "c 3+1 → c1=5"  # something runs, so a keeps its blocks and d waits


def test_parking_does_not_use_up_the_places_of_running_requests() -> None:
    desk = Desk(running=1)
    for name in "abc":
        desk.submit(name, 2)
    assert desk.step(lost="a") == "a 0+2!"
    assert desk.step(lost="b") == "b 0+2!"
    assert desk.step() == "c 0+2 → c0=5"
    desk.unpark()
    assert desk.step() == "c 2+1, a 0+2, b 0+2 → c1=5, a0=5, b0=5"


# Ends


@pytest.mark.parametrize(
    ("options", "tokens", "last"),
    [
        ({"max_tokens": 3}, [5, 5, 5], "a2=5, a length"),
        ({"max_tokens": 3}, [5, 5, EOS], "a2=9, a stop"),
        ({}, [EOS], "a0=9, a stop"),
        ({"ignore_eos": True, "max_tokens": 2}, [EOS, EOS], "a1=9, a length"),
        ({"min_tokens": 3}, [EOS, EOS, EOS], "a2=9, a stop"),
        ({"min_tokens": 2, "stop_token_ids": (7,)}, [7, 7], "a1=7, a stop"),
        ({"ignore_eos": True, "stop_token_ids": (EOS,)}, [EOS], "a0=9, a stop"),
        ({"stop_token_ids": (7, 8)}, [5, 8], "a1=8, a stop"),
    ],
)
def test_ends(options: dict[str, int], tokens: list[int], last: str) -> None:
    desk = Desk()
    desk.submit("a", 2, **options)  # type: ignore[arg-type]
    lines = [desk.step({"a": token}) for token in tokens]
    assert lines[-1].endswith(last)
    assert all("stop" not in line and "length" not in line for line in lines[:-1])
    assert not desk.scheduler.has_work and desk.everything_is_free


def test_the_context_ends_a_request() -> None:
    desk = Desk(model_len=6)
    desk.submit("a", 4)
    assert desk.step() == "a 0+4 → a0=5"
    assert desk.step() == "a 4+1 → a1=5, a length"
    with pytest.raises(ContextOverflow, match="maximum context length is 6"):
        desk.submit("b", 6)
    desk.submit("c", 5)
    assert desk.step() == "c 0+5 → c0=5, c length"


def test_a_resumed_request_counts_what_was_emitted_before() -> None:
    desk = Desk()
    desk.submit("a", 3, emitted=(5, 6), max_tokens=4)
    assert desk.step({"a": 7}) == "a 0+5 → a2=7"
    assert desk.step({"a": 8}) == "a 5+1 → a3=8, a length"


@pytest.mark.parametrize(
    ("options", "end"),
    [
        ({"emitted": (5, 6), "max_tokens": 2}, "a length"),
        ({"emitted": (5, EOS)}, "a stop"),
        ({"emitted": (5, 7), "stop_token_ids": (7,)}, "a stop"),
        ({"emitted": (5,) * 61}, "a length"),
        ({"max_tokens": 0}, "a length"),
        ({"deadline": 0.0}, "a error deadline_exceeded"),
    ],
)
def test_what_has_ended_before_it_began_ends_at_once(options: dict[str, object], end: str) -> None:
    desk = Desk()
    assert desk.submit("a", 3, **options) == [end]  # type: ignore[arg-type]
    assert desk.step() == "nothing"
    assert desk.made["a"].phase is Phase.DONE
    assert desk.submit("a", 3) == []  # its name is free again


def test_cancelling_in_every_phase() -> None:
    desk = Desk(running=2)
    for name in "abcd":
        desk.submit(name, 3)
    assert desk.step(lost="b") == "a 0+3, b 0+3! → a0=5"
    assert desk.counts() == (1, 2, 1)
    for name in "abcd":
        assert [show(event) for event in desk.scheduler.cancel(name)] == [f"{name} cancelled"]
        assert desk.scheduler.cancel(name) == []
        desk.scheduler.check_integrity()
    assert desk.everything_is_free and desk.step() == "nothing"


def test_deadlines() -> None:
    desk = Desk(running=2)
    assert desk.scheduler.next_deadline() is None
    desk.submit("a", 3, deadline=7.0)
    desk.submit("b", 3, deadline=5.0)
    desk.submit("c", 3, deadline=6.0)
    desk.step(lost="b")
    assert desk.scheduler.next_deadline() == 5.0
    assert desk.scheduler.expire(4.9) == []
    [event] = desk.scheduler.expire(5.0)
    assert isinstance(event, FinishEvent)
    assert (show(event), event.message) == (
        "b error expert_unavailable",
        "no host served expert 1 of layer 3 in time",
    )
    assert [show(event) for event in desk.scheduler.expire(10.0)] == [
        "a error deadline_exceeded",
        "c error deadline_exceeded",
    ]
    assert desk.everything_is_free


def test_what_ends_while_its_step_runs_keeps_its_blocks_until_the_update() -> None:
    desk = Desk()
    for name in "abc":
        desk.submit(name, 3, deadline=2.0 if name == "b" else 9.0)
    step = desk.schedule()
    assert [show(event) for event in desk.scheduler.cancel("a")] == ["a cancelled"]
    assert [show(event) for event in desk.scheduler.expire(3.0)] == ["b error deadline_exceeded"]
    assert desk.made["a"].global_blocks and desk.made["b"].global_blocks
    desk.submit("a", 2)  # the next attempt may come before the step ends
    assert desk.update(step, lost="b") == ["c0=5"]
    assert desk.step() == "c 3+1, a 0+2 → c1=5, a0=5"


def test_a_step_that_failed_as_a_whole() -> None:
    desk = Desk()
    desk.submit("a", 3)
    desk.submit("b", 3)
    step = desk.schedule()
    for piece in step.pieces:
        [event] = desk.scheduler.fail(piece.request.request_id, "internal_error", "broken")
        assert show(event).endswith("error internal_error")
    assert desk.scheduler.update(step, {}, {}, 0.0) == []
    assert desk.scheduler.fail("a", "internal_error", "broken") == []
    assert desk.everything_is_free


# What is refused


def test_the_number_of_requests_is_bounded() -> None:
    desk = Desk(running=1, waiting=2)
    for name in "abc":
        desk.submit(name, 2)
    with pytest.raises(Overloaded, match="3 requests") as refusal:
        desk.submit("d", 2)
    assert 1.0 <= refusal.value.retry_after_s <= 30.0
    desk.step(lost="a")
    with pytest.raises(Overloaded):  # parked requests count
        desk.submit("d", 2)
    assert desk.scheduler.cancel("b") != []
    assert desk.submit("d", 2) == []


def test_the_number_of_waiting_tokens_is_bounded_but_one_request_may_always_wait() -> None:
    desk = Desk(waiting_tokens=20, budget=64)
    desk.submit("a", 30)
    with pytest.raises(Overloaded, match="30 tokens are waiting"):
        desk.submit("b", 1)
    desk.step()
    desk.submit("b", 15)
    desk.submit("c", 5)
    with pytest.raises(Overloaded, match="20 tokens"):
        desk.submit("d", 1)


def test_retry_after_follows_the_pace_of_finishing() -> None:
    def retry_after(step_s: float) -> float:
        desk = Desk(running=1, waiting=8)
        for number in range(40):
            desk.submit(f"r{number}", 2, max_tokens=1)
            step = desk.schedule()
            desk.now += step_s
            desk.update(step)
        for number in range(8):
            desk.submit(f"w{number}", 2)
        return desk.scheduler.retry_after_s()

    assert retry_after(0.01) < 10.0
    assert retry_after(2.0) == pytest.approx(16.0, rel=0.05)
    assert retry_after(60.0) == 30.0


def test_bad_requests_are_named() -> None:
    desk = Desk()
    desk.submit("a", 3)
    with pytest.raises(InvalidInput, match="request_id"):
        desk.submit("a", 3)
    with pytest.raises(InvalidInput, match="prompt"):
        desk.submit("b", 0)
    assert desk.counts() == (0, 1, 0)
    with pytest.raises(InvalidInput, match="max_running"):
        Desk(running=0)


def test_misuse_is_caught() -> None:
    desk = Desk()
    desk.submit("a", 3)
    step = desk.schedule()
    with pytest.raises(AssertionError, match="has not been updated"):
        desk.scheduler.schedule(0.0)
    with pytest.raises(AssertionError, match="not the step"):
        desk.scheduler.update(Step(pieces=step.pieces, started=0.0), {"a": 5}, {}, 0.0)
    with pytest.raises(AssertionError, match="submitted once"):
        desk.scheduler.submit(desk.made["a"], 0.0)
