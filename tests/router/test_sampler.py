"""Sampling: filters, exactness of the distribution, and that neighbours and order never matter."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from router.engine.request import SamplingParams
from router.engine.draw import Draw
from router.engine.sampler import sample, uniform


def draw(position: int = 0, banned: tuple[int, ...] = (), **fields: float) -> Draw:
    return Draw(sampling=SamplingParams(max_tokens=1, **fields), position=position, banned=banned)  # type: ignore[arg-type]


def test_temperature_zero_takes_the_largest_and_the_smallest_id_of_a_tie() -> None:
    assert sample(torch.tensor([[1.0, 3.0, 3.0], [5.0, 3.0, 3.0]]), [draw(temperature=0.0)] * 2) == [1, 0]


def test_banned_ids_are_never_chosen() -> None:
    logits = torch.tensor([[1.0, 9.0, 8.0]])
    assert sample(logits.clone(), [draw(temperature=0.0, banned=(1,))]) == [2]
    assert sample(logits.clone(), [draw(temperature=2.0, banned=(1, 2), seed=5)]) == [0]


def test_top_k_one_and_tiny_top_p_are_greedy() -> None:
    logits = torch.randn(20, 50, generator=torch.Generator().manual_seed(1))
    best = logits.argmax(-1).tolist()
    assert sample(logits.clone(), [draw(position=p, top_k=1) for p in range(20)]) == best
    assert sample(logits.clone(), [draw(position=p, top_p=1e-9) for p in range(20)]) == best


def test_frequencies_follow_the_softmax_of_what_the_filters_leave() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -9.0])
    rows = 20_000
    tokens = sample(
        logits.repeat(rows, 1), [draw(position=p, seed=3, temperature=0.7, top_k=4, top_p=0.9) for p in range(rows)]
    )
    expected = torch.softmax(logits / 0.7, -1)
    # 0.76 + 0.18 reach 0.9, so ids 2 and 3 are out.
    assert set(tokens) == {0, 1}
    share = Counter(tokens)[0] / rows
    assert abs(share - float(expected[0] / expected[:2].sum())) < 0.01


def test_uniform_is_a_function_of_seed_and_position_and_covers_the_interval() -> None:
    values = [uniform(7, position) for position in range(4000)]
    assert values == [uniform(7, position) for position in range(4000)]
    assert 0 <= min(values) < 0.01 < 0.99 < max(values) < 1
    assert abs(sum(values) / len(values) - 0.5) < 0.02
    assert uniform(7, 0) != uniform(8, 0)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), seed=st.integers(0, 2**63))
def test_a_row_does_not_depend_on_its_neighbours(data: st.DataObject, seed: int) -> None:
    rows = data.draw(st.integers(1, 6))
    logits = torch.randn(rows, 17, generator=torch.Generator().manual_seed(seed % 2**31)) * 3
    draws = [
        draw(
            position=data.draw(st.integers(0, 99)),
            temperature=data.draw(st.sampled_from([0.0, 0.3, 1.0, 2.0])),
            top_k=data.draw(st.integers(0, 20)),
            top_p=data.draw(st.floats(0.01, 1.0)),
            seed=seed,
        )
        for _ in range(rows)
    ]
    together = sample(logits.clone(), draws)
    alone = [sample(logits[row : row + 1].clone(), [draws[row]])[0] for row in range(rows)]
    assert together == alone


def test_extreme_temperatures_and_infinite_logits_give_valid_ids() -> None:
    logits = torch.tensor([[float("-inf"), 1.0, 1e30], [0.0, 0.0, 0.0]])
    for temperature in (1e-6, 2.0):
        for token in sample(logits.clone(), [draw(temperature=temperature, seed=1)] * 2):
            assert token in (0, 1, 2)


@pytest.mark.parametrize("hopeless", [float("-inf"), float("nan")])
def test_a_row_without_a_possible_token_does_not_disturb_its_neighbours(hopeless: float) -> None:
    good = torch.randn(2, 9, generator=torch.Generator().manual_seed(3))
    logits = torch.stack([good[0], torch.full((9,), hopeless), good[1]])
    draws = [draw(temperature=1.0, seed=seed, position=5) for seed in (1, 2, 3)]
    alone = [sample(good[:1], draws[:1])[0], sample(good[1:], draws[2:])[0]]
    first, between, last = sample(logits, draws)
    assert [first, last] == alone
    assert between is None
