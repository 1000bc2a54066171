"""The scheduler's decisions, as transcripts: one line per step, pieces on the left, events on the right.

`a 0+4` is tokens 0 to 3 of request a, computed; `!` after it means that the piece was lost. `a2=7` is output token 2
of request a with id 7; `a stop` is its end.
"""

from __future__ import annotations

import pytest

from experts.errors import ContextOverflow, InvalidInput, Overloaded
from experts.placement import ExpertKey
from router.engine.kv_cache import KVCache, KVLayout
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
            eos_ids=frozenset({EOS}),
        )
        self.scheduler = Scheduler(KVCache(layout), config)
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
    ) -> list[str]:
        request = Request(
            request_id=name,
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
