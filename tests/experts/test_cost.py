"""What a host measures of itself: a line through two points, whatever the clock's noise."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from expert_hosts import Experts, make_expert

from experts.arithmetic import PlainArithmetic
from experts.cost import measure_cost
from experts.ffn import ExpertWeights
from experts.host import ExpertHost

EXPERTS = [make_expert((0, number)) for number in range(3)]


class TimedArithmetic(PlainArithmetic):
    """Takes 2 ms for an expert and 0.1 ms for a row, on a clock of its own."""

    def __init__(self, odd_s: float = 0.0) -> None:
        self.now = 0.0
        self.calls = 0
        self.used: set[int] = set()
        self._odd_s = odd_s

    def clock(self) -> float:
        return self.now

    def ffn(self, rows_RH: torch.Tensor, counts: Sequence[int], experts: Sequence[ExpertWeights]) -> torch.Tensor:
        self.calls += 1
        self.used.add(id(experts[0]))
        self.now += 2e-3 + 1e-4 * sum(counts) + (self._odd_s if self.calls % 4 == 0 else 0.0)
        return super().ffn(rows_RH, counts, experts)


@pytest.mark.parametrize("odd_s", [0.0, 0.5])
def test_finds_what_an_expert_and_a_row_cost(odd_s: float) -> None:
    arithmetic = TimedArithmetic(odd_s)
    cost = measure_cost(arithmetic, EXPERTS, arithmetic.clock)
    assert cost.per_expert_s == pytest.approx(2e-3)
    assert cost.per_row_s == pytest.approx(1e-4)
    assert len(arithmetic.used) == len(EXPERTS)


def test_a_clock_that_stands_still_gives_costs_above_zero() -> None:
    cost = measure_cost(PlainArithmetic(), EXPERTS, lambda: 0.0)
    assert cost.per_expert_s > 0
    assert cost.per_row_s > 0


def test_a_host_measures_once_it_holds_something_and_counts_none_of_it() -> None:
    host = ExpertHost("a", Experts())
    host.measure()
    assert host.cost is None
    host.load((0, 0))
    host.measure()
    assert host.cost is not None
    assert host.rows_total == 0


class BrokenArithmetic(PlainArithmetic):
    def ffn(self, rows_RH: torch.Tensor, counts: Sequence[int], experts: Sequence[ExpertWeights]) -> torch.Tensor:
        raise RuntimeError("no such kernel")


def test_a_host_that_cannot_measure_has_no_cost() -> None:
    host = ExpertHost("a", Experts(), BrokenArithmetic())
    host.load((0, 0))
    host.measure()
    assert host.cost is None
