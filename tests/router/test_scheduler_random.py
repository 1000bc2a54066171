"""The scheduler and the KV cache under random traces: whatever happens, in whatever order, their promises hold.

Before each step everything that it would read from the key/value store is compared with what earlier steps wrote there.
"""

from __future__ import annotations

from collections import Counter
from math import inf
from random import Random

import pytest
from hypothesis import event, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from scheduler_trace import Ask, Trace, World

ASKS = st.builds(
    Ask,
    num_prompt=st.sampled_from([1, 2, 3, 4, 6, 9, 20, 31]),
    num_emitted=st.sampled_from([0, 0, 0, 1, 4]),
    max_tokens=st.sampled_from([1, 5, 30, 30]),
    min_tokens=st.sampled_from([0, 0, 4]),
    ignore_eos=st.sampled_from([False, True, True]),
    stop_token_ids=st.sampled_from([(), (), (3,)]),
    patience=st.none() | st.integers(1, 60),
    priority=st.sampled_from([0, 0, 0, 1, -1]),
    salt=st.sampled_from(["", "", "", "tenant"]),
    family=st.integers(0, 1),
    num_common=st.sampled_from([0, 5, 12, 31, 31]),
    voice=st.integers(0, 2),
    picture=st.sampled_from([0, 0, 0, 1, 2]),
)
WORLDS = st.builds(
    World,
    kinds=st.sampled_from([(True, True), (True, True), (True, False), (False, True)]),
    block_size=st.sampled_from([1, 1, 2, 2, 3, 4, 5, 7, 8]),
    chunk_size=st.none() | st.integers(1, 7),
    model_len=st.sampled_from([2, 5, 12, 16, 24, 32]),
    spare=st.tuples(st.integers(0, 6), st.integers(0, 6)),
    budget=st.integers(1, 12),
    running=st.sampled_from([1, 3, 4, 6]),
    waiting=st.integers(1, 4),
    waiting_tokens=st.sampled_from([20, 1000, 1000]),
    stretch=st.sampled_from([1.0, 2.0, inf]),
    prefix_cache=st.sampled_from([True, True, True, False]),
)


class SchedulerMachine(RuleBasedStateMachine):
    """A trace whose moves hypothesis chooses."""

    @initialize(world=WORLDS, asks=st.lists(ASKS, min_size=2, max_size=8))
    def start(self, world: World, asks: list[Ask]) -> None:
        self.trace = Trace(world)
        for ask in asks:
            self.trace.submit(ask)

    @rule(ask=ASKS)
    def submit(self, ask: Ask) -> None:
        self.trace.submit(ask)

    @precondition(lambda self: self.trace.step is None and self.trace.scheduler.requests)
    @rule()
    def schedule(self) -> None:
        self.trace.schedule()

    @precondition(lambda self: self.trace.step is not None)
    @rule(fates=st.lists(st.integers(0, 5), max_size=8), elapsed_s=st.sampled_from([0.0, 0.1, 0.25, 5.0]))
    def update(self, fates: list[int], elapsed_s: float) -> None:
        self.trace.lose(fates, elapsed_s)

    @precondition(lambda self: self.trace.step is None and self.trace.scheduler.has_work)
    @rule(num_steps=st.integers(1, 10))
    def run_undisturbed(self, num_steps: int) -> None:
        for _ in range(num_steps):
            self.trace.schedule()
            if self.trace.step is not None:
                self.trace.finish_step({})
            self.trace.check()

    @precondition(lambda self: self.trace.scheduler.requests)
    @rule(choice=st.integers(0, 30), cancelled=st.booleans())
    def cancel_or_fail(self, choice: int, cancelled: bool) -> None:
        self.trace.end(f"r{choice % (len(self.trace.requests) + 1)}", cancelled=cancelled)

    @precondition(lambda self: self.trace.scheduler.requests)
    @rule(seconds=st.integers(1, 5))
    def expire(self, seconds: int) -> None:
        self.trace.expire(seconds)

    @precondition(lambda self: self.trace.scheduler.num_parked)
    @rule(draws=st.lists(st.booleans(), min_size=10, max_size=10))
    def unpark(self, draws: list[bool]) -> None:
        answers = iter(draws)
        self.trace.unpark(lambda: next(answers))

    @invariant()
    def everything_is_whole(self) -> None:
        if hasattr(self, "trace"):
            self.trace.check()

    def teardown(self) -> None:
        if hasattr(self, "trace"):
            self.trace.finish()
            for what in sorted(self.trace.seen):
                if self.trace.seen[what]:
                    event(what)


TestSchedulerRandom = SchedulerMachine.TestCase
TestSchedulerRandom.settings = settings(max_examples=100, stateful_step_count=50, deadline=None)


def draw_world(random: Random) -> World:
    block_size = random.choice([1, 2, 3, 4, 5, 8])
    return World(
        kinds=random.choice([(True, True), (True, True), (True, False), (False, True)]),
        block_size=block_size,
        chunk_size=random.choice(
            [None, *(block_size * count for count in (1, 2, 3)), 2 * block_size + 1, random.randint(1, 7)]
        ),
        model_len=random.choice([16, 32, 64, 120]),
        spare=(random.randint(0, 60), random.randint(0, 30)),
        budget=random.choice([1, 6, 12, 64]),
        running=random.choice([1, 3, 6, 8]),
        waiting=random.randint(1, 6),
        waiting_tokens=random.choice([100, 10_000]),
        stretch=random.choice([1.0, 2.0, inf]),
        prefix_cache=random.random() < 0.9,
    )


def draw_ask(random: Random) -> Ask:
    return Ask(
        num_prompt=random.choice([1, 3, 9, 20, 31, 50, 90]),
        num_emitted=random.choice([0, 0, 0, 4, 14]),
        max_tokens=random.choice([1, 5, 30, 60]),
        min_tokens=random.choice([0, 4]),
        ignore_eos=random.random() < 0.7,
        stop_token_ids=random.choice([(), (), (3,)]),
        patience=random.choice([None, None, random.randint(1, 60)]),
        priority=random.choice([0, 0, 0, 1, -1]),
        salt=random.choice(["", "", "", "", "tenant"]),
        family=random.choice([0, 0, 0, 1]),
        num_common=random.choice([0, 10, 31, 90, 90, 90]),
        voice=random.choice([0, 0, 0, 1]),
        picture=random.choice([0, 0, 0, 0, 1, 2]),
    )


def run_trace(random: Random, num_events: int) -> Counter[str]:
    """One world and so many events in it, then the end of everyone. Most events are steps, which half the time go well
    in every piece."""
    trace = Trace(draw_world(random))
    for _ in range(num_events):
        move = random.random()
        if trace.step is not None and move < 0.85:
            fates = [random.randrange(8) for _ in trace.step.pieces] if random.random() < 0.3 else []
            trace.lose(fates, random.choice([0.01, 0.1, 0.1, 0.2, 3.0]))
        elif trace.step is None and move < 0.6 and trace.scheduler.has_work:
            trace.schedule()
        elif move < 0.9:
            trace.submit(draw_ask(random))
        elif move < 0.94 and trace.requests:
            newest = len(trace.requests)
            trace.end(f"r{random.randint(max(0, newest - 8), newest)}", cancelled=random.random() < 0.5)
        elif move < 0.95:
            trace.expire(random.randint(1, 3))
        else:
            trace.unpark(lambda: random.random() < 0.7)
        trace.check()
    trace.finish()
    return trace.seen


def run_traces(seed: int, num_traces: int, num_events: int) -> Counter[str]:
    print(f"seed {seed}")
    random, seen = Random(seed), Counter[str]()
    for _ in range(num_traces):
        seen += run_trace(random, num_events)
    print(dict(seen))
    return seen


KINDS_OF_HITS = {
    "hit with local blocks",
    "hit at a border",
    "hit after preemption",
    "hit in pictures",
    "hit in output",
    "evicted",
}


def test_long_traces() -> None:
    """Everything worth happening does: sharing is put to the test, not merely switched on."""
    seen = run_traces(seed=20_251, num_traces=25, num_events=400)
    assert all(seen[what] >= 10 for what in KINDS_OF_HITS), seen


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(4))
def test_very_long_traces(seed: int) -> None:
    seen = run_traces(seed, num_traces=40, num_events=2500)
    assert all(seen[what] >= 50 for what in KINDS_OF_HITS), seen
