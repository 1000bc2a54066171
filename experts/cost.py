"""Measures what an expert and a row cost on this machine, with the arithmetic and the weights that serve."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median

import torch

from experts.arithmetic import Arithmetic
from experts.ffn import ExpertWeights
from experts.placement import ComputeCost

MANY_ROWS = 128
ROUNDS = 9
MOST_EXPERTS = 16
"""So many different ones in turn, so that weights come from where they come from when they serve."""


def measure_cost(
    arithmetic: Arithmetic, experts: Sequence[ExpertWeights], clock: Callable[[], float] = time.perf_counter
) -> ComputeCost:
    """Time one row and `MANY_ROWS` rows of each of some `experts` of one shape. Two points make the line."""
    used = experts[:MOST_EXPERTS]
    one_s = _seconds(arithmetic, used, 1, clock)
    many_s = _seconds(arithmetic, used, MANY_ROWS, clock)
    # Noise must not make rows free, nor experts.
    per_row_s = max((many_s - one_s) / (MANY_ROWS - 1), 1e-9)
    return ComputeCost(per_expert_s=max(one_s - per_row_s, 1e-9), per_row_s=per_row_s)


def _seconds(
    arithmetic: Arithmetic, experts: Sequence[ExpertWeights], num_rows: int, clock: Callable[[], float]
) -> float:
    """Of one expert with `num_rows` rows: the median of some rounds, after one to warm up."""
    down_HF = experts[0].down_HF
    rows_TH = torch.ones(num_rows, down_HF.shape[0], dtype=down_HF.dtype, device=down_HF.device)
    times = []
    for number in range(-1, max(ROUNDS, len(experts))):
        weights = experts[number % len(experts)]
        began = clock()
        # What is copied back has been computed.
        arithmetic.ffn(rows_TH, [num_rows], [weights]).to("cpu")
        if number >= 0:
            times.append(clock() - began)
    return median(times)
