"""How many prompt tokens a step may take beside running streams, learnt from made-up steps."""

from __future__ import annotations

from math import inf
from random import Random

import pytest

from router.engine.pace import LEAST_PROMPT_TOKENS, NUM_STREAM_STEPS, STALE_AFTER, Pace


def learnt(stretch: float = 2.0, streams_s: float = 0.08, token_s: float = 0.0004) -> Pace:
    pace = Pace(stretch)
    for _ in range(NUM_STREAM_STEPS):
        pace.learn(16, 0, streams_s)
        pace.learn(16, 200, streams_s + 200 * token_s)
    return pace


@pytest.mark.parametrize(("stretch", "tokens"), [(2.0, 200), (1.5, 100), (3.0, 400), (1.0, LEAST_PROMPT_TOKENS)])
def test_prompts_get_what_stretches_the_step(stretch: float, tokens: int) -> None:
    assert learnt(stretch).prompt_tokens(may_pause=True) == pytest.approx(tokens, abs=1)


def test_no_limit_is_asked_for_with_infinity() -> None:
    assert Pace(inf).prompt_tokens(may_pause=True) == inf
    assert learnt(inf).prompt_tokens(may_pause=True) == inf


def test_at_first_streams_run_alone_once_and_then_prompts_begin_small() -> None:
    pace = Pace(2.0)
    assert pace.prompt_tokens(may_pause=True) == 0
    assert pace.prompt_tokens(may_pause=False) == LEAST_PROMPT_TOKENS  # the most urgent one does not pause
    pace.learn(3, 0, 0.05)
    assert pace.prompt_tokens(may_pause=True) == LEAST_PROMPT_TOKENS
    pace.learn(3, 64, 0.05 + 64 * 0.0005)
    assert pace.prompt_tokens(may_pause=True) == pytest.approx(100, abs=1)


def test_steps_without_streams_say_nothing() -> None:
    pace = learnt()
    for _ in range(NUM_STREAM_STEPS):
        pace.learn(0, 1000, 9.0)
    assert pace.prompt_tokens(may_pause=True) == pytest.approx(200, abs=1)


def test_prompts_double_at_most_from_step_to_step() -> None:
    pace = Pace(2.0)
    pace.learn(16, 0, 0.08)
    taken = []
    for _ in range(6):
        taken.append(pace.prompt_tokens(may_pause=True))
        pace.learn(16, int(taken[-1]), 0.08 + taken[-1] * 0.0002)
    assert taken == pytest.approx([64, 128, 256, 400, 400, 400], abs=1)


def test_streams_that_turn_out_faster_are_believed() -> None:
    pace = learnt(streams_s=0.8, token_s=0.0004)
    for _ in range(2 * NUM_STREAM_STEPS):
        pace.learn(16, 100, 0.08 + 100 * 0.0004)
    assert pace.prompt_tokens(may_pause=True) <= 200


def test_a_slow_first_step_and_single_hiccups_are_forgotten_at_once() -> None:
    pace = Pace(2.0)
    pace.learn(16, 0, 7.0)
    pace.learn(16, 0, 0.08)
    pace.learn(16, 100, 0.08 + 0.04)
    pace.learn(16, 100, 9.0)
    pace.learn(16, 100, 0.08 + 0.04)
    pace.learn(16, 0, 3.0)
    pace.learn(16, 0, 0.08)
    assert pace.prompt_tokens(may_pause=True) == pytest.approx(200, abs=1)


def test_it_follows_a_prompt_that_gets_deep_and_streams_that_leave() -> None:
    pace = learnt()
    for _ in range(NUM_STREAM_STEPS):
        pace.learn(16, 100, 0.08 + 100 * 0.0008)
    assert pace.prompt_tokens(may_pause=True) == pytest.approx(100, abs=1)
    for _ in range(NUM_STREAM_STEPS):
        pace.learn(4, 0, 0.06)
    assert pace.prompt_tokens(may_pause=True) == pytest.approx(75, abs=1)


def test_after_many_steps_with_prompts_streams_run_alone_once() -> None:
    pace = learnt()
    for _ in range(STALE_AFTER - 1):
        pace.learn(16, 100, 0.12)
    assert pace.prompt_tokens(may_pause=True) == 0
    assert pace.prompt_tokens(may_pause=False) == pytest.approx(200, abs=1)
    pace.learn(16, 0, 0.08)
    assert pace.prompt_tokens(may_pause=True) == pytest.approx(200, abs=1)


def test_tiny_pieces_teach_nothing() -> None:
    pace = learnt()
    for _ in range(NUM_STREAM_STEPS):
        pace.learn(16, 1, 0.5)
        pace.learn(0, 1, 0.5)
    assert pace.prompt_tokens(may_pause=True) == pytest.approx(200, abs=1)


def test_prompts_that_cost_nothing_grow_until_they_do() -> None:
    assert learnt(token_s=0.0).prompt_tokens(may_pause=True) == 400
    assert learnt(streams_s=0.0).prompt_tokens(may_pause=True) == LEAST_PROMPT_TOKENS


@pytest.mark.parametrize("fixed_s", [0.0, 0.06])
@pytest.mark.parametrize("seed", range(3))
def test_it_settles_where_steps_are_stretched_as_asked(fixed_s: float, seed: int) -> None:
    """With noise, and even if prompts cost something whatever their length."""
    print(f"seed {seed}")
    random, pace = Random(seed), Pace(2.0)

    def noise() -> float:
        return random.uniform(0.95, 1.05)

    for _ in range(10):
        pace.learn(16, 0, 0.08 * noise())
    took = []
    for _ in range(100):
        tokens = int(min(1024, pace.prompt_tokens(may_pause=False)))
        took.append((0.08 + fixed_s + tokens * 0.0003) * noise())
        pace.learn(16, tokens, took[-1])
    settled = took[40:]
    assert 1.7 < sum(settled) / len(settled) / 0.08 < 2.3
    assert max(settled) < 0.08 * 2.8
